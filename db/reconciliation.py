"""What the rows say of files, for whoever compares them with the store."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import asyncpg

from db.pool import queries

Table = Literal["workspace_assets", "user_library", "reference_uploads"]
Fault = Literal["missing", "size"]


@dataclass(frozen=True)
class SpokenOf:
    """A file that a row speaks of. `size` is None for thumbnails, which are `extra`: the row is whole without one."""

    table: Table
    id: UUID
    bucket: str
    key: str
    size: int | None
    fault: str | None
    extra: bool


class Reconciliation:
    """Needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("reconciliation")

    async def users(self) -> AsyncIterator[UUID]:
        """All users."""
        async for row in self._sql.users(self._pool):
            yield row["id"]

    async def files_of(self, user_id: UUID) -> list[SpokenOf]:
        """Every file of the workspace, of the library and of the uploads that a row of a user speaks of."""
        return [SpokenOf(**dict(row)) async for row in self._sql.files_of(self._pool, user_id=user_id)]

    async def results_kept(self, files: Mapping[str, UUID]) -> set[str]:
        """Of these files of the workspace, each with its job, those that a row speaks of now."""
        rows = self._sql.results_kept(self._pool, keys=list(files), job_ids=list(files.values()))
        return {row["key"] async for row in rows}

    async def mark(self, table: Table, ids: Sequence[UUID], fault: Fault | None) -> None:
        """Write down what is wrong with the files of these rows; None: nothing is."""
        match table:
            case "workspace_assets":
                await self._sql.mark_assets(self._pool, ids=list(ids), fault=fault)
            case "user_library":
                await self._sql.mark_items(self._pool, ids=list(ids), fault=fault)
            case "reference_uploads":
                await self._sql.mark_uploads(self._pool, ids=list(ids), fault=fault)
