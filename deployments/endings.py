"""How a replica ends a job: completed, failed for good, cancelled, or back to the queue.

A lost connection during the write leaves it open whether it was committed. Then the row is read, not written again
blindly: the fence makes a second write harmless, and what the row says decides.
"""

import asyncio
from uuid import UUID

import structlog

from db.finisher import Finisher
from db.jobs import Jobs, Status
from db.pool import CONNECTION_FAULTS
from db.queue import Queue, Requeue, Settlement
from deployments.claims import Held, StopReason, backoff
from models.engine import GenerationError

log = structlog.get_logger()

# waits between the tries of a write whose outcome the connection did not tell; about a third of a lease
UNCERTAIN_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


class Endings:
    """Ends jobs for one worker. Every method says whether the end was written, by us and under our attempt."""

    def __init__(self, queue: Queue, jobs: Jobs, worker: UUID, lease_seconds: float) -> None:
        self._queue, self._jobs, self._worker, self._lease = queue, jobs, worker, lease_seconds
        self._finisher = Finisher(queue)

    async def settle(self, held: Held, settlement: Settlement) -> bool:
        """Write the end of a job. False: the job is no longer ours, and nothing was changed."""
        held.settling = True
        for wait in (*UNCERTAIN_SECONDS, None):
            try:
                return bool(await self._finisher.settle(settlement)) or await self._was_written(settlement)
            except CONNECTION_FAULTS as error:
                if wait is None:
                    raise
                log.warning("settle_uncertain", job_id=str(settlement.job_id), error=type(error).__name__)
                await asyncio.sleep(wait)
        return False

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

    async def requeue(self, held: Held, requeue: Requeue) -> bool:
        """Put a job back. False: it is no longer ours, or was asked to stop meanwhile (and has been ended so)."""
        for wait in (*UNCERTAIN_SECONDS, None):
            try:
                if await self._queue.requeue([requeue]) or await self._was_moved(requeue):
                    return True
                break
            except CONNECTION_FAULTS as error:
                if wait is None:
                    raise
                log.warning("requeue_uncertain", job_id=str(requeue.job_id), error=type(error).__name__)
                await asyncio.sleep(wait)
        # the one other reason that a row of ours does not move: it carries a cancel that we have not seen yet
        reason = await self._queue.cancel_reason(requeue.job_id, requeue.attempt)
        return reason is not None and await self.cancelled(held, reason)

    async def failed(self, held: Held, error: GenerationError) -> str:
        """End or repeat a job after an error, by what stopped it and by what is left of its budget.

        Returns the kind of ending, for the metrics: cancelled, failed, requeued or lost.
        """
        claim = held.claim
        reason = held.stop_reason
        if reason is StopReason.LOST:
            return "lost"
        if reason in (StopReason.USER, StopReason.DEADLINE):
            return "cancelled" if await self.cancelled(held, reason.value) else "lost"
        if reason is StopReason.DRAIN:
            back = Requeue(job_id=claim.job_id, attempt=claim.attempt, error_code="drained")
            return "requeued" if await self.requeue(held, back) else "lost"
        if error.retryable and claim.failures + 1 < claim.max_attempts:
            back = Requeue(
                job_id=claim.job_id,
                attempt=claim.attempt,
                counts=True,
                delay_seconds=backoff(claim.failures),
                error_code=error.code,
                error_message=error.message,
            )
            return "requeued" if await self.requeue(held, back) else "lost"
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
        return "failed" if await self.settle(held, end) else "lost"

    async def cancelled(self, held: Held, reason: str) -> bool:
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
        return await self.settle(held, end)
