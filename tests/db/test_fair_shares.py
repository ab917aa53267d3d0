"""Fair shares on a real Postgres: who starts next, and who gets how many seconds. A run is as long as a test says."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.jobs import Jobs, Status
from db.pool import open_pool, queries
from db.queue import Claim, Queue, Requeue, Settlement
from tests.conftest import with_database
from tests.db.test_queue import new_job

WORKER = uuid4()


async def accept(pool: asyncpg.Pool, rows: Iterable[dict[str, Any]]) -> None:
    """Many jobs in one statement, in this order."""
    refusals = await queries("jobs").accept(pool, rows=[row | {"submission": n} for n, row in enumerate(rows)])
    assert refusals is None


def rows(user: UUID, costs: Sequence[float], **changes: Any) -> list[dict[str, Any]]:
    return [new_job(user, cost=cost, callback_url=None, **changes).to_row() for cost in costs]


async def serve(pool: asyncpg.Pool, seconds: float | None = None, queue: str = "wan") -> Claim | None:
    """Run the next job for so many seconds, by default as long as was predicted."""
    claims = await Queue(pool).claim(queue, WORKER, 1)
    if not claims:
        return None
    (claim,) = claims
    await pool.execute(
        """UPDATE job_queue SET claimed_at = clock_timestamp() - make_interval(secs => coalesce($2, cost))
           WHERE job_id = $1""",
        claim.job_id,
        seconds,
    )
    await Queue(pool).settle([Settlement(job_id=claim.job_id, attempt=claim.attempt, status=Status.COMPLETED)])
    return claim


def owner(claim: Claim | None) -> UUID:
    assert claim is not None
    user_id: UUID = claim.job["user_id"]
    return user_id


async def last_finish(pool: asyncpg.Pool, user: UUID) -> float:
    value: float = await pool.fetchval("SELECT last_finish FROM fair_shares WHERE user_id = $1 AND queue = 'wan'", user)
    return value


async def test_ten_thousand_videos_do_not_delay_another_users_image(database: Any) -> None:
    whale, small = await database.user("whale"), await database.user("small")
    await accept(database.pool, rows(whale, [40.0] * 10_000, queue="wan"))
    assert owner(await serve(database.pool)) == whale
    assert owner(await serve(database.pool)) == whale
    await accept(database.pool, rows(small, [5.0], queue="wan"))
    assert owner(await serve(database.pool)) == small


async def test_ten_users_share_the_seconds_though_their_jobs_differ(database: Any) -> None:
    chance = random.Random(7)
    users = [await database.user(f"user {n}") for n in range(10)]
    sizes = {user: 5.0 * (1 + n) for n, user in enumerate(users)}  # one user's jobs take ten times another's
    for user in users:
        costs = [sizes[user] * chance.uniform(0.5, 1.5) for _ in range(int(2600 / sizes[user]))]
        await accept(database.pool, rows(user, costs, queue="wan"))
    served: Counter[UUID] = Counter()
    while served.total() < 10_000:
        (claim,) = await Queue(database.pool).claim("wan", WORKER, 1)
        served[owner(claim)] += await database.pool.fetchval(
            "SELECT cost FROM job_queue WHERE job_id = $1", claim.job_id
        )
        await Queue(database.pool).settle([Settlement(job_id=claim.job_id, attempt=1, status=Status.COMPLETED)])
    assert max(served.values()) - min(served.values()) <= 0.1 * 1000


async def test_wrong_predictions_are_paid_for_by_the_jobs_that_follow(database: Any) -> None:
    honest, lucky = await database.user("honest"), await database.user("lucky")
    real = {honest: 10.0, lucky: 30.0}  # both are predicted to take ten
    for user in real:
        await accept(database.pool, rows(user, [10.0, 10.0], queue="wan"))
    served: Counter[UUID] = Counter()
    while served.total() < 3_000:
        claims = await Queue(database.pool).claim("wan", WORKER, 1)
        user = owner(claims[0])
        await database.pool.execute(
            "UPDATE job_queue SET claimed_at = clock_timestamp() - make_interval(secs => $2) WHERE job_id = $1",
            claims[0].job_id,
            real[user],
        )
        await Queue(database.pool).settle([Settlement(job_id=claims[0].job_id, attempt=1, status=Status.COMPLETED)])
        served[user] += round(real[user])
        await accept(database.pool, rows(user, [10.0], queue="wan"))
    assert abs(served[honest] - served[lucky]) <= 0.1 * 1_500


async def test_cancelled_jobs_are_not_held_against_their_user(database: Any) -> None:
    whale, small = await database.user("whale"), await database.user("small")
    await accept(database.pool, rows(whale, [40.0] * 5, queue="wan"))
    for row in await database.pool.fetch("SELECT job_id FROM job_queue"):
        assert await Queue(database.pool).cancel(row["job_id"]) == "cancelled"
    assert await last_finish(database.pool, whale) == 0
    await accept(database.pool, rows(small, [40.0, 40.0], queue="wan"))
    await accept(database.pool, rows(whale, [40.0], queue="wan"))
    assert {owner(await serve(database.pool)), owner(await serve(database.pool))} == {whale, small}


async def test_delayed_jobs_get_their_place_when_their_time_comes(database: Any) -> None:
    planner, steady = await database.user("planner"), await database.user("steady")
    await accept(database.pool, rows(planner, [10.0] * 3, queue="wan", start_after_seconds=3600.0))
    await accept(database.pool, rows(steady, [10.0] * 20, queue="wan"))
    for _ in range(10):
        assert owner(await serve(database.pool)) == steady
    await database.pool.execute("UPDATE job_queue SET run_at = now() WHERE state = 'scheduled'")
    assert await Queue(database.pool).promote() == {"wan"}
    # with places from the time before, all three would be in front
    assert steady in [owner(await serve(database.pool)) for _ in range(3)]


async def test_the_class_that_goes_first_does_not_move_the_clock_of_the_other(database: Any) -> None:
    busy, bulk, late = await database.user("busy"), await database.user("bulk"), await database.user("late")
    await accept(database.pool, rows(bulk, [10.0] * 20, queue="wan", klass=0))
    await accept(database.pool, rows(busy, [100.0] * 5, queue="wan"))
    for _ in range(5):
        assert owner(await serve(database.pool)) == busy
    await accept(database.pool, rows(late, [10.0], queue="wan", klass=0))
    assert late in {owner(await serve(database.pool)), owner(await serve(database.pool))}


@pytest.mark.parametrize(
    ("change", "charged"),
    [
        ({}, 10 + 7),  # it keeps its place and its prediction; the run that was lost is paid for
        ({"delay_seconds": 60.0}, 7),  # it is charged again when its time comes
        ({"queue": "sdxl", "cost": 3.0, "kind": "enhanced"}, 7),  # here it is done
    ],
)
async def test_a_requeue_charges_the_run_that_was(database: Any, change: dict[str, Any], charged: float) -> None:
    user = await database.user()
    await accept(database.pool, rows(user, [10.0], queue="wan"))
    (claim,) = await Queue(database.worker_pool).claim("wan", WORKER, 1)
    await database.pool.execute("UPDATE job_queue SET claimed_at = clock_timestamp() - interval '7 seconds'")
    assert await Queue(database.worker_pool).requeue([Requeue(job_id=claim.job_id, attempt=1, **change)])
    assert charged <= await last_finish(database.pool, user) < charged + 2
    other = await database.pool.fetchval("SELECT last_finish FROM fair_shares WHERE queue = 'sdxl'")
    assert other == (3 if "queue" in change else None)


async def test_a_job_that_has_started_may_start_again_after_its_start_deadline(database: Any) -> None:
    job = new_job(await database.user(), start_deadline_seconds=3600.0)
    await Jobs(database.pool).accept(job)
    await Queue(database.pool).claim("sdxl", WORKER, 1)
    await database.pool.execute("UPDATE job_queue SET start_deadline = now()")
    await Queue(database.pool).requeue([Requeue(job_id=job.id, attempt=1, counts=True)])
    assert await Queue(database.pool).overdue() == []
    assert [claim.attempt for claim in await Queue(database.pool).claim("sdxl", WORKER, 1)] == [2]


@pytest.fixture
def database_url(postgres_url: str, template_database: str) -> Iterator[str]:
    """A database for a test that has event loops of its own."""
    name = f"fair_{uuid4().hex[:12]}"

    async def on_server(statement: str) -> None:
        connection = await asyncpg.connect(with_database(postgres_url, "postgres"))
        await connection.execute(statement)
        await connection.close()

    asyncio.run(on_server(f'CREATE DATABASE "{name}" TEMPLATE "{template_database}"'))
    yield with_database(postgres_url, name)
    asyncio.run(on_server(f'DROP DATABASE "{name}" WITH (FORCE)'))


COSTS = st.lists(st.sampled_from([0.01, 1.0, 7.5, 40.0, 900.0]), min_size=3, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(costs=st.lists(COSTS, min_size=2, max_size=3))
def test_backlogged_users_differ_by_one_job_each_at_most(database_url: str, costs: list[list[float]]) -> None:
    """The bound of start-time fair queueing: |W(a) - W(b)| <= longest job of a + longest job of b, at every moment."""
    asyncio.run(check_bound(database_url, costs))


async def check_bound(url: str, costs: list[list[float]]) -> None:
    pool = await open_pool(url, max_size=2)
    await pool.execute("TRUNCATE queues, jobs, profiles CASCADE")
    users = [
        await pool.fetchval("INSERT INTO profiles (username) VALUES ($1) RETURNING id", str(n))
        for n in range(len(costs))
    ]
    for user, mine in zip(users, costs, strict=True):
        await accept(pool, rows(user, mine, queue="wan"))
    left = {user: list(mine) for user, mine in zip(users, costs, strict=True)}
    longest = {user: max(mine) for user, mine in left.items()}
    served = dict.fromkeys(users, 0.0)
    while all(left.values()):  # as long as all of them are backlogged
        user = owner(await serve(pool))
        served[user] += left[user].pop(0)
        for a in users:
            for b in users:
                assert served[a] - served[b] <= longest[a] + longest[b] + 1e-3
    await pool.close()


async def test_a_hop_takes_shares_in_the_order_of_everybody_else(database: Any) -> None:
    user = await database.user()
    await accept(database.pool, [*rows(user, [10.0], queue="qwen"), *rows(user, [10.0], queue="sdxl")])
    (claim,) = await Queue(database.worker_pool).claim("qwen", WORKER, 1)
    holding, looking = [await asyncpg.connect(database.url) for _ in range(2)]
    try:
        transaction = holding.transaction()
        await transaction.start()
        await holding.execute("SELECT 1 FROM fair_shares WHERE queue = 'qwen' FOR UPDATE")
        hop = Requeue(job_id=claim.job_id, attempt=1, queue="sdxl", cost=3.0, kind="enhanced")
        hopping = asyncio.create_task(Queue(database.worker_pool).requeue([hop]))
        waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%charged%')"
        async with asyncio.timeout(20):
            while not await looking.fetchval(waits):  # noqa: ASYNC110 (Postgres tells nobody that somebody waits)
                await asyncio.sleep(0.01)
        await looking.execute("SELECT 1 FROM fair_shares WHERE queue = 'sdxl' FOR UPDATE NOWAIT")  # it is free yet
        await transaction.rollback()
        assert await hopping == {claim.job_id: "sdxl"}
    finally:
        await holding.close()
        await looking.close()
