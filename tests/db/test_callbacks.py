"""The outbox on a real Postgres, as the replicas' role: who gets what when, and that a lost lease writes nothing."""

import asyncio
import re
from typing import Any

import pytest

from db.callbacks import Attempt
from tests.db.outbox import LEASE_SECONDS, Outbox


@pytest.fixture
async def outbox(database: Any) -> Outbox:
    return await Outbox.open(database)


# ------------------------------------------------------------------------------------------------------- claim


async def test_claim_leases_what_is_due_and_counts_the_attempt(outbox: Outbox) -> None:
    await outbox.add("now")
    delivery = await outbox.one()
    assert (delivery.id, delivery.job_id, delivery.user_id) == ("now", outbox.job_id, outbox.user_id)
    assert (delivery.url, delivery.body, delivery.event_type) == ("https://a.example/hook", b"{}", "job.processing")
    assert (delivery.attempts, delivery.lease_no) == (1, 1)
    assert (delivery.secret_version, delivery.secret_age_seconds) == (1, None)
    assert await outbox.states() == {"now": "sending"}
    assert await outbox.claim() == []


async def test_claim_leaves_what_is_not_due_yet(outbox: Outbox) -> None:
    await outbox.add("later", age=-3600)
    assert await outbox.claim() == []


async def test_claim_takes_the_oldest_first_and_no_more_than_the_limit(outbox: Outbox) -> None:
    for number, age in enumerate((10, 30, 20)):
        await outbox.add(f"age{age}", job_id=await outbox.job(), age=age, url=f"https://{number}.example/")
    assert await outbox.claimed(limit=2) == ["age20", "age30"]


async def test_expired_lease_is_due_again_under_a_new_number(outbox: Outbox) -> None:
    await outbox.add("now")
    await outbox.claim()
    await outbox.expire("now")
    delivery = await outbox.one()
    assert (delivery.attempts, delivery.lease_no) == (2, 2)


async def test_claim_tells_the_secret_of_the_user(outbox: Outbox) -> None:
    await outbox.pool.execute(
        "UPDATE profiles SET callback_secret_version = 3, callback_secret_rotated_at = now() - interval '1 hour'"
    )
    await outbox.add("now")
    delivery = await outbox.one()
    assert delivery.secret_version == 3
    assert delivery.secret_age_seconds == pytest.approx(3600, abs=60)


async def test_concurrent_claims_share_without_overlap(outbox: Outbox) -> None:
    names = {await outbox.add(f"n{i}", job_id=await outbox.job(), url=f"https://{i}.example/") for i in range(20)}
    claims = await asyncio.gather(*(outbox.claim(limit=5) for _ in range(8)))
    rest = await outbox.claim()
    claimed = [delivery.id for claim in (*claims, rest) for delivery in claim]
    assert sorted(claimed) == sorted(names)


# --------------------------------------------------------------------------------------------- order in a job


async def test_later_event_waits_for_the_earlier_one(outbox: Outbox) -> None:
    await outbox.add("first", seq=1, age=1)
    await outbox.add("second", seq=2, age=60)
    first = await outbox.one()
    assert first.id == "first"
    assert await outbox.claim() == []
    await outbox.callbacks.delivered(first, Attempt(200))
    assert await outbox.claimed() == ["second"]


async def test_later_event_waits_while_the_earlier_one_backs_off(outbox: Outbox) -> None:
    await outbox.add("first", seq=1, age=-3600)
    await outbox.add("second", seq=2)
    assert await outbox.claim() == []


async def test_dead_event_holds_up_none_behind_it(outbox: Outbox) -> None:
    await outbox.add("first", seq=1)
    await outbox.add("second", seq=2)
    await outbox.callbacks.dead(await outbox.one(), Attempt(410, "gone"))
    assert await outbox.claimed() == ["second"]


async def test_other_jobs_do_not_wait(outbox: Outbox) -> None:
    await outbox.add("mine", seq=1, age=-3600)
    await outbox.add("other", seq=2, job_id=await outbox.job())
    assert await outbox.claimed() == ["other"]


async def test_terminal_event_passes_progress_that_backs_off_and_supersedes_it(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1, age=-3600)
    await outbox.add("end", seq=2)
    assert await outbox.claimed() == ["end"]
    assert (await outbox.states())["progress"] == "superseded"


async def test_progress_is_not_sent_once_the_job_has_ended(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1)
    await outbox.add("end", seq=2, age=-3600)
    assert await outbox.claim() == []


async def test_terminal_event_waits_for_progress_under_way(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1)
    await outbox.one()
    await outbox.add("end", seq=2)
    assert await outbox.claim() == []


