"""Moving jobs: claim, renew, settle, requeue, cancel. Every move is one statement with its guard.

Whoever runs a job writes under `(job_id, attempt)`; a write that finds no running row under that pair changes
nothing and says so, which is how a replica learns that it lost its lease.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.jobs import Status
from db.pool import Connection, queries

LEASE_SECONDS = 30.0
RENEW_SECONDS = 5.0


class CancelReason(StrEnum):
    """Why a running job is to stop: somebody asked, or its deadline passed."""

    USER = "user"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Claim:
    """A job in a replica's hands. `attempt` is the fencing token of everything the replica will write."""

    job: Mapping[str, Any]
    attempt: int
    failures: int
    max_attempts: int
    batch_size: int | None = None  # images at a time, since a larger batch ran out of memory
    moved_for_memory: bool = False  # it ran out of memory even so, and was sent to another replica once
    outage_seconds: float | None = None  # since when the object store has kept it from its end

    @property
    def job_id(self) -> UUID:
        """The job's id."""
        job_id: UUID = self.job["id"]
        return job_id

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The claim from a row of the `claim` statement."""
        return cls(
            dict(row),
            row["attempts"],
            row["budget_used"],
            row["max_attempts"],
            row["batch_size"],
            row["moved_for_memory"],
            row["outage_seconds"],
        )


@dataclass(frozen=True)
class Renewal:
    """What a replica says of one running job when it renews its lease."""

    job_id: UUID
    attempt: int
    phase: str
    step: int | None = None
    steps: int | None = None
    preview: tuple[int, int] | None = None  # the step that the latest preview shows, and of how many


@dataclass(frozen=True, kw_only=True)
class NewAsset:
    """A stored file that the finishing transaction makes known. Sizes are in pixels and bytes, as decoded."""

    id: UUID
    asset_index: int
    asset_type: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int
    height: int
    frames: int | None
    fps: float | None
    duration_seconds: float | None
    seed: int | None
    model_used: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """The end of a job. With `attempt` it ends a running job under that attempt only; without, a waiting one."""

    job_id: UUID
    status: Status
    attempt: int | None = None
    expired: bool = False  # only if the lease has run out
    counts: bool = False  # a failure against max_attempts
    error_code: str | None = None
    error_message: str | None = None
    retryable: bool | None = None
    settings: Mapping[str, Any] | None = None
    generation_time_ms: int | None = None
    worker: UUID | None = None
    assets: Sequence[NewAsset] = ()
    callback_assets: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The values as the `settle` statement names them."""
        return vars(self) | {"assets": [vars(asset) for asset in self.assets]}


@dataclass(frozen=True)
class Settled:
    """A job that ended now, and whether somebody is to be called about it."""

    job_id: UUID
    status: Status
    calls_back: bool


@dataclass(frozen=True, kw_only=True)
class Requeue:
    """A running job that goes back to a queue: `kind` is the event that says why."""

    job_id: UUID
    attempt: int
    kind: str = "requeued"
    expired: bool = False
    counts: bool = False
    delay_seconds: float = 0.0
    error_code: str | None = None
    error_message: str | None = None
    queue: str | None = None  # None: the one it came from
    cost: float | None = None
    stage: str | None = None
    enhanced_prompt: str | None = None
    enhancement: Mapping[str, Any] | None = None
    enhancement_strategy: str | None = None
    enhancement_time_ms: int | None = None
    template_name: str | None = None
    expansion: float | None = None
    batch_size: int | None = None  # the most images at a time from now on
    avoid_worker: UUID | None = None  # which is not to take it again before `avoid_seconds` have passed
    avoid_seconds: float | None = None
    outage: bool = False  # the object store was away: counts nothing, and since when is kept


@dataclass(frozen=True)
class Expired:
    """A running job whose replica has not renewed its lease in time."""

    job_id: UUID
    attempt: int
    failures: int
    max_attempts: int
    cancel: str | None
    queue: str
    worker: UUID


@dataclass(frozen=True)
class Overdue:
    """An open job past a deadline."""

    job_id: UUID
    state: str
    attempt: int
    error_code: str


@dataclass(frozen=True)
class Depth:
    """What is open in one queue and state. `cost_seconds` is the predicted work."""

    queue: str
    state: str
    jobs: int
    oldest: datetime
    cost_seconds: float


