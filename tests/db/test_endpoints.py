"""Registered endpoints on a real Postgres: who gets a row, each receiver's own order, the breaker, and disabling."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.callbacks import Attempt
from db.endpoints import MOST_OF_USER, Endpoints
from db.jobs import Jobs, Status
from db.pool import as_user
from db.queue import Claim, Queue, Settlement
from tests.db.outbox import Outbox
from tests.db.test_callbacks import backlog
from tests.db.test_queue import new_job

HOOK = "https://example.com/hook"
FAILED = Attempt(500, "status", 3)
TAKEN = Attempt(200, None, 3)


@pytest.fixture
async def outbox(database: Any) -> Outbox:
    return await Outbox.open(database)


@pytest.fixture
def endpoints(database: Any) -> Endpoints:
    return Endpoints(database.pool)


async def ended(database: Any, *jobs: Any) -> None:
    """Run jobs to their end: claimed by a replica, and completed in one statement."""
    queue = Queue(database.worker_pool)
    for job in jobs:
        await Jobs(database.pool).accept(job)
    claims: list[Claim] = await queue.claim("sdxl", uuid4(), 100)
    wanted = {job.id for job in jobs}
    done = [
        Settlement(job_id=c.job_id, attempt=c.attempt, status=Status.COMPLETED) for c in claims if c.job_id in wanted
    ]
    assert len(await queue.settle(done)) == len(jobs)


async def audit(pool: asyncpg.Pool) -> list[tuple[Any, ...]]:
    rows = await pool.fetch(
        "SELECT user_id, action, resource_id, metadata ->> 'reason' FROM user_activity_log ORDER BY created_at"
    )
    return [tuple(row) for row in rows]


async def disabled(outbox: Outbox, endpoint_id: UUID) -> str | None:
    """Why an endpoint is disabled."""
    statement = "SELECT disabled_reason FROM callback_endpoints WHERE id = $1"
    return await outbox.pool.fetchval(statement, endpoint_id)


# ------------------------------------------------------------------------------------------------ who gets a row


async def test_every_receiver_that_wants_the_event_gets_a_row_of_its_own(database: Any, outbox: Outbox) -> None:
    both = await outbox.endpoint("https://both.example/")
    end = await outbox.endpoint("https://end.example/", events=["completed"])
    await outbox.endpoint("https://failures.example/", events=["failed"])
    await outbox.endpoint("https://bob.example/", await database.user("bob"))
    job = new_job(outbox.user_id, callback_url=HOOK)
    await ended(database, job)
    rows = await outbox.pool.fetch("SELECT * FROM callback_outbox WHERE job_id = $1", job.id)
    told = {(row["endpoint_id"], row["event_type"], row["url"]) for row in rows}
    assert told == {
        (None, "job.processing", HOOK),
        (None, "job.completed", HOOK),
        (both.id, "job.processing", "https://both.example/"),
        (both.id, "job.completed", "https://both.example/"),
        (end.id, "job.completed", "https://end.example/"),
    }
    assert len(rows) == len({row["id"] for row in rows}) == 5
    assert all(json.loads(row["body"])["id"] == row["id"] for row in rows)


async def test_jobs_that_end_in_one_statement_have_rows_of_their_own(database: Any, outbox: Outbox) -> None:
    endpoint = await outbox.endpoint(events=["completed"])
    jobs = [new_job(outbox.user_id, callback_url=None) for _ in range(5)]
    await ended(database, *jobs)
    rows = await outbox.pool.fetch("SELECT id, job_id, endpoint_id FROM callback_outbox")
    assert {(row["job_id"], row["endpoint_id"]) for row in rows} == {(job.id, endpoint.id) for job in jobs}


async def test_end_that_nobody_wants_to_hear_of_has_no_row(database: Any, outbox: Outbox) -> None:
    await outbox.endpoint(events=["failed"])
    await ended(database, new_job(outbox.user_id, callback_url=None))
    assert await outbox.pool.fetchval("SELECT count(*) FROM callback_outbox") == 0


async def test_disabled_endpoint_hears_of_nothing(database: Any, outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint()
    await endpoints.change(endpoint.id, outbox.user_id, enabled=False)
    await ended(database, new_job(outbox.user_id, callback_url=None))
    assert await outbox.states() == {}


async def test_one_receiver_gets_an_event_of_a_job_once(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("url")
    await outbox.add("endpoint", endpoint_id=endpoint.id)
    with pytest.raises(asyncpg.UniqueViolationError):
        await outbox.add("url again")
    with pytest.raises(asyncpg.UniqueViolationError):
        await outbox.add("endpoint again", endpoint_id=endpoint.id)


# ------------------------------------------------------------------------------------------- order by receiver


async def test_receiver_does_not_wait_for_another_of_the_same_job(outbox: Outbox) -> None:
    first, second = await outbox.endpoint(), await outbox.endpoint()
    await outbox.add("url1", seq=1, age=-3600)
    await outbox.add("first1", seq=1, age=-3600, endpoint_id=first.id)
    for name, endpoint_id in (("url2", None), ("first2", first.id), ("second2", second.id)):
        await outbox.add(name, seq=2, endpoint_id=endpoint_id)
    assert await outbox.claimed() == ["second2"]


async def test_end_supersedes_the_progress_of_its_own_receiver_only(outbox: Outbox) -> None:
    first, second = await outbox.endpoint(), await outbox.endpoint()
    for name, endpoint_id in (("url", None), ("first", first.id), ("second", second.id)):
        await outbox.add(name, seq=1, age=-3600, endpoint_id=endpoint_id)
    await outbox.add("end", seq=2, endpoint_id=first.id)
    assert await outbox.claimed() == ["end"]
    assert await outbox.states() == {"url": "due", "first": "superseded", "second": "due", "end": "sending"}


async def test_failed_progress_is_superseded_by_the_end_to_its_own_receiver_only(outbox: Outbox) -> None:
    first, second = await outbox.endpoint(), await outbox.endpoint()
    await outbox.add("first", seq=1, endpoint_id=first.id)
    await outbox.add("second", seq=1, endpoint_id=second.id)
    claimed = await outbox.claim()
    await outbox.add("end", seq=2, endpoint_id=first.id)
    for delivery in claimed:
        assert await outbox.callbacks.failed(delivery, FAILED, 60)
    assert await outbox.states() == {"first": "superseded", "second": "due", "end": "due"}


async def test_replay_asks_for_the_end_to_the_same_receiver_only(outbox: Outbox) -> None:
    first, second = await outbox.endpoint(), await outbox.endpoint()
    await outbox.add("first", seq=1, endpoint_id=first.id)
    await outbox.add("second", seq=1, endpoint_id=second.id)
    for delivery in await outbox.claim():
        await outbox.callbacks.dead(delivery, FAILED)
    await outbox.add("end", seq=2, age=-3600, endpoint_id=first.id)
    assert not await outbox.callbacks.replay("first")
    assert await outbox.callbacks.replay("second")


# ------------------------------------------------------------------------------------------------------- claim


async def test_claim_tells_the_key_of_the_endpoint(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint(signature="v1a")
    await outbox.pool.execute("UPDATE profiles SET callback_secret_version = 9, callback_secret_rotated_at = now()")
    await outbox.pool.execute(
        "UPDATE callback_endpoints SET secret_version = 3, secret_rotated_at = now() - interval '1 hour'"
    )
    await outbox.add("now", endpoint_id=endpoint.id)
    key = (await outbox.one()).key
    assert (key.owner_id, key.scheme, key.version) == (endpoint.id, "v1a", 3)
    assert key.age_seconds == pytest.approx(3600, abs=60)


async def test_claim_goes_where_the_endpoint_is_now(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint("https://old.example/")
    await outbox.add("now", url="https://old.example/", endpoint_id=endpoint.id)
    await endpoints.change(endpoint.id, outbox.user_id, url="https://new.example/")
    assert (await outbox.one()).url == "https://new.example/"
    assert (await outbox.row("now"))["url"] == "https://new.example/"


async def test_tripped_endpoint_gets_one_at_a_time_until_one_succeeds(outbox: Outbox) -> None:
    endpoint, other = await outbox.endpoint(), await outbox.endpoint()
    for index in range(12):
        await outbox.add(f"n{index}", job_id=await outbox.job(), age=100 - index, endpoint_id=endpoint.id)
    await outbox.add("other", endpoint_id=other.id)
    for _ in range(9):
        (delivery,) = await outbox.claim(limit=1)
        await outbox.callbacks.failed(delivery, FAILED, 0)
    nine = await outbox.claim(limit=3)
    assert len(nine) == 3, "nine failures do not trip it"
    for delivery in nine:
        await outbox.callbacks.failed(delivery, FAILED, 3600)

    tried = [delivery.endpoint_id for delivery in await outbox.claim()]
    assert sorted(map(str, tried)) == sorted(map(str, [endpoint.id, other.id]))
    assert await outbox.claim() == []
    held = await outbox.pool.fetchval(
        "SELECT id FROM callback_outbox WHERE state = 'sending' AND endpoint_id = $1", endpoint.id
    )
    await outbox.expire(held)
    (again,) = await outbox.claim()
    assert again.endpoint_id == endpoint.id
    assert await outbox.callbacks.delivered(again, TAKEN)
    assert len(await outbox.claim()) == 8


async def test_no_backlog_of_a_tripped_endpoint_hides_another_for_more_than_one_claim(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await backlog(outbox, 500, "due", "https://sick.example/")
    await outbox.pool.execute("UPDATE callback_outbox SET endpoint_id = $1", endpoint.id)
    await outbox.failing(endpoint.id, 10, 1)
    await outbox.add("quick", url="https://quick.example/")
    assert len(await outbox.claim(limit=4)) == 1
    assert await outbox.claimed(limit=4) == ["quick"]


@pytest.mark.parametrize("ended_by", ["disable", "delete"])
async def test_claim_says_that_nobody_wants_it_any_more(outbox: Outbox, endpoints: Endpoints, ended_by: str) -> None:
    endpoint = await outbox.endpoint()
    if ended_by == "disable":
        await endpoints.change(endpoint.id, outbox.user_id, enabled=False)
    else:
        await endpoints.remove(endpoint.id, outbox.user_id)
    await outbox.add("late", endpoint_id=endpoint.id)  # as by a job that ended at that very moment
    assert (await outbox.one()).withdrawn == f"endpoint_{ended_by}d"


async def test_claim_says_nothing_of_the_kind_about_others(outbox: Outbox) -> None:
    await outbox.add("endpoint", endpoint_id=(await outbox.endpoint()).id)
    await outbox.add("url")
    assert [delivery.withdrawn for delivery in await outbox.claim()] == [None, None]


# --------------------------------------------------------------------------------------------------- disabling


async def test_gone_disables_the_endpoint_with_all_that_waits_for_it(outbox: Outbox) -> None:
    endpoint, other = await outbox.endpoint(), await outbox.endpoint()
    await outbox.add("now", age=9, endpoint_id=endpoint.id)
    await outbox.add("waits", seq=2, endpoint_id=endpoint.id)
    await outbox.add("later", job_id=await outbox.job(), age=-3600, endpoint_id=endpoint.id)
    await outbox.add("other", age=-3600, endpoint_id=other.id)
    await outbox.add("url", age=-3600)
    assert await outbox.callbacks.dead(await outbox.one(), Attempt(410, "gone", 3))
    assert await outbox.states() == {"now": "dead", "waits": "dead", "later": "dead", "other": "due", "url": "due"}
    assert (await outbox.row("later"))["last_error"] == "endpoint_disabled"
    assert await disabled(outbox, endpoint.id) == "gone"
    assert await disabled(outbox, other.id) is None
    assert await audit(outbox.pool) == [(outbox.user_id, "callback_endpoint.disabled", str(endpoint.id), "gone")]


async def test_gone_by_the_url_of_a_job_disables_nothing(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("url")
    await outbox.callbacks.dead(await outbox.one(), Attempt(410, "gone", 3))
    assert await disabled(outbox, endpoint.id) is None
    assert await audit(outbox.pool) == []


@pytest.mark.parametrize("end", ["failed", "dead"])
async def test_five_days_of_nothing_but_failures_disable_it(outbox: Outbox, end: str) -> None:
    endpoint = await outbox.endpoint()
    for days, reason in ((4.9, None), (5.1, "failing")):
        name = await outbox.add(f"after {days}", job_id=await outbox.job(), endpoint_id=endpoint.id)
        await outbox.failing(endpoint.id, 3, days)
        delivery = await outbox.one()
        assert delivery.id == name
        arguments = (delivery, FAILED, 3600.0) if end == "failed" else (delivery, FAILED)
        assert await getattr(outbox.callbacks, end)(*arguments)
        assert await disabled(outbox, endpoint.id) == reason
    assert set((await outbox.states()).values()) == {"dead"}
    assert [row[3] for row in await audit(outbox.pool)] == ["failing"]


@pytest.mark.parametrize("failures", [1, 50])
async def test_a_success_forgives_the_failures_before_it(outbox: Outbox, failures: int) -> None:
    endpoint = await outbox.endpoint()
    await outbox.failing(endpoint.id, failures, 9)
    await outbox.add("now", endpoint_id=endpoint.id)
    await outbox.callbacks.delivered(await outbox.one(), TAKEN)
    await outbox.add("next", seq=2, endpoint_id=endpoint.id)
    await outbox.callbacks.failed(await outbox.one(), FAILED, 3600)
    row = await outbox.pool.fetchrow(
        "SELECT failures, failing_since > now() - interval '1 minute' FROM callback_endpoints"
    )
    assert tuple(row) == (1, True)
    assert await disabled(outbox, endpoint.id) is None


async def test_write_of_a_lost_lease_counts_against_nobody(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("now", endpoint_id=endpoint.id)
    old = await outbox.one()
    await outbox.expire("now")
    await outbox.one()
    assert not await outbox.callbacks.dead(old, Attempt(410, "gone", 3))
    assert not await outbox.callbacks.failed(old, FAILED, 5)
    assert await disabled(outbox, endpoint.id) is None
    assert await outbox.pool.fetchval("SELECT failures FROM callback_endpoints") == 0


async def test_what_was_never_sent_counts_against_nobody(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("now", endpoint_id=endpoint.id)
    assert await outbox.callbacks.dead(await outbox.one(), Attempt(error="abandoned"))
    assert await outbox.pool.fetchval("SELECT failures FROM callback_endpoints WHERE id = $1", endpoint.id) == 0


async def test_failures_at_once_all_count_and_disable_once(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    for index in range(8):
        await outbox.add(f"n{index}", job_id=await outbox.job(), endpoint_id=endpoint.id)
    claimed = await outbox.claim()
    await asyncio.gather(*(outbox.callbacks.failed(delivery, FAILED, 3600) for delivery in claimed[:6]))
    assert await outbox.pool.fetchval("SELECT failures FROM callback_endpoints") == 6
    gone = Attempt(410, "gone", 3)
    await asyncio.gather(*(outbox.callbacks.dead(delivery, gone) for delivery in claimed[6:]))
    assert len(await audit(outbox.pool)) == 1
    assert set((await outbox.states()).values()) == {"dead"}


async def test_disabling_waits_for_no_row_that_another_transaction_holds(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("held", endpoint_id=endpoint.id)
    await outbox.add("free", seq=2, endpoint_id=endpoint.id)
    async with outbox.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM callback_outbox WHERE id = 'held' FOR UPDATE")
        async with asyncio.timeout(20):
            await endpoints.change(endpoint.id, outbox.user_id, enabled=False)
    assert await outbox.states() == {"held": "due", "free": "dead"}
    assert (await outbox.one()).withdrawn == "endpoint_disabled"


async def test_enabling_begins_without_the_failures(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint()
    await outbox.failing(endpoint.id, 50, 9)
    await endpoints.change(endpoint.id, outbox.user_id, enabled=False)
    await endpoints.change(endpoint.id, outbox.user_id, enabled=True)
    found = await endpoints.read(outbox.user_id, endpoint.id)
    assert found is not None
    assert (found.disabled_at, found.disabled_reason, found.failures, found.failing_since) == (None, None, 0, None)


async def test_only_another_url_forgives_failures(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint(HOOK)
    failures = []
    for changes in ({"url": HOOK}, {"description": "x"}, {"enabled": True}, {"url": HOOK + "/2"}):
        await outbox.failing(endpoint.id, 7, 2)
        await endpoints.change(endpoint.id, outbox.user_id, **changes)
        failures.append(await outbox.pool.fetchval("SELECT failures FROM callback_endpoints"))
    assert failures == [7, 7, 7, 0]


async def test_delete_leaves_the_history_and_an_audit_row(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("sent", endpoint_id=endpoint.id)
    await outbox.callbacks.delivered(await outbox.one(), TAKEN)
    await outbox.add("waits", seq=2, endpoint_id=endpoint.id)
    assert await endpoints.remove(endpoint.id, outbox.user_id)
    assert not await endpoints.remove(endpoint.id, outbox.user_id)
    assert await outbox.states() == {"sent": "delivered", "waits": "dead"}
    assert (await outbox.row("waits"))["last_error"] == "endpoint_deleted"
    assert not await outbox.callbacks.replay("waits")
    assert [row[1] for row in await audit(outbox.pool)] == ["callback_endpoint.deleted"]


# ------------------------------------------------------------------------------------------------------ replay


async def test_replay_range_takes_its_endpoint_its_time_and_its_states(outbox: Outbox) -> None:
    endpoint, other = await outbox.endpoint(), await outbox.endpoint()
    now = datetime.now(UTC)
    for name, owner, state, hours in (
        ("dead", endpoint, "dead", 2),
        ("delivered", endpoint, "delivered", 2),
        ("due", endpoint, "due", 2),
        ("early", endpoint, "dead", 5),
        ("late", endpoint, "dead", 1),
        ("others", other, "dead", 2),
    ):
        await outbox.add(name, job_id=await outbox.job(), age=-3600, endpoint_id=owner.id)
        await outbox.pool.execute(
            """UPDATE callback_outbox SET state = $2, created_at = $3, attempts = 4,
                      delivered_at = CASE WHEN $2 = 'delivered' THEN now() END WHERE id = $1""",
            name,
            state,
            now - timedelta(hours=hours),
        )
    since, until = now - timedelta(hours=3), now - timedelta(hours=1)
    assert await outbox.callbacks.replay_range(endpoint.id, since, until, ["dead"]) == 1
    assert await outbox.claimed() == ["dead"]
    assert await outbox.callbacks.replay_range(endpoint.id, since, until, ["dead", "delivered", "due"]) == 1
    assert await outbox.claimed() == ["delivered"]
    assert (await outbox.row("delivered"))["attempts"] == 1, "with a fresh budget"


async def test_nothing_is_replayed_to_a_disabled_endpoint(outbox: Outbox, endpoints: Endpoints) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("end", endpoint_id=endpoint.id)
    await outbox.callbacks.dead(await outbox.one(), Attempt(410, "gone", 3))
    ever = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC), ["dead"])
    assert not await outbox.callbacks.replay("end")
    assert await outbox.callbacks.replay_range(endpoint.id, *ever) == 0
    await endpoints.change(endpoint.id, outbox.user_id, enabled=True)
    assert await outbox.callbacks.replay_range(endpoint.id, *ever) == 1


# ------------------------------------------------------------------------------------------- limits and access


async def test_no_user_has_more_than_the_limit_even_when_they_come_at_once(
    outbox: Outbox, endpoints: Endpoints, database: Any
) -> None:
    async def one() -> bool:
        return await endpoints.create(outbox.user_id, HOOK, "", ["completed"], "v1") is not None

    made = await asyncio.gather(*(one() for _ in range(MOST_OF_USER + 5)))
    assert sum(made) == MOST_OF_USER
    assert await endpoints.create(await database.user("bob"), HOOK, "", ["completed"], "v1") is not None


@pytest.mark.parametrize(("role", "seen"), [("basic_user", False), ("moderator", True), ("admin", True)])
async def test_others_see_an_endpoint_only_as_staff(
    outbox: Outbox, endpoints: Endpoints, database: Any, role: str, seen: bool
) -> None:
    endpoint = await outbox.endpoint()
    bob = await database.user("bob", role)
    assert (await endpoints.read(bob, endpoint.id) is not None) is seen
    assert await endpoints.read(outbox.user_id, endpoint.id) is not None
    assert await endpoints.of_user(bob) == []


async def test_users_write_no_endpoint_by_themselves(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    for statement in (
        "UPDATE callback_endpoints SET url = 'https://evil.example/' WHERE id = $1",
        "DELETE FROM callback_endpoints WHERE id = $1",
        "SELECT ourvidz.disable_endpoint($1, 'manual')",
    ):
        async with outbox.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL ROLE authenticated")
            claims = json.dumps({"sub": str(outbox.user_id), "role": "authenticated"})
            await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    await connection.execute(statement, endpoint.id)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE callback_endpoints SET url = 'https://evil.example/'",
        "UPDATE callback_endpoints SET secret_version = 1",
        "DELETE FROM callback_endpoints",
        "INSERT INTO user_activity_log (action) VALUES ('job.erased')",
        "SELECT FROM user_activity_log",
    ],
)
async def test_replicas_may_disable_an_endpoint_and_no_more(outbox: Outbox, database: Any, statement: str) -> None:
    await outbox.endpoint()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await database.worker_pool.execute(statement)


async def test_rows_of_another_user_are_not_seen_through_an_endpoint(outbox: Outbox, database: Any) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("now", endpoint_id=endpoint.id)
    statement = "SELECT count(endpoint_id) FROM callback_outbox"
    async with as_user(database.pool, await database.user("bob")) as connection:
        assert await connection.fetchval(statement) == 0
    async with as_user(database.pool, outbox.user_id) as connection:
        assert await connection.fetchval(statement) == 1


async def test_for_endpoint_gives_the_newest_first_and_by_state(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    for minutes in (1, 3, 2):
        name = await outbox.add(f"m{minutes}", job_id=await outbox.job(), endpoint_id=endpoint.id)
        created = datetime.now(UTC) - timedelta(minutes=minutes)
        await outbox.pool.execute("UPDATE callback_outbox SET created_at = $2 WHERE id = $1", name, created)
    await outbox.add("url")
    assert [c.id for c in await outbox.callbacks.for_endpoint(endpoint.id, None, 2)] == ["m1", "m2"]
    (delivery, *_) = await outbox.claim(limit=1)
    (sending,) = await outbox.callbacks.for_endpoint(endpoint.id, "sending", 10)
    assert sending.id == delivery.id
