"""Moving jobs: claim, renew, settle, requeue, cancel. Every move is one statement with its guard.

Whoever runs a job writes under `(job_id, attempt)`; a write that finds no running row under that pair changes
nothing and says so, which is how a replica learns that it lost its lease.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from db.jobs import Status
from db.moves import CancelReason as CancelReason
from db.moves import Claim as Claim
from db.moves import Depth as Depth
from db.moves import Expired as Expired
from db.moves import Fit as Fit
from db.moves import NewAsset as NewAsset
from db.moves import Overdue as Overdue
from db.moves import Renewal as Renewal
from db.moves import Requeue as Requeue
from db.moves import Settlement as Settlement
from db.pool import Connection, queries

LEASE_SECONDS = 30.0
FIT_WINDOW_SECONDS = 10.0  # of fair share that a job may come before its turn by
FIT_LOOK = 8  # waiting jobs that are looked at for each free slot
RENEW_SECONDS = 5.0


class Queue:
    """The moves, over a pool that acts as the owner or as the replicas' role."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("queue")

    async def claim(
        self,
        queue: str,
        worker: UUID,
        slots: int,
        lease_seconds: float = LEASE_SECONDS,
        fit: Fit | None = None,
        least_class: int = 0,
    ) -> list[Claim]:
        """Take up to `slots` waiting jobs of a queue, in its order, but for those that `fit` lets come before.

        With a `least_class` jobs of lower classes stay, and nothing fits better than another. Never ask for more than
        are free.
        """
        fits = fit is not None and fit.shapes and least_class == 0
        chosen = await self._fitting(queue, worker, slots, fit) if fits and fit is not None else []
        rows = self._sql.claim(
            self._pool,
            queue=queue,
            slots=slots,
            worker=worker,
            lease_seconds=lease_seconds,
            chosen=chosen,
            least_class=least_class,
        )
        return [Claim.from_row(row) async for row in rows]

    async def _fitting(self, queue: str, worker: UUID, slots: int, fit: Fit) -> list[UUID]:
        rows = self._sql.fitting(
            self._pool,
            queue=queue,
            slots=slots,
            worker=worker,
            shapes=list(fit.shapes),
            most_rows=list(fit.shapes.values()),
            loras=list(fit.loras),
            window=FIT_WINDOW_SECONDS,
            look=FIT_LOOK * slots,
        )
        return [row["job_id"] async for row in rows]

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

    async def settle(self, settlements: Sequence[Settlement], connection: Connection | None = None) -> list[Settlement]:
        """End jobs, each in full or not at all: state, assets, event and callback in one statement. The answer are
        those that ended something."""
        return [ended for ended in await self.settle_each(settlements, connection) if ended is not None]

    async def settle_each(
        self, settlements: Sequence[Settlement], connection: Connection | None = None
    ) -> list[Settlement | None]:
        """The same, with an answer for each in their order: None where nothing ended."""
        answer: list[Settlement | None] = [None] * len(settlements)
        ended = await self._sql.settle(
            connection or self._pool,
            job_ids=[s.job_id for s in settlements],
            attempts=[s.attempt for s in settlements],
            statuses=[s.status for s in settlements],
            times=[s.generation_time_ms for s in settlements],
            workers=[s.worker for s in settlements],
            # few have any, and a shorter array is filled up with nulls
            details=details if any(details := [s.details for s in settlements]) else [],
        )
        for n in ended:
            answer[n - 1] = settlements[n - 1]
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

    async def open_jobs(self, job_ids: set[UUID]) -> set[UUID]:
        """Of these jobs, those that have not ended."""
        return {row["job_id"] async for row in self._sql.open_jobs(self._pool, job_ids=list(job_ids))}

    async def known_jobs(self, job_ids: set[UUID]) -> set[UUID]:
        """Of these jobs, those that exist."""
        return {row["id"] async for row in self._sql.known_jobs(self._pool, job_ids=list(job_ids))}


def given(values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The values of one row as the statements take them in: what is missing is null there, so nulls are left out."""
    return {"n": n} | {name: value for name, value in values.items() if value is not None}
