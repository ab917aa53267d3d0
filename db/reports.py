"""What outside providers report about jobs that they run: found, held and ended here.

A report has no fence, so it may end only a job that none of our replicas holds; whoever asks this module has looked at
the job's provider. The queue's row is locked while a report ends its job, so of two reports one finds nothing to end.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import Connection, queries


@dataclass(frozen=True)
class Reported:
    """A job, and the provider that runs it. `provider_id` is None where no provider of that name is registered."""

    user_id: UUID
    provider: str
    format: str
    model_type: str
    original_prompt: str = field(repr=False)
    enhanced_prompt: str | None = field(repr=False)
    params: Mapping[str, Any] = field(repr=False)
    ended: bool
    provider_id: UUID | None
    output_hosts: Sequence[str]

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """From a row of `reported`."""
        return cls(**dict(row))


@dataclass(frozen=True)
class Open:
    """The queue row of an open job. `fence` is what its end has to name: None while nothing has claimed it."""

    state: str
    attempt: int

    @property
    def fence(self) -> int | None:
        """For `Settlement.attempt`."""
        return self.attempt if self.state == "running" else None


class Reports:
    """Over a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("reports")

    async def find(self, job_id: UUID) -> Reported | None:
        """The job of a report; None when there is none."""
        row = await self._sql.reported(self._pool, job_id=job_id)
        return None if row is None else Reported.from_row(row)

    async def begin(self, job_id: UUID) -> None:
        """Note that the provider has begun. Repeating it changes nothing."""
        await self._sql.begin(self._pool, job_id=job_id)

    @asynccontextmanager
    async def held(self, job_id: UUID) -> AsyncIterator[tuple[Connection, Open | None]]:
        """A transaction that holds an open job's queue row, and that row; None where the job has ended."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await self._sql.hold(connection, job_id=job_id)
            yield connection, None if row is None else Open(row["state"], row["attempt"])
