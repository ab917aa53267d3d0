"""The moves of the queue on a real Postgres: order, leases, the fence, and what one statement must do together."""

import json
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from uuid6 import uuid7

from db.idempotency import IdempotencyConflict
from db.jobs import Jobs, NewJob, Stage, Status
from db.queue import NewAsset, Queue, Renewal, Requeue, Settlement


def new_job(user_id: UUID, **changes: Any) -> NewJob:
    values: dict[str, Any] = {
        "id": UUID(int=uuid7().int),
        "user_id": user_id,
        "job_type": "sdxl_image_fast",
        "format": "image",
        "quality": "fast",
        "model_type": "sdxl",
        "stage": Stage.GENERATE,
        "queue": "sdxl",
        "cost": 5.0,
        "credits": 1,
        "original_prompt": "a lighthouse",
        "params": {"steps": 4},
        "callback_url": "https://example.com/hook",
    }
    return NewJob(**(values | changes))


def asset(job_id: UUID, attempt: int, index: int = 0) -> NewAsset:
    return NewAsset(
        id=uuid4(),
        asset_index=index,
        asset_type="image",
        key=f"u/{job_id}/{attempt}/{index}.png",
        thumbnail_key=None,
        mime_type="image/png",
        file_size_bytes=10,
        width=64,
        height=64,
        frames=None,
        fps=None,
        duration_seconds=None,
        seed=7,
        model_used="tiny",
    )


async def expire(pool: asyncpg.Pool, job_id: UUID) -> None:
    """Let a lease run out, by the database's own clock."""
    await pool.execute("UPDATE job_queue SET lease_until = now() - interval '1 second' WHERE job_id = $1", job_id)


async def test_accept_writes_job_queue_event_and_charge_together(database: Any) -> None:
    job = new_job(await database.user())
    await Jobs(database.pool).accept(job)
    row = await database.pool.fetchrow(
        """SELECT j.status, q.queue, q.state::text, e.kind, u.credits_consumed FROM jobs j
           JOIN job_queue q ON q.job_id = j.id JOIN job_events e ON e.job_id = j.id
           JOIN usage_logs u ON u.job_id = j.id WHERE j.id = $1""",
        job.id,
    )
    assert tuple(row) == ("queued", "sdxl", "ready", "queued", 1)


async def test_accept_with_a_broken_invariant_stores_nothing(database: Any) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await Jobs(database.pool).accept(new_job(await database.user(), job_type="nonsense"), idempotency_key="k")
    counts = (
        "SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM job_queue), (SELECT count(*) FROM idempotency_keys)"
    )
    assert tuple(await database.pool.fetchrow(counts)) == (0, 0, 0)


async def test_idempotency_key_gives_the_same_job_again(database: Any) -> None:
    jobs, user = Jobs(database.pool), await database.user()
    first = await jobs.accept(new_job(user), idempotency_key="k", body=b"1")
    again = await jobs.accept(new_job(user), idempotency_key="k", body=b"1")
    assert (again.job_id, first.replayed, again.replayed) == (first.job_id, False, True)
    with pytest.raises(IdempotencyConflict):
        await jobs.accept(new_job(user), idempotency_key="k", body=b"2")
    assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 1


