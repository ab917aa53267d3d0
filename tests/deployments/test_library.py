"""Saving, clearing, discarding and copying back, on real rows and files: nothing is lost, whoever dies when."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.blobs import BlobStore, StorageUnavailable
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, LibraryRows
from deployments.expiry import Expiry
from deployments.library import AssetFileMissing, AssetNotFound, CollectionNotFound, ItemNotFound, Library
from tests.deployments.results import Shelf

DATA = b"pixels of a lighthouse"


@pytest.fixture
async def shelf(database: Any, tmp_path: Path) -> Shelf:
    return Shelf(database, BlobStore.from_url(f"file://{tmp_path}"), await database.user())


# ------------------------------------------------------------------------------------------------------- saving


async def test_saving_copies_file_and_thumbnail_and_keeps_the_workspace(shelf: Shelf) -> None:
    made = await shelf.result()
    saved = await shelf.library.save(shelf.user, made.assets[0], {"custom_title": "dusk", "tags": ["sea"]})
    item = await shelf.item(saved.item_id)
    assert saved.new
    assert (item.custom_title, item.tags, item.source_asset_id, item.source_job_id) == (
        "dusk",
        ["sea"],
        made.assets[0],
        made.job_id,
    )
    assert item.key.startswith(f"{shelf.user}/saved/")
    assert await shelf.blobs.get(LIBRARY_BUCKET, item.key) == DATA
    assert await shelf.blobs.get(LIBRARY_BUCKET, item.thumbnail_key or "") == b"small"
    assert await shelf.readable(made.assets[0]) == [DATA, DATA]
    assert item.provenance["job_type"] == "sdxl_image_fast"
    assert item.provenance["settings"] == {"steps": 4}


async def test_saving_twice_is_one_item_with_the_later_labels(shelf: Shelf) -> None:
    made = await shelf.result()
    first = await shelf.library.save(shelf.user, made.assets[0], {"custom_title": "dusk", "tags": ["sea"]})
    again = await shelf.library.save(shelf.user, made.assets[0], {"custom_title": "dawn"})
    assert (again.item_id, again.new) == (first.item_id, False)
    item = await shelf.item(first.item_id)
    assert (item.custom_title, item.tags) == ("dawn", ["sea"])
    assert len(await shelf.files(LIBRARY_BUCKET)) == 2


async def test_saves_at_once_are_one_item(shelf: Shelf) -> None:
    made = await shelf.result()
    saved = await asyncio.gather(*(shelf.library.save(shelf.user, made.assets[0]) for _ in range(6)))
    assert len({one.item_id for one in saved}) == 1
    assert sum(one.new for one in saved) == 1
    assert len(await shelf.files(LIBRARY_BUCKET)) == 2  # the losers took their copies back


async def test_siblings_of_one_seed_are_saved_one_by_one(shelf: Shelf) -> None:
    made = await shelf.result(3)  # the same prompt, seed and model
    done = await shelf.library.clear_all(shelf.user, made.job_id)
    assert (done.processed, done.new_saves, done.errors) == (3, 3, [])
    contents = {await shelf.blobs.get(LIBRARY_BUCKET, key) for key in await shelf.files(LIBRARY_BUCKET)}
    assert contents == {DATA, DATA + b".", DATA + b"..", b"small"}


async def test_a_thumbnail_that_is_gone_is_no_reason_to_lose_the_picture(shelf: Shelf) -> None:
    made = await shelf.result()
    await shelf.blobs.delete(WORKSPACE_BUCKET, [made.keys[0].replace(".png", ".thumb.webp")])
    saved = await shelf.library.clear(shelf.user, made.assets[0])
    assert (await shelf.item(saved.item_id)).thumbnail_key is None
    assert await shelf.readable(made.assets[0]) == [DATA]


async def test_nothing_of_somebody_else_can_be_kept_or_discarded(shelf: Shelf, database: Any) -> None:
    bob = await database.user("bob")
    made = await shelf.result(user=bob)
    saved = await shelf.library.save(bob, made.assets[0])
    for call in (shelf.library.save, shelf.library.clear):
        with pytest.raises(AssetNotFound):
            await call(shelf.user, made.assets[0])
    with pytest.raises(ItemNotFound):
        await shelf.library.copy_back(shelf.user, saved.item_id)
    with pytest.raises(ItemNotFound):
        await shelf.library.update(shelf.user, saved.item_id, {"custom_title": "mine"})
    assert not await shelf.library.discard(shelf.user, made.assets[0])
    assert not await shelf.library.remove(shelf.user, saved.item_id)
    assert (await shelf.library.clear_all(shelf.user, made.job_id)).processed == 0
    assert len(await shelf.files(LIBRARY_BUCKET)) == len(await shelf.files(WORKSPACE_BUCKET)) == 2


@pytest.mark.parametrize("damage", ["gone", "cut"])
async def test_a_file_that_is_not_the_rows_is_not_saved_and_not_cleared(shelf: Shelf, damage: str) -> None:
    made = await shelf.result()
    if damage == "gone":
        await shelf.blobs.delete(WORKSPACE_BUCKET, made.keys)
    else:
        await shelf.blobs.put(WORKSPACE_BUCKET, made.keys[0], DATA[:5], "image/png")
    with pytest.raises(AssetFileMissing):
        await shelf.library.clear(shelf.user, made.assets[0])
    assert await shelf.rows.asset(made.assets[0]) is not None
    assert await shelf.files(LIBRARY_BUCKET) == set()
    done = await shelf.library.clear_all(shelf.user)
    assert (done.processed, done.errors) == (0, [(made.assets[0], "asset_file_missing")])


# ------------------------------------------------------------------------------------------------------ clearing


async def test_clearing_is_saving_and_then_the_workspace_is_empty(shelf: Shelf) -> None:
    made = await shelf.result()
    first = await shelf.library.clear(shelf.user, made.assets[0])
    assert (await shelf.rows.asset(made.assets[0]), await shelf.files(WORKSPACE_BUCKET)) == (None, set())
    again = await shelf.library.clear(shelf.user, made.assets[0])
    assert (first.new, again.new, again.item_id) == (True, False, first.item_id)
    assert await shelf.readable(made.assets[0]) == [DATA]


async def test_an_asset_whose_library_file_was_lost_is_copied_anew_before_it_is_cleared(shelf: Shelf) -> None:
    made = await shelf.result()
    saved = await shelf.library.save(shelf.user, made.assets[0])
    lost = (await shelf.item(saved.item_id)).key
    of = await a_character(shelf, f"{LIBRARY_BUCKET}/{lost}")
    await shelf.blobs.delete(LIBRARY_BUCKET, [lost])
    assert (await shelf.library.clear(shelf.user, made.assets[0])).item_id == saved.item_id
    assert await shelf.readable(made.assets[0]) == [DATA]
    assert await shelf.rows.asset(made.assets[0]) is None
    again = (await shelf.item(saved.item_id)).key
    assert (again != lost, await shown(shelf, of)) == (True, (f"{LIBRARY_BUCKET}/{again}", None, None))


async def test_an_item_that_is_removed_meanwhile_keeps_the_workspaces_copy(shelf: Shelf) -> None:
    made = await shelf.result()
    saved = await shelf.library.save(shelf.user, made.assets[0])
    item = await shelf.item(saved.item_id)
    await shelf.library.remove(shelf.user, saved.item_id)
    assert await shelf.rows.clear(made.assets[0], item) is None  # what a clearing that looked before then says
    assert await shelf.readable(made.assets[0]) == [DATA]


class Died(Exception):
    """The process, at this step."""


class Fuse:
    """Real parts whose process dies before step `last` of those that touch the store or the database."""

    def __init__(self, last: int) -> None:
        self.left = last

    def around(self, part: Any) -> Any:
        """The same part, burning the fuse with each call."""
        fuse = self

        class Burning:
            def __getattr__(self, name: str) -> Any:
                real = getattr(part, name)

                async def step(*args: Any, **options: Any) -> Any:
                    if fuse.left == 0:
                        raise Died
                    fuse.left -= 1
                    return await real(*args, **options)

                return step

        return Burning()


@pytest.mark.parametrize("action", ["save", "clear", "copy_back"])
async def test_a_crash_at_any_step_loses_nothing_and_the_next_try_ends_it(shelf: Shelf, action: str) -> None:
    for step in range(40):
        made = await shelf.result()
        subject = made.assets[0]
        if action == "copy_back":
            subject = (await shelf.library.clear(shelf.user, made.assets[0])).item_id
        fuse = Fuse(step)
        cut = Library(fuse.around(shelf.rows), fuse.around(shelf.blobs))
        try:
            await getattr(cut, action)(shelf.user, subject)
        except Died:
            ended = False
        else:
            ended = True
        readable = await shelf.readable(made.assets[0])
        assert readable
        assert set(readable) == {DATA}
        again = await getattr(shelf.library, action)(shelf.user, subject)
        if action == "copy_back":
            back = await shelf.rows.asset(again.item_id)
            assert back is not None
            assert await shelf.blobs.get(WORKSPACE_BUCKET, back.key) == DATA
            await shelf.library.discard(shelf.user, back.id)
        else:
            assert (await shelf.readable(made.assets[0]))[-1] == DATA
            assert len(await shelf.readable(made.assets[0])) == (2 if action == "save" else 1)
        if ended:
            break
    assert ended
    assert step > 4
    # what the crashes left behind is found by the sweep, and it finds nothing else
    items = [await shelf.item(row["id"]) for row in await shelf.pool.fetch("SELECT id FROM user_library")]
    await Expiry(LibraryRows(shelf.worker_pool), shelf.blobs, grace_seconds=0).sweep()
    kept = {key for item in items for key in (item.key, item.thumbnail_key)}
    assert await shelf.files(LIBRARY_BUCKET) == kept


async def test_clearing_with_a_store_that_fails_keeps_the_source(shelf: Shelf) -> None:
    class Full(BlobStore):
        async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
            raise StorageUnavailable("full")

    folder = shelf.blobs._folder
    full = Library(shelf.rows, Full.from_url(f"file://{folder}"))
    made = await shelf.result(2)
    done = await full.clear_all(shelf.user)
    assert (done.processed, done.new_saves) == (0, 0)
    assert {code for _, code in done.errors} == {"storage_unavailable"}
    assert await shelf.readable(made.assets[0]) == [DATA]
    done = await shelf.library.clear_all(shelf.user)
    assert (done.processed, done.new_saves) == (2, 2)


# ------------------------------------------------------------------------------------- discarding, copying back


async def test_discarding_leaves_what_was_saved(shelf: Shelf) -> None:
    made = await shelf.result(2)
    await shelf.library.save(shelf.user, made.assets[0])
    assert await shelf.library.discard(shelf.user, made.assets[0])
    assert not await shelf.library.discard(shelf.user, made.assets[0])
    assert await shelf.readable(made.assets[0]) == [DATA]
    assert await shelf.readable(made.assets[1]) == [DATA + b"."]


async def test_a_copy_in_the_workspace_is_of_a_job_that_says_where_it_comes_from(shelf: Shelf) -> None:
    made = await shelf.result()
    item_id = (await shelf.library.clear(shelf.user, made.assets[0])).item_id
    copied = await shelf.library.copy_back(shelf.user, item_id)
    again = await shelf.library.copy_back(shelf.user, item_id)
    assert (copied.new, again.new, again.item_id) == (True, False, copied.item_id)
    asset = await shelf.rows.asset(copied.item_id)
    assert asset is not None
    assert (asset.source_library_id, asset.job_type, asset.settings) == (item_id, "sdxl_image_fast", {"steps": 4})
    job = await shelf.pool.fetchrow(
        "SELECT status, provider, destination, metadata FROM jobs WHERE id = $1", asset.job_id
    )
    assert tuple(job)[:3] == ("completed", "library", "workspace")
    assert job["metadata"] == {"source": "library_copy", "library_id": str(item_id)}
    # the copy is the item: clearing it makes no second one
    cleared = await shelf.library.clear(shelf.user, copied.item_id)
    assert (cleared.item_id, cleared.new) == (item_id, False)
    assert (await shelf.library.copy_back(shelf.user, item_id)).new


async def test_copies_back_at_once_are_one_asset(shelf: Shelf) -> None:
    made = await shelf.result()
    item_id = (await shelf.library.clear(shelf.user, made.assets[0])).item_id
    copied = await asyncio.gather(*(shelf.library.copy_back(shelf.user, item_id) for _ in range(5)))
    assert len({one.item_id for one in copied}) == 1
    assert len(await shelf.files(WORKSPACE_BUCKET)) == 2
    assert await shelf.pool.fetchval("SELECT count(*) FROM jobs") == 2


async def test_a_copy_of_an_older_systems_item_says_what_is_assumed(shelf: Shelf) -> None:
    await shelf.blobs.put(LIBRARY_BUCKET, f"{shelf.user}/old.mp4", b"frames", "video/mp4")
    item_id = await shelf.pool.fetchval(
        """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
             model_used) VALUES ($1, 'video', $2, 6, 'video/mp4', 'p', 'm') RETURNING id""",
        shelf.user,
        f"{shelf.user}/old.mp4",
    )
    copied = await shelf.library.copy_back(shelf.user, item_id)
    asset = await shelf.rows.asset(copied.item_id)
    assert asset is not None
    assert (asset.job_type, asset.model_type, asset.key.rpartition(".")[2]) == ("video_high", "wan", "mp4")
    metadata = await shelf.pool.fetchval("SELECT metadata FROM jobs WHERE id = $1", asset.job_id)
    assert metadata["assumed"] == "job_type, quality, model_type, content_mode"


async def test_removing_an_item_spares_a_file_that_another_row_speaks_of(shelf: Shelf) -> None:
    key = f"{shelf.user}/shared.png"
    await shelf.blobs.put(LIBRARY_BUCKET, key, b"x", "image/png")
    ids = [
        await shelf.pool.fetchval(
            """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
                 model_used) VALUES ($1, 'image', $2, 1, 'image/png', 'p', 'm') RETURNING id""",
            shelf.user,
            key,
        )
        for _ in range(2)
    ]
    of = await a_character(shelf, f"{LIBRARY_BUCKET}/{key}")
    assert await shelf.library.remove(shelf.user, ids[0])
    assert (await shelf.files(LIBRARY_BUCKET), (await shown(shelf, of))[0]) == ({key}, f"{LIBRARY_BUCKET}/{key}")
    assert await shelf.library.remove(shelf.user, ids[1])
    assert (await shelf.files(LIBRARY_BUCKET), (await shown(shelf, of))[0]) == (set(), None)
    assert not await shelf.library.remove(shelf.user, ids[1])


async def a_character(shelf: Shelf, *shows: str | None) -> UUID:
    """One of the installation's own, with a picture, a reference and a preview."""
    made: UUID = await shelf.pool.fetchval(
        """INSERT INTO characters (name, description, image_url, reference_image_url, preview_image_url)
           VALUES ('Ada', 'd', $1, $2, $3) RETURNING id""",
        *(*shows, None, None, None)[:3],
    )
    return made


