"""Whether a job that was made again came out the same: the pixels of its files, and where their manifests disagree."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.media import UnreadableMedia
from models.origin.manifest import Difference, Manifest, differences
from models.origin.pixels import decode, pixel_difference, pixel_hash
from serve_app.api.wire import Asset, Job
from serve_app.client import ApiError, Client, DownloadFailed

Basis = Literal["files", "hashes", "nothing"]


@dataclass(frozen=True)
class Comparison:
    """One file and its second making. `identical` is None where nothing could be compared.

    `basis` says what was compared: the decoded files; or the hashes of their pixels, where a file is gone. `pixels`
    says how far they are apart, `differences` what the manifests disagree on, `notes` what kept from comparing more.
    """

    index: int
    identical: bool | None
    basis: Basis
    pixels: str | None
    differences: Sequence[Difference]
    notes: Sequence[str]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"differences": [vars(found) for found in self.differences], "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """As a person reads it: what the manifests disagree on only where that made a difference."""
        if self.identical is None:
            verdict = "nothing to compare"
        elif self.identical:
            verdict = "identical pixels" + ("" if self.basis == "files" else " (by their hash)")
        else:
            verdict = "different pixels" + (f": {self.pixels}" if self.pixels else " (by their hash)")
        found = []
        if not self.identical:
            found = [f"  {one.field}: {_shown(one.before)} -> {_shown(one.after)}" for one in self.differences]
        if not found and self.identical is False:
            found = ["  nothing that is recorded differs"]
        return [f"file {self.index}: {verdict}", *found, *(f"  note: {note}" for note in self.notes)]


async def compare(client: Client, before: Job, after: Job, index: int) -> Comparison:
    """Compare file `index` of two jobs. Raises `CannotConnect` and `ApiError`."""
    notes: list[str] = []
    old, new = await _file(client, before, index, notes), await _file(client, after, index, notes)
    manifests = [await _manifest(client, job, index, notes) for job in (before, after)]
    return await asyncio.to_thread(_compared, index, (old, new), manifests, notes)


def _compared(
    index: int, files: tuple[bytes | None, bytes | None], manifests: list[Manifest | None], notes: list[str]
) -> Comparison:
    old, new = files
    first, second = manifests
    found = differences(first, second) if first is not None and second is not None else []
    samples = [None if data is None else decode(data) for data in (old, new)]
    hashes = [
        pixel_hash(pixels) if pixels is not None else manifest and manifest.pixels.sha256
        for pixels, manifest in zip(samples, manifests, strict=True)
    ]
    for which, digest, manifest in zip(("first", "second"), hashes, manifests, strict=True):
        if manifest is not None and digest != manifest.pixels.sha256:
            notes.append(f"the {which} file is not the one that its manifest speaks of")
    if None in hashes:
        return Comparison(index, None, "nothing", None, found, notes)
    if samples[0] is None or samples[1] is None:
        return Comparison(index, hashes[0] == hashes[1], "hashes", None, found, notes)
    apart = pixel_difference(samples[0], samples[1])
    return Comparison(index, apart is None, "files", None if apart is None else str(apart), found, notes)


async def _file(client: Client, job: Job, index: int, notes: list[str]) -> bytes | None:
    asset = next((asset for asset in job.assets if asset.index == index), None)
    if asset is None:
        notes.append(f"job {job.id} has no file {index}")
        return None
    try:
        return await _fetched(client, job, asset)
    except DownloadFailed as error:
        notes.append(f"of job {job.id}: {error}")
    except UnreadableMedia:
        notes.append(f"file {index} of job {job.id} can't be decoded")
    return None


async def _fetched(client: Client, job: Job, asset: Asset) -> bytes:
    with tempfile.TemporaryDirectory(prefix="ourvidz-") as folder:
        (path,) = await client.download(job.model_copy(update={"assets": [asset]}), Path(folder))
        data = await asyncio.to_thread(path.read_bytes)
    await asyncio.to_thread(decode, data)  # a file that can't be decoded is as good as gone
    return data


async def _manifest(client: Client, job: Job, index: int, notes: list[str]) -> Manifest | None:
    try:
        return Manifest.model_validate(await client.call("GET", f"/v1/jobs/{job.id}/assets/{index}/manifest"))
    except ApiError as error:
        if error.code != "no_manifest":
            raise
        notes.append(f"file {index} of job {job.id} has no manifest")
        return None


def _shown(value: Any) -> str:
    """A value in a line: hashes by their beginning."""
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
