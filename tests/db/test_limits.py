"""The limits of system_config, which hold however many ask at once, and what they refuse leaves nothing behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db import migrate as migrating
from db.idempotency import canonical_body
from db.jobs import Jobs, Status
from db.limits import NAMES, LimitReached, SystemConfig
from db.migrate import migrate, migrations
from db.pool import open_pool
from db.queue import Queue, Requeue, Settlement
from tests.conftest import with_database
from tests.db.test_queue import new_job

OFF = dict.fromkeys(NAMES)


async def limit(database: Any, **values: Any) -> None:
    """Set these, and no others."""
    await SystemConfig(database.pool).change(OFF | values, await database.user("operator", "admin"))


async def refused(jobs: Jobs, *wanted: Any, **options: Any) -> LimitReached:
    asking = jobs.accept(wanted[0], **options) if len(wanted) == 1 else jobs.accept_together(wanted, **options)
    with pytest.raises(LimitReached) as caught:
        await asking
    return caught.value


async def rows(database: Any) -> list[int]:
    """How many rows an acceptance makes, by table."""
    tables = ("jobs", "job_queue", "job_events", "usage_logs", "idempotency_keys", "callback_outbox", "fair_shares")
    return [await database.pool.fetchval(f"SELECT count(*) FROM {table}") for table in tables]  # noqa: S608


async def end(database: Any, slots: int = 1, **values: Any) -> None:
    """Run the next jobs to their end."""
    queue = Queue(database.worker_pool)
    claims = await queue.claim("sdxl", uuid4(), slots)
    given = {"status": Status.COMPLETED} | values
    assert len(await queue.settle([Settlement(job_id=c.job_id, attempt=c.attempt, **given) for c in claims])) == slots


async def open_count(database: Any, user: UUID) -> int:
    return int(await database.pool.fetchval("SELECT jobs FROM ourvidz.open_jobs WHERE user_id = $1", user))


@asynccontextmanager
async def before_audit(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A database as it was before whole numbers had no point, and users' words in the log no prefix."""
    name = f"older_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{name}"')
    connection = await asyncpg.connect(with_database(postgres_url, name))
    files = [file for file in migrations() if file.name < "0029_audit"]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(migrating, "migrations", lambda: files)
            await migrate(connection)
        yield connection
    finally:
        await connection.close()
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


@pytest.fixture
async def pools(database: Any) -> AsyncIterator[list[Jobs]]:
    """Two processes' worth of acceptance, with connections of their own."""
    async with await open_pool(database.url, max_size=8) as one, await open_pool(database.url, max_size=8) as other:
        yield [Jobs(one), Jobs(other)]


@pytest.mark.parametrize(
    ("limits", "code", "way"),
    [
        ({"maxJobsPerUser": 10}, "user_limit", "gathered"),
        ({"maxJobsPerUser": 10}, "user_limit", "alone"),
        ({"maxJobsPerUser": 10}, "user_limit", "keyed"),
        ({"maxJobsPerHour": 10}, "hourly_limit", "alone"),
        ({"maxConcurrentJobs": 10}, "concurrent_limit", "gathered"),
        ({"rateLimitRequestsPerMinute": 1, "burst": 10}, "rate_limited", "keyed"),
        ({"chargeCredits": True}, "credits_exhausted", "gathered"),
        ({"chargeCredits": True}, "credits_exhausted", "alone"),
    ],
)
async def test_of_fifty_at_once_exactly_ten_are_taken(
    database: Any, pools: list[Jobs], limits: dict[str, Any], code: str, way: str
) -> None:
    await limit(database, **limits)
    user = await database.user()
    await database.pool.execute("UPDATE profiles SET token_balance = 10 WHERE id = $1", user)

    async def ask(number: int) -> str:
        jobs, job = pools[number % 2], new_job(user)
        try:
            if way == "gathered":
                await jobs.accept(job)
            elif way == "alone":
                await jobs.accept_together([job])
            else:
                await jobs.accept(job, idempotency_key=str(number), body=canonical_body(number))
        except LimitReached as error:
            return error.code
        return "taken"

    outcomes = await asyncio.gather(*(ask(number) for number in range(50)))
    assert {outcome: outcomes.count(outcome) for outcome in outcomes} == {"taken": 10, code: 40}
    keys = 10 if way == "keyed" else 0
    assert await rows(database) == [10, 10, 10, 10, keys, 0, 1]


