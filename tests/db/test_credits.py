"""Credits: charged once when a job is taken in, given back once when it gives nothing for no fault of its owner."""

import asyncio
import random
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.idempotency import canonical_body
from db.jobs import Jobs, NewJob, Status
from db.limits import LimitReached, SystemConfig
from db.queue import Queue, Requeue, Settlement
from tests.db.test_queue import expire, new_job

FAULTS_OF_OURS = ("oom", "generation_failed", "worker_lost", "storage_unavailable", "internal")
FAULTS_OF_THEIRS = ("invalid_input", "content_rejected", "deadline_exceeded")  # of jobs that ran


async def charge(database: Any, on: bool = True) -> None:
    await SystemConfig(database.pool).change({"chargeCredits": on}, await database.user("operator", "admin"))


async def balance(database: Any, user: UUID) -> int:
    return int(await database.pool.fetchval("SELECT token_balance FROM profiles WHERE id = $1", user))


async def charges(database: Any, job: NewJob) -> list[float]:
    rows = await database.pool.fetch(
        "SELECT credits_consumed FROM usage_logs WHERE job_id = $1 AND charged ORDER BY created_at, id", job.id
    )
    return sorted((float(row[0]) for row in rows), reverse=True)


async def a_claimed(database: Any, **changes: Any) -> tuple[UUID, NewJob, int]:
    user = await database.user()
    job = new_job(user, **({"credits": 3} | changes))
    await Jobs(database.pool).accept(job)
    (claim,) = await Queue(database.worker_pool).claim("sdxl", uuid4(), 1)
    return user, job, claim.attempt


async def test_credits_are_only_logged_until_charging_is_on(database: Any) -> None:
    user, jobs = await database.user(), Jobs(database.pool)
    await database.pool.execute("UPDATE profiles SET token_balance = 0 WHERE id = $1", user)
    job = new_job(user, credits=5)
    await jobs.accept(job)
    await Queue(database.pool).cancel(job.id)
    rows = await database.pool.fetch("SELECT credits_consumed, charged FROM usage_logs")
    assert [tuple(row) for row in rows] == [(5, False)]
    await charge(database)
    with pytest.raises(LimitReached) as caught:
        await jobs.accept(new_job(user, credits=1))
    error = caught.value
    assert (error.code, error.allowed, error.needed, error.retry_after) == ("credits_exhausted", 0, 1, None)
    assert await balance(database, user) == 0


async def test_a_batch_is_charged_as_one(database: Any) -> None:
    await charge(database)
    user, jobs = await database.user(), Jobs(database.pool)
    await jobs.accept_together([new_job(user, credits=20) for _ in range(4)])
    assert await balance(database, user) == 20
    with pytest.raises(LimitReached):
        await jobs.accept_together([new_job(user, credits=15) for _ in range(2)])
    assert await balance(database, user) == 20
    assert await database.pool.fetchval("SELECT count(*) FROM usage_logs") == 4


async def test_a_replay_is_charged_nothing(database: Any) -> None:
    await charge(database)
    user, jobs = await database.user(), Jobs(database.pool)
    for _ in range(3):
        await jobs.accept(new_job(user, credits=30), idempotency_key="k", body=canonical_body({}))
    assert await balance(database, user) == 70


async def test_a_failure_is_paid_by_who_is_at_fault(database: Any) -> None:
    await charge(database)
    for code in FAULTS_OF_OURS + FAULTS_OF_THEIRS:
        user, job, attempt = await a_claimed(database)
        before = await balance(database, user)
        failed = Settlement(job_id=job.id, attempt=attempt, status=Status.FAILED, error_code=code, retryable=False)
        for _ in range(2):  # the second finds nothing to end
            await Queue(database.worker_pool).settle([failed])
        back = 3 if code in FAULTS_OF_OURS else 0
        assert await charges(database, job) == ([3, -3] if back else [3]), code
        assert await balance(database, user) == before + back


async def test_what_was_cancelled_is_given_back_unless_it_ran(database: Any) -> None:
    await charge(database)
    user, running, attempt = await a_claimed(database)
    waiting = new_job(user, credits=7)
    await Jobs(database.pool).accept(waiting)
    queue = Queue(database.pool)
    assert [await queue.cancel(job.id) for job in (waiting, running)] == ["cancelled", "cancelling"]
    await queue.settle([Settlement(job_id=running.id, attempt=attempt, status=Status.CANCELLED)])
    assert [await charges(database, job) for job in (waiting, running)] == [[7, -7], [3]]
    assert await balance(database, user) == 97


@pytest.mark.parametrize("code", ["deadline_exceeded", "start_deadline_exceeded"])
async def test_a_deadline_that_passed_in_the_queue_is_given_back(database: Any, code: str) -> None:
    await charge(database)
    user = await database.user()
    never_ran, came_back = [new_job(user, credits=3) for _ in range(2)]
    await Jobs(database.pool).accept(came_back)
    queue = Queue(database.worker_pool)
    (claim,) = await queue.claim("sdxl", uuid4(), 1)
    await queue.requeue([Requeue(job_id=claim.job_id, attempt=claim.attempt, counts=True)])
    await Jobs(database.pool).accept(never_ran)
    ends = [Settlement(job_id=job.id, status=Status.FAILED, error_code=code) for job in (never_ran, came_back)]
    assert len(await queue.settle(ends)) == 2
    assert [await charges(database, job) for job in (never_ran, came_back)] == [[3, -3], [3, -3]]
    assert await balance(database, user) == 100


async def test_what_was_free_gives_nothing_back(database: Any) -> None:
    user, job, attempt = await a_claimed(database)
    await charge(database)
    failed = Settlement(job_id=job.id, attempt=attempt, status=Status.FAILED, error_code="oom", retryable=False)
    await Queue(database.worker_pool).settle([failed])
    assert (await charges(database, job), await balance(database, user)) == ([], 100)


