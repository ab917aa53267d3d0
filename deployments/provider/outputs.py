"""What a provider made: fetched from where the operator allows it, decoded, and made ready to be stored.

Pictures are written anew as PNG, so that nothing of the file itself but its pixels gets through; videos keep their
pictures, in a container of our own. Both say that a model made them, as all our files do.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from db.providers import ApiProvider
from deployments.egress import Egress, EgressError, EgressFailed
from deployments.provider.api import OutputGone, OutputRefused, OutputUnreadable, ProviderUnavailable
from deployments.storing import EncodedFile, Finishing
from models.engine import Generation, InvalidInput
from models.media import UnreadableMedia, describe_mp4, encode_png, open_reference, probe, thumbnail
from models.moderation import ContentRefused, Decision, Judge
from models.origin.manifest import SOFTWARE

if TYPE_CHECKING:
    from PIL.Image import Image

FETCH_SECONDS = 120.0
MAX_OUTPUTS = 16
MAX_FRAMES = 3600
MAX_PICTURES = 8  # of a video, for its thumbnail and its judge
TYPES = {
    "image": ("image/png", "image/jpeg", "image/webp", "application/octet-stream"),
    "video": ("video/mp4", "application/octet-stream", "binary/octet-stream"),
}
GONE = (401, 403, 404, 410)  # how object stores answer for what is no longer, or for a URL that has run out


def host_allowed(url: str, hosts: Sequence[str]) -> bool:
    """Whether a URL's host is one of these, or below one that begins with `*.`."""
    try:
        host = (urlsplit(url).hostname or "").lower()
    except ValueError:
        return False
    return any(
        host == allowed.lower() or (allowed.startswith("*.") and host.endswith(allowed[1:].lower()))
        for allowed in hosts
        if allowed not in ("", "*.")
    )


async def fetch(egress: Egress, provider: ApiProvider, url: str, output: str, max_bytes: int) -> bytes:
    """One output (`image` or `video`). The provider's secret is not sent along. Raises `OutputRefused`, `OutputGone`,
    `ProviderUnavailable`."""
    if not host_allowed(url, provider.output_hosts):
        raise OutputRefused("an output lies at a host that is not among the provider's output_hosts")
    try:
        return (await egress.fetch(url, max_bytes, FETCH_SECONDS, TYPES[output])).data
    except EgressFailed as error:
        if error.reason == "too_large":
            raise OutputRefused(f"an output is larger than {max_bytes} bytes") from error
        if error.status in GONE:
            raise OutputGone("an output is no longer kept by the provider", error.status) from error
        raise ProviderUnavailable(f"an output could not be fetched ({error.reason})", error.status) from error
    except EgressError as error:
        raise OutputRefused(f"an output may not be fetched ({error.reason})") from error


def encode(
    data: bytes, output: str, seed: int | None, model_name: str, finishing: Finishing, max_pixels: int
) -> EncodedFile:
    """A fetched output as a file of ours, judged as our own are. Blocking; run it off the event loop. Raises
    `OutputUnreadable`, `ContentRefused`."""
    texts, marking = {"Software": SOFTWARE, "Model": model_name}, finishing.marking
    try:
        if output == "video":
            pictures = _pictures(data, max_pixels)
            made = marking.signed(describe_mp4(data, texts, marking.xmp), "video/mp4", model_name)
            shown = pictures[len(pictures) // 2]
            file = EncodedFile("video", "mp4", made, thumbnail(shown), probe(made), seed, None)
        else:
            pictures = [open_reference(data, max_pixels, len(data), name="output")]
            made = marking.signed(encode_png(pictures[0], texts, marking.xmp), "image/png", model_name)
            file = EncodedFile("image", "png", made, thumbnail(pictures[0]), probe(made), seed, None)
    except InvalidInput as error:
        raise OutputUnreadable(error.message) from error
    except (UnreadableMedia, ValueError) as error:
        raise OutputUnreadable("an output is no readable video") from error
    return file if finishing.judge is None else _judged(file, pictures, finishing.judge, finishing.keep_rejected)


def _judged(file: EncodedFile, pictures: list[Image], judge: Judge, keep_rejected: bool) -> EncodedFile:
    """The file with the gravest judgement of its pictures."""
    judgements = judge.judge(Generation(pictures, None, None, [], {}, {}))
    gravest = max(judgements, key=lambda judgement: judgement.decision)
    if gravest.decision is Decision.REJECT and not keep_rejected:
        raise ContentRefused("the installation's classifier rejects what was made")
    return replace(file, judgement=gravest)


def _pictures(data: bytes, max_pixels: int) -> list[Image]:
    """Pictures of a video, evenly spread. All of it is decoded. Raises `OutputUnreadable`."""
    import av

    if data[4:8] != b"ftyp":
        raise OutputUnreadable("an output is no MP4")
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > max_pixels or stream.frames > MAX_FRAMES:
                raise OutputUnreadable("an output is larger, or longer, than what is decoded here")
            every = 1
            pictures: list[Image] = []
            for number, frame in enumerate(container.decode(stream)):
                if number >= MAX_FRAMES:
                    raise OutputUnreadable("an output is longer than what is decoded here")
                if number % every == 0:
                    pictures.append(frame.to_image())
                if len(pictures) == 2 * MAX_PICTURES:  # how many will come need not be said, or true
                    pictures, every = pictures[::2], 2 * every
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise OutputUnreadable("an output is no readable video") from error
    if not pictures:
        raise OutputUnreadable("an output has no frames")
    return pictures
