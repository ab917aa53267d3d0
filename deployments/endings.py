"""How a replica ends a job: completed, failed for good, cancelled, or back to the queue.

What the installation does to a job is not held against it. A batch that has no room is made smaller; a job that has
none even alone goes elsewhere, once; one whose LoRAs find none beside those in use comes again. While the store is
away jobs wait for it, for a limited time, and count no failure.

A lost connection during the write leaves it open whether it was committed. Then the row is read, not written again
blindly: the fence makes a second write harmless, and what the row says decides.
"""

import asyncio
import time
from collections.abc import Iterator
from enum import StrEnum
from itertools import chain, repeat
from typing import Any
from uuid import UUID

import structlog

from db.batches import GATHER_SECONDS, Batcher
from db.jobs import Jobs, Stage, Status
from db.pool import CONNECTION_FAULTS
from db.queue import Claim, Queue, Requeue, Settlement
from deployments.claims import backoff, jittered
from deployments.held import Held, StopReason
from deployments.storing import StorageFailed
from models.engine import GenerationError, OutOfMemory
from models.lora.files import LoraNoRoom

log = structlog.get_logger()

UNCERTAIN_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)  # between the tries of a write; the last one over and over
ELSEWHERE_SECONDS = 30.0  # for another replica to take what had no room here; then this one may, with what it has freed
NO_ROOM_SECONDS = 5.0  # until LoRAs that others use may have been let go
OUTAGE_SECONDS = 3600.0


class Outcome(StrEnum):
    """How a run ended."""

    COMPLETED = "completed"
    ENHANCED = "enhanced"  # it goes on in the queue of its next stage
    REQUEUED = "requeued"
    FAILED = "failed"
    CANCELLED = "cancelled"  # by a person or by its deadline
    LOST = "lost"  # it was not ours to end, and nothing was changed
    UNKNOWN = "unknown"  # it could not be learnt what was written