async def test_claim_takes_its_queue_only_and_no_job_twice(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    for _ in range(3):
        await jobs.accept(new_job(user))
    await jobs.accept(new_job(user, queue="wan", job_type="video_fast", format="video", model_type="wan"))
    first = await queue.claim("sdxl", uuid4(), 2)
    second = await queue.claim("sdxl", uuid4(), 5)
    assert len(first) == 2
    assert len(second) == 1
    assert {c.job["job_type"] for c in first + second} == {"sdxl_image_fast"}
    assert {c.attempt for c in first + second} == {1}


async def test_claim_serves_the_interactive_class_first(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    batch, interactive = new_job(user, klass=0), new_job(user, klass=1)
    await jobs.accept(batch)
    await jobs.accept(interactive)
    assert [c.job_id for c in await queue.claim("sdxl", uuid4(), 2)] == [interactive.id, batch.id]


async def test_claim_shares_between_users_by_cost(database: Any) -> None:
    jobs, queue = Jobs(database.pool), Queue(database.worker_pool)
    whale, small = await database.user("whale"), await database.user("small")
    for _ in range(10):
        await jobs.accept(new_job(whale, cost=100.0))
    image = new_job(small, cost=1.0)
    await jobs.accept(image)
    first, second = await queue.claim("sdxl", uuid4(), 1), await queue.claim("sdxl", uuid4(), 1)
    assert image.id in {first[0].job_id, second[0].job_id}


async def test_claim_of_a_paused_queue_gets_nothing(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    await jobs.accept(new_job(user))
    await queue.pause("sdxl", True)
    assert await queue.claim("sdxl", uuid4(), 1) == []
    await queue.pause("sdxl", False)
    assert len(await queue.claim("sdxl", uuid4(), 1)) == 1


async def test_settle_finishes_with_assets_event_and_callback(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user, metadata={"order": 7})
    await jobs.accept(job)
    (claim,) = await queue.claim("sdxl", uuid4(), 1)
    done = Settlement(
        job_id=job.id,
        attempt=claim.attempt,
        status=Status.COMPLETED,
        assets=[asset(job.id, 1)],
        callback_assets=[{"url": "signed"}],
        facts={"seed": 7, "num_images": 1},
        settings={"steps": 4},
        generation_time_ms=12,
    )
    assert await queue.settle([done]) == [done]
    record = await jobs.read(database.pool, job.id)
    assert record is not None
    assert record.queue is None
    assert record.job["generation_settings"] == {"steps": 4}
    assert [a["asset_index"] for a in record.assets] == [0]
    rows = await database.pool.fetch("SELECT seq, state, body FROM callback_outbox ORDER BY seq")
    assert [row["state"] for row in rows] == ["superseded", "due"]
    body = json.loads(rows[1]["body"])
    assert (body["status"], body["assets"], body["metadata"]["seed"]) == ("completed", [{"url": "signed"}], 7)
    assert body["metadata"]["client"] == {"order": 7}
    kinds = [e.kind for e in await jobs.events_after(database.pool, job.id)]
    assert kinds == ["queued", "started", "completed"]


async def test_fence_keeps_a_late_replica_out_of_everything(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    old, new = uuid4(), uuid4()
    (stale,) = await queue.claim("sdxl", old, 1)
    await expire(database.pool, job.id)
    assert await queue.requeue([Requeue(job_id=job.id, attempt=1, expired=True, counts=True)]) == {job.id: "sdxl"}
    (owner,) = await queue.claim("sdxl", new, 1)
    assert (stale.attempt, owner.attempt) == (1, 2)

    before = await database.pool.fetch("SELECT * FROM job_queue UNION ALL SELECT * FROM job_queue")
    late = Settlement(job_id=job.id, attempt=1, status=Status.COMPLETED, assets=[asset(job.id, 1)])
    assert await queue.settle([late]) == []
    assert await queue.settle([Settlement(job_id=job.id, attempt=1, status=Status.FAILED, error_code="oom")]) == []
    assert await queue.requeue([Requeue(job_id=job.id, attempt=1)]) == {}
    assert await queue.renew(old, [Renewal(job.id, 1, "denoise", 3, 4)]) == {}
    assert await database.pool.fetch("SELECT * FROM job_queue UNION ALL SELECT * FROM job_queue") == before
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_assets") == 0
    assert await database.pool.fetchval("SELECT status FROM current_jobs") == "processing"


async def test_renew_needs_the_worker_that_claimed(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    worker = uuid4()
    await queue.claim("sdxl", worker, 1)
    assert await queue.renew(uuid4(), [Renewal(job.id, 1, "denoise")]) == {}
    assert await queue.renew(worker, [Renewal(job.id, 1, "denoise", 2, 4)]) == {job.id: None}
    row = await database.pool.fetchrow("SELECT phase, step, steps FROM job_queue")
    assert tuple(row) == ("denoise", 2, 4)


async def test_expired_settlement_spares_a_lease_that_was_renewed(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    await queue.claim("sdxl", uuid4(), 1)
    lost = Settlement(job_id=job.id, attempt=1, expired=True, status=Status.FAILED, error_code="worker_lost")
    assert await queue.settle([lost]) == []
    await expire(database.pool, job.id)
    assert len(await queue.expired()) == 1
    assert len(await queue.settle([lost])) == 1


async def test_requeue_moves_to_the_next_stage_with_its_prompt(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user, stage=Stage.ENHANCE, queue="qwen", cost=2.0)
    await jobs.accept(job)
    (claim,) = await queue.claim("qwen", uuid4(), 1)
    hop = Requeue(
        job_id=job.id,
        attempt=claim.attempt,
        kind="enhanced",
        queue="sdxl",
        cost=9.0,
        stage="generate",
        enhanced_prompt="a tall lighthouse",
        enhancement_strategy="qwen",
    )
    assert await queue.requeue([hop]) == {job.id: "sdxl"}
    (second,) = await queue.claim("sdxl", uuid4(), 1)
    assert (second.attempt, second.failures, second.job["stage"]) == (2, 0, "generate")
    assert second.job["enhanced_prompt"] == "a tall lighthouse"
    # the receiver hears of the start once, not once a stage
    assert await database.pool.fetchval("SELECT count(*) FROM callback_outbox") == 1


async def test_failures_count_apart_from_attempts(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.worker_pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    await queue.claim("sdxl", uuid4(), 1)
    await queue.requeue([Requeue(job_id=job.id, attempt=1)])  # a drain
    await queue.claim("sdxl", uuid4(), 1)
    await queue.requeue([Requeue(job_id=job.id, attempt=2, counts=True, error_code="oom", delay_seconds=60)])
    row = await database.pool.fetchrow("SELECT state::text, attempt, failures, run_at > now() AS later FROM job_queue")
    assert tuple(row) == ("scheduled", 2, 1, True)
    assert await queue.promote() == set()
    await database.pool.execute("UPDATE job_queue SET run_at = now()")
    assert await queue.promote() == {"sdxl"}


async def test_cancel_of_a_waiting_job_ends_it_at_once(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    assert await queue.cancel(job.id) == "cancelled"
    assert await queue.cancel(job.id) == "ended"
    record = await jobs.read(database.pool, job.id)
    assert record is not None
    assert record.status is Status.CANCELLED
    assert await queue.claim("sdxl", uuid4(), 1) == []


async def test_cancel_of_a_running_job_reaches_its_replica(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    worker = uuid4()
    await queue.claim("sdxl", worker, 1)
    assert await queue.cancel(job.id) == "cancelling"
    assert await queue.cancel(job.id) == "cancelling"
    assert await queue.renew(worker, [Renewal(job.id, 1, "denoise")]) == {job.id: "user"}
    # a failure must not put it back now: it was asked to stop
    assert await queue.requeue([Requeue(job_id=job.id, attempt=1, counts=True)]) == {}
    assert len(await queue.settle([Settlement(job_id=job.id, attempt=1, status=Status.CANCELLED)])) == 1
    kinds = [e.kind for e in await jobs.events_after(database.pool, job.id)]
    assert kinds == ["queued", "started", "cancelling", "cancelled"]


async def test_retry_opens_a_failed_job_under_a_new_attempt(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    await queue.claim("sdxl", uuid4(), 1)
    await queue.settle([Settlement(job_id=job.id, attempt=1, status=Status.FAILED, error_code="oom", counts=True)])
    assert await jobs.retry(job.id, queue="sdxl", cost=5.0)
    assert not await jobs.retry(job.id, queue="sdxl", cost=5.0)
    (claim,) = await queue.claim("sdxl", uuid4(), 1)
    assert (claim.attempt, claim.failures) == (2, 0)


async def test_terminal_states_do_not_change(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    job = new_job(user)
    await jobs.accept(job)
    await queue.claim("sdxl", uuid4(), 1)
    finish = Settlement(job_id=job.id, attempt=1, status=Status.COMPLETED, assets=[asset(job.id, 1)])
    assert len(await queue.settle([finish])) == 1
    assert await queue.settle([finish]) == []
    assert await queue.settle([Settlement(job_id=job.id, status=Status.CANCELLED)]) == []
    assert not await jobs.retry(job.id, queue="sdxl", cost=1.0)
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_assets") == 1


async def test_deadlines_are_seen_by_their_kind(database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    start, total = new_job(user, start_deadline_seconds=0.0), new_job(user, deadline_seconds=0.0)
    await jobs.accept(start)
    await jobs.accept(total)
    assert await queue.claim("sdxl", uuid4(), 5) == []
    found = {o.job_id: o.error_code for o in await queue.overdue()}
    assert found == {start.id: "start_deadline_exceeded", total.id: "deadline_exceeded"}


async def test_standing_counts_what_is_ahead(database: Any) -> None:
    jobs, user = Jobs(database.pool), await database.user()
    first, second = new_job(user), new_job(user)
    await jobs.accept(first)
    await jobs.accept(second)
    record = await jobs.read(database.pool, second.id)
    assert record is not None
    assert record.standing == {"ahead": 1, "ahead_cost": 5.0}


async def test_retry_counts_the_deadlines_anew(database: Any) -> None:
    user = await database.user()
    jobs, queue = Jobs(database.pool), Queue(database.worker_pool)
    job = new_job(user, start_deadline_seconds=600.0, deadline_seconds=3600.0)
    await jobs.accept(job)
    await queue.claim("sdxl", uuid4(), 1)
    await queue.settle([Settlement(job_id=job.id, attempt=1, status=Status.FAILED, error_code="oom")])
    await database.pool.execute("UPDATE jobs SET created_at = now() - interval '1 day'")
    assert await jobs.retry(job.id, queue="sdxl", cost=1)
    left = await database.pool.fetchrow(
        """SELECT extract(epoch FROM start_deadline - now())::float8, extract(epoch FROM deadline - now())::float8
           FROM job_queue"""
    )
    assert tuple(left) == (pytest.approx(600, abs=60), pytest.approx(3600, abs=60))
    data = await database.pool.fetchval("SELECT data FROM job_events WHERE kind = 'retried'")
    assert data == {"start_deadline_seconds": 600, "deadline_seconds": 3600}
    await database.pool.execute("UPDATE job_queue SET start_deadline = now()")
    assert [overdue.error_code for overdue in await queue.overdue()] == ["start_deadline_exceeded"], "it has not begun"
