"""Retention on a real Postgres: what is forgotten, what is not, and how much at a time."""

import re
from importlib.resources import files
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.jobs import Jobs, Status
from db.queue import Queue, Settlement
from db.retention import Retention, RetentionPolicy
from db.workers import Workers
from tests.db.test_queue import new_job


async def ended_job(database: Any) -> UUID:
    """A cancelled job with its events and a callback."""
    job = new_job(await database.user())
    await Jobs(database.pool).accept(job, idempotency_key=str(job.id), body=b"1")
    await Queue(database.pool).settle([Settlement(job_id=job.id, status=Status.CANCELLED)])
    return job.id


async def tried(database: Any, job_id: UUID, count: int, days_ago: int) -> None:
    """Tries to deliver the callback of a job."""
    await database.pool.execute(
        """INSERT INTO callback_attempts (callback_id, attempt, at)
           SELECT id, n, now() - make_interval(days => $3)
           FROM callback_outbox, generate_series(1, $2) n WHERE job_id = $1""",
        job_id,
        count,
        days_ago,
    )


async def count(database: Any, table: str) -> int:
    value: int = await database.pool.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
    return value


@pytest.fixture
def retention(database: Any) -> Retention:
    """With no more rights than upkeep has."""
    return Retention(database.worker_pool, RetentionPolicy(event_days=30, delivery_days=7))


async def aged(database: Any, job_id: UUID, days: int, ended_days: int | None = None) -> None:
    """Make a job, and what is told of it, as old as that."""
    await database.pool.execute(
        "UPDATE job_events SET at = at - make_interval(days => $2) WHERE job_id = $1", job_id, days
    )
    await database.pool.execute(
        "UPDATE jobs SET completed_at = completed_at - make_interval(days => $2) WHERE id = $1",
        job_id,
        days if ended_days is None else ended_days,
    )


async def told_of(database: Any) -> set[UUID]:
    """The jobs that still have events."""
    return {row["job_id"] for row in await database.pool.fetch("SELECT DISTINCT job_id FROM job_events")}


async def test_old_events_of_ended_jobs_go_and_their_jobs_stay(database: Any, retention: Retention) -> None:
    ended = await ended_job(database)
    waiting = new_job(await database.user())
    await Jobs(database.pool).accept(waiting)
    for job_id in (ended, waiting.id):
        await aged(database, job_id, 31)
    young = await ended_job(database)
    assert await retention.prune() is False
    assert await told_of(database) == {waiting.id, young}
    assert {row["id"] for row in await database.pool.fetch("SELECT id FROM jobs")} == {ended, waiting.id, young}


async def test_a_history_is_kept_whole_until_its_end_is_old(database: Any, retention: Retention) -> None:
    job_id = await ended_job(database)
    await aged(database, job_id, 40, ended_days=29)
    await retention.prune()
    assert await count(database, "job_events") == 2
    await aged(database, job_id, 2)
    await retention.prune()
    assert await count(database, "job_events") == 0


async def test_a_retry_whose_first_history_is_gone_is_forgotten_as_well(database: Any, retention: Retention) -> None:
    job_id = await ended_job(database)
    await aged(database, job_id, 31)
    await retention.prune()
    assert await Jobs(database.pool).retry(job_id, queue="sdxl", cost=5.0)
    await Queue(database.pool).settle([Settlement(job_id=job_id, status=Status.CANCELLED)])
    assert await count(database, "job_events") == 2
    await aged(database, job_id, 31)
    await retention.prune()
    assert await count(database, "job_events") == 0


async def test_a_history_without_its_beginning_gets_one_by_the_migration(database: Any, retention: Retention) -> None:
    job_id = await ended_job(database)
    await database.pool.execute("DELETE FROM job_events WHERE kind = 'queued'")
    text = files("db").joinpath("migrations/0031_history.sql").read_text(encoding="utf-8")
    (repair,) = re.findall(r"INSERT INTO job_events.*?;", text, re.DOTALL)
    for _ in range(2):
        await database.pool.execute(repair)
    events = await Jobs(database.pool).events_after(database.pool, job_id)
    assert [event.kind for event in events] == ["queued", "cancelled"]
    await aged(database, job_id, 31)
    await retention.prune()
    assert await count(database, "job_events") == 0


async def test_one_call_forgets_a_batch_of_histories_and_says_that_there_is_more(database: Any) -> None:
    jobs = [await ended_job(database) for _ in range(5)]
    for days, job_id in enumerate(jobs, start=40):
        await aged(database, job_id, days)
    small = Retention(database.worker_pool, batch=10)
    assert await small.prune() is True
    assert await told_of(database) == set(jobs[:3]), "the oldest go first"
    assert await small.prune() is True
    assert await small.prune() is False
    assert await told_of(database) == set()


async def test_the_delivery_log_has_an_age_of_its_own(database: Any, retention: Retention) -> None:
    job_id = await ended_job(database)
    await tried(database, job_id, 3, days_ago=8)
    await tried(database, job_id, 2, days_ago=6)
    await database.pool.execute("UPDATE job_events SET at = now() - interval '8 days'")
    await retention.prune()
    assert await count(database, "callback_attempts") == 2
    assert await count(database, "job_events") == 2  # 8 days are not 30
    assert await count(database, "callback_outbox") == 1  # what is to be sent is not the log of it


async def test_one_call_deletes_one_batch_and_says_that_there_is_more(database: Any) -> None:
    job_id = await ended_job(database)
    await tried(database, job_id, 25, days_ago=100)
    small = Retention(database.worker_pool, batch=10)
    left = []
    while more := await small.prune():
        left.append(await count(database, "callback_attempts"))
        assert more is True
    assert left == [15, 5]
    assert await count(database, "callback_attempts") == 0


async def test_the_oldest_go_first(database: Any) -> None:
    job_id = await ended_job(database)
    for days in (40, 90, 60):
        await tried(database, job_id, 1, days_ago=days)
    await Retention(database.worker_pool, batch=1).prune()
    rows = await database.pool.fetch("SELECT extract(day FROM now() - at)::int AS days FROM callback_attempts")
    assert sorted(row["days"] for row in rows) == [40, 60]


async def test_expired_keys_go_and_valid_ones_stay(database: Any, retention: Retention) -> None:
    old, new = await ended_job(database), await ended_job(database)
    await database.pool.execute(
        "UPDATE idempotency_keys SET expires_at = now() - interval '1 second' WHERE job_id = $1", old
    )
    await retention.prune()
    assert await database.pool.fetchval("SELECT job_id FROM idempotency_keys") == new


async def test_old_replicas_are_forgotten(database: Any, retention: Retention) -> None:
    workers, old, new = Workers(database.worker_pool), uuid4(), uuid4()
    for worker in (old, new):
        await workers.enter(worker, "sdxl", "ready")
    await database.pool.execute("UPDATE workers SET seen_at = now() - interval '2 days' WHERE id = $1", old)
    await retention.prune()
    assert [worker.id for worker in await workers.list(10**7)] == [new]
