"""Upkeep on a real queue: jobs that nobody looks after any more."""

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import open_pool
from db.queue import Queue, Renewal
from db.retention import Retention
from deployments.upkeep import Upkeep
from tests.deployments.conftest import Desk


@pytest.fixture
def upkeep(desk: Desk) -> Upkeep:
    return Upkeep(desk.queue, Notifier(desk.database.worker_pool), Retention(desk.database.worker_pool))


async def test_a_lost_job_goes_back_at_once_the_first_time(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold()
    await desk.expire()
    assert await upkeep.rescue() == 1
    assert await desk.queued(held.claim.job_id) == ("ready", 1)
    assert await desk.status(held.claim.job_id) == ("queued", None)
    assert await desk.events(held.claim.job_id) == ["queued", "started", "requeued worker_lost"]


async def test_a_job_that_is_lost_again_waits(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold()
    for _ in range(2):
        await desk.expire()
        await upkeep.rescue()
        await desk.queue.claim("sdxl", uuid4(), 1)
    assert await desk.queued(held.claim.job_id) == ("scheduled", 2)


async def test_a_job_that_kills_its_replicas_ends(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold(max_attempts=2)
    job_id = held.claim.job_id
    for _ in range(2):
        await desk.expire()
        assert await upkeep.rescue() == 1
        await desk.queue.claim("sdxl", uuid4(), 1)
    assert (await desk.status(job_id), await desk.queued(job_id)) == (("failed", "worker_lost"), None)
    assert (await desk.events(job_id))[-1] == "failed worker_lost"
    assert await desk.callbacks(job_id) == ["job.failed"]
    assert await desk.database.pool.fetchval("SELECT retryable FROM jobs")


async def test_a_job_whose_lease_holds_is_left_alone(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold()
    assert await upkeep.rescue() == 0
    assert await desk.queued(held.claim.job_id) == ("running", 0)


async def test_a_late_replica_can_not_take_its_job_back(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold()
    await desk.expire()
    await upkeep.rescue()
    assert await desk.queue.renew(desk.worker, [Renewal(held.claim.job_id, 1, "denoise")]) == {}


async def test_two_upkeeps_rescue_a_job_once(desk: Desk) -> None:
    held = await desk.hold()
    await desk.expire()
    notifier = Notifier(desk.database.worker_pool)
    both = [Upkeep(desk.queue, notifier, Retention(desk.database.worker_pool)) for _ in range(4)]
    assert sum(await asyncio.gather(*(upkeep.rescue() for upkeep in both))) == 1
    assert await desk.queued(held.claim.job_id) == ("ready", 1)
    await notifier.close()


@pytest.mark.parametrize(
    ("reason", "status"), [("user", ("cancelled", None)), ("deadline", ("failed", "deadline_exceeded"))]
)
async def test_a_lost_job_that_was_asked_to_stop_ends_for_that_reason(
    desk: Desk, upkeep: Upkeep, reason: str, status: tuple[str, str | None]
) -> None:
    held = await desk.hold()
    job_id = held.claim.job_id
    await (Queue(desk.database.pool).cancel(job_id) if reason == "user" else desk.queue.flag_deadline(job_id))
    await desk.expire()
    assert await upkeep.rescue() == 1
    assert (await desk.status(job_id), await desk.queued(job_id)) == (status, None)


# ------------------------------------------------------------------------------------------------------ deadlines


async def test_a_job_that_did_not_start_in_time_fails(desk: Desk, upkeep: Upkeep) -> None:
    (job_id,) = await desk.accept(start_deadline_seconds=0.0)
    await upkeep.end_overdue()
    assert await desk.status(job_id) == ("failed", "start_deadline_exceeded")
    assert await desk.callbacks(job_id) == ["job.failed"]
    assert await desk.database.pool.fetchval("SELECT retryable FROM jobs") is False


async def test_a_job_that_started_in_time_may_run_past_its_start_deadline(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold(start_deadline_seconds=60.0)
    await desk.database.pool.execute("UPDATE job_queue SET start_deadline = now() - interval '1 second'")
    await upkeep.end_overdue()
    assert await desk.queued(held.claim.job_id) == ("running", 0)
    assert await desk.database.pool.fetchval("SELECT cancel FROM job_queue") is None


async def test_a_waiting_job_past_its_deadline_fails(desk: Desk, upkeep: Upkeep) -> None:
    (job_id,) = await desk.accept(deadline_seconds=0.0)
    await upkeep.end_overdue()
    assert await desk.status(job_id) == ("failed", "deadline_exceeded")


async def test_a_running_job_past_its_deadline_is_asked_to_stop_once(desk: Desk, upkeep: Upkeep) -> None:
    held = await desk.hold(deadline_seconds=60.0)
    await desk.database.pool.execute("UPDATE job_queue SET deadline = now() - interval '1 second'")
    for _ in range(3):
        await upkeep.end_overdue()
    assert await desk.queue.renew(desk.worker, [Renewal(held.claim.job_id, 1, "denoise")]) == {
        held.claim.job_id: "deadline"
    }
    assert await desk.events(held.claim.job_id) == ["queued", "started", "cancelling"]


async def test_a_job_that_is_still_in_time_is_left_alone(desk: Desk, upkeep: Upkeep) -> None:
    (job_id,) = await desk.accept(start_deadline_seconds=60.0, deadline_seconds=60.0)
    await upkeep.once()
    assert await desk.queued(job_id) == ("ready", 0)


@pytest.mark.parametrize(
    ("reason", "status"), [("user", ("cancelled", None)), ("deadline", ("failed", "deadline_exceeded"))]
)
async def test_a_job_that_came_back_although_it_was_to_stop_ends(
    desk: Desk, upkeep: Upkeep, reason: str, status: tuple[str, str | None]
) -> None:
    (job_id,) = await desk.accept()
    await desk.database.pool.execute("UPDATE job_queue SET cancel = $1", reason)
    await upkeep.end_stopped()
    assert await desk.status(job_id) == status


# ---------------------------------------------------------------------------------------------------- the rounds


async def test_a_delay_ends_and_its_queue_is_woken(desk: Desk, upkeep: Upkeep) -> None:
    (job_id,) = await desk.accept(start_after_seconds=3600.0)
    await upkeep.once()
    assert await desk.queued(job_id) == ("scheduled", 0)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = Listener(desk.database.url, QUEUE_CHANNEL, heard.put_nowait)
    listener.start()
    async with asyncio.timeout(30):
        assert await heard.get() == ""
        await desk.database.pool.execute("UPDATE job_queue SET run_at = now()")
        await upkeep.once()
        assert await heard.get() == "sdxl"
    await listener.close()
    assert await desk.queued(job_id) == ("ready", 0)


async def test_rounds_go_on_until_they_are_stopped(desk: Desk, upkeep: Upkeep) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(upkeep.run(0.05, stop))
    held = await desk.hold()
    await desk.expire()
    await desk.until("SELECT state = 'ready' FROM job_queue")
    assert await desk.queued(held.claim.job_id) == ("ready", 1)
    stop.set()
    async with asyncio.timeout(30):
        await running


async def test_rounds_outlive_the_database_and_try_to_revive_it(desk: Desk) -> None:
    revived = asyncio.Event()

    async def revive() -> None:
        revived.set()
        raise OSError("not yet")

    pool = await open_pool(desk.database.url, max_size=1)
    await pool.close()
    stop = asyncio.Event()
    upkeep = Upkeep(Queue(pool), Notifier(pool), Retention(pool), revive)
    running = asyncio.create_task(upkeep.run(0.01, stop))
    async with asyncio.timeout(30):
        for _ in range(2):
            await revived.wait()
            revived.clear()
        stop.set()
        await running


async def test_old_history_of_ended_jobs_is_forgotten(desk: Desk, upkeep: Upkeep) -> None:
    pool: asyncpg.Pool = desk.database.pool
    ended, open_job = await desk.accept(2)
    await Queue(pool).cancel(ended)
    await pool.execute("UPDATE job_events SET at = now() - interval '31 days'")
    await pool.execute("UPDATE jobs SET completed_at = now() - interval '31 days' WHERE id = $1", ended)
    stop = asyncio.Event()
    running = asyncio.create_task(upkeep.run(60, stop))
    await desk.until("SELECT count(*) = 0 FROM job_events WHERE job_id = $1", ended)
    stop.set()
    await running
    assert await desk.events(open_job) == ["queued"]
    assert await pool.fetchval("SELECT count(*) FROM jobs") == 2


async def test_a_backlog_of_old_rows_goes_in_every_round_a_batch_at_a_time(desk: Desk) -> None:
    (job_id,) = await desk.accept()
    pool: asyncpg.Pool = desk.database.pool
    await pool.execute(
        """INSERT INTO workers (id, queue, node, pid, state, seen_at)
           SELECT gen_random_uuid(), 'sdxl', 'n', 1, 'stopped', now() - interval '2 days' FROM generate_series(1, 7)"""
    )
    stop = asyncio.Event()
    retention = Retention(desk.database.worker_pool, batch=2)
    running = asyncio.create_task(Upkeep(desk.queue, Notifier(pool), retention).run(0.001, stop))
    await desk.until("SELECT count(*) = 0 FROM workers")
    stop.set()
    await running
    assert await desk.queued(job_id) == ("ready", 0)


async def test_upkeep_needs_no_more_than_a_replicas_rights(desk: Desk, upkeep: Upkeep) -> None:
    assert await desk.database.worker_pool.fetchval("SELECT current_user::text") == "ourvidz_worker"
    await upkeep.once()
    await Retention(desk.database.worker_pool).prune()
