"""Expiry on real rows and files: both go together, and a crash leaves a file at most."""

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from db.blobs import BlobStore, StorageUnavailable
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, LibraryRows
from db.queue import Queue
from db.uploads import UPLOAD_BUCKET
from deployments.expiry import Expiry
from deployments.sweep import Sweep
from tests.deployments.results import Shelf


@pytest.fixture
async def shelf(database: Any, tmp_path: Path) -> Shelf:
    return Shelf(database, BlobStore.from_url(f"file://{tmp_path}"), await database.user())


def expiry(shelf: Shelf, grace_seconds: float = 0, blobs: BlobStore | None = None) -> Expiry:
    """With the rights that upkeep has."""
    return Expiry(LibraryRows(shelf.worker_pool), blobs or shelf.blobs, grace_seconds)


async def age(shelf: Shelf, asset_id: object) -> None:
    """Let an asset's time be over, by the database's own clock."""
    await shelf.pool.execute("UPDATE workspace_assets SET expires_at = now() WHERE id = $1", asset_id)


async def test_what_has_expired_goes_with_its_files_and_the_rest_stays(shelf: Shelf) -> None:
    old, young = await shelf.result(2), await shelf.result()
    saved = await shelf.library.save(shelf.user, old.assets[0])
    for asset_id in old.assets:
        await age(shelf, asset_id)
    assert await expiry(shelf).expire() == 2
    assert await expiry(shelf).expire() == 0
    assert [await shelf.rows.asset(one) is None for one in (*old.assets, *young.assets)] == [True, True, False]
    assert {key for key in await shelf.files(WORKSPACE_BUCKET) if key.endswith("png")} == set(young.keys)
    assert await shelf.blobs.get(LIBRARY_BUCKET, (await shelf.item(saved.item_id)).key)
    job = await shelf.pool.fetchval("SELECT status FROM jobs WHERE id = $1", old.job_id)
    assert job == "completed"


async def test_assets_live_for_seven_days(shelf: Shelf) -> None:
    made = await shelf.result()
    asset = await shelf.rows.asset(made.assets[0])
    assert asset is not None
    assert (asset.expires_at - asset.created_at).days == 7


async def test_more_than_a_batch_goes_in_one_round(shelf: Shelf) -> None:
    made = await shelf.result(6)
    await shelf.pool.execute("UPDATE workspace_assets SET expires_at = now()")
    rows = LibraryRows(shelf.worker_pool)
    assert len(await rows.expire(batch=4)) == 4
    assert await expiry(shelf).expire() == 2
    assert [await shelf.rows.asset(one) for one in made.assets] == [None] * 6


async def test_a_crash_between_row_and_file_leaves_a_file_that_the_sweep_finds(shelf: Shelf) -> None:
    class Away(BlobStore):
        async def delete(self, bucket: str, keys: Any) -> None:
            raise StorageUnavailable("away")

    made = await shelf.result()
    await age(shelf, made.assets[0])
    with pytest.raises(StorageUnavailable):
        await expiry(shelf, blobs=Away.from_url(f"file://{shelf.blobs._folder}")).expire()
    assert await shelf.rows.asset(made.assets[0]) is None
    assert len(await shelf.files(WORKSPACE_BUCKET)) == 2
    assert await Sweep(shelf.blobs, Queue(shelf.worker_pool), grace_seconds=0).once() == 2
    assert await shelf.files(WORKSPACE_BUCKET) == set()


async def test_a_row_that_names_its_file_as_none_of_ours_holds_up_no_other(shelf: Shelf) -> None:
    made = await shelf.result(2)
    statement = "UPDATE workspace_assets SET temp_storage_path = 'old name/ä.png', thumbnail_path = NULL WHERE id = $1"
    await shelf.pool.execute(statement, made.assets[0])
    await shelf.pool.execute("UPDATE workspace_assets SET expires_at = now()")
    assert await expiry(shelf).expire() == 2
    assert made.keys[1] not in await shelf.files(WORKSPACE_BUCKET)


async def test_the_sweep_takes_copies_and_uploads_without_a_row_and_nothing_else(shelf: Shelf) -> None:
    made = await shelf.result()
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    lost = f"{shelf.user}/saved/{uuid4()}.png"
    foreign = {f"{shelf.user}/{uuid4()}.png", f"{shelf.user}/notes/{uuid4()}.png"}
    for key in (lost, *foreign):
        await shelf.blobs.put(LIBRARY_BUCKET, key, b"x", "image/png")
    upload, of_a_job = f"{shelf.user}/uploads/{uuid4()}.png", f"{shelf.user}/{made.job_id}.png"
    for key in (upload, of_a_job):
        await shelf.blobs.put(UPLOAD_BUCKET, key, b"x", "image/png")
    assert await expiry(shelf, grace_seconds=3600).sweep() == 0  # all of it is too young
    assert await expiry(shelf).sweep() == 2
    assert await shelf.files(LIBRARY_BUCKET) == {item.key, item.thumbnail_key, *foreign}
    assert await shelf.files(UPLOAD_BUCKET) == {of_a_job}


async def test_a_copy_is_as_young_as_its_copying(shelf: Shelf) -> None:
    made = await shelf.result()
    folder = shelf.blobs._folder
    assert folder is not None
    os.utime(folder / WORKSPACE_BUCKET / made.keys[0], (0, 0))  # made in 1970
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    assert (await shelf.blobs.head(LIBRARY_BUCKET, item.key)).modified_at.year > 1970
