"""Expiry: assets of the workspace whose time is over, rows and files together; and what saving left behind.

The row goes first. Whoever dies before the file does leaves a file of an attempt that no row speaks of, which the sweep
deletes; the other order would show assets that can't be read.
"""

from uuid import UUID

import structlog

from db.blobs import BlobStore, InvalidBlobName
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, LibraryRows
from db.uploads import UPLOAD_BUCKET
from deployments.library import SAVED
from deployments.sweep import delete_orphans, old_files

log = structlog.get_logger()

UPLOADED = "uploads"  # the folder of a user's in the references' bucket: jobs keep theirs beside it


class Expiry:
    """Two duties that may be done at any time, by any number. The replicas' role is enough."""

    def __init__(self, rows: LibraryRows, blobs: BlobStore, grace_seconds: float) -> None:
        self._rows, self._blobs, self._grace = rows, blobs, grace_seconds

    async def expire(self) -> int:
        """Delete everything whose time is over; returns how many assets. Raises `StorageUnavailable`: what is left of
        that batch is the sweep's."""
        expired = 0
        while batch := await self._rows.expire():
            expired += len(batch)
            log.info("assets_expired", assets=len(batch))
            await self._delete([key for files in batch for key in files.keys])
        return expired

    async def _delete(self, keys: list[str]) -> None:
        try:
            await self._blobs.delete(WORKSPACE_BUCKET, keys)
        except InvalidBlobName:  # a row of another system's may name a file as none of ours is named
            for key in keys:
                try:
                    await self._blobs.delete(WORKSPACE_BUCKET, [key])
                except InvalidBlobName:
                    log.warning("expired_file_left", bucket=WORKSPACE_BUCKET)

    async def sweep(self) -> int:
        """Delete copies and uploads that never came to a row, or have lost it; returns how many."""
        deleted = 0
        for bucket, folder in ((LIBRARY_BUCKET, SAVED), (UPLOAD_BUCKET, UPLOADED)):
            async for page in old_files(self._blobs, bucket, self._grace):
                ours = [info.key for info in page if is_ours(info.key, folder)]
                kept = await self._rows.kept_files(bucket, ours)
                deleted += await delete_orphans(self._blobs, bucket, [key for key in ours if key not in kept])
        return deleted


def is_ours(key: str, folder: str) -> bool:
    """Whether a key has the form `<user>/<folder>/<id>.<ending>`."""
    parts = key.split("/")
    try:
        return len(parts) == 3 and parts[1] == folder and bool(UUID(parts[0]) and UUID(parts[2].partition(".")[0]))
    except ValueError:
        return False