class Queue:
    """The moves, over a pool that acts as the owner or as the replicas' role."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("queue")

    async def claim(self, queue: str, worker: UUID, slots: int, lease_seconds: float = LEASE_SECONDS) -> list[Claim]:
        """Take up to `slots` waiting jobs of a queue, in its order. Never ask for more than are free."""
        rows = self._sql.claim(self._pool, queue=queue, slots=slots, worker=worker, lease_seconds=lease_seconds)
        return [Claim.from_row(row) async for row in rows]

    async def renew(
        self, worker: UUID, renewals: Sequence[Renewal], lease_seconds: float = LEASE_SECONDS
    ) -> dict[UUID, str | None]:
        """Renew leases; the answer maps the jobs still held to their cancel reason. A missing job was lost."""
        rows = self._sql.renew(
            self._pool,
            job_ids=[r.job_id for r in renewals],
            attempts=[r.attempt for r in renewals],
            phases=[r.phase for r in renewals],
            steps=[r.step for r in renewals],
            totals=[r.steps for r in renewals],
            preview_steps=[r.preview and r.preview[0] for r in renewals],
            preview_totals=[r.preview and r.preview[1] for r in renewals],
            worker=worker,
            lease_seconds=lease_seconds,
        )
        return {row["job_id"]: row["cancel"] async for row in rows}

    async def settle(self, settlements: Sequence[Settlement], connection: Connection | None = None) -> list[Settled]:
        """End jobs, each in full or not at all: state, assets, event and callback in one statement."""
        return [ended for ended in await self.settle_each(settlements, connection) if ended is not None]

    async def settle_each(
        self, settlements: Sequence[Settlement], connection: Connection | None = None
    ) -> list[Settled | None]:
        """The same, with an answer for each in their order: None where nothing ended."""
        answer: list[Settled | None] = [None] * len(settlements)
        rows = [given(s.to_row(), n) for n, s in enumerate(settlements)]
        async for row in self._sql.settle(connection or self._pool, rows=rows):
            answer[row["n"]] = Settled(row["job_id"], Status(row["status"]), row["calls_back"])
        return answer

    async def requeue(self, requeues: Sequence[Requeue]) -> dict[UUID, str]:
        """Put running jobs back; the answer maps those that moved to their queue."""
        rows = self._sql.requeue(self._pool, rows=[given(vars(r), n) for n, r in enumerate(requeues)])
        return {row["job_id"]: row["queue"] async for row in rows}

    async def unheard(self, worker: UUID, known: Sequence[UUID]) -> list[tuple[UUID, int]]:
        """Jobs, with their attempts, that run in a worker's name although it knows of `known` alone: the connection
        broke between a claim's commit and its answer."""
        return [(r["job_id"], r["attempt"]) async for r in self._sql.unheard(self._pool, worker=worker, known=known)]

    async def cancel(self, job_id: UUID) -> str:
        """Stop a job: `cancelled` when it was waiting, `cancelling` when a replica will stop at its next step,
        `ended` when it had ended already. Repeating it changes nothing."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await self._sql.queue_row(connection, job_id=job_id)
            if row is None:
                return "ended"
            if row["state"] == "running":
                await self._sql.flag_cancel(connection, job_id=job_id, reason=CancelReason.USER)
                return "cancelling"
            await self.settle([Settlement(job_id=job_id, status=Status.CANCELLED)], connection)
            return "cancelled"

    async def cancel_reason(self, job_id: UUID, attempt: int) -> str | None:
        """Why a job that runs under this attempt is to stop; None when it is not, or does not run under it."""
        reason: str | None = await self._sql.cancel_reason(self._pool, job_id=job_id, attempt=attempt)
        return reason

    async def flag_deadline(self, job_id: UUID) -> bool:
        """Ask the replica that runs a job to stop it, because its deadline has passed."""
        return await self._sql.flag_cancel(self._pool, job_id=job_id, reason=CancelReason.DEADLINE) is not None

    async def expired(self, page_size: int = 100) -> list[Expired]:
        """Running jobs whose lease has run out."""
        return [Expired(**dict(r)) async for r in self._sql.expired(self._pool, page_size=page_size)]

    async def promote(self, page_size: int = 1000) -> set[str]:
        """Make delayed jobs whose time has come claimable; the answer names their queues."""
        return {row["queue"] async for row in self._sql.promote(self._pool, page_size=page_size)}

    async def overdue(self, page_size: int = 100) -> list[Overdue]:
        """Open jobs past a deadline."""
        return [Overdue(**dict(r)) async for r in self._sql.overdue(self._pool, page_size=page_size)]

    async def stopped_waiting(self, page_size: int = 100) -> list[tuple[UUID, CancelReason]]:
        """Waiting jobs that were asked to stop while they still ran."""
        rows = self._sql.stopped_waiting(self._pool, page_size=page_size)
        return [(row["job_id"], CancelReason(row["cancel"])) async for row in rows]

    async def depth(self) -> list[Depth]:
        """What is open, per queue and state."""
        return [Depth(**dict(row)) async for row in self._sql.depth(self._pool)]

    async def pause(self, queue: str, paused: bool) -> None:
        """Stop or resume the claims of a queue; running jobs go on."""
        await self._sql.pause(self._pool, queue=queue, paused=paused)

    async def paused(self) -> set[str]:
        """The queues that nothing is claimed from."""
        return {row["name"] async for row in self._sql.paused(self._pool)}

    async def live_attempts(self, attempts: set[tuple[UUID, int]]) -> set[tuple[UUID, int]]:
        """Of these attempts, the one that won each job, and those that run now: their files are spoken of."""
        pairs = list(attempts)
        rows = self._sql.live_attempts(self._pool, job_ids=[p[0] for p in pairs], attempts=[p[1] for p in pairs])
        return {(row["job_id"], row["attempt"]) async for row in rows}

    async def running_attempts(self, attempts: set[tuple[UUID, int]]) -> set[tuple[UUID, int]]:
        """Of these attempts, those that run now."""
        pairs = list(attempts)
        rows = self._sql.running_attempts(self._pool, job_ids=[p[0] for p in pairs], attempts=[p[1] for p in pairs])
        return {(row["job_id"], row["attempt"]) async for row in rows}

    async def known_jobs(self, job_ids: set[UUID]) -> set[UUID]:
        """Of these jobs, those that exist."""
        return {row["id"] async for row in self._sql.known_jobs(self._pool, job_ids=list(job_ids))}


def given(values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The values of one row as the statements take them in: what is missing is null there, so nulls are left out."""
    return {"n": n} | {name: value for name, value in values.items() if value is not None}
