"""What a user is told of their own profile, and the birth date that decides the age gate."""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Self
from uuid import UUID

import asyncpg

from db.pool import queries


@dataclass(frozen=True)
class Profile:
    """A user. The birth date itself is shown to nobody."""

    id: UUID
    username: str | None
    subscription_status: str
    token_balance: int
    age_verified: bool
    birth_date_set: bool
    created_at: datetime

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The profile from a row of `read_profile`."""
        return cls(**dict(row))


class Profiles:
    """Needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("profiles")

    async def read(self, user_id: UUID) -> Profile | None:
        """A user's profile; None where it is gone."""
        row = await self._sql.read_profile(self._pool, user_id=user_id)
        return None if row is None else Profile.from_row(row)

    async def set_birth_date(self, user_id: UUID, birth_date: date) -> bool:
        """Set it, once, with an audit row that does not tell it. False when there was one."""
        return await self._sql.set_birth_date(self._pool, user_id=user_id, birth_date=birth_date) is not None