async def test_nothing_is_counted_where_no_limit_is_set(database: Any) -> None:
    user = await database.user()
    await Jobs(database.pool).accept_all([new_job(user) for _ in range(200)])
    assert await database.pool.fetchval("SELECT count(*) FROM ourvidz.user_quotas") == 0
    assert await open_count(database, user) == 200


async def test_others_in_the_same_statement_are_taken(database: Any) -> None:
    await limit(database, maxJobsPerUser=3)
    alice, bob = await database.user(), await database.user("bob")
    jobs = Jobs(database.pool)
    mixed = [new_job(alice if number % 2 else bob) for number in range(12)]
    outcomes = await asyncio.gather(*(jobs.accept(job) for job in mixed), return_exceptions=True)
    assert sum(isinstance(outcome, LimitReached) for outcome in outcomes) == 6
    assert [await open_count(database, user) for user in (alice, bob)] == [3, 3]


async def test_a_batch_is_taken_whole_or_not_at_all(database: Any) -> None:
    await limit(database, maxJobsPerUser=5)
    user = await database.user()
    jobs = Jobs(database.pool)
    await jobs.accept_together([new_job(user) for _ in range(3)])
    before = await rows(database)
    error = await refused(jobs, *(new_job(user) for _ in range(3)))
    assert (error.code, error.setting, error.allowed, error.needed) == ("user_limit", "maxJobsPerUser", 5, 3)
    assert await rows(database) == before
    await jobs.accept_together([new_job(user) for _ in range(2)])


async def test_a_batch_is_one_request_of_the_rate(database: Any) -> None:
    await limit(database, rateLimitRequestsPerMinute=1, burst=2)
    user, jobs = await database.user(), Jobs(database.pool)
    for _ in range(2):
        await jobs.accept_together([new_job(user) for _ in range(20)])
    assert (await refused(jobs, new_job(user))).code == "rate_limited"


async def test_rate_tells_when_the_next_request_may_come(database: Any) -> None:
    await limit(database, rateLimitRequestsPerMinute=6, burst=1)
    user, jobs = await database.user(), Jobs(database.pool)
    await jobs.accept(new_job(user))
    error = await refused(jobs, new_job(user))
    assert 1 <= (error.retry_after or 0) <= 10
    later = "UPDATE ourvidz.user_quotas SET rate_at = rate_at - make_interval(secs => $1)"
    await database.pool.execute(later, float(error.retry_after or 0))
    await jobs.accept(new_job(user))


async def test_burst_is_ten_where_none_is_set(database: Any) -> None:
    await limit(database, rateLimitRequestsPerMinute=1)
    user, jobs = await database.user(), Jobs(database.pool)
    for _ in range(10):
        await jobs.accept(new_job(user))
    assert (await refused(jobs, new_job(user))).code == "rate_limited"


async def test_work_that_is_no_job_shares_the_rate_with_jobs(database: Any) -> None:
    user, jobs, config = await database.user(), Jobs(database.pool), SystemConfig(database.pool)
    await config.admit_request(user)  # no rate is set: nothing is counted
    await limit(database, rateLimitRequestsPerMinute=6, burst=3)
    await config.admit_request(user)
    await jobs.accept(new_job(user))
    await config.admit_request(user)
    with pytest.raises(LimitReached) as told:
        await config.admit_request(user)
    assert (told.value.code, told.value.setting) == ("rate_limited", "rateLimitRequestsPerMinute")
    assert told.value.allowed == 6
    assert 1 <= (told.value.retry_after or 0) <= 10
    assert (await refused(jobs, new_job(user))).code == "rate_limited"
    await config.admit_request(await database.user("bob"))
    later = "UPDATE ourvidz.user_quotas SET rate_at = rate_at - make_interval(secs => $1)"
    await database.pool.execute(later, float(told.value.retry_after or 0))
    await config.admit_request(user)


