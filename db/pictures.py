"""A user's pictures, wherever their rows are: uploads, results in the workspace, and items of the library."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import asyncpg

from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.pool import queries
from db.uploads import UPLOAD_BUCKET

PICTURE_BUCKETS = (WORKSPACE_BUCKET, LIBRARY_BUCKET, UPLOAD_BUCKET)


class Pictures:
    """Reads only. The pool acts as the owner of the tables, so every call names the user."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("pictures")

    async def place(self, user_id: UUID, picture_id: UUID) -> tuple[str, str] | None:
        """The bucket and key of a picture of that user's, by the id of its row. None for anybody else's."""
        row = await self._sql.place(self._pool, picture_id=picture_id, user_id=user_id)
        return None if row is None else (row["bucket"], row["key"])

    async def origin(self, user_id: UUID, bucket: str, key: str) -> Mapping[str, Any] | None:
        """The manifest of a file, where a row says that a model of this system made it."""
        manifest = await self._sql.origin(self._pool, user_id=user_id, bucket=bucket, key=key)
        return manifest if isinstance(manifest, Mapping) else None
