"""Placing results: the picture of a completed job copied to where its metadata wants it, and its row told.

The workspace's files go after their time; so what a scene or a character speaks of is a copy of its own: an item of the
user's library, or an avatar of the installation. The copy comes before the row, and both steps may be repeated.
"""

import asyncio
import contextlib
import re

import structlog

from db.blobs import BlobNotFound, BlobStore, StorageUnavailable
from db.destinations import Destinations, Due
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.pool import DATABASE_FAULTS

log = structlog.get_logger()

AVATAR_BUCKET = "avatars"
AVATAR_KEY = re.compile(r"characters/[a-z0-9][a-z0-9-]{0,100}\.png")


class Placing:
    """A duty of upkeep. Any number may run: the row is locked while it changes, and copies have the same name."""

    def __init__(self, rows: Destinations, blobs: BlobStore) -> None:
        self._rows, self._blobs = rows, blobs

    async def run(self, every_seconds: float, stop: asyncio.Event) -> None:
        """Place what is due, over and over, until `stop`."""
        while not stop.is_set():
            try:
                await self.once()
            except (*DATABASE_FAULTS, StorageUnavailable) as error:
                log.warning("placing_failed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_seconds):
                    await stop.wait()

    async def once(self) -> int:
        """Place everything that is due; returns how many pictures. Raises `StorageUnavailable`."""
        placed = 0
        for due in await self._rows.due():
            refused = _fault(due)
            if refused is None:
                refused = await self._place(due)
            if refused is None:
                placed += 1
                log.info("result_placed", job_id=str(due.job_id), destination=due.kind)
            else:
                await self._rows.refuse(due.job_id, refused)
                log.warning("result_not_placed", job_id=str(due.job_id), destination=due.kind, error=refused)
        return placed

    async def _place(self, due: Due) -> str | None:
        """None when it is done; else why it can't be."""
        assert due.key is not None
        bucket, key, thumbnail = _names(due)
        try:
            copied = await self._blobs.copy(WORKSPACE_BUCKET, due.key, bucket, key)
            if thumbnail is not None and due.thumbnail_key is not None:
                await self._blobs.copy(WORKSPACE_BUCKET, due.thumbnail_key, bucket, thumbnail)
        except BlobNotFound:
            return "asset_file_missing"
        if copied.size != due.file_size_bytes:
            return "asset_file_missing"
        path = await self._rows.place(due.job_id, key, thumbnail)
        if path != f"{bucket}/{key}" and bucket == LIBRARY_BUCKET:
            # it was saved before, or what it was for is gone: nothing speaks of this copy
            await self._blobs.delete(bucket, [name for name in (key, thumbnail) if name is not None])
        return "destination_not_found" if path is None else None


def _fault(due: Due) -> str | None:
    if due.target is None:
        return "destination_not_found"
    if due.key is None:
        return "asset_not_found"
    if due.asset_type != "image":
        return "not_an_image"
    if due.kind == "character_avatar" and not AVATAR_KEY.fullmatch(due.avatar or ""):
        return "avatar_name"
    return None


def _names(due: Due) -> tuple[str, str, str | None]:
    """Bucket, key and the thumbnail's key of the copy."""
    assert due.key is not None
    if due.kind == "character_avatar":
        assert due.avatar is not None
        return AVATAR_BUCKET, due.avatar, None
    stem = f"{due.user_id}/{due.job_id}_{due.target}"
    thumbnail = f"{stem}.thumb.{due.thumbnail_key.rpartition('.')[2]}" if due.thumbnail_key else None
    return LIBRARY_BUCKET, f"{stem}.{due.key.rpartition('.')[2]}", thumbnail