async def test_what_was_charged_is_given_back_after_charging_was_turned_off(database: Any) -> None:
    await charge(database)
    user, job, attempt = await a_claimed(database)
    await charge(database, False)
    failed = Settlement(job_id=job.id, attempt=attempt, status=Status.FAILED, error_code="oom", retryable=False)
    await Queue(database.worker_pool).settle([failed])
    assert await balance(database, user) == 100


async def test_a_retry_is_charged_where_the_charge_was_given_back(database: Any) -> None:
    await charge(database)
    user, refunded, attempt = await a_claimed(database)
    queue, jobs = Queue(database.pool), Jobs(database.pool)
    await queue.settle(
        [Settlement(job_id=refunded.id, attempt=attempt, status=Status.FAILED, error_code="oom", retryable=True)]
    )
    assert await jobs.retry(refunded.id, queue="sdxl", cost=1)
    assert await balance(database, user) == 97
    (claim,) = await queue.claim("sdxl", uuid4(), 1)
    await queue.settle(
        [Settlement(job_id=refunded.id, attempt=claim.attempt, status=Status.FAILED, error_code="invalid_input")]
    )
    assert await jobs.retry(refunded.id, queue="sdxl", cost=1)
    assert await balance(database, user) == 97, "it was paid for, and nothing was given back"
    await queue.cancel(refunded.id)
    assert await balance(database, user) == 100
    await database.pool.execute("UPDATE profiles SET token_balance = 2 WHERE id = $1", user)
    with pytest.raises(LimitReached):
        await jobs.retry(refunded.id, queue="sdxl", cost=1)
    assert await database.pool.fetchval("SELECT status FROM jobs WHERE id = $1", refunded.id) == "cancelled"


@pytest.mark.parametrize("seed", range(3))
async def test_the_balance_is_what_was_there_less_what_was_charged(database: Any, seed: int) -> None:
    """Whatever becomes of jobs, and in whatever order, of several users, with several at work at once."""
    await charge(database)
    users = [await database.user(name) for name in ("alice", "bob", "carol")]
    await database.pool.execute("UPDATE profiles SET token_balance = 60")
    jobs, queue, worker = Jobs(database.pool), Queue(database.worker_pool), uuid4()
    made, refusals = list[NewJob](), set[str]()

    async def accept(rng: random.Random) -> None:
        user = rng.choice(users)
        batch = [new_job(user, credits=rng.randint(0, 6)) for _ in range(rng.choice((1, 1, 3)))]
        try:
            if len(batch) == 1:
                await jobs.accept(batch[0])
            else:
                await jobs.accept_together(batch, idempotency_key=str(batch[0].id), body=b"")
        except LimitReached as error:
            refusals.add(error.code)
        else:
            made.extend(batch)

    async def run(rng: random.Random) -> None:
        claims = await queue.claim("sdxl", worker, rng.randint(1, 4))
        ends, back = [], []
        for claim in claims:
            end: dict[str, Any] = {"job_id": claim.job_id, "attempt": claim.attempt}
            fate = rng.choice(("completed", "failed", "cancelled", "back", "lost"))
            if fate == "back":
                back.append(Requeue(**end))
            elif fate == "lost":
                await expire(database.pool, claim.job_id)
                ends.append(Settlement(**end, status=Status.FAILED, expired=True, error_code="worker_lost"))
            else:
                code = rng.choice(FAULTS_OF_OURS + FAULTS_OF_THEIRS) if fate == "failed" else None
                ends.append(Settlement(**end, status=Status(fate), error_code=code))
        await queue.requeue(back)
        await queue.settle(ends)
        await queue.settle(ends)  # as after an answer that was lost

    async def disturb(rng: random.Random) -> None:
        job = rng.choice(made) if made else None
        if job is not None and rng.random() < 0.6:
            await Queue(database.pool).cancel(job.id)
        elif job is not None:
            try:
                await jobs.retry(job.id, queue="sdxl", cost=1)
            except LimitReached as error:
                refusals.add(error.code)

    async def work(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(25):
            await rng.choice((accept, accept, run, disturb))(rng)

    await asyncio.gather(*(work(number) for number in range(4)))
    assert refusals <= {"credits_exhausted"}
    rows = await database.pool.fetch(
        """SELECT p.token_balance, 60 - coalesce(sum(u.credits_consumed) FILTER (WHERE u.charged), 0) AS expected
           FROM profiles p LEFT JOIN usage_logs u ON u.user_id = p.id WHERE p.id = ANY ($1) GROUP BY p.id""",
        users,
    )
    assert [row["token_balance"] for row in rows] == [row["expected"] for row in rows]
    assert all(0 <= row["token_balance"] <= 60 for row in rows)
    net = await database.pool.fetch(
        """SELECT j.status, u.net, first.credits FROM jobs j
           CROSS JOIN LATERAL (SELECT sum(credits_consumed) AS net FROM usage_logs WHERE job_id = j.id) u
           CROSS JOIN LATERAL (SELECT max(credits_consumed) AS credits FROM usage_logs WHERE job_id = j.id) first"""
    )
    assert all(row["net"] in (0, row["credits"]) for row in net), "no job is charged or given back twice"
    assert all(row["net"] == row["credits"] for row in net if row["status"] in ("completed", "queued"))
    opened = await database.pool.fetch(
        """SELECT o.jobs, (SELECT count(*) FROM job_queue q WHERE q.user_id = o.user_id) AS counted
           FROM ourvidz.open_jobs o"""
    )
    assert [row["jobs"] for row in opened] == [row["counted"] for row in opened]
