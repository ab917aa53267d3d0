"""Erasing a user: everything that is theirs, and the profile.

First one transaction ends the access, stops the jobs and writes the audit row; with it the erasure is durable, and
nothing of the user moves any more. The rest goes in batches, as deleting a million rows at once would hold up
everybody. A process that dies in between leaves a row in `erasures`, and upkeep goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import asyncpg

from db.pool import queries

BATCH = 1000  # jobs in a transaction; each takes a dozen rows of other tables with it
TRIES = 5

AskedBy = Literal["user", "admin", "operator"]


@dataclass(frozen=True)
class Holdings:
    """How much there is of a user."""

    jobs: int
    open_jobs: int
    assets: int
    library: int
    endpoints: int
    keys: int


class Erasures:
    """`find`, `holdings` and `request` need the owner of the tables; the replicas' role is enough for the rest."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("erasure")

    async def find(self, user: UUID | str) -> UUID | None:
        """A user by id or name, also one whose erasure is under way."""
        given: Mapping[str, UUID | str | None] = (
            {"user_id": user, "username": None} if isinstance(user, UUID) else {"user_id": None, "username": user}
        )
        found: UUID | None = await self._sql.find_user(self._pool, **given)
        return found

    async def holdings(self, user_id: UUID) -> Holdings:
        """What would go."""
        return Holdings(**dict(await self._sql.holdings(self._pool, user_id=user_id)))

    async def request(self, user_id: UUID, asked_by: AskedBy, actor: UUID | None = None) -> list[UUID]:
        """Stop everything of a user, in one transaction with the audit row; returns the jobs that were open.

        On return no key of the user opens anything, no replica can end one of the jobs, nothing is sent to the user's
        receivers, and the erasure will be carried out whoever dies. Repeating it changes nothing.
        """
        for attempt in range(TRIES):
            try:
                return await self._request(user_id, asked_by, actor)
            except asyncpg.DeadlockDetectedError:
                # replicas lock the same rows in an order of their own
                if attempt == TRIES - 1:
                    raise
        raise AssertionError

    async def _request(self, user_id: UUID, asked_by: AskedBy, actor: UUID | None) -> list[UUID]:
        async with self._pool.acquire() as connection, connection.transaction():
            # the queue first: who ends a job locks its row there before it looks at the profile
            stopped = [row["job_id"] async for row in self._sql.stop_jobs(connection, user_id=user_id)]
            await self._sql.end_access(connection, user_id=user_id)
            await self._sql.forget_person(connection, user_id=user_id)
            await self._sql.request(connection, user_id=user_id, actor=actor, asked_by=asked_by, open_jobs=len(stopped))
        return stopped

    async def delete_some(self, user_id: UUID, batch: int = BATCH) -> bool:
        """Delete a batch of the rows of a user whose erasure was requested. False when none is left."""
        return bool(await self._sql.erase_some(self._pool, user_id=user_id, batch=batch))

    async def pending(self) -> list[UUID]:
        """The users of whom rows or files are left."""
        return [row["user_id"] async for row in self._sql.pending(self._pool)]

    async def complete(self, user_id: UUID) -> None:
        """Note that the files are gone too."""
        await self._sql.complete(self._pool, user_id=user_id)
