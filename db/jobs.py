"""The job: what it is, what its states mean, how it is accepted and read. Read this file first.

A job is one row of `jobs` for ever and, while it is open, one row of `job_queue`. A claim writes the queue's row alone;
`jobs` is written at the acceptance and at the end of each run, and the view `current_jobs` puts the two together: read
that one. Its status moves like this:

    queued ── claim ──> processing ── settle ──> completed | failed | cancelled
      ^                     |
      └────── requeue ──────┘        next stage, failure with budget left, lost lease, drain, explicit retry

queued      Waits in `job_queue`, for the model family that does its next stage: `qwen` while the stage is
            `enhance`, then `sdxl` or `wan`. If every process dies here, nothing happens to it.
processing  A replica holds it: `worker` until `lease_until`, under `attempt`. The replica renews the lease while
            its engine advances. If it dies, the lease runs out and upkeep puts the job back; the failure is
            counted. If it only sleeps and comes back late, its `attempt` is old and no write of it has effect.
completed   Every asset is stored and readable, and its row was written in the transaction that said so.
failed      Given up, with a typed `error_code`: not retryable, or `max_attempts` failures. A deadline that
            passed is a failure with its own code.
cancelled   Stopped because somebody asked.

The last three are terminal: nothing but an explicit retry moves a job out of failed or cancelled, and nothing
moves it out of completed. `attempt` counts claims and is the fencing token of every write of a replica; `failures`
is the budget. So a drain, a preemption and a hop between stages cost nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import repeat
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.batches import Batcher
from db.idempotency import IdempotencyKey
from db.limits import LimitReached
from db.pool import Connection, queries

MAX_ACCEPTED = 100  # a statement's worth: what comes meanwhile waits for it


class Status(StrEnum):
    """`current_jobs.status`; the transitions are in the module's docstring."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing but a retry can move the job on."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class QueueState(StrEnum):
    """`job_queue.state`."""

    READY = "ready"  # may be claimed
    SCHEDULED = "scheduled"  # not before run_at
    BLOCKED = "blocked"  # its user is at a cap
    RUNNING = "running"  # leased


class Stage(StrEnum):
    """What a job needs next."""

    ENHANCE = "enhance"  # the prompt, by the language model
    GENERATE = "generate"  # the media


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to accept. Validated already: the database refuses what breaks an invariant, not what is bad input."""

    id: UUID
    user_id: UUID
    job_type: str
    format: str
    quality: str
    model_type: str
    stage: Stage
    queue: str
    cost: float  # predicted seconds of the first stage
    credits: float
    original_prompt: str
    params: Mapping[str, Any]
    enhanced_prompt: str | None = None
    template_name: str | None = None  # of what made the enhanced prompt
    enhancement_strategy: str | None = None  # asked for; the end of the job writes what was really done
    content_mode: str = "sfw"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    adjustments: Sequence[Mapping[str, Any]] = ()
    klass: int = 1
    max_attempts: int = 3
    callback_url: str | None = None
    callback_events: Sequence[str] = ("processing", "completed", "failed", "cancelled")
    destination: str = "workspace"
    traceparent: str | None = None
    start_after_seconds: float | None = None
    start_deadline_seconds: float | None = None
    deadline_seconds: float | None = None
    batch_size: int | None = None  # images at a time; None: all of them
    shape: str | None = None  # jobs of one shape share forwards
    rows: int | None = None  # of it in one step, with as many images at a time as now
    loras: Sequence[str] = ()
    provider: str = "local"  # or an outside one, whose model is `api_model_id`
    api_model_id: UUID | None = None
    exempt: bool = False  # from the limits and charges: an admin's, or taken over from another system

    def to_row(self) -> dict[str, Any]:
        """The values as the `accept` statement names them."""
        values = dict(vars(self))
        values["class"] = values.pop("klass")
        return values


@dataclass(frozen=True)
class Accepted:
    """`replayed` says that an earlier request with this key made the job."""

    job_id: UUID
    replayed: bool


@dataclass(frozen=True)
class JobRecord:
    """A job as its reader may see it, with everything that hangs on it."""

    job: Mapping[str, Any]
    queue: Mapping[str, Any] | None
    standing: Mapping[str, Any] | None
    assets: Sequence[Mapping[str, Any]]
    callbacks: Sequence[Mapping[str, Any]]

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The record from a row of `read` or `list_page`."""
        return cls(row["job"], row["queue"], row["standing"], row["assets"], row["callbacks"])

    @property
    def status(self) -> Status:
        """The job's status."""
        return Status(self.job["status"])


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history. `id` grows with time; clients resume after it."""

    id: int
    job_id: UUID
    attempt: int
    kind: str
    at: datetime
    data: Mapping[str, Any]

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The event from a row of `job_events`."""
        return cls(**dict(row))


