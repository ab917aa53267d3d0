"""The operator's limits and switches, which the statement that accepts a job reads and holds to (`ourvidz.admit`).

They stand in `system_config`, under the names of the specification. One that is absent or null is off.
`moderation` stands beside them, and is read where assets are.
"""

import math
from collections.abc import Mapping
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import Connection, queries

NAMES = (
    "maxConcurrentJobs",
    "maxJobsPerUser",
    "maxJobsPerHour",
    "rateLimitRequestsPerMinute",
    "burst",
    "maxStoragePerUserGB",
    "maintenanceMode",
    "chargeCredits",
    "moderation",
)
MAINTENANCE_RETRY_SECONDS = 60


class LimitReached(Exception):
    """A submission that the limits, maintenance or the balance refuse; nothing of it was stored.

    `code` is rate_limited, hourly_limit, user_limit, concurrent_limit, storage_limit, credits_exhausted or maintenance.
    `setting` is what set the limit, `allowed` its value, or for credits what the balance has left; `needed` is how many
    jobs, or credits, were asked for. `retry_after` is in whole seconds, or None where waiting alone does not help.
    """

    code: str = "limit_reached"

    def __init__(
        self,
        code: str,
        setting: str,
        allowed: float | None = None,
        needed: float | None = None,
        retry_after: int | None = None,
        submission: int = 0,
    ) -> None:
        super().__init__(code)
        self.code, self.setting, self.allowed, self.needed = code, setting, allowed, needed
        self.retry_after, self.submission = retry_after, submission

    @classmethod
    def from_json(cls, told: Mapping[str, Any], submission: int = 0) -> Self:
        """A refusal as `ourvidz.admit` tells it."""
        wait = told.get("retry_after")
        seconds = None if wait is None else max(1, math.ceil(wait))
        if told["code"] == "maintenance":
            seconds = MAINTENANCE_RETRY_SECONDS
        return cls(told["code"], told["setting"], told.get("allowed"), told.get("needed"), seconds, submission)

    @property
    def message(self) -> str:
        """For people."""
        allowed = f"{self.allowed:g}" if self.allowed is not None else ""
        whole = ""
        if self.allowed is not None and self.needed is not None and self.needed > self.allowed:
            whole = f"; {self.needed:g} at once never fit"
        return {
            "rate_limited": f"at most {allowed} requests a minute may be sent",
            "hourly_limit": f"a user may have {allowed} jobs an hour{whole}",
            "user_limit": f"a user may have {allowed} jobs that wait or run{whole}",
            "concurrent_limit": f"this installation takes {allowed} jobs that wait or run{whole}",
            "storage_limit": f"your files take up the {allowed} GB that a user may have; delete some",
            "credits_exhausted": f"this takes {self.needed or 0:g} credits, and your balance is {allowed}",
            "maintenance": "this installation is being maintained and takes no new work",
        }[self.code]


class SystemConfig:
    """The row of `system_config`, as far as this system reads it. Needs a pool that acts as the owner."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("limits")

    async def read(self) -> dict[str, Any]:
        """The values that are set, by their names."""
        config = await self._sql.read_config(self._pool) or {}
        return {name: config[name] for name in NAMES if config.get(name) is not None}

    async def change(self, values: Mapping[str, Any], actor: UUID) -> dict[str, Any]:
        """Set values, or with None take them away, leaving all others of the row as they are, with one audit row of
        what was before and is now. In force for the next submission. The values that are set then."""
        await self._sql.change_config(self._pool, given=dict(values), actor=actor)
        return await self.read()

    async def admit_request(self, user_id: UUID) -> None:
        """Count a request of a user that makes no job. Raises `LimitReached` (`maintenance`, `rate_limited`)."""
        refusal = await self._sql.admit_request(self._pool, user_id=user_id)
        if refusal is not None:
            raise LimitReached.from_json(refusal)

    async def maintenance(self) -> bool:
        """Whether new work is refused now."""
        return bool(await self._sql.in_maintenance(self._pool))


async def check_room(connection: Connection, user_id: UUID, size: int) -> None:
    """Raise `LimitReached` where a file of `size` bytes is more than a user may have here; admins may have any. Exact
    if the caller holds the user's profile locked, as uploads do."""
    row = await queries("limits").storage_room(connection, user_id=user_id, size=size)
    if row is not None:
        wait = row["retry_after"]
        seconds = None if wait is None else max(1, math.ceil(wait))
        raise LimitReached("storage_limit", "maxStoragePerUserGB", float(row["gigabytes"]), retry_after=seconds)
