"""Archives, as far as the database goes: which jobs, their rows as CSV, and deleting what is safely written.

An archive is one batch of ended jobs. Its row in `archives` says how far it has come: planned (nothing is deleted, its
files may be half there), verified (every file was read back; deleting may have begun), finished.
"""

import gzip
import hashlib
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import CONNECTION_FAULTS, Connection, queries


@dataclass(frozen=True)
class Survey:
    """What there is to archive. `asset_bytes` is the size of the files of its jobs, thumbnails not counted."""

    jobs: int
    first_created_at: datetime | None
    last_created_at: datetime | None
    assets: int
    asset_bytes: int


@dataclass(frozen=True)
class Plan:
    """An archive that was begun. Once it is `verified` its files are not written again."""

    name: str
    cutoff: datetime
    keeps_files: bool
    job_ids: Sequence[UUID]
    verified: bool = False

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The plan from a row of `unfinished`."""
        return cls(**dict(row))


@dataclass(frozen=True)
class Copied:
    """The rows of one table: CSV with a header, compressed. `data` depends on the rows only."""

    table: str
    rows: int
    data: bytes


@dataclass(frozen=True)
class Snapshot:
    """All tables as they were at one moment."""

    taken_at: datetime
    schema_version: int
    tables: Sequence[Copied]


@dataclass(frozen=True)
class ArchivedJob:
    """A job as it was written: `updated_at` tells whether it has changed since."""

    id: UUID
    updated_at: datetime


class Archives:
    """The statements behind an archive, over one connection of the owner, which holds the lock."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sql = queries("archives")

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[bool]:
        """Keep every other archive command out meanwhile. False: one is at work."""
        try:
            yield bool(await self._sql.lock(self._connection))
        finally:  # also when it is not known whether it was taken; giving back what one has not is no error
            with suppress(*CONNECTION_FAULTS):  # the lock has gone with the connection
                await self._sql.unlock(self._connection)

    async def cutoff(self, older_than: timedelta) -> datetime:
        """The moment that long ago, by the database's clock."""
        moment: datetime = await self._sql.cutoff(self._connection, seconds=older_than.total_seconds())
        return moment

    async def survey(self, cutoff: datetime) -> Survey:
        """What an archive of the jobs that ended before `cutoff` would hold."""
        return Survey(**dict(await self._sql.survey(self._connection, cutoff=cutoff)))

    async def unfinished(self) -> Plan | None:
        """What a command before this one left behind."""
        row = await self._sql.unfinished(self._connection)
        return None if row is None else Plan.from_row(row)

    async def plan(self, cutoff: datetime, batch: int, keeps_files: bool) -> Plan | None:
        """Begin an archive of the `batch` oldest jobs that may go; None when there is none. Durable on return."""
        rows = [row async for row in self._sql.archivable(self._connection, cutoff=cutoff, batch=batch)]
        if not rows:
            return None
        ids = sorted(row["id"] for row in rows)
        digest = hashlib.sha256(b"".join(job_id.bytes for job_id in ids)).hexdigest()
        name = f"{rows[0]['created_at']:%Y%m%d}-{rows[-1]['created_at']:%Y%m%d}-{digest[:16]}"
        await self._sql.plan(self._connection, name=name, cutoff=cutoff, keeps_files=keeps_files, job_ids=ids)
        return Plan(name, cutoff, keeps_files, ids)

    async def abandon(self, plan: Plan) -> None:
        """Give up a plan of which nothing was deleted."""
        await self._sql.abandon(self._connection, name=plan.name)

    async def snapshot(self, plan: Plan) -> Snapshot | None:
        """The rows of those jobs of a plan that may still go, all as of one moment; None when none may."""
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            begun = await self._sql.begin_snapshot(self._connection)
            rows = self._sql.still_archivable(self._connection, job_ids=plan.job_ids, cutoff=plan.cutoff)
            ids = [row["id"] async for row in rows]
            if not ids:
                return None
            tables = [await self._copy(table, sql, ids) for table, sql in self._copies().items()]
        return Snapshot(begun["taken_at"], begun["schema_version"], tables)

    def _copies(self) -> Mapping[str, str]:
        sql = self._sql
        return {
            "jobs": sql.copy_jobs.sql,
            "events": sql.copy_events.sql,
            "assets": sql.copy_assets.sql,
            "callbacks": sql.copy_callbacks.sql,
            "deliveries": sql.copy_deliveries.sql,
            "usage": sql.copy_usage.sql,
        }

    async def _copy(self, table: str, sql: str, ids: Sequence[UUID]) -> Copied:
        into = io.BytesIO()
        # no time and no name in the header: equal rows give equal bytes
        with gzip.GzipFile(filename="", mode="wb", fileobj=into, mtime=0) as packed:

            async def take(chunk: bytes) -> None:
                packed.write(chunk)

            query: Any = self._connection.copy_from_query
            done: str = await query(sql.rstrip().rstrip(";"), ids, output=take, format="csv", header=True)
        return Copied(table, int(done.rpartition(" ")[2]), into.getvalue())

    async def verified(self, plan: Plan, jobs: int) -> None:
        """Note that all files of an archive were read back: from now on its jobs may be deleted."""
        await self._sql.verified(self._connection, name=plan.name, jobs=jobs)

    async def delete(self, jobs: Sequence[ArchivedJob], taken_at: datetime) -> int:
        """Delete archived jobs with all that hangs on them, in one transaction; returns how many.

        A job that is not as it was at `taken_at` stays: it was retried, rated, or one of its callbacks was replayed.
        """
        ids = [job.id for job in jobs]
        async with self._connection.transaction():
            async for _ in self._sql.lock_callbacks(self._connection, job_ids=ids):
                pass
            gone = self._sql.delete_archived(
                self._connection, job_ids=ids, stamps=[job.updated_at for job in jobs], taken_at=taken_at
            )
            return len([row async for row in gone])

    async def existing(self, jobs: Sequence[ArchivedJob]) -> set[UUID]:
        """Of these jobs, those that are still in the database."""
        rows = self._sql.existing(self._connection, job_ids=[job.id for job in jobs])
        return {row["id"] async for row in rows}

    async def finish(self, plan: Plan) -> None:
        """Note that nothing is left to do."""
        await self._sql.finish(self._connection, name=plan.name)
