"""Previews beside a run: made, stored under the attempt, told by the renewal under its fence, and gone with the run."""

import asyncio
import io
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image

from db.blobs import BlobStore
from db.jobs import Status
from db.queue import Renewal, Requeue, Settlement
from deployments.held import Held, StopReason
from deployments.previews import Previews, cleaned, is_preview, preview_key
from deployments.settings import Settings
from deployments.storing import BUCKET, attempt_prefix
from deployments.sweep import Sweep
from tests.db.test_queue import asset
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, files, serving, settings, state_dir, submit

__all__ = ["settings", "state_dir"]  # fixtures

PARAMS = {"prompt": "a mill", "width": 128, "height": 64, "previews": True}
LONG = {"width": 1024, "height": 1024, "steps": 100, "previews": True}  # seconds, also with tiny weights


class Shop:
    """A run's previews over a real folder, and what they counted."""

    def __init__(self, held: Held, folder: Path) -> None:
        self.counted: list[str] = []
        self.held, self.blobs = held, BlobStore.from_url(f"file://{folder}")
        self.previews = Previews(held, 0, self.blobs, self.counted.append)

    def offer(self, step: int, channels: int = 4) -> None:
        """What the engine does after a step."""
        import torch

        assert self.previews.snapshots is not None
        self.previews.snapshots.offer(torch.zeros(1, channels, 8, 16), step, 9)

    async def show(self, step: int, channels: int = 4) -> None:
        """Offer, and wait for what comes of it."""
        before = len(self.counted)
        self.offer(step, channels)
        await self.until(lambda: len(self.counted) > before)

    async def until(self, condition: Any) -> None:
        """Look, as the replica's watch does, until something is so."""
        async with asyncio.timeout(30):
            while not condition():
                self.previews.look()
                await asyncio.sleep(0)

    async def keys(self) -> list[str]:
        """The previews in the store."""
        return sorted([info.key async for info in self.blobs.list(BUCKET) if is_preview(info.key)])


@pytest.fixture
async def shop(desk: Desk, tmp_path: Path) -> Shop:
    return Shop(await desk.hold(params=PARAMS), tmp_path)


def key_of(held: Held, step: int, attempt: int | None = None) -> str:
    claim = held.claim
    return preview_key(claim.job["user_id"], claim.job_id, attempt or claim.attempt, step)


async def shown(desk: Desk, job_id: UUID) -> tuple[int | None, int | None] | None:
    row = await desk.database.pool.fetchrow(
        "SELECT preview_step, preview_steps FROM job_queue WHERE job_id = $1", job_id
    )
    return None if row is None else tuple(row)


async def renew(desk: Desk, held: Held, **changes: Any) -> bool:
    values = {"job_id": held.claim.job_id, "attempt": held.claim.attempt, "phase": "denoise", "preview": held.preview}
    return bool(await desk.queue.renew(desk.worker, [Renewal(**values | changes)]))


async def test_a_job_that_asks_shows_previews_while_it_runs_and_leaves_none(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, "sdxl_image_high", **(LONG | {"width": 1024, "height": 576, "steps": 8}))
        step = await desk.until("SELECT preview_step FROM job_queue WHERE job_id = $1", job_id)
        assert await shown(desk, job_id) == (step, 8)
        user = await desk.database.user()
        data = await BlobStore.from_url(settings.blobs()).get(BUCKET, preview_key(user, job_id, 1, step))
        assert Image.open(io.BytesIO(data)).size == (256, 144)
        assert replica._loop is not None
        await asyncio.wait(replica._loop._tasks)
        assert await desk.status(job_id) == ("completed", None)
        await cleaned()
    prefix = f"workspace-temp/{attempt_prefix(user, job_id, 1)}"
    assert files(settings) == [f"{prefix}0.png", f"{prefix}0.thumb.webp"]


