"""What the models' forwards cost, as replicas have measured it and as others predict by it."""

from typing import Any

import asyncpg

from db.pool import queries


class CostProfiles:
    """One profile a queue. What is in it is the business of those who write and read it."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("costs")

    async def publish(self, queue: str, model_name: str, profile: dict[str, Any]) -> None:
        """The profile from now on."""
        await self._sql.publish_costs(self._pool, queue=queue, model_name=model_name, profile=profile)

    async def read(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Model name and profile of each queue that has one."""
        return {row["queue"]: (row["model_name"], row["profile"]) async for row in self._sql.read_costs(self._pool)}