async def test_of_many_requests_at_once_the_burst_is_let_in(database: Any) -> None:
    await limit(database, rateLimitRequestsPerMinute=1, burst=4)
    user, config = await database.user(), SystemConfig(database.pool)
    answers = await asyncio.gather(*(config.admit_request(user) for _ in range(12)), return_exceptions=True)
    assert [type(answer) for answer in answers if answer is not None] == [LimitReached] * 8


async def test_a_request_beside_the_ones_that_used_the_burst_up_is_refused(database: Any) -> None:
    await limit(database, rateLimitRequestsPerMinute=1, burst=4)
    user, config = await database.user(), SystemConfig(database.pool)
    async with database.pool.acquire() as connection, connection.transaction():
        used_up = (
            "INSERT INTO ourvidz.user_quotas (user_id, rate_at) VALUES ($1, clock_timestamp() + interval '4 minutes')"
        )
        await connection.execute(used_up, user)
        beside = asyncio.create_task(config.admit_request(user))
        waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted)"
        async with asyncio.timeout(60):
            while not await database.pool.fetchval(waits):  # noqa: ASYNC110 (the lock tells nobody)
                await asyncio.sleep(0.01)
    with pytest.raises(LimitReached):
        await beside


async def test_hour_slides_and_tells_when_its_first_job_leaves_it(database: Any) -> None:
    await limit(database, maxJobsPerHour=3)
    user, jobs = await database.user(), Jobs(database.pool)
    for minutes in (50, 30, 10):
        job = new_job(user)
        await jobs.accept(job)
        await database.pool.execute(
            "UPDATE usage_logs SET created_at = now() - make_interval(mins => $2) WHERE job_id = $1", job.id, minutes
        )
    error = await refused(jobs, new_job(user))
    assert (error.code, error.allowed) == ("hourly_limit", 3)
    assert 9 * 60 < (error.retry_after or 0) <= 10 * 60
    two = await refused(jobs, new_job(user), new_job(user))
    assert 29 * 60 < (two.retry_after or 0) <= 30 * 60, "two places are free when the second has left as well"
    await database.pool.execute("UPDATE usage_logs SET created_at = created_at - interval '11 minutes'")
    await jobs.accept(new_job(user))
    assert (await refused(jobs, new_job(user))).code == "hourly_limit"


@pytest.mark.parametrize(
    ("setting", "code"),
    [("maxJobsPerHour", "hourly_limit"), ("maxJobsPerUser", "user_limit"), ("maxConcurrentJobs", "concurrent_limit")],
)
@pytest.mark.parametrize("used", [0, 1])
async def test_a_batch_that_no_waiting_helps_is_told_so(database: Any, setting: str, code: str, used: int) -> None:
    user, jobs = await database.user(), Jobs(database.pool)
    await jobs.accept_all([new_job(user) for _ in range(used)])
    await limit(database, **{setting: 2})
    error = await refused(jobs, *(new_job(user) for _ in range(3)))
    assert (error.code, error.allowed, error.needed, error.retry_after) == (code, 2, 3, None)
    assert "3 at once never fit" in error.message
    await jobs.accept_together([new_job(user) for _ in range(2 - used)])
    later = await refused(jobs, new_job(user))
    assert (later.code, "never" in later.message) == (code, False)
    assert (later.retry_after or 0) > 0


async def test_jobs_that_come_in_one_statement_share_the_hour(database: Any) -> None:
    await limit(database, maxJobsPerHour=3)
    user, jobs = await database.user(), Jobs(database.pool)
    with pytest.raises(LimitReached) as caught:
        await jobs.accept_all([new_job(user) for _ in range(4)])
    assert (caught.value.code, caught.value.retry_after) == ("hourly_limit", 3600), "when the first of them leaves it"


