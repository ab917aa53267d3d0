"""Out of memory, raised inside a real pipeline: a smaller batch, then another replica, then the end."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.jobs import Jobs
from db.queue import Queue
from deployments.endings import ELSEWHERE_SECONDS, Endings, Outcome
from deployments.held import Held
from deployments.replica import Replica
from deployments.settings import Settings
from models.engine import OutOfMemory
from models.sdxl import SMALLER_BATCH
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, serving, settings, state_dir, submit

__all__ = ["settings", "state_dir"]

FULL = OutOfMemory("CUDA out of memory")


def raise_inside(replica: Replica, make: Callable[[int], BaseException | None]) -> None:
    """Let the real denoiser raise what `make` gives for a batch of so many images."""
    assert replica.engine is not None
    unet = replica.engine.model._pipeline.unet  # type: ignore[attr-defined]

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        error = make(given["sample"].shape[0] // 2)  # guided: each image is there twice
        if error is not None:
            raise error

    unet.register_forward_pre_hook(before, with_kwargs=True)


def no_room_for_more_than(images: int) -> Callable[[int], BaseException | None]:
    import torch

    message = "CUDA out of memory. Tried to allocate 2.00 GiB"
    return lambda batch: torch.OutOfMemoryError(message) if batch > images else None


async def facts(desk: Desk, job_id: UUID) -> list[Any]:
    """The batch sizes that a job was put back with, in their order."""
    rows = await desk.database.pool.fetch(
        "SELECT data -> 'batch_size' AS size FROM job_events WHERE job_id = $1 AND kind = 'requeued' ORDER BY id",
        job_id,
    )
    return [size for (size,) in rows]


async def test_a_batch_without_room_is_halved_until_it_fits(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        raise_inside(replica, no_room_for_more_than(1))
        job_id = await submit(desk, settings, num_images=6, steps=1, max_attempts=1)
        assert await ended(desk, job_id) == "completed"
        assert replica.health() is None
    row = await desk.database.pool.fetchrow("SELECT failures, attempts, generation_settings FROM jobs")
    assert (row["failures"], row["attempts"]) == (0, 3), "it costs nothing of the budget"
    assert await facts(desk, job_id) == [3, 1]
    assert (row["generation_settings"]["batch_size"], row["generation_settings"]["batch_reason"]) == (1, SMALLER_BATCH)
    seeds = await desk.database.pool.fetch("SELECT generation_seed FROM workspace_assets ORDER BY asset_index")
    assert [seed for (seed,) in seeds] == [7, 8, 9, 10, 11, 12]


async def test_out_of_memory_fails_that_request_alone(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        raise_inside(replica, no_room_for_more_than(2))
        large = await submit(desk, settings, num_images=3)
        small = await submit(desk, settings, num_images=1)
        assert [await ended(desk, job_id) for job_id in (small, large)] == ["completed", "completed"]
        assert replica.engine is not None
        assert replica.engine.alive
    assert await desk.events(small) == ["queued", "started", "completed"]
    assert await desk.events(large) == ["queued", "started", "requeued oom", "started", "completed"]


async def test_what_has_no_room_even_alone_is_done_by_another_replica(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as full:
        raise_inside(full, no_room_for_more_than(0))
        job_id = await submit(desk, settings)
        await desk.until("SELECT avoid_worker IS NOT NULL FROM job_queue")
        async with serving(settings) as other:
            assert await ended(desk, job_id) == "completed"
    row = await desk.database.pool.fetchrow("SELECT worker, failures, attempts FROM jobs")
    assert tuple(row) == (other.worker, 1, 2)
    assert await desk.events(job_id) == ["queued", "started", "requeued oom", "started", "completed"]


async def test_a_worker_without_room_takes_the_job_again_when_nobody_else_did(desk: Desk) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    assert await endings.failed(held, FULL) is Outcome.REQUEUED
    assert await desk.queue.claim("sdxl", desk.worker, 1) == []
    await desk.database.pool.execute(
        "UPDATE job_queue SET avoid_until = avoid_until - make_interval(secs => $1)", ELSEWHERE_SECONDS
    )
    (again,) = await desk.queue.claim("sdxl", desk.worker, 1)
    assert again.moved_for_memory
    assert await endings.failed(Held(again), FULL) is Outcome.FAILED
    assert await desk.status(again.job_id) == ("failed", "oom")
    assert await desk.database.pool.fetchval("SELECT retryable FROM jobs"), "with another load it may fit"


async def test_a_job_that_avoids_a_worker_does_not_keep_others_from_it(desk: Desk) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await endings.failed(held, FULL)
    (next_one,) = await desk.accept()
    (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
    assert claim.job_id == next_one
    (elsewhere,) = await desk.queue.claim("sdxl", uuid4(), 1)
    assert elsewhere.job_id == held.claim.job_id


async def test_out_of_memory_at_the_end_of_the_budget_fails_at_once(desk: Desk) -> None:
    held = await desk.hold(max_attempts=1)
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    assert await endings.failed(held, FULL) is Outcome.FAILED


async def test_the_batch_size_outlives_a_lost_lease_and_ends_with_a_retry(desk: Desk) -> None:
    held = await desk.hold(params={"prompt": "x", "num_images": 6})
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await endings.failed(held, FULL)
    sizes = []
    for _ in range(2):
        (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
        sizes.append(claim.batch_size)
        await desk.database.pool.execute("UPDATE job_queue SET state = 'ready', worker = NULL, lease_until = NULL")
    assert sizes == [3, 3]
    await Queue(desk.database.pool).cancel(held.claim.job_id)
    assert await desk.jobs.retry(held.claim.job_id, queue="sdxl", cost=1)
    (fresh,) = await desk.queue.claim("sdxl", desk.worker, 1)
    assert (fresh.batch_size, fresh.moved_for_memory) == (None, False)


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered"]
)
async def test_a_broken_device_makes_the_replica_ill_and_the_job_goes_to_another(
    desk: Desk, settings: Settings, text: str
) -> None:
    import torch

    async with serving(settings) as broken:
        raise_inside(broken, lambda batch: torch.AcceleratorError(text))
        job_id = await submit(desk, settings)
        await desk.until("SELECT failures = 1 FROM job_queue")
        assert broken.health() == text
        await desk.database.pool.execute("UPDATE job_queue SET state = 'ready'")  # its delay is over
        other_job = await submit(desk, settings)
        assert await desk.events(other_job) == ["queued"], "it claims no more"
        async with serving(settings) as fresh:
            assert [await ended(desk, each) for each in (job_id, other_job)] == ["completed", "completed"]
    assert await desk.events(job_id) == ["queued", "started", "requeued device_broken", "started", "completed"]
    assert await desk.database.pool.fetch("SELECT DISTINCT worker FROM jobs") == [(fresh.worker,)]