async def test_terminal_event_does_not_wait_for_a_dead_deliverer(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1)
    progress = await outbox.one()
    await outbox.add("end", seq=2)
    await outbox.expire("progress")
    assert await outbox.claimed() == ["end"]
    assert (await outbox.states())["progress"] == "superseded"
    assert not await outbox.callbacks.delivered(progress, Attempt(200))


async def test_progress_that_fails_after_the_end_is_superseded(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1)
    progress = await outbox.one()
    await outbox.add("end", seq=2)
    assert await outbox.callbacks.failed(progress, Attempt(500), 3600)
    assert (await outbox.states())["progress"] == "superseded"
    assert await outbox.claimed() == ["end"]


async def test_event_of_a_retried_job_waits_for_the_end_before_it(outbox: Outbox) -> None:
    await outbox.add("end1", seq=1, age=-3600)
    await outbox.add("progress", seq=2)
    assert await outbox.claim() == []


# ---------------------------------------------------------------------------------------------------- fairness


async def test_claim_takes_no_more_of_one_receiver_than_its_share(outbox: Outbox) -> None:
    for index in range(6):
        await outbox.add(f"slow{index}", job_id=await outbox.job(), url=f"https://Slow.example/{index}?x", age=100)
    await outbox.add("quick", job_id=await outbox.job(), url="https://quick.example/", age=1)
    assert await outbox.claimed(limit=4, per_host=2) == ["quick", "slow0", "slow1"]


async def test_callbacks_under_way_count_against_the_share(outbox: Outbox) -> None:
    for index in range(5):
        await outbox.add(f"slow{index}", job_id=await outbox.job())
    assert len(await outbox.claim(per_host=2)) == 2
    assert await outbox.claim(per_host=2) == []
    await outbox.expire("slow0")
    assert await outbox.claimed(per_host=2) == ["slow0"]


async def backlog(outbox: Outbox, count: int, state: str, url: str) -> None:
    """Rows of as many jobs, an hour old."""
    await outbox.pool.execute(
        """WITH made AS (
             INSERT INTO jobs
             SELECT (jsonb_populate_record(j, jsonb_build_object('id', gen_random_uuid()))).*
             FROM jobs j, generate_series(1, $2) WHERE j.id = $1 RETURNING id, user_id)
           INSERT INTO callback_outbox (id, job_id, user_id, seq, event_type, terminal, url, body, next_at, state,
                                        delivered_at)
           SELECT 'old' || id, id, user_id, 1, 'job.completed', true, $4, '', now() - interval '1 hour', $3,
                  CASE WHEN $3 = 'delivered' THEN now() END
           FROM made""",
        outbox.job_id,
        count,
        state,
        url,
    )
    await outbox.pool.execute("ANALYZE callback_outbox")


async def test_no_backlog_of_one_receiver_hides_another_for_more_than_one_claim(outbox: Outbox) -> None:
    await backlog(outbox, 500, "due", "https://slow.example/")
    await outbox.add("quick", url="https://quick.example/")
    await outbox.claim(limit=4, per_host=2)
    assert await outbox.claimed(limit=4, per_host=2) == ["quick"]


async def test_claim_takes_no_more_of_one_user_than_the_share_whatever_the_receivers(
    outbox: Outbox, database: Any
) -> None:
    for index in range(6):
        await outbox.add(f"many{index}", job_id=await outbox.job(), url=f"https://{index}.example/", age=100)
    await outbox.add("bob", job_id=await outbox.job(await database.user("bob")))
    assert await outbox.claimed(limit=4, per_user=2) == ["bob", "many0", "many1"]
    assert await outbox.claim(per_user=2) == []


# -------------------------------------------------------------------------------------------------------- ends


async def test_delivered_ends_the_callback_and_logs_the_attempt(outbox: Outbox) -> None:
    await outbox.add("now")
    assert await outbox.callbacks.delivered(await outbox.one(), Attempt(204, None, 12, "thanks"))
    row = await outbox.row("now")
    assert (row["state"], row["last_status"], row["last_error"]) == ("delivered", 204, None)
    assert row["delivered_at"] is not None
    (logged,) = await outbox.callbacks.attempts_of("now")
    assert (logged.attempt, logged.status, logged.elapsed_ms, logged.response_excerpt) == (1, 204, 12, "thanks")


async def test_failed_is_due_again_after_its_delay(outbox: Outbox) -> None:
    await outbox.add("now")
    assert await outbox.callbacks.failed(await outbox.one(), Attempt(500, "status"), 60)
    row = await outbox.row("now")
    assert (row["state"], row["attempts"], row["last_status"], row["last_error"]) == ("due", 1, 500, "status")
    wait = await outbox.pool.fetchval("SELECT extract(epoch FROM next_at - now()) FROM callback_outbox")
    assert 50 < wait <= 60
    assert await outbox.claim() == []


