"""Where the picture of a reference comes from. Whoever asks for a job names it in one of four ways:

    an id          of an upload, a result in the workspace or an item of the library, and of the caller's own
    a path         `<bucket>/<user>/…` or `<user>/…`, as rows and answers have them, under the caller's own id
    a signed URL   of this installation: read as the path in it, whether it has expired or not
    another URL    fetched through the guard of `deployments.egress`

A path is taken as it stands: nothing in it is decoded, and what is no name of ours is refused, not cleaned.
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from db.access import Principal
from db.blobs import BUCKETS, BlobNotFound, InvalidBlobName
from db.pictures import PICTURE_BUCKETS, Account, Origin, Pictures
from models.origin.manifest import SOFTWARE
from models.policy import NO_SIGNS, signs_kept
from models.prompting.signs import Signs
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
    """A file in our store that is the caller's. `origin` is what the rows say of it, and `signs` are those of all that
    it was made from: none of a picture that a user brought."""

    bucket: str
    key: str
    origin: Origin
    signs: Signs = NO_SIGNS

    @property
    def manifest(self) -> Mapping[str, Any] | None:
        """There where a row says that a model of ours made it."""
        return self.origin.manifest

    @property
    def nsfw(self) -> bool:
        """Whether its manifest, its job or its item of the library says so. A provider's results have no manifest."""
        asked = (self.manifest or {}).get("parameters")
        return self.origin.nsfw or (isinstance(asked, Mapping) and asked.get("content_mode") == "nsfw")

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
            pictures = Pictures(edge.pool)
            accounts = await pictures.accounts(user.user_id, bucket, key)
            if any(account.moderation_status == "rejected" for account in accounts):
                raise Problem(403, "reference_not_allowed", "moderation has rejected the picture", field=field)
            signs = await asyncio.to_thread(_signs, accounts)
            return Inside(bucket, key, await pictures.origin(user.user_id, bucket, key), signs)
    raise _not_found(field)


def _signs(accounts: Sequence[Account]) -> Signs:
    """Judged anew, since words that were kept may say more to today's policy than to that of their day."""
    signs = NO_SIGNS
    for account in accounts:  # the job may be gone, or have run in no model, as that of a copy
        signs |= Signs.told(account.signs) | signs_kept(account.params, *account.prompts)
    return signs


def _not_found(field: str) -> Problem:
    return Problem(422, "reference_not_found", "you have no such picture", field=field)
