"""A user's pictures, wherever their rows are: uploads, results in the workspace, and items of the library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.pool import queries
from db.uploads import UPLOAD_BUCKET

PICTURE_BUCKETS = (WORKSPACE_BUCKET, LIBRARY_BUCKET, UPLOAD_BUCKET)


@dataclass(frozen=True)
class Origin:
    """What the rows say of a file. `manifest` is there where a model of this system made it.

    `nsfw` says whether the job that made it, wherever that was, or its item of the library is nsfw.
    """

    manifest: Mapping[str, Any] | None
    nsfw: bool

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The origin from a row of the query of this name."""
        manifest = row["manifest"]
        return cls(manifest if isinstance(manifest, Mapping) else None, row["nsfw"])


@dataclass(frozen=True)
class Account:
    """What one row says of what a file was made from: words, and the parameters and signs that stand beside them."""

    prompts: tuple[str, ...] = field(repr=False)
    params: Mapping[str, Any] = field(repr=False)  # of the job; empty where it is gone
    signs: Any  # as `models.prompting.signs` reads them
    moderation_status: str

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """One account from a row of the query."""
        prompts = tuple(filter(None, (row["original_prompt"], row["enhanced_prompt"])))
        return cls(prompts, row["params"] or {}, row["signs"], row["moderation_status"])


class Pictures:
    """Reads only. The pool acts as the owner of the tables, so every call names the user."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("pictures")

    async def place(self, user_id: UUID, picture_id: UUID) -> tuple[str, str] | None:
        """The bucket and key of a picture of that user's, by the id of its row. None for anybody else's."""
        row = await self._sql.place(self._pool, picture_id=picture_id, user_id=user_id)
        return None if row is None else (row["bucket"], row["key"])

    async def origin(self, user_id: UUID, bucket: str, key: str) -> Origin:
        """Where a file of that user's comes from."""
        return Origin.from_row(await self._sql.origin(self._pool, user_id=user_id, bucket=bucket, key=key))

    async def accounts(self, user_id: UUID, bucket: str, key: str) -> list[Account]:
        """What all rows that speak of a file of that user's say of what it was made from."""
        rows = self._sql.accounts(self._pool, user_id=user_id, bucket=bucket, key=key)
        return [Account.from_row(row) async for row in rows]
