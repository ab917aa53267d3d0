"""The claim loop: how a replica takes jobs, keeps them, and lets them go. No Ray and no model in it.

A replica pulls, because it alone knows its free slots. For every job that it holds it renews the lease, but only
while the work really advances: a wedged engine loses its jobs to a healthy replica, though its process lives.
What a renewal brings back decides the rest: a job that is missing was lost, and one with a cancel reason must stop.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from db.jobs import Status
from db.pool import CONNECTION_FAULTS, DATABASE_FAULTS
from db.queue import Claim, Fit, Queue, Renewal, Requeue, Settlement
from deployments.held import Held, StopReason

log = structlog.get_logger()

STOP_ALLOWANCE = 120.0  # for a step or a decode that can't be interrupted, after the lease is lost
REFUSED_ALLOWANCE = 60.0  # of claims that Postgres answers with an error, before the replica counts as ill
HAND_BACK_SECONDS = 3.0  # for a draining job to stop at its next step, before it is handed back regardless
PROGRESS_SECONDS = 0.5  # progress goes out at most twice a second
HELD_PER_SLOT = 2  # jobs at most, with those that have left their slot: finished work must not pile up
INTERACTIVE = 1  # the class that others give way to


class ClaimLoop:
    """Claims for the free slots of one replica and runs `work` on every job.

    A slot is free again when its job has left it or ended, but no more than twice as many jobs as slots are held.
    Beside these, interactive jobs are claimed where background ones hold the slots, as many as hold them: the engine
    lets them go first. A single slot is not shared, nor are those of work without an engine (`shared`).
    `work` must end every job that it gets (settle it or put it back) and must return soon after `held.stop_reason`
    is set. `wake` sets the loop going at once; without it the queue is polled.
    """

    def __init__(
        self,
        queue: Queue,
        name: str,
        worker: UUID,
        work: Callable[[Held], Awaitable[None]],
        *,
        slots: int,
        lease_seconds: float,
        renew_seconds: float,
        poll_seconds: float,
        on_news: Callable[[UUID], None] = lambda job_id: None,
        on_lost: Callable[[], None] = lambda: None,
        may_claim: Callable[[], bool] = lambda: True,
        fit: Callable[[], Fit | None] = lambda: None,
        shared: bool = True,
    ) -> None:
        self._queue, self._name, self._worker, self._work = queue, name, worker, work
        self._slots, self._shared = slots, shared and slots > 1
        self._lease, self._renew, self._poll = lease_seconds, renew_seconds, poll_seconds
        self._on_news, self._on_lost, self._may_claim, self._fit = on_news, on_lost, may_claim, fit
        self._wake = asyncio.Event()
        self._claiming = True
        self._tasks: dict[asyncio.Task[None], Held] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._died: str | None = None
        self._refused_since: float | None = None
        self._unheard = False  # a claim's answer was lost, and jobs may be ours that we don't know of

    @property
    def fault(self) -> str | None:
        """What is wrong beyond repair: a loop of ours has died, work does not stop although its
        lease is lost, or Postgres refuses our claims."""
        now = time.monotonic()
        if any(h.lost_at is not None and now - h.lost_at > STOP_ALLOWANCE for h in self._tasks.values()):
            return "the engine does not let go of a job that is lost"
        if self._refused_since is not None and now - self._refused_since > REFUSED_ALLOWANCE:
            return "Postgres has refused every claim for a while"
        return self._died

    @property
    def running(self) -> int:
        """How many jobs are in our hands."""
        return len(self._tasks)

    def _room(self) -> tuple[int, int]:
        """For how many jobs there is room, and of which class they must be at least."""
        in_slots = [held.claim.klass for held in self._tasks.values() if held.in_slot]
        more = HELD_PER_SLOT * self._slots - len(self._tasks)
        free = min(self._slots - len(in_slots), more)
        if free > 0 or not self._shared:
            return free, 0
        background = sum(klass < INTERACTIVE for klass in in_slots)
        return min(self._slots - len(in_slots), more) + background, INTERACTIVE

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def start(self) -> None:
        """Begin claiming."""
        self._loops = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]
        for loop in self._loops:
            loop.add_done_callback(self._note_end)

    async def drain(self, seconds: float) -> None:
        """Stop claiming, let the running jobs finish for so long, then hand back the rest. Renewals go on meanwhile."""
        self._claiming = False
        self._wake.set()
        if self._loops:  # a claim that is under way must come back, or its jobs would wait for their leases
            await asyncio.wait(self._loops[:1], timeout=self._lease)
        try:
            await self._give_back_unheard()
        except CONNECTION_FAULTS as error:
            log.warning("claim_unheard_kept", queue=self._name, error=type(error).__name__)  # its lease will run out
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for held in list(self._tasks.values()):
            held.stop(StopReason.DRAIN)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HAND_BACK_SECONDS)
        await self._hand_back()
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def _hand_back(self) -> None:
        """Put back what has not stopped by now, such as a job in the middle of a long step. Serve would kill us before
        it stopped; the fence makes whatever its engine still does harmless."""
        for held in list(self._tasks.values()):
            back = Requeue(job_id=held.claim.job_id, attempt=held.claim.attempt, error_code="drained")
            try:
                moved = await self._queue.requeue([back])
            except DATABASE_FAULTS as error:
                log.warning("requeue_failed", job_id=str(held.claim.job_id), error=type(error).__name__)
                continue
            if moved:
                held.stop(StopReason.LOST)
                self._on_news(held.claim.job_id)

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            self._died = f"{type(task.exception()).__name__} in the claim loop"
            log.error("claim_loop_died", queue=self._name, error=self._died)

    async def _claim_forever(self) -> None:
        while self._claiming:
            self._wake.clear()
            free, least_class = self._room()
            claims: list[Claim] = []
            if free > 0 and self._may_claim():
                started = time.monotonic()
                try:
                    await self._give_back_unheard()
                    claims = await self._queue.claim(
                        self._name, self._worker, free, self._lease, self._fit(), least_class
                    )
                    self._refused_since = None
                except CONNECTION_FAULTS as error:
                    self._unheard = True
                    log.warning("claim_failed", queue=self._name, error=type(error).__name__)
                except asyncpg.PostgresError as error:  # Postgres answers, and says no
                    log.error("claim_refused", queue=self._name, error=type(error).__name__)
                    self._refused_since = self._refused_since or started
                for claim in claims:
                    self._begin(Held(claim, lease_ends=started + self._lease, on_leave=self.wake))
            if len(claims) == free and free > 0:
                continue  # there may be more for the slots that are free by now
            try:
                async with asyncio.timeout(self._poll * random.uniform(0.8, 1.2)):  # noqa: S311 - jitter
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _give_back_unheard(self) -> None:
        """Put back what a claim took whose answer was lost on the way: nothing of it was run, and it must not wait for
        its lease."""
        if not self._unheard:
            return
        known = [held.claim.job_id for held in self._tasks.values()]
        for job_id, attempt in await self._queue.unheard(self._worker, known):
            log.warning("claim_unheard", job_id=str(job_id), attempt=attempt, queue=self._name)
            await self._queue.requeue([Requeue(job_id=job_id, attempt=attempt, error_code="claim_unheard")])
        self._unheard = False

    def _begin(self, held: Held) -> None:
        log.info("job_claimed", job_id=str(held.claim.job_id), attempt=held.claim.attempt, queue=self._name)
        task = asyncio.create_task(self._run(held))
        self._tasks[task] = held
        task.add_done_callback(self._end)
        self._on_news(held.claim.job_id)

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(task, None)
        self._wake.set()

    async def _run(self, held: Held) -> None:
        try:
            await self._work(held)
        except Exception as error:
            # the work ends its jobs itself; whatever escapes it is our fault, and the job must not wait for its lease
            log.exception("job_escaped", job_id=str(held.claim.job_id), attempt=held.claim.attempt)
            message = f"{type(error).__name__} in the replica"
            try:
                await self._put_back(held.claim, message)
            except DATABASE_FAULTS:
                log.warning("requeue_failed", job_id=str(held.claim.job_id))  # the lease will run out

    async def _put_back(self, claim: Claim, message: str) -> None:
        told: dict[str, Any] = {"error_code": "internal", "error_message": message, "counts": True}
        if claim.failures + 1 < claim.max_attempts:
            delay = backoff(claim.failures)
            await self._queue.requeue(
                [Requeue(job_id=claim.job_id, attempt=claim.attempt, delay_seconds=delay, **told)]
            )
        else:
            end = Settlement(job_id=claim.job_id, attempt=claim.attempt, status=Status.FAILED, retryable=True, **told)
            await self._queue.settle([end])

    async def _renew_forever(self) -> None:
        renewed = 0.0
        while True:
            await asyncio.sleep(min(PROGRESS_SECONDS, self._renew))
            due = time.monotonic() - renewed >= self._renew
            held = [h for h in self._tasks.values() if h.stop_reason is not StopReason.LOST and not h.stalled]
            news = [h for h in held if h.reported != h.news]
            if not due and not news:
                continue
            chosen = held if due else news
            started = time.monotonic()
            if chosen and await self._renew_once(chosen, started):
                for h in news:
                    self._on_news(h.claim.job_id)
            if due:
                renewed = started
            self._give_up_late(started)

    async def _renew_once(self, held: list[Held], started: float) -> bool:
        said = [(h, h.news) for h in held]
        renewals = [Renewal(h.claim.job_id, h.claim.attempt, h.phase, h.step, h.steps, h.preview) for h in held]
        # a Postgres that takes and never answers must not keep us from letting go in time. The statement is left to
        # itself, because to end it in good order takes an answer as well
        renewing = asyncio.create_task(self._queue.renew(self._worker, renewals, self._lease))
        renewing.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may fail unheard
        try:
            if not (await asyncio.wait({renewing}, timeout=self._lease / 4))[0]:
                renewing.cancel()
                raise TimeoutError
            kept = renewing.result()
        except DATABASE_FAULTS as error:
            log.warning("renew_failed", queue=self._name, error=type(error).__name__, jobs=len(held))
            return False
        still_here = {id(h) for h in self._tasks.values()}
        for h, reported in said:
            if h.claim.job_id in kept:
                h.lease_ends, h.reported = started + self._lease, reported
                if kept[h.claim.job_id] is not None:
                    h.stop(StopReason(kept[h.claim.job_id] or StopReason.USER))
            elif id(h) in still_here and not h.settling:
                self._lose(h)
        return True

    def _give_up_late(self, now: float) -> None:
        """Without Postgres we can't know: shortly before the lease ends, by our own clock, we let go."""
        for h in list(self._tasks.values()):
            if h.stop_reason is not StopReason.LOST and now > h.lease_ends - min(5.0, self._lease / 4):
                self._lose(h)

    def _lose(self, held: Held) -> None:
        log.warning(
            "lease_lost",
            job_id=str(held.claim.job_id),
            attempt=held.claim.attempt,
            phase=held.phase,
            stalled=held.stalled,
        )
        held.lost_at = time.monotonic()
        held.stop(StopReason.LOST)
        self._on_lost()


def backoff(failures: int, base: float = 2.0, cap: float = 120.0) -> float:
    """Seconds before the next try after so many failures: exponential, and jittered."""
    return jittered(min(cap, base * 2**failures))


def jittered(seconds: float) -> float:
    """The same with 20 % of jitter either way."""
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311