class Endings:
    """Ends jobs for one worker. Every method says whether the end was written, by us and under our attempt.

    A database that is away is tried again for as long as a lease, since no one else can take the job before that.
    """

    def __init__(
        self, queue: Queue, jobs: Jobs, worker: UUID, lease_seconds: float, outage_seconds: float = OUTAGE_SECONDS
    ) -> None:
        """`outage_seconds` is how long the object store may keep a job from its end before the job fails."""
        self._queue, self._jobs, self._worker, self._lease = queue, jobs, worker, lease_seconds
        self._outage = outage_seconds
        self._ends = Batcher(queue.settle_each, gather_seconds=GATHER_SECONDS)

    async def settle(self, held: Held, settlement: Settlement) -> bool:
        """Write the end of a job. False: the job is no longer ours, and nothing was changed."""
        held.settling = True
        tries = self._tries()
        while True:
            try:
                return bool(await self._ends.put(settlement)) or await self._was_written(settlement)
            except CONNECTION_FAULTS as error:
                await self._wait(next(tries, None), error, settlement.job_id)

    async def _was_written(self, settlement: Settlement) -> bool:
        """Whether an earlier try of ours was committed although we never heard so."""
        record = await self._jobs.read_bare(settlement.job_id)
        return (
            record is not None
            and record["status"] == settlement.status
            and record["attempts"] == settlement.attempt
            and record["worker"] == settlement.worker
        )

    async def _was_moved(self, requeue: Requeue) -> bool:
        """Whether an earlier try of ours was committed: then the job waits, and nobody has claimed it since."""
        record = await self._jobs.read_bare(requeue.job_id)
        return record is not None and record["status"] == Status.QUEUED and record["attempts"] == requeue.attempt

    def _tries(self) -> Iterator[float]:
        """The waits between the tries of a write, until a lease has passed."""
        until = time.monotonic() + self._lease
        for wait in chain(UNCERTAIN_SECONDS, repeat(UNCERTAIN_SECONDS[-1])):
            if time.monotonic() + wait > until:
                return
            yield wait

    @staticmethod
    async def _wait(seconds: float | None, error: BaseException, job_id: UUID) -> None:
        if seconds is None:
            raise error
        log.warning("end_uncertain", job_id=str(job_id), error=type(error).__name__)
        await asyncio.sleep(seconds)

    async def requeue(self, held: Held, requeue: Requeue) -> Outcome:
        """Put a job back: `REQUEUED`, or `CANCELLED` when it was asked to stop meanwhile and has been ended so, or
        `LOST`."""
        tries = self._tries()
        while True:
            try:
                if await self._queue.requeue([requeue]) or await self._was_moved(requeue):
                    return Outcome.REQUEUED
                # the one other reason that a row of ours does not move: it carries a cancel that we have not seen yet
                reason = await self._queue.cancel_reason(requeue.job_id, requeue.attempt)
                break
            except CONNECTION_FAULTS as error:
                await self._wait(next(tries, None), error, requeue.job_id)
        return Outcome.LOST if reason is None else await self.cancelled(held, reason)

    async def failed(self, held: Held, error: GenerationError) -> Outcome:
        """End or repeat a job after an error, by what stopped it, by whose fault it was, and by what is left of its
        budget."""
        claim = held.claim
        reason = held.stop_reason
        if reason is StopReason.LOST:
            return Outcome.LOST
        if reason in (StopReason.USER, StopReason.DEADLINE):
            return await self.cancelled(held, reason.value)
        if reason is StopReason.DRAIN:
            return await self.requeue(held, Requeue(job_id=claim.job_id, attempt=claim.attempt, error_code="drained"))
        again = self._again(claim, error)
        if again is not None:
            back = Requeue(
                job_id=claim.job_id,
                attempt=claim.attempt,
                error_code=error.code,
                error_message=error.message,
                **again,
            )
            return await self.requeue(held, back)
        end = Settlement(
            job_id=claim.job_id,
            attempt=claim.attempt,
            status=Status.FAILED,
            counts=True,
            error_code=error.code,
            error_message=error.message,
            retryable=error.retryable,
            worker=self._worker,
        )
        return Outcome.FAILED if await self.settle(held, end) else Outcome.LOST

    def _again(self, claim: Claim, error: GenerationError) -> dict[str, Any] | None:
        """How a job is run again after an error; None: it is not."""
        if isinstance(error, StorageFailed):
            away = claim.outage_seconds or 0.0
            # as long as it has been away already, which doubles the waits
            return (
                {"outage": True, "delay_seconds": jittered(min(max(away, 2.0), 60.0))} if away < self._outage else None
            )
        if isinstance(error, LoraNoRoom):  # others' runs are in the way, as in a queue: no failure of this job
            return {"delay_seconds": jittered(NO_ROOM_SECONDS)}
        budget_left = claim.failures + 1 < claim.max_attempts
        if isinstance(error, OutOfMemory) and claim.job["stage"] == Stage.GENERATE:
            batch = claim.batch_size or claim.job["params"].get("num_images", 1)
            if batch > 1:  # costs nothing of the budget: it is another plan, and there are few of them
                return {"batch_size": batch // 2}
            if claim.moved_for_memory or not budget_left:
                return None
            return {"counts": True, "avoid_worker": self._worker, "avoid_seconds": ELSEWHERE_SECONDS}
        return {"counts": True, "delay_seconds": backoff(claim.failures)} if error.retryable and budget_left else None

    async def cancelled(self, held: Held, reason: str) -> Outcome:
        """End a job that was asked to stop: cancelled by a person, or failed by its deadline."""
        claim = held.claim
        by_deadline = reason == "deadline"
        end = Settlement(
            job_id=claim.job_id,
            attempt=claim.attempt,
            status=Status.FAILED if by_deadline else Status.CANCELLED,
            error_code="deadline_exceeded" if by_deadline else None,
            error_message="the job's deadline passed while it ran" if by_deadline else None,
            retryable=False if by_deadline else None,
            worker=self._worker,
        )
        return Outcome.CANCELLED if await self.settle(held, end) else Outcome.LOST
