"""The claim loop on a real queue: what it takes, what it keeps, and when it lets go."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from db.jobs import Status
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.queue import Queue, Requeue, Settlement
from deployments.claims import ClaimLoop, backoff
from deployments.held import Held, StopReason
from tests.deployments.conftest import Desk, Road

Work = Callable[[Held], Awaitable[None]]
LONG = 3600.0  # a poll that does not come in a test's time


class Hands:
    """Work that holds each job until it is told to end it, or stops as replicas do."""

    def __init__(self, desk: Desk, queue: Queue | None = None) -> None:
        self.queue = queue or desk.queue
        self.taken: asyncio.Queue[Held] = asyncio.Queue()
        self.ended: asyncio.Queue[Held] = asyncio.Queue()
        self.at_once = self.most = 0
        self._go: dict[UUID, asyncio.Event] = {}

    async def __call__(self, held: Held) -> None:
        go = self._go[held.claim.job_id] = asyncio.Event()
        held.on_stop = go.set
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.taken.put_nowait(held)
        try:
            await go.wait()
            await self._end(held)
        finally:
            self.at_once -= 1
            self.ended.put_nowait(held)

    async def _end(self, held: Held) -> None:
        job_id, attempt = held.claim.job_id, held.claim.attempt
        if held.stop_reason is StopReason.DRAIN:
            await self.queue.requeue([Requeue(job_id=job_id, attempt=attempt)])
        elif held.stop_reason is None:
            await self.queue.settle([Settlement(job_id=job_id, attempt=attempt, status=Status.COMPLETED)])

    def finish(self, held: Held) -> None:
        self._go[held.claim.job_id].set()

    async def take(self) -> Held:
        async with asyncio.timeout(30):
            return await self.taken.get()

    async def end(self) -> Held:
        async with asyncio.timeout(30):
            return await self.ended.get()


@asynccontextmanager
async def looping(desk: Desk, work: Work, **changes: Any) -> AsyncIterator[ClaimLoop]:
    options: dict[str, Any] = {"slots": 1, "lease_seconds": 30, "renew_seconds": 0.2, "poll_seconds": LONG}
    queue = changes.pop("queue", desk.queue)
    loop = ClaimLoop(queue, "sdxl", desk.worker, work, **(options | changes))
    loop.start()
    try:
        yield loop
    finally:
        await loop.drain(0)


# ------------------------------------------------------------------------------------------------------ claiming


async def test_no_more_jobs_are_taken_than_there_are_slots(desk: Desk) -> None:
    await desk.accept(5)
    hands = Hands(desk)
    async with looping(desk, hands, slots=2) as loop:
        first, _ = await hands.take(), await hands.take()
        assert loop.running == 2
        counts = await desk.database.pool.fetch("SELECT state::text, count(*) FROM job_queue GROUP BY 1 ORDER BY 1")
        assert [tuple(row) for row in counts] == [("ready", 3), ("running", 2)]
        hands.finish(first)
        for _ in range(3):
            hands.finish(await hands.take())
        await desk.until("SELECT count(*) = 4 FROM jobs WHERE status = 'completed'")
    assert hands.most == 2


async def test_interactive_jobs_come_in_beside_background_ones(desk: Desk) -> None:
    await desk.accept(5, klass=0)
    hands = Hands(desk)
    async with looping(desk, hands, slots=2) as loop:
        background = [await hands.take(), await hands.take()]
        urgent = await desk.accept(3, klass=1)
        loop.wake()
        taken = [await hands.take(), await hands.take()]
        assert [held.claim.job_id for held in taken] == urgent[:2]  # no more of them than there are slots
        hands.finish(background[0])
        hands.finish(taken[0])
        assert (await hands.take()).claim.job_id == urgent[2]
        for held in [background[1], taken[1]]:
            hands.finish(held)
        await desk.until("SELECT count(*) = 4 FROM jobs WHERE status = 'completed'")


async def test_slots_of_work_without_an_engine_are_not_shared(desk: Desk) -> None:
    await desk.accept(2, klass=0)
    hands = Hands(desk)
    async with looping(desk, hands, slots=2, shared=False) as loop:
        background = [await hands.take(), await hands.take()]
        urgent = await desk.accept(2, klass=1)
        loop.wake()
        hands.finish(background[0])
        assert (await hands.take()).claim.job_id == urgent[0]
        hands.finish(background[1])
        hands.finish(await hands.take())
        await desk.until("SELECT count(*) = 3 FROM jobs WHERE status = 'completed'")
    assert hands.most == 2


async def test_a_single_slot_is_not_shared(desk: Desk) -> None:
    await desk.accept(1, klass=0)
    hands = Hands(desk)
    async with looping(desk, hands, slots=1, poll_seconds=0.05):
        background = await hands.take()
        await desk.accept(1, klass=1)
        hands.finish(background)
        assert (await hands.take()).claim.klass == 1
    assert hands.most == 1


async def test_a_free_slot_takes_the_next_job_without_a_poll(desk: Desk) -> None:
    ids = await desk.accept(3)
    hands = Hands(desk)
    async with looping(desk, hands):
        seen = []
        for _ in ids:
            held = await hands.take()
            seen.append(held.claim.job_id)
            hands.finish(held)
    assert seen == ids


async def test_a_job_that_has_left_its_slot_makes_room_for_the_next(desk: Desk) -> None:
    first, second = await desk.accept(2)
    hands = Hands(desk)
    async with looping(desk, hands):
        storing = await hands.take()
        assert storing.claim.job_id == first
        storing.leave_slot()
        running = await hands.take()
        assert running.claim.job_id == second
        assert hands.at_once == 2
        hands.finish(storing)
        hands.finish(running)
        assert {(await hands.end()).claim.job_id for _ in range(2)} == {first, second}


async def test_a_slot_is_left_once(desk: Desk) -> None:
    await desk.accept(1)
    (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
    left: list[bool] = []
    held = Held(claim, on_leave=lambda: left.append(held.in_slot))
    held.leave_slot()
    held.leave_slot()
    assert left == [False]


async def test_jobs_that_have_left_their_slots_do_not_pile_up(desk: Desk) -> None:
    await desk.accept(5)
    hands = Hands(desk)
    async with looping(desk, hands, slots=2):
        held = [await hands.take() for _ in range(2)]
        for one in held:
            one.leave_slot()
        held += [await hands.take() for _ in range(2)]
        for one in held[2:]:
            one.leave_slot()  # four in hand, and every slot is free
        hands.finish(held[0])
        await hands.end()
        await hands.take()
        assert hands.most == 4


async def test_a_wake_up_is_as_good_as_a_poll(desk: Desk) -> None:
    hands = Hands(desk)
    async with looping(desk, hands) as loop:
        (job_id,) = await desk.accept()
        loop.wake()
        held = await hands.take()
        assert held.claim.job_id == job_id
        hands.finish(held)


async def test_a_notification_wakes_the_loop(desk: Desk) -> None:
    hands, listening = Hands(desk), asyncio.Event()
    notifier = Notifier(desk.database.pool)
    async with looping(desk, hands) as loop:

        def hear(payload: str) -> None:
            listening.set()
            loop.wake()

        listener = Listener(desk.database.url, QUEUE_CHANNEL, hear)
        listener.start()
        async with asyncio.timeout(30):
            await listening.wait()
        await desk.accept()
        notifier.queue("sdxl")
        hands.finish(await hands.take())
        await listener.close()
        await notifier.close()


async def test_a_lost_notification_costs_a_poll(desk: Desk) -> None:
    hands = Hands(desk)
    async with looping(desk, hands, poll_seconds=0.05):
        await desk.accept()
        hands.finish(await hands.take())


async def test_nothing_is_claimed_while_it_may_not_be(desk: Desk) -> None:
    hands, asked, open_ = Hands(desk), asyncio.Event(), False

    def may_claim() -> bool:
        asked.set()
        return open_

    await desk.accept()
    async with looping(desk, hands, may_claim=may_claim) as loop:
        async with asyncio.timeout(30):
            await asked.wait()
        assert loop.running == 0
        open_ = True
        loop.wake()
        hands.finish(await hands.take())


async def test_loops_side_by_side_take_no_job_twice(desk: Desk) -> None:
    ids = await desk.accept(12)
    first, second = Hands(desk), Hands(desk)
    other = Desk(desk.database)
    seen: list[UUID] = []

    async def finish_all(hands: Hands) -> None:
        while True:
            held = await hands.taken.get()
            seen.append(held.claim.job_id)
            hands.finish(held)

    async with looping(desk, first, slots=3), looping(other, second, slots=3):
        tasks = [asyncio.create_task(finish_all(hands)) for hands in (first, second)]
        await desk.until("SELECT count(*) = 12 FROM jobs WHERE status = 'completed'")
        for task in tasks:
            task.cancel()
    assert sorted(seen) == sorted(ids)


# ---------------------------------------------------------------------------------------------------- the lease


async def test_a_lease_is_renewed_while_the_work_goes_on(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands, lease_seconds=2):
        held = await hands.take()
        lease = await desk.database.pool.fetchval("SELECT lease_until FROM job_queue")
        await desk.until("SELECT lease_until > $1::timestamptz + interval '2 seconds' FROM job_queue", lease)
        assert held.stop_reason is None
        hands.finish(held)
        await hands.end()
    assert await desk.status(job_id) == ("completed", None)


async def test_a_lease_is_not_renewed_when_the_work_stands_still(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.held.PHASE_ALLOWANCE", {"waiting": 0.0})
    lost = []
    await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands, lease_seconds=1, on_lost=lambda: lost.append(1)):
        held = await hands.take()
        lease = await desk.database.pool.fetchval("SELECT lease_until FROM job_queue")
        assert await hands.end() is held
        assert held.stop_reason is StopReason.LOST
        assert await desk.database.pool.fetchval("SELECT lease_until FROM job_queue") == lease
    assert lost == [1]


async def test_progress_keeps_the_lease_beyond_the_allowance(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.held.PHASE_ALLOWANCE", {"denoise": 0.8})
    (job_id,) = await desk.accept()

    async def work(held: Held) -> None:
        # thirty steps of 0.1 seconds: several times the allowance, and the lease
        for step in range(30):
            held.report("denoise", step, 30)
            wait = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.1, wait.set_result, None)
            await wait
        assert held.stop_reason is None
        await desk.queue.settle([Settlement(job_id=job_id, attempt=1, status=Status.COMPLETED)])

    async with looping(desk, work, lease_seconds=2):
        await desk.until("SELECT status = 'completed' FROM jobs")


async def test_progress_is_told_with_the_renewals(desk: Desk) -> None:
    await desk.accept()
    news: list[UUID] = []
    hands = Hands(desk)
    async with looping(desk, hands, renew_seconds=60, on_news=news.append):
        held = await hands.take()
        held.report("denoise", 3, 15)
        row = await desk.until("SELECT (phase, step, steps)::text FROM job_queue WHERE phase = 'denoise'")
        assert row == "(denoise,3,15)"
        held.report("denoise", 4, 15)  # once this is told, what came before it was
        await desk.until("SELECT step = 4 FROM job_queue")
        hands.finish(held)
    assert len(news) >= 2
    assert set(news) == {held.claim.job_id}


async def test_a_job_that_another_one_runs_is_let_go(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    lost = []
    hands = Hands(desk)
    async with looping(desk, hands, on_lost=lambda: lost.append(1)):
        held = await hands.take()
        await desk.take(job_id)
        assert await hands.end() is held
    assert (held.stop_reason, lost) == (StopReason.LOST, [1])
    assert await desk.queued(job_id) == ("running", 0)


async def test_a_lost_job_frees_its_slot(desk: Desk) -> None:
    first, second = await desk.accept(2)
    hands = Hands(desk)
    async with looping(desk, hands):
        assert (await hands.take()).claim.job_id == first
        await desk.take(first)
        held = await hands.take()
        assert held.claim.job_id == second
        hands.finish(held)


async def test_a_job_that_is_being_ended_is_not_taken_for_lost(desk: Desk) -> None:
    ending, other = await desk.accept(2)
    lost: list[int] = []
    hands = Hands(desk)
    async with looping(desk, hands, slots=2, on_lost=lambda: lost.append(1)):
        held = {taken.claim.job_id: taken for taken in (await hands.take(), await hands.take())}
        held[ending].settling = True
        await desk.queue.settle([Settlement(job_id=ending, attempt=1, status=Status.COMPLETED)])
        for _ in range(2):  # renewals of both, of which one is missing
            lease = await desk.database.pool.fetchval("SELECT lease_until FROM job_queue")
            await desk.until("SELECT lease_until > $1 FROM job_queue", lease)
        assert (lost, held[ending].stop_reason) == ([], None)
        for one in held.values():
            hands.finish(one)
    assert await desk.status(other) == ("completed", None)


async def test_a_fault_that_work_does_not_let_go_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.claims.STOP_ALLOWANCE", 0.0)
    (job_id,) = await desk.accept()
    stuck, go = asyncio.Event(), asyncio.Event()

    async def work(held: Held) -> None:
        held.on_stop = stuck.set
        await go.wait()  # heeds no stop

    async with looping(desk, work) as loop:
        await desk.until("SELECT state = 'running' FROM job_queue")
        assert loop.fault is None
        await desk.take(job_id)
        async with asyncio.timeout(30):
            await stuck.wait()
        assert loop.fault is not None
        go.set()
    assert loop.fault is None


# ------------------------------------------------------------------------------------------------------ stopping


async def test_a_cancel_stops_the_work(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands):
        held = await hands.take()
        assert await Queue(desk.database.pool).cancel(job_id) == "cancelling"
        assert await hands.end() is held
    assert held.stop_reason is StopReason.USER


async def test_a_deadline_stops_the_work(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands):
        held = await hands.take()
        assert await desk.queue.flag_deadline(job_id)
        assert await hands.end() is held
    assert held.stop_reason is StopReason.DEADLINE


def test_the_first_reason_stands_but_a_lost_lease_overrules_it() -> None:
    held = Held(claim=None)  # type: ignore[arg-type]
    held.stop(StopReason.USER)
    held.stop(StopReason.DRAIN)
    assert held.stop_reason is StopReason.USER
    held.stop(StopReason.LOST)
    assert held.stop_reason is StopReason.LOST


async def test_a_drain_lets_the_work_finish_and_takes_no_more(desk: Desk) -> None:
    first, second = await desk.accept(2)
    hands = Hands(desk)
    loop = ClaimLoop(
        desk.queue, "sdxl", desk.worker, hands, slots=1, lease_seconds=30, renew_seconds=0.2, poll_seconds=0.05
    )
    loop.start()
    held = await hands.take()
    draining = asyncio.create_task(loop.drain(60))
    lease = await desk.database.pool.fetchval("SELECT max(lease_until) FROM job_queue")
    await desk.until("SELECT max(lease_until) > $1 FROM job_queue", lease)  # it goes on renewing
    assert not draining.done()
    hands.finish(held)
    await draining
    assert await desk.status(first) == ("completed", None)
    assert await desk.queued(second) == ("ready", 0)


async def test_a_drain_hands_back_what_does_not_finish(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands):
        held = await hands.take()
    assert held.stop_reason is StopReason.DRAIN
    assert await desk.queued(job_id) == ("ready", 0)


async def test_a_drain_of_an_idle_loop_ends_at_once(desk: Desk) -> None:
    async with looping(desk, Hands(desk)) as loop:
        await loop.drain(60)
        await desk.accept()
        loop.wake()
    assert loop.running == 0


async def test_a_drain_waits_for_the_claim_that_is_under_way(desk: Desk, road: Road, far_pool: asyncpg.Pool) -> None:
    hands = Hands(desk)
    loop = ClaimLoop(
        Queue(far_pool), "sdxl", desk.worker, hands, slots=1, lease_seconds=30, renew_seconds=0.2, poll_seconds=LONG
    )
    loop.start()
    await desk.accept()
    loop.wake()
    hands.finish(await hands.take())  # the statement is prepared, so that the next claim just runs
    await hands.end()
    await desk.until("SELECT count(*) = 0 FROM job_queue")
    async with asyncio.timeout(30):
        while not loop._wake._waiters:  # noqa: ASYNC110 - the claim that followed that end has its answer, and the loop sleeps
            await asyncio.sleep(0)
    (job_id,) = await desk.accept()
    road.hold_answers()
    loop.wake()
    await desk.until("SELECT state = 'running' FROM job_queue")  # claimed, and we have not heard of it
    draining = asyncio.create_task(loop.drain(0))
    await asyncio.sleep(0)
    road.let_answers_through()
    await draining
    assert await desk.queued(job_id) == ("ready", 0), (
        "a job that was claimed during a drain must not wait for its lease"
    )


# ------------------------------------------------------------------------------------------------------- faults


async def test_an_error_in_the_work_puts_the_job_back(desk: Desk) -> None:
    (job_id,) = await desk.accept(max_attempts=3)

    async def work(held: Held) -> None:
        raise KeyError("a bug")

    async with looping(desk, work) as loop:
        await desk.until("SELECT state = 'scheduled' FROM job_queue")
        assert loop.fault is None
    assert await desk.queued(job_id) == ("scheduled", 1)
    assert await desk.events(job_id) == ["queued", "started", "requeued internal"]
    message = await desk.database.pool.fetchval(
        "SELECT data ->> 'error_message' FROM job_events WHERE kind = 'requeued'"
    )
    assert message == "KeyError in the replica"


async def test_an_error_in_the_work_uses_up_the_budget(desk: Desk) -> None:
    (job_id,) = await desk.accept(max_attempts=1)

    async def work(held: Held) -> None:
        raise KeyError("a bug")

    async with looping(desk, work):
        await desk.until("SELECT status = 'failed' FROM jobs")
    assert await desk.status(job_id) == ("failed", "internal")
    assert await desk.callbacks(job_id) == ["job.failed"]


async def test_the_loop_outlives_a_cut_connection(desk: Desk, road: Road, far_pool: asyncpg.Pool) -> None:
    hands = Hands(desk)
    async with looping(desk, hands, queue=Queue(far_pool), poll_seconds=0.05) as loop:
        for _ in range(3):
            road.cut()
            await desk.accept()
            hands.finish(await hands.take())
            await hands.end()
        assert loop.fault is None


async def test_without_the_database_a_job_is_let_go_before_its_lease_ends(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    (job_id,) = await desk.accept()
    hands = Hands(desk)
    async with looping(desk, hands, queue=Queue(far_pool), lease_seconds=2):
        held = await hands.take()
        road.hold_answers()
        assert await hands.end() is held
        assert held.stop_reason is StopReason.LOST
        road.let_answers_through()
    assert await desk.queued(job_id) == ("running", 0)


@pytest.mark.parametrize("failures", range(12))
def test_backoff_grows_to_its_cap(failures: int) -> None:
    plain = min(120.0, 2.0 * 2**failures)
    waits = [backoff(failures) for _ in range(200)]
    assert all(0.8 * plain <= wait <= 1.2 * plain for wait in waits)
    assert len(set(waits)) > 100