async def test_a_cancelled_job_leaves_no_preview(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        job_id = await submit(desk, settings, "sdxl_image_high", **LONG)
        await desk.until("SELECT preview_step FROM job_queue WHERE job_id = $1", job_id)
        assert files(settings)
        await desk.queue.cancel(job_id)
        assert await ended(desk, job_id) == "cancelled"
    assert files(settings) == []


async def test_a_run_that_lost_its_lease_leaves_no_preview(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, "sdxl_image_high", **LONG)
        await desk.until("SELECT preview_step FROM job_queue WHERE job_id = $1", job_id)
        await desk.take(job_id)
        assert replica._loop is not None
        async with asyncio.timeout(60):
            await asyncio.wait(replica._loop._tasks)
        await cleaned()
        assert files(settings) == []


async def test_a_job_that_does_not_ask_has_none(desk: Desk, tmp_path: Path) -> None:
    shop = Shop(await desk.hold(params=PARAMS | {"previews": False}), tmp_path)
    assert shop.previews.snapshots is None
    shop.previews.look()
    shop.previews.end()
    assert (shop.counted, shop.held.preview) == ([], None)


async def test_a_preview_is_stored_before_it_is_told(desk: Desk, shop: Shop) -> None:
    await shop.show(3)
    assert (shop.counted, shop.held.preview) == (["shown"], (3, 9))
    assert shop.held.news != shop.held.reported
    assert await shop.keys() == [key_of(shop.held, 3)]
    assert await renew(desk, shop.held)
    assert await shown(desk, shop.held.claim.job_id) == (3, 9)


async def test_each_preview_has_a_file_of_its_own_and_all_go_with_the_run(shop: Shop) -> None:
    for step in (1, 4, 7):
        await shop.show(step)
    assert await shop.keys() == [key_of(shop.held, step) for step in (1, 4, 7)]
    shop.previews.end()
    await cleaned()
    assert await shop.keys() == []


async def test_a_preview_under_way_when_the_run_ends_leaves_nothing(shop: Shop) -> None:
    shop.offer(2)
    shop.previews.look()
    shop.previews.end()
    await cleaned()
    assert (await shop.keys(), shop.held.preview) == ([], None)


async def test_a_preview_that_is_being_stored_when_the_run_ends_is_deleted_after_it(shop: Shop) -> None:
    shop.offer(2)
    await shop.until(lambda: shop.previews._keys)
    shop.previews.end()
    await cleaned()
    assert await shop.keys() == []


async def test_no_preview_of_a_job_that_is_to_stop(shop: Shop) -> None:
    shop.held.stop(StopReason.LOST)
    shop.offer(2)
    shop.previews.look()
    assert shop.previews._task is not None
    await shop.previews._task
    assert (await shop.keys(), shop.held.preview, shop.counted) == ([], None, [])


async def test_a_preview_that_can_not_be_made_is_counted_and_the_next_one_comes(shop: Shop) -> None:
    await shop.show(1, channels=5)
    assert (shop.counted, shop.held.preview) == (["preview_failed"], None)
    await shop.show(2)
    assert (shop.counted, shop.held.preview) == (["preview_failed", "shown"], (2, 9))


async def test_a_copy_that_failed_is_counted(shop: Shop) -> None:
    assert shop.previews.snapshots is not None
    shop.previews.snapshots.offer(None, 1, 9)
    shop.previews.look()
    assert shop.counted == ["preview_failed"]


async def test_a_store_that_refuses_costs_the_preview_only(desk: Desk, tmp_path: Path) -> None:
    shop = Shop(await desk.hold(params=PARAMS), tmp_path)
    (tmp_path / BUCKET).mkdir()
    (tmp_path / BUCKET / str(shop.held.claim.job["user_id"])).write_text("in the way")
    await shop.show(1)
    assert (shop.counted, shop.held.preview) == (["storage_unavailable"], None)


async def test_a_job_runs_to_its_end_where_no_preview_can_be_stored(desk: Desk, settings: Settings) -> None:
    """The preview's name is taken by a folder, so that it alone can't be written."""
    job_id = await submit(desk, settings, previews=True, steps=1)
    user = await desk.database.user()
    folder = Path(settings.blobs().removeprefix("file://")) / BUCKET / preview_key(user, job_id, 1, 1)
    (folder / "in the way").mkdir(parents=True)
    async with serving(settings):
        assert await ended(desk, job_id) == "completed"
    assert [Path(name).name for name in files(settings)] == ["0.png", "0.thumb.webp"]


async def test_an_old_attempt_tells_no_preview(desk: Desk, shop: Shop) -> None:
    await shop.show(3)
    await desk.take(shop.held.claim.job_id)
    assert not await renew(desk, shop.held)
    assert await shown(desk, shop.held.claim.job_id) == (None, None)


async def test_a_job_that_goes_back_has_no_preview_any_more(desk: Desk, shop: Shop) -> None:
    job_id = shop.held.claim.job_id
    await shop.show(3)
    assert await renew(desk, shop.held)
    assert await desk.queue.requeue([Requeue(job_id=job_id, attempt=shop.held.claim.attempt)])
    assert await shown(desk, job_id) == (None, None)
    assert await desk.queue.claim("sdxl", desk.worker, 1)
    assert await shown(desk, job_id) == (None, None)


async def test_the_sweep_keeps_a_preview_only_while_its_attempt_runs(desk: Desk, tmp_path: Path) -> None:
    blobs = BlobStore.from_url(f"file://{tmp_path}")
    running, done = await desk.hold(params=PARAMS), await desk.hold(params=PARAMS)
    result = attempt_prefix(done.claim.job["user_id"], done.claim.job_id, 1) + "0.png"
    kept = key_of(running, 5)
    gone = [key_of(running, 5, attempt=7), key_of(done, 2)]
    for key in (kept, *gone):
        await blobs.put(BUCKET, key, b"x", "image/webp")
    await blobs.put(BUCKET, result, b"x", "image/png")
    sweep = Sweep(blobs, desk.queue, grace_seconds=0)
    end = Settlement(job_id=done.claim.job_id, attempt=1, status=Status.COMPLETED, assets=[asset(done.claim.job_id, 1)])
    assert await sweep.once() == 1  # of an attempt that does not run
    await desk.queue.settle([end])
    assert await sweep.once() == 1  # the winner's preview, beside its result
    assert {info.key async for info in blobs.list(BUCKET)} == {kept, result}
