"""How a replica ends its jobs, in every case, and when nobody knows whether it did."""

import asyncio
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from db.jobs import Jobs, Status
from db.pool import CONNECTION_FAULTS
from db.queue import Queue, Requeue, Settlement
from deployments.endings import Endings, Outcome
from deployments.held import Held, StopReason
from models.engine import GenerationError, GenerationFailed, InvalidInput
from models.lora.files import LoraNoRoom
from tests.db.test_queue import asset
from tests.deployments.conftest import Desk, Road


@pytest.fixture
def endings(desk: Desk) -> Endings:
    return Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)


def completed(desk: Desk, held: Held) -> Settlement:
    job_id, attempt = held.claim.job_id, held.claim.attempt
    return Settlement(
        job_id=job_id, attempt=attempt, status=Status.COMPLETED, worker=desk.worker, assets=[asset(job_id, attempt)]
    )


async def assets(desk: Desk) -> int:
    count: int = await desk.database.pool.fetchval("SELECT count(*) FROM workspace_assets")
    return count


# --------------------------------------------------------------------------------------------------------- settle


async def test_settle_ends_a_job_once(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    end = completed(desk, held)
    assert await endings.settle(held, end)
    assert await endings.settle(held, end), "it is written, by us, however often we ask"
    assert (await desk.status(held.claim.job_id), await assets(desk)) == (("completed", None), 1)
    assert await desk.callbacks(held.claim.job_id) == ["job.completed"]


async def test_settle_of_a_lost_job_changes_nothing(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    await desk.take(held.claim.job_id)
    assert not await endings.settle(held, completed(desk, held))
    assert (await desk.status(held.claim.job_id), await assets(desk)) == (("processing", None), 0)


async def test_settle_does_not_take_the_end_of_another_for_its_own(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    late = Endings(desk.queue, Jobs(desk.database.worker_pool), uuid4(), 30)
    assert await endings.settle(held, completed(desk, held))
    other = Settlement(job_id=held.claim.job_id, attempt=1, status=Status.COMPLETED, worker=uuid4())
    assert not await late.settle(held, other)


async def test_settle_that_was_committed_but_not_heard_of_is_known_as_written(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    far = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 30)
    before = await desk.hold()
    await far.settle(before, completed(desk, before))  # the statement is prepared, so that the next one just runs
    held = await desk.hold()
    road.hold_answers()
    ending = asyncio.create_task(far.settle(held, completed(desk, held)))
    await desk.until("SELECT status = 'completed' FROM jobs WHERE id = $1", held.claim.job_id)
    assert not ending.done()
    road.cut()
    async with asyncio.timeout(30):
        assert await ending
    assert await assets(desk) == 2
    assert await desk.events(held.claim.job_id) == ["queued", "started", "completed"]
    assert await desk.callbacks(held.claim.job_id) == ["job.completed"]


async def test_settle_that_never_arrived_is_repeated(desk: Desk, road: Road, far_pool: asyncpg.Pool) -> None:
    held = await desk.hold()
    far = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 30)
    blocker = await asyncpg.connect(desk.database.url)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("SELECT 1 FROM job_queue FOR UPDATE")
    ending = asyncio.create_task(far.settle(held, completed(desk, held)))
    victims = """SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity
                 WHERE wait_event_type = 'Lock' AND datname = current_database()"""
    await desk.until(victims)
    await transaction.rollback()
    await blocker.close()
    async with asyncio.timeout(30):
        assert await ending
    assert (await desk.status(held.claim.job_id), await assets(desk)) == (("completed", None), 1)


async def test_settle_of_a_job_that_was_lost_while_nobody_heard_is_not_ours(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    held = await desk.hold()
    far = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 30)
    await desk.take(held.claim.job_id)
    road.hold_answers()
    ending = asyncio.create_task(far.settle(held, completed(desk, held)))
    statement = """SELECT count(*) > 0 FROM pg_stat_activity
                   WHERE query LIKE '%gone AS%' AND pid <> pg_backend_pid() AND datname = current_database()"""
    await desk.until(statement)
    road.cut()
    async with asyncio.timeout(30):
        assert not await ending
    assert await assets(desk) == 0


async def test_while_it_settles_a_missing_job_proves_nothing(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    assert not held.settling
    await endings.settle(held, completed(desk, held))
    assert held.settling


async def test_settle_waits_for_a_database_that_is_away_as_long_as_a_lease(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    held = await desk.hold()
    far = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 0.1)
    await far_pool.fetchval("SELECT 1")
    road.close()
    with pytest.raises(CONNECTION_FAULTS):
        await far.settle(held, completed(desk, held))
    assert (await desk.status(held.claim.job_id)) == ("processing", None)
    patient = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 30)
    ending = asyncio.create_task(patient.settle(held, completed(desk, held)))
    await road.refused(3)
    road.open()
    async with asyncio.timeout(30):
        assert await ending
    assert await desk.status(held.claim.job_id) == ("completed", None)


# -------------------------------------------------------------------------------------------------------- requeue


async def test_requeue_that_was_committed_but_not_heard_of_is_known_as_written(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    far = Endings(Queue(far_pool), Jobs(far_pool), desk.worker, 30)
    before = await desk.hold()
    await far.requeue(before, Requeue(job_id=before.claim.job_id, attempt=1, delay_seconds=3600))
    held = await desk.hold()
    job_id = held.claim.job_id
    road.hold_answers()
    moving = asyncio.create_task(far.requeue(held, Requeue(job_id=job_id, attempt=1, counts=True)))
    await desk.until("SELECT state = 'ready' FROM job_queue WHERE job_id = $1", job_id)
    assert not moving.done()
    road.cut()
    async with asyncio.timeout(30):
        assert await moving is Outcome.REQUEUED
    assert await desk.queued(job_id) == ("ready", 1), "and it is not counted twice"
    assert await desk.events(job_id) == ["queued", "started", "requeued"]


async def test_requeue_puts_a_job_back(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    assert await endings.requeue(held, Requeue(job_id=held.claim.job_id, attempt=1)) is Outcome.REQUEUED
    assert await desk.queued(held.claim.job_id) == ("ready", 0)


async def test_requeue_of_a_lost_job_changes_nothing(desk: Desk, endings: Endings) -> None:
    held = await desk.hold()
    await desk.take(held.claim.job_id)
    assert await endings.requeue(held, Requeue(job_id=held.claim.job_id, attempt=1)) is Outcome.LOST
    assert await desk.queued(held.claim.job_id) == ("running", 0)


@pytest.mark.parametrize(
    ("reason", "status"), [("user", ("cancelled", None)), ("deadline", ("failed", "deadline_exceeded"))]
)
async def test_requeue_of_a_job_that_was_asked_to_stop_ends_it_for_that_reason(
    desk: Desk, endings: Endings, reason: str, status: tuple[str, str | None]
) -> None:
    held = await desk.hold()
    job_id = held.claim.job_id
    if reason == "user":
        await Queue(desk.database.pool).cancel(job_id)
    else:
        await desk.queue.flag_deadline(job_id)
    back = Requeue(job_id=job_id, attempt=1, counts=True)
    assert await endings.requeue(held, back) is Outcome.CANCELLED, "it is not told as put back"
    assert (await desk.status(job_id), await desk.queued(job_id)) == (status, None)


# --------------------------------------------------------------------------------------------------------- failed

BROKE = GenerationFailed("the pipeline raised")
BAD = InvalidInput("the reference is broken")

CASES: list[
    tuple[str, GenerationError, StopReason | None, dict[str, Any], str, tuple[str, str | None], Any, list[str]]
] = [
    ("budget left", BROKE, None, {}, "requeued", ("queued", None), ("scheduled", 1), ["requeued generation_failed"]),
    (
        "budget used up",
        BROKE,
        None,
        {"max_attempts": 1},
        "failed",
        ("failed", "generation_failed"),
        None,
        ["failed generation_failed"],
    ),
    ("not worth it", BAD, None, {}, "failed", ("failed", "invalid_input"), None, ["failed invalid_input"]),
    ("cancelled", BROKE, StopReason.USER, {}, "cancelled", ("cancelled", None), None, ["cancelled"]),
    (
        "too late",
        BROKE,
        StopReason.DEADLINE,
        {},
        "cancelled",
        ("failed", "deadline_exceeded"),
        None,
        ["failed deadline_exceeded"],
    ),
    ("drained", BROKE, StopReason.DRAIN, {}, "requeued", ("queued", None), ("ready", 0), ["requeued drained"]),
    ("lost", BROKE, StopReason.LOST, {}, "lost", ("processing", None), ("running", 0), []),
]


@pytest.mark.parametrize(
    ("error", "reason", "job", "outcome", "status", "queued", "events"),
    [c[1:] for c in CASES],
    ids=[c[0] for c in CASES],
)
async def test_failed_ends_or_repeats_by_what_stopped_it_and_what_is_left(
    desk: Desk,
    endings: Endings,
    error: GenerationError,
    reason: StopReason | None,
    job: dict[str, Any],
    outcome: str,
    status: tuple[str, str | None],
    queued: Any,
    events: list[str],
) -> None:
    held = await desk.hold(**job)
    held.stop_reason = reason
    job_id = held.claim.job_id
    assert await endings.failed(held, error) == outcome
    assert (await desk.status(job_id), await desk.queued(job_id)) == (status, queued)
    assert await desk.events(job_id) == ["queued", "started", *events]


@pytest.mark.parametrize("reason", [None, StopReason.USER, StopReason.DRAIN])
async def test_failed_with_a_job_that_another_one_has_changes_nothing(
    desk: Desk, endings: Endings, reason: StopReason | None
) -> None:
    held = await desk.hold()
    held.stop_reason = reason
    await desk.take(held.claim.job_id)
    assert await endings.failed(held, BROKE) == "lost"
    assert await desk.queued(held.claim.job_id) == ("running", 0)


@pytest.mark.parametrize(("error", "retryable"), [(BROKE, True), (BAD, False)])
async def test_failed_tells_whether_a_retry_is_worth_it(
    desk: Desk, endings: Endings, error: GenerationError, retryable: bool
) -> None:
    held = await desk.hold(max_attempts=1)
    await endings.failed(held, error)
    row = await desk.database.pool.fetchrow("SELECT retryable, error_message, failures, worker FROM jobs")
    assert tuple(row) == (retryable, error.message, 1, desk.worker)
    assert await desk.callbacks(held.claim.job_id) == ["job.failed"]


async def test_failed_counts_up_to_the_budget(desk: Desk, endings: Endings) -> None:
    held = await desk.hold(max_attempts=3)
    outcomes = [await endings.failed(held, BROKE)]
    while await desk.queued(held.claim.job_id):
        await desk.database.pool.execute("UPDATE job_queue SET state = 'ready'")
        (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
        outcomes.append(await endings.failed(Held(claim), BROKE))
    assert outcomes == ["requeued", "requeued", "failed"]


# --------------------------------------------------------------------------------------------------- LoRAs in use


async def test_a_job_whose_loras_find_no_room_comes_again_and_counts_nothing(desk: Desk) -> None:
    held = await desk.hold(max_attempts=1)
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    assert await endings.failed(held, LoraNoRoom("those in use leave no room")) is Outcome.REQUEUED
    row = await desk.database.pool.fetchrow("SELECT state::text, failures, run_at > now() AS later FROM job_queue")
    assert tuple(row) == ("scheduled", 0, True)