async def test_hour_counts_jobs_that_were_erased(database: Any) -> None:
    await limit(database, maxJobsPerHour=1)
    user, jobs = await database.user(), Jobs(database.pool)
    job = new_job(user)
    await jobs.accept(job)
    await end(database)
    assert await jobs.erase(job.id, user) is not None
    assert (await refused(jobs, new_job(user))).code == "hourly_limit"


async def test_a_place_is_free_when_a_job_ends_in_any_way(database: Any) -> None:
    await limit(database, maxJobsPerUser=1)
    user, jobs, queue = await database.user(), Jobs(database.pool), Queue(database.pool)
    ends = [
        lambda job: end(database),
        lambda job: end(database, status=Status.FAILED, error_code="oom", retryable=True),
        lambda job: queue.cancel(job.id),
        lambda job: database.pool.execute("DELETE FROM jobs WHERE id = $1", job.id),
    ]
    for finish in ends:
        job = new_job(user)
        await jobs.accept(job)
        error = await refused(jobs, new_job(user))
        assert (error.code, error.retry_after) == ("user_limit", 5), "what is predicted for the job that waits"
        await finish(job)
        assert await open_count(database, user) == 0


async def test_a_job_that_goes_back_to_its_queue_is_counted_once(database: Any) -> None:
    user, queue = await database.user(), Queue(database.worker_pool)
    await Jobs(database.pool).accept(new_job(user))
    (claim,) = await queue.claim("sdxl", uuid4(), 1)
    await queue.requeue([Requeue(job_id=claim.job_id, attempt=claim.attempt, counts=True)])
    assert await open_count(database, user) == 1


async def test_a_limit_that_is_changed_holds_for_the_next_job(database: Any) -> None:
    user, jobs = await database.user(), Jobs(database.pool)
    await limit(database, maxJobsPerUser=100, maxJobsPerHour=100)
    await jobs.accept_all([new_job(user) for _ in range(20)])
    await limit(database, maxJobsPerUser=20)
    assert (await refused(jobs, new_job(user))).code == "user_limit"
    await limit(database, maxJobsPerHour=20)
    assert (await refused(jobs, new_job(user))).code == "hourly_limit", "the room that was counted under 100 is void"
    await limit(database, maxJobsPerUser=21)
    await jobs.accept(new_job(user))
    await limit(database)
    await jobs.accept(new_job(user))


async def test_what_is_exempt_is_counted_and_never_refused(database: Any) -> None:
    await limit(
        database, maxJobsPerUser=2, maxJobsPerHour=2, maxConcurrentJobs=2, rateLimitRequestsPerMinute=1, burst=1
    )
    user, jobs = await database.user(), Jobs(database.pool)
    for _ in range(3):
        await jobs.accept(new_job(user, exempt=True))
    assert (await refused(jobs, new_job(user))).code == "hourly_limit"
    await limit(database, maintenanceMode=True, chargeCredits=True)
    await jobs.accept(new_job(user, exempt=True, credits=1000))
    assert await database.pool.fetchval("SELECT token_balance FROM profiles WHERE id = $1", user) == 100


async def test_maintenance_refuses_new_jobs_and_ends_those_that_run(database: Any) -> None:
    user, jobs = await database.user(), Jobs(database.pool)
    first, second = new_job(user), new_job(user)
    await jobs.accept_all([first, second])
    await limit(database, maintenanceMode=True)
    error = await refused(jobs, new_job(user))
    assert (error.code, error.setting, error.retry_after) == ("maintenance", "maintenanceMode", 60)
    await end(database)
    assert await Queue(database.pool).cancel(second.id) == "cancelled"
    with pytest.raises(LimitReached):
        await jobs.retry(second.id, queue="sdxl", cost=1)
    assert await jobs.retry(second.id, queue="sdxl", cost=1, exempt=True)


