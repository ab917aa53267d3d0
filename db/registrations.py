"""The addresses that workers of the older system register. They are kept for those who read them; nothing here calls
them, and no work goes there."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import asyncpg

from db.pool import queries


class Registrations:
    """Entries of `system_config.config`. Needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("registrations")

    async def read(self) -> Mapping[str, Any]:
        """What was registered, by the entries' names."""
        entries: Mapping[str, Any] = await self._sql.read(self._pool)
        return entries

    async def write(self, entries: Mapping[str, Any]) -> datetime:
        """Keep these entries, beside whatever else is in the configuration; returns the database's time of it."""
        at: datetime = await self._sql.write(self._pool, entries=dict(entries))
        return at
