"""Uploads: the pictures that users send to be used as references. The same bytes are the same upload."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self
from uuid import UUID

import asyncpg

from db.limits import check_room
from db.pool import Connection, queries

UPLOAD_BUCKET = "reference_images"
MOST_UPLOADS = 500  # of a user; whoever needs more deletes some


@dataclass(frozen=True)
class Upload:
    """A picture that lies in the store under `key`. `sha256` is of what was sent, which is not what is stored."""

    id: UUID
    user_id: UUID
    key: str
    mime_type: str
    file_size_bytes: int
    width: int
    height: int
    sha256: bytes
    fault: str | None
    created_at: datetime

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The upload from a row of `reference_uploads`."""
        values = dict(row)
        return cls(key=values.pop("storage_path"), **values)


class TooManyUploads(Exception):
    """The user has as many uploads as one may have."""

    code = "too_many_uploads"


class Uploads:
    """Reading takes any connection; writing needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("uploads")

    async def find(self, user_id: UUID, sha256: bytes) -> Upload | None:
        """A user's upload of these bytes."""
        return _upload(await self._sql.find(self._pool, user_id=user_id, sha256=sha256))

    async def read(self, connection: Connection, upload_id: UUID) -> Upload | None:
        """One upload, as far as the connection may see it."""
        return _upload(await self._sql.read(connection, upload_id=upload_id))

    async def list(self, connection: Connection, user_id: UUID) -> list[Upload]:
        """All uploads of a user, newest first."""
        return [Upload.from_row(row) async for row in self._sql.list_all(connection, user_id=user_id)]

    async def add(
        self,
        upload_id: UUID,
        user_id: UUID,
        *,
        key: str,
        mime_type: str,
        file_size_bytes: int,
        size: tuple[int, int],
        sha256: bytes,
        most: int = MOST_UPLOADS,
    ) -> Upload | None:
        """Make the row of a stored file. None when the user has the same upload. Raises `TooManyUploads`,
        `LimitReached`."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self._sql.lock_owner(connection, user_id=user_id)
            await check_room(connection, user_id, file_size_bytes)
            row = await self._sql.add(
                connection,
                id=upload_id,
                user_id=user_id,
                storage_path=key,
                mime_type=mime_type,
                file_size_bytes=file_size_bytes,
                width=size[0],
                height=size[1],
                sha256=sha256,
                most=most,
            )
            if row is None and await self._sql.find(connection, user_id=user_id, sha256=sha256) is None:
                raise TooManyUploads(f"a user may have {most} uploads")
        return _upload(row)

    async def remove(self, upload_id: UUID, user_id: UUID) -> Upload | None:
        """Delete a row; the file is the caller's to delete. None when it is not that user's."""
        return _upload(await self._sql.remove(self._pool, upload_id=upload_id, user_id=user_id))


def _upload(row: asyncpg.Record | None) -> Upload | None:
    return None if row is None else Upload.from_row(row)
