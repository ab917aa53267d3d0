"""Two moves of one job at the same moment, on two connections of a real Postgres, in an order that is pinned.

The first one has done its work and not committed; the second one starts, waits for it, and must then decide by what
the first one left. That the second waits is read from Postgres itself, so nothing here sleeps or guesses.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Generator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.idempotency import IdempotencyInFlight
from db.jobs import Jobs, Status
from db.pool import open_pool
from db.queue import Queue, Renewal, Requeue, Settlement
from tests.db.test_queue import expire, new_job

T = TypeVar("T")


class Lent:
    """A connection that is lent out again and again, as by a pool of one, and keeps its open transaction."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def acquire(self) -> "Lent":
        return self

    async def release(self, connection: object) -> None:
        pass

    def __await__(self) -> Generator[None, None, Any]:
        return self.connection
        yield  # what makes it a generator

    async def __aenter__(self) -> Any:
        return self.connection

    async def __aexit__(self, *raised: object) -> None:
        pass


class Race:
    """The two sides: `first` acts in a transaction that ends with `decided`, `second` meanwhile."""

    def __init__(self, first: Any, second: Any, watcher: asyncpg.Pool) -> None:
        self._first, self._second, self._watcher = first, second, watcher
        self.first, self.second = Queue(Lent(first)), Queue(Lent(second))  # type: ignore[arg-type]
        self.first_jobs, self.second_jobs = Jobs(Lent(first)), Jobs(Lent(second))  # type: ignore[arg-type]
        self._open: Any = None

    async def begin(self) -> None:
        self._open = self._first.transaction()
        await self._open.start()

    async def commit(self) -> None:
        await self._open.commit()

    async def decided(self, move: Awaitable[T]) -> T:
        """What `move` comes to, when it has begun, waits for the first side's transaction, and that one commits."""
        task = asyncio.ensure_future(move)
        async with asyncio.timeout(20):
            while not await self._watcher.fetchval(
                "SELECT $1 = ANY (pg_blocking_pids($2))", self._first.get_server_pid(), self._second.get_server_pid()
            ):
                assert not task.done(), f"it did not wait: {task}"
        await self.commit()
        return await task


@pytest.fixture
async def race(database: Any) -> AsyncIterator[Race]:
    async with asynccontextmanager(two_connections)(database.url) as (first, second):
        yield Race(first, second, database.pool)


async def two_connections(url: str) -> AsyncIterator[tuple[Any, Any]]:
    pool = await open_pool(url, min_size=2, max_size=2)
    async with pool.acquire() as first, pool.acquire() as second:
        yield first, second
    await pool.close()


async def queued(database: Any, **changes: Any) -> UUID:
    job = new_job(await database.user(), **changes)
    await Jobs(database.pool).accept(job)
    return job.id


async def running(database: Any, worker: UUID | None = None) -> UUID:
    job_id = await queued(database)
    assert len(await Queue(database.pool).claim("sdxl", worker or uuid4(), 1)) == 1
    return job_id


async def history(database: Any, job_id: UUID) -> tuple[str, list[str]]:
    kinds = [event.kind for event in await Jobs(database.pool).events_after(database.pool, job_id)]
    return await database.pool.fetchval("SELECT status FROM current_jobs WHERE id = $1", job_id), kinds


def completed(job_id: UUID) -> Settlement:
    return Settlement(job_id=job_id, attempt=1, status=Status.COMPLETED)


def lost(job_id: UUID) -> Requeue:
    return Requeue(job_id=job_id, attempt=1, expired=True, counts=True, error_code="worker_lost")


async def test_cancel_during_a_claim_reaches_the_replica(database: Any, race: Race) -> None:
    job_id, worker = await queued(database), uuid4()
    await race.begin()
    assert len(await race.first.claim("sdxl", worker, 1)) == 1
    assert await race.decided(race.second.cancel(job_id)) == "cancelling"
    assert await race.second.renew(worker, [Renewal(job_id, 1, "denoise")]) == {job_id: "user"}


async def test_claim_during_a_cancel_passes_the_job_over(database: Any, race: Race) -> None:
    job_id = await queued(database)
    await race.begin()
    assert await race.first.cancel(job_id) == "cancelled"
    assert await race.second.claim("sdxl", uuid4(), 1) == []
    await race.commit()
    assert await race.second.claim("sdxl", uuid4(), 1) == []
    assert await history(database, job_id) == ("cancelled", ["queued", "cancelled"])


async def test_two_claims_at_once_take_different_jobs(database: Any, race: Race) -> None:
    older, newer = await queued(database), await queued(database)
    await race.begin()
    first = await race.first.claim("sdxl", uuid4(), 1)
    async with asyncio.timeout(20):
        second = await race.second.claim("sdxl", uuid4(), 1)
    assert [claim.job_id for claim in first + second] == [older, newer]


async def test_rescue_during_a_settle_finds_the_job_ended(database: Any, race: Race) -> None:
    job_id = await running(database)
    await expire(database.pool, job_id)
    await race.begin()
    assert len(await race.first.settle([completed(job_id)])) == 1
    assert await race.decided(race.second.requeue([lost(job_id)])) == {}
    assert await history(database, job_id) == ("completed", ["queued", "started", "completed"])


