"""Batches: many settlements or acceptances in one statement, and each caller with its own outcome."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.batches import Batcher
from db.jobs import Jobs, Status
from db.queue import Queue, Settlement
from tests.db.test_queue import new_job


async def running_jobs(database: Any, count: int) -> list[UUID]:
    user = await database.user()
    for _ in range(count):
        await Jobs(database.pool).accept(new_job(user))
    return [claim.job_id for claim in await Queue(database.worker_pool).claim("sdxl", uuid4(), count)]


def done(job_id: UUID, attempt: int = 1, **changes: Any) -> Settlement:
    return Settlement(**({"job_id": job_id, "attempt": attempt, "status": Status.COMPLETED} | changes))


async def transactions(pool: asyncpg.Pool) -> int:
    """How many different transactions ended jobs."""
    count: int = await pool.fetchval("SELECT count(DISTINCT xmin::text) FROM jobs WHERE completed_at IS NOT NULL")
    return count


async def test_settlements_that_come_together_share_one_commit(database: Any) -> None:
    ids = await running_jobs(database, 8)
    ends = Batcher(Queue(database.worker_pool).settle_each)
    ended = await asyncio.gather(*(ends.put(done(job_id)) for job_id in ids))
    assert [e.job_id for e in ended if e] == ids
    assert await transactions(database.pool) == 1


async def test_each_caller_gets_its_own_outcome(database: Any) -> None:
    fresh, stale = await running_jobs(database, 2)
    ends = Batcher(Queue(database.worker_pool).settle_each)
    ended = await asyncio.gather(ends.put(done(stale, attempt=7)), ends.put(done(fresh)), ends.put(done(uuid4())))
    assert [e and e.job_id for e in ended] == [None, fresh, None]
    assert await database.pool.fetchval("SELECT status FROM current_jobs WHERE id = $1", stale) == "processing"


async def test_a_stale_and_a_true_end_of_one_job_do_not_mix(database: Any) -> None:
    (job_id,) = await running_jobs(database, 1)
    await database.pool.execute("UPDATE job_queue SET attempt = 2")
    late = done(job_id, status=Status.FAILED, error_code="oom", error_message="of the lost run")
    ends = Batcher(Queue(database.worker_pool).settle_each)
    outcomes = await asyncio.gather(ends.put(late), ends.put(done(job_id, 2)), ends.put(late))
    assert [o and o.status for o in outcomes] == [None, Status.COMPLETED, None]
    assert tuple(await database.pool.fetchrow("SELECT status, error_code FROM jobs")) == ("completed", None)


async def test_a_broken_settlement_fails_alone(database: Any) -> None:
    first, broken, last = await running_jobs(database, 3)
    ends = Batcher(Queue(database.worker_pool).settle_each)
    no_code = done(broken, status=Status.FAILED)  # the table insists on a code
    outcomes = await asyncio.gather(
        ends.put(done(first)), ends.put(no_code), ends.put(done(last)), return_exceptions=True
    )
    assert isinstance(outcomes[1], asyncpg.CheckViolationError)
    statuses = await database.pool.fetch("SELECT status FROM current_jobs ORDER BY id")
    assert [row["status"] for row in statuses] == ["completed", "processing", "completed"]


async def test_what_is_no_json_fails_alone(database: Any) -> None:
    broken, fine = await running_jobs(database, 2)
    ends = Batcher(Queue(database.worker_pool).settle_each)
    outcomes = await asyncio.gather(
        ends.put(done(broken, settings={"guidance": float("nan")})),
        ends.put(done(fine)),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], asyncpg.DataError)
    assert outcomes[1] is not None
    assert await database.pool.fetchval("SELECT status FROM jobs WHERE id = $1", fine) == "completed"


async def test_a_lost_connection_is_told_to_every_caller_of_the_batch(database: Any) -> None:
    ids = await running_jobs(database, 2)
    await database.worker_pool.close()
    ends = Batcher(Queue(database.worker_pool).settle_each)
    outcomes = await asyncio.gather(*(ends.put(done(job_id)) for job_id in ids), return_exceptions=True)
    assert [type(o) for o in outcomes] == [asyncpg.InterfaceError] * 2


async def test_a_caller_cancelled_in_time_takes_its_settlement_back(database: Any) -> None:
    kept, taken_back = await running_jobs(database, 2)
    ends = Batcher(Queue(database.worker_pool).settle_each)
    tasks = [asyncio.create_task(ends.put(done(job_id))) for job_id in (kept, taken_back)]
    await asyncio.sleep(0)  # both have asked; nothing is sent before the loop comes round
    tasks[1].cancel()
    assert await tasks[0] is not None
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert await database.pool.fetchval("SELECT status FROM current_jobs WHERE id = $1", taken_back) == "processing"


async def test_more_than_a_batch_goes_in_several(database: Any) -> None:
    ids = await running_jobs(database, 5)
    ends = Batcher(Queue(database.worker_pool).settle_each, max_batch=2)
    await asyncio.gather(*(ends.put(done(job_id)) for job_id in ids))
    assert await transactions(database.pool) == 3


async def test_an_error_that_nobody_foresaw_leaves_nobody_waiting() -> None:
    async def write(items: Any) -> list[int]:
        await asyncio.sleep(0)
        if "bad" in items:
            raise MemoryError
        return [len(items)] * len(items)

    batcher: Batcher[str, int] = Batcher(write, max_batch=2)
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(
            *(batcher.put(item) for item in ("a", "bad", "b", "c", "d")), return_exceptions=True
        )
    assert [outcome if isinstance(outcome, int) else type(outcome) for outcome in outcomes] == [
        MemoryError,
        MemoryError,
        2,
        2,
        1,
    ]


async def test_the_victim_of_a_deadlock_is_written_again(database: Any) -> None:
    (job_id,) = await running_jobs(database, 1)
    await database.pool.execute(
        """CREATE SEQUENCE faults;
           CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
             IF nextval('faults') <= 2 THEN RAISE EXCEPTION 'no' USING ERRCODE = '40P01'; END IF; RETURN OLD; END $$;
           CREATE TRIGGER fault BEFORE DELETE ON job_queue FOR EACH ROW EXECUTE FUNCTION fault()"""
    )
    ended = await Batcher(Queue(database.worker_pool).settle_each).put(done(job_id))
    assert ended is not None
    assert await database.pool.fetchval("SELECT last_value FROM faults") == 3
