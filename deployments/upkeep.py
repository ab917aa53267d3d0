"""Upkeep: what must happen though nobody asks. Lost leases, delays that end, deadlines, retention.

Any number of these may run: every duty is guarded in its statement, so a double changes nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from db.jobs import Status
from db.notify import Notifier
from db.pool import DATABASE_FAULTS
from db.queue import CancelReason, Queue, Requeue, Settlement
from db.retention import Retention
from deployments.claims import backoff

log = structlog.get_logger()

PRUNE_EVERY = 100  # rounds; in each round while there is a backlog, a batch at a time, so that leases don't wait for it


class Upkeep:
    """The duties, each one a method that may be called at any time."""

    def __init__(
        self,
        queue: Queue,
        notifier: Notifier,
        retention: Retention,
        revive: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """`revive` is called when the database is away: it may start the embedded one, which nobody else watches."""
        self._queue, self._notifier, self._retention = queue, notifier, retention
        self._revive = revive

    async def run(self, every_seconds: float, stop: asyncio.Event) -> None:
        """Do everything, over and over, until `stop`. A database that is away is waited for."""
        rounds, more = 0, False
        while not stop.is_set():
            try:
                await self.once()
                if more or rounds % PRUNE_EVERY == 0:
                    more = await self._retention.prune()
                rounds += 1
            except DATABASE_FAULTS as error:
                log.warning("upkeep_failed", error=type(error).__name__)
                await self._try_to_revive()
            try:
                async with asyncio.timeout(every_seconds):
                    await stop.wait()
            except TimeoutError:
                pass

    async def _try_to_revive(self) -> None:
        if self._revive is None:
            return
        try:
            await self._revive()
        except Exception as error:  # whatever it is, the next round tries again
            log.error("revive_failed", error=type(error).__name__)

    async def once(self) -> None:
        """One round of the duties that jobs wait for."""
        await self.rescue()
        await self.end_overdue()
        await self.end_stopped()
        for queue in await self._queue.promote():
            self._notifier.queue(queue)

    async def rescue(self) -> int:
        """Jobs whose replica fell silent: back to the queue, or ended when their budget is used up or they were
        asked to stop. Returns how many."""
        moved = 0
        for lost in await self._queue.expired():
            message = "the replica that ran it fell silent"
            if lost.cancel is None and lost.failures + 1 < lost.max_attempts:
                back = Requeue(
                    job_id=lost.job_id,
                    attempt=lost.attempt,
                    expired=True,
                    counts=True,
                    # the first time at once: the loss says nothing against the job
                    delay_seconds=backoff(lost.failures) if lost.failures else 0,
                    error_code="worker_lost",
                    error_message=message,
                )
                done = bool(await self._queue.requeue([back]))
            else:
                end = Settlement(
                    job_id=lost.job_id,
                    attempt=lost.attempt,
                    expired=True,
                    counts=True,
                    **_stopped(lost.cancel) if lost.cancel else _failed("worker_lost", message, retryable=True),
                )
                done = bool(await self._queue.settle([end]))
                self._notifier.queue("callbacks")
            if done:
                moved += 1
                log.warning("lease_expired", job_id=str(lost.job_id), attempt=lost.attempt, worker=str(lost.worker))
                self._notifier.queue(lost.queue)
                self._notifier.job(lost.job_id)
        return moved

    async def end_overdue(self) -> None:
        """Jobs past a deadline: those that run are asked to stop, those that wait end here."""
        for overdue in await self._queue.overdue():
            if overdue.state == "running":
                await self._queue.flag_deadline(overdue.job_id)
                continue
            message = "not started" if overdue.error_code.startswith("start") else "not finished"
            end = _failed(overdue.error_code, f"{message} within the time that was asked for", retryable=False)
            await self._queue.settle([Settlement(job_id=overdue.job_id, **end)])
            self._notifier.job(overdue.job_id)
            self._notifier.queue("callbacks")

    async def end_stopped(self) -> None:
        """Jobs that came back to the queue although they had been asked to stop."""
        for job_id, reason in await self._queue.stopped_waiting():
            await self._queue.settle([Settlement(job_id=job_id, **_stopped(reason))])
            self._notifier.job(job_id)
            self._notifier.queue("callbacks")


def _failed(code: str, message: str, *, retryable: bool) -> dict[str, Any]:
    return {"status": Status.FAILED, "error_code": code, "error_message": message, "retryable": retryable}


def _stopped(reason: str) -> dict[str, Any]:
    if reason == CancelReason.DEADLINE:
        return _failed("deadline_exceeded", "the job's deadline passed while it ran", retryable=False)
    return {"status": Status.CANCELLED}
