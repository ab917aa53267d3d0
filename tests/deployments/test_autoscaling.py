"""How many replicas the work in Postgres wants, asked for as Serve's controller does."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from db.jobs import Jobs
from db.queue import Queue
from deployments.autoscaling import QueueDepthPolicy, replicas_for
from tests.db.test_queue import new_job


@dataclass
class Context:
    """What Serve tells a policy, as far as ours looks."""

    target_num_replicas: int


@pytest.mark.parametrize(
    ("ready", "running", "ready_seconds", "wanted"),
    [
        (0, 0, 0.0, 0),  # nothing to do: none
        (1, 0, 0.1, 1),  # however small
        (1, 0, 300.0, 1),  # a job can't be shared
        (10, 0, 30.0, 1),
        (10, 0, 30.1, 2),
        (10, 0, 300.0, 10),
        (10, 0, 3000.0, 10),  # never more than there are jobs
        (0, 3, 0.0, 3),  # never fewer than are busy
        (2, 3, 60.0, 5),
        (100, 2, 15.0, 3),
    ],
)
def test_replicas_follow_the_predicted_work(ready: int, running: int, ready_seconds: float, wanted: int) -> None:
    assert replicas_for(ready, running, ready_seconds, 30.0) == wanted


async def read(policy: QueueDepthPolicy, replicas: int = 7) -> int:
    """What the policy says after a reading that it has begun now."""
    policy(Context(replicas))
    assert policy._task is not None
    await policy._task
    wanted, _ = policy(Context(replicas))
    return wanted


@pytest.fixture
def policy(database: Any, monkeypatch: pytest.MonkeyPatch) -> QueueDepthPolicy:
    monkeypatch.setenv("OURVIDZ_DATABASE_URL", database.url)
    return QueueDepthPolicy("sdxl", target_seconds=10)


async def test_the_policy_reads_ready_and_running_jobs_of_its_queue(policy: QueueDepthPolicy, database: Any) -> None:
    jobs, queue, user = Jobs(database.pool), Queue(database.pool), await database.user()
    for _ in range(4):
        await jobs.accept(new_job(user, cost=9.0))
    for _ in range(5):
        await jobs.accept(new_job(user, queue="wan", job_type="video_fast", format="video", model_type="wan"))
    await queue.claim("sdxl", uuid4(), 1)
    assert await read(policy) == 1 + 3  # one runs, and 27 seconds wait


async def test_jobs_that_wait_for_their_time_want_no_replica(policy: QueueDepthPolicy, database: Any) -> None:
    await Jobs(database.pool).accept(new_job(await database.user(), start_after_seconds=3600.0))
    assert await read(policy) == 0


async def test_an_empty_queue_wants_none(policy: QueueDepthPolicy) -> None:
    assert await read(policy) == 0


async def test_before_the_first_reading_it_keeps_what_is_there(policy: QueueDepthPolicy) -> None:
    assert policy(Context(7)) == (7, {})
    assert policy._task is not None
    await policy._task


async def test_it_reads_no_more_often_than_it_should(policy: QueueDepthPolicy) -> None:
    policy.poll_seconds = 3600
    assert await read(policy) == 0
    first = policy._task
    for _ in range(100):
        policy(Context(7))
    assert policy._task is first


@pytest.mark.parametrize(
    "url", ["postgresql://127.0.0.1:1/nothing", "postgresql://postgres@/none?host=/nowhere", "nonsense"]
)
async def test_without_the_database_it_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OURVIDZ_DATABASE_URL", url)
    assert await read(QueueDepthPolicy("sdxl"), replicas=3) == 3


async def test_when_the_database_goes_away_it_keeps_what_is_there(
    policy: QueueDepthPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.poll_seconds = 0
    assert await read(policy, replicas=3) == 0
    monkeypatch.setenv("OURVIDZ_DATABASE_URL", "postgresql://127.0.0.1:1/nothing")
    assert await read(policy, replicas=3) == 3


async def test_a_call_never_waits_for_a_database_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    held = asyncio.Event()

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("OURVIDZ_DATABASE_URL", f"postgresql://u@127.0.0.1:{port}/db")
    policy = QueueDepthPolicy("sdxl", poll_seconds=0)
    assert policy(Context(3)) == (3, {})
    task = policy._task
    async with asyncio.timeout(30):
        await held.wait()
    before = time.process_time()
    for _ in range(100):
        assert policy(Context(3)) == (3, {})
    assert time.process_time() - before < 5  # a sanity bound of computing, not of waiting
    assert policy._task is task, "a reading that hangs is not joined by others"
    assert task is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    server.close()


def test_a_call_outside_of_a_loop_keeps_what_is_there() -> None:
    assert QueueDepthPolicy("sdxl")(Context(3)) == (3, {})
