"""Jobs that share the forwards of what runs are taken first, within the bounds of fairness."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from db.jobs import Jobs
from db.queue import FIT_LOOK, FIT_WINDOW_SECONDS, Fit, Queue
from tests.db.test_queue import new_job

LARGE, SMALL = "1024x1024x1", "512x512x1"


async def accept(database: Any, *shapes: str, user: UUID | None = None, **changes: Any) -> list[UUID]:
    """Jobs of these shapes, in this order."""
    owner = user or await database.user()
    jobs = Jobs(database.pool)
    made = []
    for shape in shapes:
        job = new_job(owner, **({"shape": shape, "cost": 1.0} | changes))
        await jobs.accept(job)
        made.append(job.id)
    return made


async def test_first_in_line_waits_no_longer_than_the_window_by_the_clock(database: Any) -> None:
    """The jobs of ever new users stand beside the first, since the clock of the queue does not move."""
    (first,) = await accept(database, LARGE)
    await database.pool.execute(
        "UPDATE job_queue SET enqueued_at = now() - make_interval(secs => $1)", FIT_WINDOW_SECONDS
    )
    await accept(database, SMALL)
    assert await claimed(database, 1, Fit({SMALL: None})) == {first}


async def claimed(database: Any, slots: int, fit: Fit | None) -> set[UUID]:
    return {claim.job_id for claim in await Queue(database.pool).claim("sdxl", uuid4(), slots, fit=fit)}


async def test_order_stands_where_nothing_runs(database: Any) -> None:
    first, *_ = await accept(database, LARGE, SMALL, SMALL)
    assert await claimed(database, 1, None) == {first}


@pytest.mark.parametrize("slots", [1, 2])
async def test_jobs_of_the_running_shape_come_first(database: Any, slots: int) -> None:
    made = await accept(database, LARGE, SMALL, LARGE, SMALL)
    assert await claimed(database, slots, Fit({SMALL: None})) == set([made[1], made[3]][:slots])
    assert made[0] in await claimed(database, 2, Fit({SMALL: None}))


async def test_slots_that_nothing_fits_are_filled_in_order(database: Any) -> None:
    made = await accept(database, LARGE, LARGE, SMALL)
    assert await claimed(database, 2, Fit({SMALL: None})) == {made[2], made[0]}


async def test_no_job_comes_more_than_the_window_before_its_turn(database: Any) -> None:
    user = await database.user()
    first, *_ = await accept(database, LARGE, user=user, cost=FIT_WINDOW_SECONDS + 1)
    await accept(database, SMALL, user=user)
    assert await claimed(database, 1, Fit({SMALL: None})) == {first}


async def test_job_at_the_head_is_passed_over_a_bounded_number_of_times(database: Any) -> None:
    """However many fit, the first in line is served after as much work as the window holds."""
    user = await database.user()
    first, *_ = await accept(database, LARGE, user=user)
    await accept(database, *[SMALL] * 30, user=user)
    passed = 0
    while first not in await claimed(database, 1, Fit({SMALL: None})):
        passed += 1
    assert passed <= FIT_WINDOW_SECONDS


async def test_background_never_comes_before_interactive(database: Any) -> None:
    (interactive,) = await accept(database, LARGE)
    await accept(database, SMALL, klass=0)
    assert await claimed(database, 1, Fit({SMALL: None})) == {interactive}


async def test_loras_that_would_have_to_be_loaded_do_not_fit(database: Any) -> None:
    plain, with_lora = await accept(database, LARGE, SMALL, loras=["ink"])
    assert await claimed(database, 1, Fit({SMALL: None}, ["pastel"])) == {plain}
    assert await claimed(database, 1, Fit({SMALL: None}, ["pastel", "ink"])) == {with_lora}


@pytest.mark.parametrize(("rows", "fits"), [(2, True), (3, False), (None, True)])
async def test_jobs_that_the_free_memory_has_no_room_for_keep_their_place(
    database: Any, rows: int | None, fits: bool
) -> None:
    first, *_ = await accept(database, LARGE)
    (beside,) = await accept(database, SMALL, rows=rows)
    assert await claimed(database, 1, Fit({SMALL: 2})) == {beside if fits else first}


async def test_paused_queue_gives_nothing_that_fits(database: Any) -> None:
    await accept(database, SMALL)
    await Queue(database.pool).pause("sdxl", True)
    assert await claimed(database, 1, Fit({SMALL: None})) == set()


async def test_retried_job_keeps_its_fit(database: Any) -> None:
    (job_id,) = await accept(database, SMALL)
    assert await Queue(database.pool).cancel(job_id) == "cancelled"
    assert await Jobs(database.pool).retry(job_id, queue="sdxl", cost=1.0, shape=SMALL, rows=2, loras=["ink"])
    row = await database.pool.fetchrow("SELECT shape, rows, loras FROM job_queue WHERE job_id = $1", job_id)
    assert tuple(row) == (SMALL, 2, ["ink"])


def test_more_is_looked_at_than_is_taken() -> None:
    assert FIT_LOOK > 1


async def test_claim_tells_class_and_deadline(database: Any) -> None:
    await accept(database, SMALL, klass=0, deadline_seconds=100.0)
    (claim,) = await Queue(database.pool).claim("sdxl", uuid4(), 1)
    assert claim.klass == 0
    assert claim.deadline_seconds == pytest.approx(100, abs=20)
