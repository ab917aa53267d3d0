"""An object store that is away, or full: jobs wait for it, and finished work is kept in hand for a while."""

import asyncio
import io
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from db.blobs import BlobStore, StorageUnavailable
from db.jobs import Jobs
from deployments.endings import Endings, Outcome
from deployments.held import Held
from deployments.replica import Replica
from deployments.settings import Settings
from deployments.storing import StorageFailed
from models.engine import GenerationFailed
from tests.deployments import hostile
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, files, serving, settings, state_dir, submit
from tests.serve_app.conftest import a_job, in_process

__all__ = ["settings", "state_dir"]

AWAY = StorageFailed("the object store is not available")


def root(settings: Settings) -> Path:
    return Path(settings.blobs().removeprefix("file://"))


@contextmanager
def outage(folder: Path) -> Iterator[None]:
    """A file where a folder must be: nothing below it can be read or written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}-aside")
    if folder.exists():
        folder.rename(aside)
    folder.write_text("")
    try:
        yield
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)


async def noticed(replica: Replica) -> None:
    """The replica has seen that its store is away."""
    async with asyncio.timeout(60):
        while not replica._storing.away:  # noqa: ASYNC110 - the replica tells nobody
            await asyncio.sleep(0)


async def test_finished_work_is_kept_in_hand_while_the_store_is_away(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        with outage(root(settings) / "workspace-temp"):
            job_id = await submit(desk, settings)
            await desk.until("SELECT phase = 'store' FROM job_queue WHERE job_id = $1", job_id)
            lease = await desk.database.pool.fetchval("SELECT lease_until FROM job_queue")
            await desk.until("SELECT lease_until > $1 FROM job_queue", lease)
        assert await ended(desk, job_id) == "completed"
    assert await desk.events(job_id) == ["queued", "started", "completed"], "it was made once"
    assert await desk.database.pool.fetchval("SELECT failures FROM jobs") == 0


async def test_a_longer_outage_loses_no_job_and_counts_nothing(desk: Desk, settings: Settings) -> None:
    impatient = settings.model_copy(update={"store_patience_seconds": 0, "renew_seconds": 0.2})
    async with serving(impatient) as replica:
        with outage(root(settings) / "workspace-temp"):
            job_id = await submit(desk, settings, max_attempts=1)
            await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
            assert await desk.queued(job_id) == ("scheduled", 0)
            await desk.database.pool.execute("UPDATE job_queue SET state = 'ready'")
            later = await submit(desk, settings)
            seen = await desk.database.pool.fetchval("SELECT seen_at FROM workers")
            await desk.until("SELECT seen_at > $1 FROM workers", seen)
            assert await desk.events(later) == ["queued"], "what could not be stored is not made"
            assert replica.health() is None
        assert [await ended(desk, each) for each in (job_id, later)] == ["completed", "completed"]
    assert await desk.events(job_id) == ["queued", "started", "requeued storage_unavailable", "started", "completed"]
    assert await desk.database.pool.fetchval("SELECT failures FROM jobs WHERE id = $1", job_id) == 0
    assert [name for name in files(settings) if "probes" in name] == []


async def test_a_reference_is_waited_for_as_well(desk: Desk, settings: Settings) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 90), "orange").save(buffer, "PNG")
    blobs = BlobStore.from_url(settings.blobs())
    await blobs.put("reference_images", "u/r.png", buffer.getvalue(), "image/png")
    reference = {"bucket": "reference_images", "key": "u/r.png", "strength": 0.5}
    async with serving(settings) as replica:
        with outage(root(settings) / "reference_images"):
            job_id = await submit(desk, settings, reference=reference, steps=4)
            await noticed(replica)
        assert await ended(desk, job_id) == "completed"
    assert await desk.events(job_id) == ["queued", "started", "completed"]


async def test_a_submission_with_a_reference_is_503_while_the_store_is_away(
    desk: Desk, settings: Settings, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "PNG")
    good = hostile.answer(200, buffer.getvalue(), content_type="image/png")
    async with (
        hostile.receiving(good) as receiver,
        in_process(desk.database, tmp_path, egress_allow=f"http://127.0.0.1:{receiver.port}") as server,
    ):
        alice = await server.user("alice")
        before = await server.stored()
        with outage(root(settings) / "reference_images"):
            refused = await alice.post("/v1/jobs", json=a_job(reference_image_url=receiver.url))
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert await server.stored() == before


def after(desk: Desk, held: Held, seconds: float) -> Any:
    """The same job, put back by an outage that has lasted so long."""
    return desk.database.pool.execute(
        "UPDATE job_queue SET state = 'ready', outage_since = now() - make_interval(secs => $2) WHERE job_id = $1",
        held.claim.job_id,
        seconds,
    )


@pytest.mark.parametrize(("away", "least", "most"), [(0, 1.5, 2.5), (20, 15, 25), (1800, 45, 75)])
async def test_the_waits_grow_with_the_outage(desk: Desk, away: float, least: float, most: float) -> None:
    held = await desk.hold(max_attempts=1)
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await endings.failed(held, AWAY)
    await after(desk, held, away)
    (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
    assert await endings.failed(Held(claim), AWAY) is Outcome.REQUEUED
    wait = await desk.database.pool.fetchval("SELECT extract(epoch FROM run_at - now())::float8 FROM job_queue")
    assert least - 1 < wait < most + 1


async def test_what_the_store_never_takes_fails_in_the_end(desk: Desk) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30, outage_seconds=600)
    assert await endings.failed(held, AWAY) is Outcome.REQUEUED
    await after(desk, held, 601)
    (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
    assert await endings.failed(Held(claim), AWAY) is Outcome.FAILED
    assert await desk.status(claim.job_id) == ("failed", "storage_unavailable")
    assert await desk.database.pool.fetchval("SELECT retryable FROM jobs")
    assert await desk.callbacks(claim.job_id) == ["job.failed"]


async def test_another_failure_ends_the_outage(desk: Desk) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await endings.failed(held, AWAY)
    await after(desk, held, 1000)
    (claim,) = await desk.queue.claim("sdxl", desk.worker, 1)
    await endings.failed(Held(claim), GenerationFailed("the pipeline raised"))
    assert await desk.database.pool.fetchval("SELECT outage_since IS NULL FROM job_queue")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 256 KiB. Mounting takes a right that not every machine gives."""
    with tempfile.TemporaryDirectory(prefix="ovz") as name:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", name],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip("no right to mount a small file system here")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


async def test_a_full_disk_is_storage_that_is_not_available_and_leaves_nothing_half(small_disk: Path) -> None:
    blobs = BlobStore.from_url(f"file://{small_disk / 'blobs'}")
    await blobs.put("workspace-temp", "u/small.png", b"s" * 1000, "image/png")
    with pytest.raises(StorageUnavailable):
        await blobs.put("workspace-temp", "u/large.png", b"l" * 1_000_000, "image/png")
    assert [info.key async for info in blobs.list("workspace-temp")] == ["u/small.png"]
    assert await blobs.get("workspace-temp", "u/small.png") == b"s" * 1000


async def test_a_job_outlives_a_full_disk(desk: Desk, settings: Settings, small_disk: Path) -> None:
    full = settings.model_copy(update={"blob_url": f"file://{small_disk / 'blobs'}"})
    filler = small_disk / "filler"
    async with serving(full) as replica:
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(b"x" * 1_000_000)
        job_id = await submit(desk, full)
        await noticed(replica)
        assert await desk.status(job_id) == ("processing", None)
        filler.unlink()
        assert await ended(desk, job_id) == "completed"
    assert await desk.events(job_id) == ["queued", "started", "completed"]
