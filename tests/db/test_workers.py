"""The register of replicas."""

import os
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from db.workers import Worker, Workers


@pytest.fixture
def workers(database: Any) -> Workers:
    return Workers(database.worker_pool)


async def only(workers: Workers) -> Worker:
    (worker,) = await workers.list()
    return worker


async def test_a_replica_is_one_row_through_its_life(workers: Workers) -> None:
    worker = uuid4()
    await workers.enter(worker, "sdxl", "loading", model_name="tiny-sdxl")
    await workers.enter(worker, "sdxl", "ready", model_name="tiny-sdxl", device="cpu", load_ms=1200, slots=2)
    seen = await only(workers)
    assert (seen.id, seen.queue, seen.state, seen.model_name) == (worker, "sdxl", "ready", "tiny-sdxl")
    assert (seen.device, seen.load_ms, seen.pid, seen.error) == ("cpu", 1200, os.getpid(), None)


async def test_what_is_known_of_a_replica_outlasts_its_states(workers: Workers) -> None:
    worker = uuid4()
    await workers.enter(worker, "sdxl", "ready", model_name="tiny-sdxl", device="cpu", load_ms=1200)
    await workers.enter(worker, "sdxl", "draining")
    seen = await only(workers)
    assert (seen.state, seen.model_name, seen.device, seen.load_ms) == ("draining", "tiny-sdxl", "cpu", 1200)


async def test_an_error_is_gone_when_the_replica_is_ready(workers: Workers) -> None:
    worker = uuid4()
    await workers.enter(worker, "qwen", "failed", error="model_load_failed: no file")
    assert (await only(workers)).error == "model_load_failed: no file"
    await workers.enter(worker, "qwen", "ready")
    assert (await only(workers)).error is None


async def test_a_sign_of_life_says_how_much_runs(workers: Workers, database: Any) -> None:
    worker = uuid4()
    await workers.enter(worker, "sdxl", "ready")
    await database.pool.execute("UPDATE workers SET seen_at = now() - interval '5 minutes'")
    assert await workers.list() == []
    await workers.seen(worker, 1)
    assert (await only(workers)).running == 1


async def test_a_replica_is_listed_for_as_long_as_it_is_asked_for(workers: Workers, database: Any) -> None:
    await workers.enter(uuid4(), "sdxl", "ready")
    await database.pool.execute("UPDATE workers SET seen_at = now() - interval '50 seconds'")
    assert len(await workers.list(60)) == 1
    assert await workers.list(40) == []


async def test_replicas_are_listed_by_queue(workers: Workers) -> None:
    for queue in ("wan", "qwen", "sdxl"):
        await workers.enter(uuid4(), queue, "ready")
    assert [worker.queue for worker in await workers.list()] == ["qwen", "sdxl", "wan"]


async def test_a_state_that_is_none_is_refused(workers: Workers) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await workers.enter(uuid4(), "sdxl", "sleeping")
