"""Endpoints that users register to hear of all their jobs, beside the URL that a single job may have.

    enabled ── 410, or nothing but failures for five days, or somebody's wish ──> disabled ── enable ──> enabled

Only what happens while an endpoint is enabled is sent to it. Disabling makes what waits for it dead, with an audit row;
`replay_range` of the outbox brings that back once the endpoint is enabled again. Their secrets are derived from the
operator's one, so no column holds any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.callbacks import SigningKey
from db.pool import as_user, queries

MOST_OF_USER = 20


@dataclass(frozen=True)
class Endpoint:
    """A registered endpoint. `failures` counts the tries that failed since the last one that did not."""

    id: UUID
    user_id: UUID
    url: str = field(repr=False)
    description: str = field(repr=False)
    events: Sequence[str]
    signature: str
    secret_version: int
    secret_rotated_at: datetime | None
    secret_age_seconds: float | None
    failures: int
    failing_since: datetime | None
    tested_at: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None
    created_at: datetime

    @property
    def key(self) -> SigningKey:
        """What is sent to it is signed with this."""
        return SigningKey(self.id, self.signature, self.secret_version, self.secret_age_seconds)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """An endpoint from a row of `callback_endpoints` with the age of its secret."""
        return cls(**row)


class Endpoints:
    """Endpoints in Postgres. Needs a pool that acts as the owner of the tables.

    Whose endpoint it is, is the caller's to check before a change: `read` shows only what the user may see.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("endpoints")

    async def create(
        self, user_id: UUID, url: str, description: str, events: Sequence[str], signature: str
    ) -> Endpoint | None:
        """Register an endpoint. None when the user has `MOST_OF_USER` of them."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self._sql.lock_owner(connection, user_id=user_id)
            row = await self._sql.create(
                connection,
                user_id=user_id,
                url=url,
                description=description,
                events=list(events),
                signature=signature,
                most=MOST_OF_USER,
            )
        return None if row is None else Endpoint.from_row(row)

    async def of_user(self, user_id: UUID) -> list[Endpoint]:
        """The endpoints of a user, oldest first."""
        async with as_user(self._pool, user_id) as connection:
            return [Endpoint.from_row(row) async for row in self._sql.of_user(connection, user_id=user_id)]

    async def read(self, user_id: UUID, endpoint_id: UUID) -> Endpoint | None:
        """An endpoint, if that user may see it."""
        async with as_user(self._pool, user_id) as connection:
            row = await self._sql.read(connection, endpoint_id=endpoint_id)
        return None if row is None else Endpoint.from_row(row)

    async def change(
        self,
        endpoint_id: UUID,
        actor: UUID,
        *,
        url: str | None = None,
        description: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Change what is given, all of it or nothing. A new URL begins without the old one's failures."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self._sql.change(
                connection,
                endpoint_id=endpoint_id,
                url=url,
                description=description,
                events=None if events is None else list(events),
            )
            if enabled is True:
                await self._sql.enable(connection, endpoint_id=endpoint_id)
            elif enabled is False:
                await self._sql.disable(connection, endpoint_id=endpoint_id, actor=actor)

    async def rotate(self, endpoint_id: UUID) -> None:
        """Move an endpoint on to its next secret."""
        await self._sql.rotate(self._pool, endpoint_id=endpoint_id)

    async def note_test(self, endpoint_id: UUID, pause_seconds: float) -> bool:
        """Note that a test is sent now. False when the last one was sent less than `pause_seconds` ago."""
        noted = await self._sql.note_test(self._pool, endpoint_id=endpoint_id, pause_seconds=pause_seconds)
        return noted is not None

    async def remove(self, endpoint_id: UUID, actor: UUID) -> bool:
        """Delete an endpoint; what waits for it is dead. False when it is gone already."""
        return bool(await self._sql.remove(self._pool, endpoint_id=endpoint_id, actor=actor))