async def shown(shelf: Shelf, character: UUID) -> tuple[str | None, ...]:
    statement = "SELECT image_url, reference_image_url, preview_image_url FROM characters WHERE id = $1"
    return tuple(await shelf.pool.fetchrow(statement, character))


async def test_nothing_shows_an_item_that_was_removed(shelf: Shelf) -> None:
    made = await shelf.result(2)
    gone, kept = [await shelf.item((await shelf.library.save(shelf.user, one)).item_id) for one in made.assets]
    lost, small, path = (f"{LIBRARY_BUCKET}/{key}" for key in (gone.key, gone.thumbnail_key, kept.key))
    everywhere, beside = await a_character(shelf, lost, lost, small), await a_character(shelf, path, lost, path)
    talks, scenes = {}, {}
    for one, other in ((lost, path), (path, lost)):
        talk = "INSERT INTO conversations (user_id, last_scene_image) VALUES ($1, $2) RETURNING id"
        talks[await shelf.pool.fetchval(talk, shelf.user, one)] = None if one == lost else one
        scene = """INSERT INTO character_scenes (character_id, scene_prompt, image_url, previous_scene_image_url)
                   VALUES ($1, 's', $2, $3) RETURNING id"""
        scenes[await shelf.pool.fetchval(scene, beside, one, other)] = (one, other) if one == path else (None, other)
    assert not await shelf.library.remove(uuid4(), gone.id)
    assert await shown(shelf, everywhere) == (lost, lost, small)
    assert await shelf.library.remove(shelf.user, gone.id)
    assert (await shown(shelf, everywhere), await shown(shelf, beside)) == ((None, None, None), (path, None, path))
    assert dict(await shelf.pool.fetch("SELECT id, last_scene_image FROM conversations")) == talks
    rows = await shelf.pool.fetch("SELECT id, image_url, previous_scene_image_url FROM character_scenes")
    now = {row["id"]: (row["image_url"], row["previous_scene_image_url"]) for row in rows}
    assert now == {id_: (one, None if other == lost else other) for id_, (one, other) in scenes.items()}


