"""Where the picture of a reference comes from. Whoever asks for a job names it in one of four ways:

    an id          of an upload, a result in the workspace or an item of the library, and of the caller's own
    a path         `<bucket>/<user>/…` or `<user>/…`, as rows and answers have them, under the caller's own id
    a signed URL   of this installation: read as the path in it, whether it has expired or not
    another URL    fetched through the guard of `deployments.egress`

A path is taken as it stands: nothing in it is decoded, and what is no name of ours is refused, not cleaned.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from db.access import Principal
from db.blobs import BUCKETS, BlobNotFound, InvalidBlobName
from db.pictures import PICTURE_BUCKETS, Pictures
from models.origin.manifest import SOFTWARE
from serve_app.api.problems import Problem
from serve_app.edge import Edge

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_PATH = re.compile(rf"{_SEGMENT}(/{_SEGMENT})+")


@dataclass(frozen=True)
class Outside:
    """A URL of somebody else's."""

    url: str


@dataclass(frozen=True)
class Inside:
    """A file in our store that is the caller's. `manifest` is there where a row says that a model of ours made it."""

    bucket: str
    key: str
    manifest: Mapping[str, Any] | None = None

    @property
    def nsfw(self) -> bool:
        """Whether a model of ours made it in nsfw mode."""
        asked = (self.manifest or {}).get("parameters")
        return isinstance(asked, Mapping) and asked.get("content_mode") == "nsfw"

    @property
    def made_here(self) -> bool:
        """Whether its row says that it came from words alone, or from what did.

        A picture made from a reference may show what the reference shows. In nsfw mode references have passed this very
        test, so that what came from them has too.
        """
        if self.manifest is None or self.manifest.get("software") != SOFTWARE:
            return False
        asked = self.manifest.get("parameters")
        if not isinstance(asked, Mapping) or "content_mode" not in asked:
            return False
        return asked["content_mode"] == "nsfw" or not (asked.get("reference") or asked.get("references"))


Source = Outside | Inside


async def locate(edge: Edge, user: Principal, text: str, field: str) -> Source:
    """Where a picture is, with no byte of it read and nothing fetched. Raises `Problem`, `StorageUnavailable`.

    403 `CROSS_USER_REFERENCE` for a path under another user's id; 422 for one that is none, or where nothing is.
    """
    path = _path(edge, text)
    if path is not None:
        return await _file(edge, user, path, field)
    if not _UUID.fullmatch(text):
        return Outside(text)
    place = await Pictures(edge.pool).place(user.user_id, UUID(text))
    if place is None:
        raise _not_found(field)
    return await _found(edge, user, (place[0],), place[1], field)


def _path(edge: Edge, text: str) -> str | None:
    """The path that a text is, or that one of our signed URLs holds. None for any other text."""
    ours = f"{edge.settings.public_url.rstrip('/')}/v1/files/"
    if text[: len(ours)].casefold() == ours.casefold():
        return text[len(ours) :].partition("?")[0]
    first, slash, _ = text.partition("/")
    return text if slash and (first in BUCKETS or _UUID.fullmatch(first)) else None


async def _file(edge: Edge, user: Principal, path: str, field: str) -> Source:
    if not _PATH.fullmatch(path):
        raise Problem(422, "invalid_reference_path", "is no path of a file", field=field)
    first, _, rest = path.partition("/")
    buckets, key = ((first,), rest) if first in BUCKETS else (PICTURE_BUCKETS, path)
    if not set(buckets) <= set(PICTURE_BUCKETS):
        message = f"must lie in {', '.join(PICTURE_BUCKETS)}"
        raise Problem(422, "invalid_reference_path", message, field=field)
    if key.partition("/")[0] != str(user.user_id):
        raise Problem(403, "CROSS_USER_REFERENCE", "the reference belongs to somebody else", field=field)
    return await _found(edge, user, buckets, key, field)


async def _found(edge: Edge, user: Principal, buckets: tuple[str, ...], key: str, field: str) -> Inside:
    most = edge.settings.max_reference_bytes
    for bucket in buckets:
        with contextlib.suppress(BlobNotFound, InvalidBlobName):
            if (await edge.blobs.head(bucket, key)).size > most:
                raise Problem(422, "invalid_input", f"the reference is larger than {most} bytes", field=field)
            return Inside(bucket, key, await Pictures(edge.pool).origin(user.user_id, bucket, key))
    raise _not_found(field)


def _not_found(field: str) -> Problem:
    return Problem(422, "reference_not_found", "you have no such picture", field=field)
