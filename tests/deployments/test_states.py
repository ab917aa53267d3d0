"""A replica that dies in the middle of a video costs it a few steps, not all of them."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from db.blobs import BlobStore
from db.notify import Notifier
from db.retention import Retention
from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings
from deployments.states import job_of_state, state_key
from deployments.storing import BUCKET
from deployments.upkeep import Upkeep
from models.origin.pixels import decode, pixel_hash
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, submit

REPLICA = """
import asyncio, json, sys
from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings

async def main():
    replica = Replica(Settings(**json.loads(sys.argv[1])), "wan", Metrics())
    await replica.start()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, made once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def fields(database: Any, tmp_path: Path, state_dir: Path) -> dict[str, Any]:
    return {
        "database_url": database.url,
        "state_dir": str(state_dir),
        "blob_url": f"file://{tmp_path / 'blobs'}",
        "public_url": "https://api.example.com",
        "signing_secret": "s" * 40,
        "lease_seconds": 30,
        "renew_seconds": 0.5,
        "poll_seconds": 0.1,
    }


@asynccontextmanager
async def serving(fields: dict[str, Any]) -> AsyncIterator[Replica]:
    replica = Replica(Settings(**fields), "wan", Metrics())
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop(0)


async def kept(blobs: BlobStore) -> list[str]:
    return [info.key async for info in blobs.list(BUCKET) if job_of_state(info.key)]


async def until_kept(blobs: BlobStore) -> None:
    async with asyncio.timeout(60):
        while not await kept(blobs):  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.05)


async def result(desk: Desk, blobs: BlobStore, job_id: UUID) -> tuple[dict[str, Any], str]:
    """The settings of a job and the hash of its pixels."""
    row = await desk.database.pool.fetchrow(
        "SELECT j.generation_settings, a.temp_storage_path FROM jobs j JOIN workspace_assets a ON a.job_id = j.id "
        "WHERE j.id = $1",
        job_id,
    )
    data = await blobs.get(BUCKET, row["temp_storage_path"])
    return row["generation_settings"], pixel_hash(decode(data))


async def test_killed_replica_costs_a_few_steps(desk: Desk, fields: dict[str, Any]) -> None:
    import torch

    video = {"name": "video_fast", "steps": 40, "reproducible": True}
    settings = Settings(**fields)
    blobs = BlobStore.from_url(settings.blobs())
    # bit for bit the same needs the same threads: sums are split among them
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", REPLICA, json.dumps(fields)]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.DEVNULL)
    try:
        job_id = await submit(desk, settings, **video)
        await until_kept(blobs)
    finally:
        process.kill()
        await process.wait()
    assert await desk.status(job_id) == ("processing", None)
    await desk.expire(job_id)
    pool, stop = desk.database.worker_pool, asyncio.Event()
    upkeep = asyncio.create_task(Upkeep(desk.queue, Notifier(pool), Retention(pool)).run(0.2, stop))
    async with serving(fields):
        assert await ended(desk, job_id) == "completed"
        stop.set()
        await upkeep
        other = await submit(desk, settings, **video)
        assert await ended(desk, other) == "completed"
    resumed, pixels = await result(desk, blobs, job_id)
    whole, expected = await result(desk, blobs, other)
    assert resumed["resumed_from_step"] >= 5
    assert resumed["resume_refused"] is None
    assert "resumed_from_step" not in whole
    assert pixels == expected
    assert await kept(blobs) == []  # they go with their jobs


async def test_drained_job_goes_on_elsewhere(desk: Desk, fields: dict[str, Any]) -> None:
    settings = Settings(**fields)
    blobs = BlobStore.from_url(settings.blobs())
    async with serving(fields):
        job_id = await submit(desk, settings, "video_fast", steps=60)
        await until_kept(blobs)
    assert await desk.status(job_id) == ("queued", None)
    assert len(await kept(blobs)) == 1
    async with serving(fields):
        assert await ended(desk, job_id) == "completed"
    resumed, _ = await result(desk, blobs, job_id)
    assert resumed["resumed_from_step"] >= 5


async def test_cancelled_job_leaves_no_state(desk: Desk, fields: dict[str, Any]) -> None:
    from db.queue import Queue

    settings = Settings(**fields)
    blobs = BlobStore.from_url(settings.blobs())
    async with serving(fields):
        job_id = await submit(desk, settings, "video_fast", steps=90)
        await until_kept(blobs)
        assert await Queue(desk.database.pool).cancel(job_id) == "cancelling"
        assert await ended(desk, job_id) == "cancelled"
    assert await kept(blobs) == []


def test_keys_of_states_are_told_from_others() -> None:
    job = UUID(int=5)
    assert job_of_state(state_key("user", job)) == job
    for key in (f"user/{job}/1/0.mp4", f"user/{job}/states", "user/x/states/latest.safetensors", "probes/x.json"):
        assert job_of_state(key) is None