@dataclass(frozen=True)
class Erased:
    """A job that is gone from the database, and the keys of the files that are still to be deleted."""

    job_id: UUID
    user_id: UUID
    keys: Sequence[str]
    reference_keys: Sequence[str]


class Jobs:
    """Accepting and reading jobs. `accept` and `retry` need a pool that acts as the owner; reading takes any
    connection, and what it sees is what row-level security lets it see."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("jobs")
        self._accepting = Batcher(self._accept_each, max_batch=MAX_ACCEPTED)

    async def accept(self, job: NewJob, *, idempotency_key: str | None = None, body: bytes = b"") -> Accepted:
        """Take a job in, in one transaction with its charge and its idempotency key. Durable on return.

        Raises `LimitReached`; `IdempotencyConflict` for a known key with another body, `IdempotencyInFlight` when the
        first request with it has not committed yet.
        """
        if idempotency_key is None:  # together with whoever else comes now: one commit for all of them
            refusal = await self._accepting.put(job)
            if refusal is not None:
                raise refusal
            return Accepted(job.id, replayed=False)
        (accepted,) = await self.accept_together([job], idempotency_key=idempotency_key, body=body)
        return accepted

    async def accept_together(
        self, jobs: Sequence[NewJob], *, idempotency_key: str | None = None, body: bytes = b""
    ) -> list[Accepted]:
        """Take several jobs of one user in, all or none. Raises as `accept` does."""
        if idempotency_key is None:
            await self._make_together(self._pool, jobs)
            return [Accepted(job.id, replayed=False) for job in jobs]
        key = IdempotencyKey(jobs[0].user_id, idempotency_key, body, len(jobs))
        async with self._pool.acquire() as connection, connection.transaction():
            earlier = await key.begin(connection)
            if earlier is not None:
                return [Accepted(job_id, replayed=True) for job_id in earlier]
            await self._make_together(connection, jobs)
            await key.store(connection, [job.id for job in jobs])
        return [Accepted(job.id, replayed=False) for job in jobs]

    async def accepted_before(self, user_id: UUID, key: str, body: bytes, jobs: int = 1) -> list[Accepted] | None:
        """What an earlier request with this key made. Raises `IdempotencyConflict` for another body."""
        earlier = await IdempotencyKey(user_id, key, body, jobs).find(self._pool)
        return None if earlier is None else [Accepted(job_id, replayed=True) for job_id in earlier]

    async def accept_all(self, jobs: Sequence[NewJob]) -> list[UUID]:
        """Take jobs in, of any users, each for itself, in one transaction; the answer has their ids in the same order.
        Raises `LimitReached`, and then took in none."""
        async with self._pool.acquire() as connection, connection.transaction():
            for refusal in await self._make(connection, jobs, range(len(jobs))):
                raise refusal
        return [job.id for job in jobs]

    async def _accept_each(self, jobs: Sequence[NewJob]) -> list[LimitReached | None]:
        """Take in those that the limits let in; for each of the others, why not."""
        refused = {refusal.submission: refusal for refusal in await self._make(self._pool, jobs, range(len(jobs)))}
        return [refused.get(number) for number in range(len(jobs))]

    async def _make_together(self, connection: Connection | asyncpg.Pool, jobs: Sequence[NewJob]) -> None:
        for refusal in await self._make(connection, jobs, repeat(0)):
            raise refusal

    async def _make(
        self, connection: Connection | asyncpg.Pool, jobs: Sequence[NewJob], submissions: Iterable[int]
    ) -> list[LimitReached]:
        rows = [
            {name: value for name, value in job.to_row().items() if value is not None} | {"submission": number}
            for job, number in zip(jobs, submissions, strict=False)
        ]
        refusals = await self._sql.accept(connection, rows=rows)
        return [LimitReached.from_json(told, int(number)) for number, told in (refusals or {}).items()]

    async def read(self, connection: Connection | asyncpg.Pool, job_id: UUID) -> JobRecord | None:
        """One job, or None when there is none that the connection may see."""
        row = await self._sql.read(connection, job_id=job_id)
        return None if row is None else JobRecord.from_row(row)

    async def read_bare(self, job_id: UUID) -> Mapping[str, Any] | None:
        """`status`, `attempts`, `worker` and `stage` of a job."""
        row = await self._sql.read_bare(self._pool, job_id=job_id)
        return None if row is None else dict(row)

    async def manifest(
        self, connection: Connection | asyncpg.Pool, job_id: UUID, asset_index: int
    ) -> Mapping[str, Any] | None:
        """What a file of a job was made from and by; None where there is no such file, or it has no manifest."""
        manifest: Mapping[str, Any] | None = await self._sql.manifest(
            connection, job_id=job_id, asset_index=asset_index
        )
        return manifest

    async def list_page(
        self,
        connection: Connection,
        *,
        user_id: UUID | None = None,
        status: str | None = None,
        job_type: str | None = None,
        created_after: datetime | None = None,
        before: UUID | None = None,
        after: UUID | None = None,
        page_size: int = 20,
    ) -> list[JobRecord]:
        """Jobs, newest first. With `after` the page next to it on the newer side, still newest first."""
        rows = self._sql.list_page(
            connection,
            user_id=user_id,
            status=status,
            job_type=job_type,
            created_after=created_after,
            before=before,
            after=after,
            page_size=page_size,
        )
        page = [JobRecord.from_row(row) async for row in rows]
        return sorted(page, key=lambda record: str(record.job["id"]), reverse=True)

    async def events_after(
        self, connection: Connection, job_id: UUID, after_id: int = 0, page_size: int = 200
    ) -> list[JobEvent]:
        """The events of a job past an id, oldest first."""
        rows = self._sql.events_after(connection, job_id=job_id, after_id=after_id, page_size=page_size)
        return [JobEvent.from_row(row) async for row in rows]

    async def stamps(self, job_ids: set[UUID]) -> dict[UUID, str]:
        """A text for each job that is another one whenever something about it has changed that its watchers see."""
        return {row["id"]: row["stamp"] async for row in self._sql.stamps(self._pool, job_ids=list(job_ids))}

    async def run_seconds(self, job_type: str) -> float | None:
        """Mean seconds of a type's completed runs, the recent ones weighing most; None before the first."""
        seconds: float | None = await self._sql.run_seconds(self._pool, job_type=job_type)
        return seconds

    async def retry(
        self,
        job_id: UUID,
        *,
        queue: str,
        cost: float,
        shape: str | None = None,
        rows: int | None = None,
        loras: Sequence[str] = (),
        exempt: bool = False,
    ) -> bool:
        """Queue a failed or cancelled job again with a new budget and its deadlines counted from now. False when it is
        in no such state. Raises `LimitReached`."""
        row = await self._sql.retry(
            self._pool,
            job_id=job_id,
            queue=queue,
            cost=cost,
            shape=shape,
            rows=rows,
            loras=list(loras),
            exempt=exempt,
        )
        if row is not None and row["refusal"] is not None:
            raise LimitReached.from_json(row["refusal"])
        return row is not None

    async def erase(self, job_id: UUID, actor: UUID) -> Erased | None:
        """Delete an ended job and all its rows, callbacks that wait included, leaving one audit row of `actor`.

        None when it is open. The rows go first: a file without a row is an orphan that the sweep deletes, a row without
        a file would be a lie.
        """
        row = await self._sql.erase(self._pool, job_id=job_id, actor=actor)
        return None if row is None else Erased(row["id"], row["user_id"], row["keys"], row["reference_keys"])
