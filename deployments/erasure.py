"""Carrying an erasure out: the rows in batches, then every file below the user's folders."""

import time
from uuid import UUID

import asyncpg
import structlog

from db.blobs import BlobNotFound, BlobStore, StorageUnavailable
from db.erasures import Erasures
from deployments.storing import BUCKET, REFERENCE_BUCKET

log = structlog.get_logger()

USER_BUCKETS = (BUCKET, REFERENCE_BUCKET, "user-library", "avatars")  # keys begin with the user's id


class Erasure:
    """Deletes what is left of users whose erasure was requested."""

    def __init__(self, erasures: Erasures, blobs: BlobStore) -> None:
        self._erasures, self._blobs = erasures, blobs

    async def carry_out(self, user_id: UUID, within_seconds: float | None = None) -> bool:
        """Delete all rows and files of a user. False when the time ran out first; upkeep does the rest.

        Raises `StorageUnavailable`, and what a lost database raises; nothing is forgotten then.
        """
        until = None if within_seconds is None else time.monotonic() + within_seconds
        while await self._delete_some(user_id):
            if until is not None and time.monotonic() > until:
                return False
        files = 0
        for bucket in USER_BUCKETS:
            files += await self._delete_files(bucket, user_id)
        await self._erasures.complete(user_id)
        log.info("user_erased", files=files)
        return True

    async def _delete_some(self, user_id: UUID) -> bool:
        try:
            return await self._erasures.delete_some(user_id)
        except asyncpg.DeadlockDetectedError:
            return True  # nothing was deleted; once more

    async def _delete_files(self, bucket: str, user_id: UUID) -> int:
        try:
            return await self._blobs.delete_below(bucket, str(user_id))
        except BlobNotFound:
            return 0  # a bucket that nobody has written to yet

    async def resume(self) -> int:
        """Go on with what others left behind; returns how many users are gone now. One that fails delays no other."""
        done = 0
        for user_id in await self._erasures.pending():
            try:
                done += await self.carry_out(user_id)
            except StorageUnavailable as error:
                log.warning("erasure_waits", error=str(error))
        return done