async def test_an_item_that_is_placed_while_it_is_removed_is_shown_nowhere(shelf: Shelf) -> None:
    made = await shelf.result()
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    of = await a_character(shelf)
    async with shelf.pool.acquire() as connection, asyncio.timeout(30):
        async with connection.transaction():
            await connection.execute("UPDATE user_library SET tags = '{portrait}' WHERE id = $1", item.id)
            removal = asyncio.create_task(shelf.library.remove(shelf.user, item.id))
            waits = """SELECT EXISTS (SELECT FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND datname = current_database())"""
            while not await shelf.pool.fetchval(waits):  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0)
            picture = f"{LIBRARY_BUCKET}/{item.key}"
            await connection.execute("UPDATE characters SET image_url = $2 WHERE id = $1", of, picture)
        assert await removal
    assert await shown(shelf, of) == (None, None, None)


async def test_an_item_of_an_unknown_asset_is_not_found(shelf: Shelf) -> None:
    with pytest.raises(AssetNotFound):
        await shelf.library.save(shelf.user, uuid4())
    with pytest.raises(ItemNotFound):
        await shelf.library.copy_back(shelf.user, UUID(int=0))


async def test_an_item_goes_into_no_collection_of_somebody_else(shelf: Shelf) -> None:
    made = await shelf.result()
    with pytest.raises(CollectionNotFound):
        await shelf.library.save(shelf.user, made.assets[0], {"collection_id": str(uuid4())})
    assert await shelf.files(LIBRARY_BUCKET) == set()


async def test_an_item_goes_into_a_collection_and_out_again(shelf: Shelf) -> None:
    made = await shelf.result()
    statement = "INSERT INTO user_collections (user_id, name) VALUES ($1, 'sea') RETURNING id"
    collection = await shelf.pool.fetchval(statement, shelf.user)
    saved = await shelf.library.save(shelf.user, made.assets[0], {"collection_id": str(collection)})
    assert (await shelf.item(saved.item_id)).collection_id == collection
    item = await shelf.library.update(shelf.user, saved.item_id, {"collection_id": None})
    assert item.collection_id is None