async def test_a_retry_takes_a_place_and_no_hour(database: Any) -> None:
    await limit(database, maxJobsPerUser=1, maxJobsPerHour=2)
    user, jobs = await database.user(), Jobs(database.pool)
    first, second = new_job(user), new_job(user)
    await jobs.accept(first)
    await end(database, status=Status.FAILED, error_code="oom", retryable=True)
    await jobs.accept(second)
    with pytest.raises(LimitReached, match="user_limit"):
        await jobs.retry(first.id, queue="sdxl", cost=1)
    assert await database.pool.fetchval("SELECT status FROM jobs WHERE id = $1", first.id) == "failed"
    await end(database)
    assert await jobs.retry(first.id, queue="sdxl", cost=1)
    assert not await jobs.retry(second.id, queue="sdxl", cost=1), "it is completed"


async def test_full_storage_refuses_jobs_until_there_is_room(database: Any) -> None:
    user, jobs = await database.user(), Jobs(database.pool)
    await limit(database, maxStoragePerUserGB=0.000001)
    await jobs.accept(new_job(user))
    await database.pool.execute(
        """INSERT INTO workspace_assets (id, user_id, job_id, asset_index, attempt, asset_type, temp_storage_path,
                                         mime_type, file_size_bytes, width, height, original_prompt, model_used,
                                         expires_at)
           SELECT gen_random_uuid(), user_id, id, 0, 1, 'image', 'a', 'image/png', 1000, 1, 1, '', 'tiny',
                  now() + interval '90 seconds' FROM jobs"""
    )
    await database.pool.execute("UPDATE ourvidz.user_quotas SET stored_at = stored_at - interval '2 minutes'")
    error = await refused(jobs, new_job(user))
    assert (error.code, error.setting) == ("storage_limit", "maxStoragePerUserGB")
    assert 80 < (error.retry_after or 0) <= 90, "then the next asset expires"
    await database.pool.execute("DELETE FROM workspace_assets")
    await jobs.accept(new_job(user))


async def test_the_row_can_hold_no_limit_that_is_none(database: Any) -> None:
    limits = [("maxJobsPerUser", "10"), ("maxJobsPerHour", 1.5), ("burst", 0), ("maxStoragePerUserGB", 0)]
    limits += [(name, 20.0) for name in NAMES[:5]]  # which jsonb keeps with its point, and which is no int
    for config in [{name: value} for name, value in [*limits, ("maintenanceMode", 1)]] + [[]]:
        with pytest.raises(asyncpg.CheckViolationError):
            await database.pool.execute("UPDATE system_config SET config = $1", config)


async def test_changing_the_row_leaves_what_others_keep_there_and_one_line_in_the_log(database: Any) -> None:
    await database.pool.execute("UPDATE system_config SET config = $1", {"promptCache": {"a": 1}, "burst": 3})
    config, admin = SystemConfig(database.pool), await database.user("operator", "admin")
    assert await config.change({"burst": None, "maxJobsPerUser": 5}, admin) == {"maxJobsPerUser": 5}
    assert await config.change({"maxJobsPerUser": 5}, admin) == {"maxJobsPerUser": 5}
    row = await database.pool.fetchval("SELECT config FROM system_config")
    assert row == {"promptCache": {"a": 1}, "maxJobsPerUser": 5}
    (line,) = await database.pool.fetch(
        "SELECT user_id, metadata FROM user_activity_log WHERE action = 'config.changed'"
    )
    assert line["user_id"] == admin
    assert line["metadata"]["changed"] == {
        "burst": {"before": 3, "after": None},
        "maxJobsPerUser": {"before": None, "after": 5},
    }


async def test_whole_numbers_that_were_stored_with_a_point_lose_it(postgres_url: str) -> None:
    kept = '{"burst": 3, "maxStoragePerUserGB": 0.5, "maxJobsPerHour": null, "promptCache": {"a": 1.0}}'
    async with before_audit(postgres_url) as connection:
        await connection.execute("UPDATE system_config SET config = $1 || '{\"maxJobsPerUser\": 20.0}'::jsonb", kept)
        await migrate(connection)
        after = await connection.fetchval("SELECT config::text FROM system_config")
        assert after == await connection.fetchval("SELECT ($1 || '{\"maxJobsPerUser\": 20}'::jsonb)::text", kept)