async def test_settle_during_a_rescue_is_too_late(database: Any, race: Race) -> None:
    job_id = await running(database)
    await expire(database.pool, job_id)
    await race.begin()
    assert await race.first.requeue([lost(job_id)]) == {job_id: "sdxl"}
    assert await race.decided(race.second.settle([completed(job_id)])) == []
    assert await history(database, job_id) == ("queued", ["queued", "started", "requeued"])


async def test_rescue_during_a_renewal_leaves_the_job(database: Any, race: Race) -> None:
    worker = uuid4()
    job_id = await running(database, worker)
    await expire(database.pool, job_id)
    await race.begin()
    assert await race.first.renew(worker, [Renewal(job_id, 1, "denoise")]) == {job_id: None}
    assert await race.decided(race.second.requeue([lost(job_id)])) == {}
    assert await history(database, job_id) == ("processing", ["queued", "started"])


async def test_two_rescues_at_once_count_one_failure(database: Any, race: Race) -> None:
    job_id = await running(database)
    await expire(database.pool, job_id)
    await race.begin()
    assert await race.first.requeue([lost(job_id)]) == {job_id: "sdxl"}
    assert await race.decided(race.second.requeue([lost(job_id)])) == {}
    assert await database.pool.fetchval("SELECT failures FROM job_queue") == 1


async def test_cancel_during_a_settle_finds_the_job_ended(database: Any, race: Race) -> None:
    job_id = await running(database)
    await race.begin()
    assert len(await race.first.settle([completed(job_id)])) == 1
    assert await race.decided(race.second.cancel(job_id)) == "ended"
    assert await history(database, job_id) == ("completed", ["queued", "started", "completed"])


async def test_settle_during_a_cancel_still_completes(database: Any, race: Race) -> None:
    job_id = await running(database)
    await race.begin()
    assert await race.first.cancel(job_id) == "cancelling"
    assert len(await race.decided(race.second.settle([completed(job_id)]))) == 1
    assert await history(database, job_id) == ("completed", ["queued", "started", "cancelling", "completed"])


async def test_requeue_during_a_cancel_does_not_put_the_job_back(database: Any, race: Race) -> None:
    job_id = await running(database)
    await race.begin()
    assert await race.first.cancel(job_id) == "cancelling"
    assert await race.decided(race.second.requeue([Requeue(job_id=job_id, attempt=1)])) == {}
    assert await race.second.cancel_reason(job_id, 1) == "user"


async def test_second_submit_with_a_key_is_told_to_wait_and_then_gets_the_job(database: Any, race: Race) -> None:
    user = await database.user()
    first, again = new_job(user), new_job(user)
    await race.begin()
    accepted = await race.first_jobs.accept(first, idempotency_key="k", body=b"1")
    with pytest.raises(IdempotencyInFlight):
        await race.second_jobs.accept(again, idempotency_key="k", body=b"1")
    await race.commit()
    replay = await race.second_jobs.accept(again, idempotency_key="k", body=b"1")
    assert (replay.job_id, replay.replayed) == (accepted.job_id, True)
    assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 1


async def test_cancel_during_a_promotion_ends_the_job(database: Any, race: Race) -> None:
    job_id = await queued(database, start_after_seconds=3600.0)
    await database.pool.execute("UPDATE job_queue SET run_at = now()")
    await race.begin()
    assert await race.first.promote() == {"sdxl"}
    assert await race.decided(race.second.cancel(job_id)) == "cancelled"
    assert await race.second.claim("sdxl", uuid4(), 1) == []
    assert await history(database, job_id) == ("cancelled", ["queued", "cancelled"])


async def test_promotion_during_a_cancel_passes_the_job_over(database: Any, race: Race) -> None:
    job_id = await queued(database, start_after_seconds=3600.0)
    await database.pool.execute("UPDATE job_queue SET run_at = now()")
    await race.begin()
    assert await race.first.cancel(job_id) == "cancelled"
    assert await race.second.promote() == set()
    await race.commit()
    assert await race.second.promote() == set()
    assert await history(database, job_id) == ("cancelled", ["queued", "cancelled"])


async def test_retry_during_an_erasure_finds_no_job(database: Any, race: Race) -> None:
    job_id = await queued(database)
    await Queue(database.pool).cancel(job_id)
    await race.begin()
    assert await race.first_jobs.erase(job_id, await database.user()) is not None
    assert not await race.decided(race.second_jobs.retry(job_id, queue="sdxl", cost=5.0))
    assert await database.pool.fetchval("SELECT count(*) FROM job_queue") == 0


async def test_erasure_during_a_retry_leaves_the_open_job(database: Any, race: Race) -> None:
    job_id = await queued(database)
    await Queue(database.pool).cancel(job_id)
    await race.begin()
    assert await race.first_jobs.retry(job_id, queue="sdxl", cost=5.0)
    assert await race.decided(race.second_jobs.erase(job_id, await database.user())) is None
    assert await database.pool.fetchval("SELECT count(*) FROM job_queue") == 1