async def test_dead_ends_the_callback_with_its_reason(outbox: Outbox) -> None:
    await outbox.add("now")
    assert await outbox.callbacks.dead(await outbox.one(), Attempt(None, "private_address"))
    row = await outbox.row("now")
    assert (row["state"], row["last_error"]) == ("dead", "private_address")


@pytest.mark.parametrize("end", ["delivered", "failed", "dead"])
async def test_write_of_a_lost_lease_changes_nothing(outbox: Outbox, end: str) -> None:
    await outbox.add("now")
    old = await outbox.one()
    await outbox.expire("now")
    new = await outbox.one()
    before = await outbox.row("now")
    write = getattr(outbox.callbacks, end)
    arguments = (old, Attempt(200), 5.0) if end == "failed" else (old, Attempt(200))
    assert not await write(*arguments)
    assert await outbox.row("now") == before
    assert await outbox.callbacks.attempts_of("now") == []
    assert await outbox.callbacks.delivered(new, Attempt(200))


@pytest.mark.parametrize("end", ["delivered", "dead"])
async def test_second_end_changes_nothing(outbox: Outbox, end: str) -> None:
    await outbox.add("now")
    delivery = await outbox.one()
    await outbox.callbacks.delivered(delivery, Attempt(200))
    assert not await getattr(outbox.callbacks, end)(delivery, Attempt(500))
    assert len(await outbox.callbacks.attempts_of("now")) == 1


async def test_late_write_under_an_expired_lease_that_nobody_took_counts(outbox: Outbox) -> None:
    await outbox.add("now")
    delivery = await outbox.one()
    await outbox.expire("now")
    assert await outbox.callbacks.delivered(delivery, Attempt(200))


# ------------------------------------------------------------------------------------------------------ replay


@pytest.mark.parametrize("end", ["delivered", "dead"])
async def test_replay_sends_the_same_callback_with_a_fresh_budget(outbox: Outbox, end: str) -> None:
    await outbox.add("now")
    await getattr(outbox.callbacks, end)(await outbox.one(), Attempt(410))
    assert await outbox.callbacks.replay("now")
    delivery = await outbox.one()
    assert (delivery.id, delivery.attempts, delivery.lease_no) == ("now", 1, 2)


async def test_replay_leaves_open_and_unknown_callbacks_alone(outbox: Outbox) -> None:
    await outbox.add("open", age=-3600)
    assert not await outbox.callbacks.replay("open")
    assert not await outbox.callbacks.replay("unknown")


async def test_replay_refuses_progress_of_a_job_that_has_ended(outbox: Outbox) -> None:
    await outbox.add("progress", seq=1)
    await outbox.callbacks.dead(await outbox.one(), Attempt(410))
    await outbox.add("end", seq=2)
    assert not await outbox.callbacks.replay("progress")


# ------------------------------------------------------------------------------------------------------- reads


async def test_due_count_counts_due_and_expired(outbox: Outbox) -> None:
    for name, age in (("held", 1), ("expired", 1), ("later", -3600)):
        await outbox.add(name, job_id=await outbox.job(), age=age)
    await outbox.claim()
    await outbox.expire("expired")
    await outbox.add("due", job_id=await outbox.job())
    assert await outbox.callbacks.due_count() == 2


async def test_for_job_gives_its_callbacks_in_order(outbox: Outbox) -> None:
    await outbox.add("end", seq=2)
    await outbox.add("progress", seq=1)
    await outbox.add("other", job_id=await outbox.job())
    found = await outbox.callbacks.for_job(outbox.job_id)
    assert [(callback.id, callback.seq, callback.terminal) for callback in found] == [
        ("progress", 1, False),
        ("end", 2, True),
    ]


async def test_claim_reads_no_more_when_many_callbacks_are_delivered(outbox: Outbox) -> None:
    await backlog(outbox, 5000, "delivered", "https://a.example/")
    await outbox.add("now")
    async with outbox.pool.acquire() as connection:
        # the arguments are in the order in which the statement first uses them
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {outbox.callbacks._sql.claim_due.sql}"
        (found,) = await connection.fetchval(explain, 5, 5, 200, 5, LEASE_SECONDS)
    plan = found["Plan"]
    assert plan["Actual Rows"] == 1
    assert not re.search(r"'Node Type': 'Seq Scan'[^{}]*'Relation Name': 'callback_outbox'", str(plan))
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 100
