"""Backup and restore of real databases and stores: one point in time, whole or refused."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from db import dumps
from db.backup import BackupDamaged, BackupError, BackupTooNew, Manifest, TargetNotEmpty, back_up
from db.blobs import BlobStore
from db.jobs import Jobs, Status
from db.migrate import migrate, migrations
from db.queue import NewAsset, Queue, Settlement
from db.restore import check, restore
from tests.conftest import with_database
from tests.db.test_queue import asset, new_job

VERSION = "0.0.0"


class Shop:
    """A database and a store in which jobs are made, ended and erased."""

    def __init__(self, database: Any, folder: Path) -> None:
        self.database, self.blobs = database, BlobStore.from_url(f"file://{folder}")
        self.jobs, self.queue = Jobs(database.pool), Queue(database.worker_pool)
        self.user = UUID(int=0)
        self.erased = 0

    async def open(self) -> None:
        self.user = await self.database.user()

    async def accept(self, **changes: Any) -> UUID:
        job = new_job(self.user, **changes)
        await self.jobs.accept(job)
        return job.id

    async def complete(self) -> UUID | None:
        """Run the next job to its end, with a file of its own and a thumbnail."""
        claims = await self.queue.claim("sdxl", uuid4(), 1)
        for claim in claims:
            prefix = f"{self.user}/{claim.job_id}/{claim.attempt}/0"
            data = os.urandom(2000)
            await self.blobs.put("workspace-temp", f"{prefix}.png", data, "image/png")
            await self.blobs.put("workspace-temp", f"{prefix}.thumb.webp", data[:100], "image/webp")
            made: NewAsset = asset(claim.job_id, claim.attempt)
            values = vars(made) | {
                "key": f"{prefix}.png",
                "thumbnail_key": f"{prefix}.thumb.webp",
                "file_size_bytes": len(data),
            }
            done = Settlement(
                job_id=claim.job_id, attempt=claim.attempt, status=Status.COMPLETED, assets=[NewAsset(**values)]
            )
            assert await self.queue.settle([done])
            return claim.job_id
        return None

    async def erase(self, job_id: UUID) -> None:
        gone = await self.jobs.erase(job_id, self.user)
        assert gone is not None
        await self.blobs.delete("workspace-temp", list(gone.keys))
        self.erased += 1

    async def trade(self, stop: asyncio.Event, turned: asyncio.Event) -> None:
        """Accept, finish and erase without a pause."""
        done: list[UUID] = []
        while not stop.is_set():
            await self.accept()
            if (job_id := await self.complete()) is not None:
                done.append(job_id)
            if len(done) > 5:
                await self.erase(done.pop(0))
                turned.set()


@pytest.fixture
async def shop(database: Any, tmp_path: Path) -> Shop:
    opened = Shop(database, tmp_path / "store")
    await opened.open()
    return opened


@pytest.fixture
async def empty_url(postgres_url: str) -> AsyncIterator[str]:
    """An empty database on the same server."""
    name = f"restored_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{name}"')
    try:
        yield with_database(postgres_url, name)
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


async def rows_of(connection: Any) -> dict[str, list[str]]:
    """Every row of every table, as JSON, in an order of its own."""
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    return {
        name: sorted(row for (row,) in await connection.fetch(f'SELECT to_jsonb(t)::text FROM "{name}" t'))  # noqa: S608
        for (name,) in tables
    }


async def rows_at(url: str) -> dict[str, list[str]]:
    connection = await asyncpg.connect(url, server_settings={"timezone": "UTC"})
    try:
        return await rows_of(connection)
    finally:
        await connection.close()


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "files.jsonl").read_text().splitlines()]


async def a_backup(shop: Shop, folder: Path) -> Manifest:
    """A backup of one finished and one waiting job."""
    await shop.accept()
    await shop.complete()
    await shop.accept()
    return await back_up(shop.database.url, shop.blobs, folder, VERSION)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one backup is kept for all tests that only want one."""
    return tmp_path_factory.mktemp("kept") / "b"


async def a_copy(shop: Shop, kept: Path, folder: Path) -> None:
    """A backup of a test's own, without making each anew."""
    with contextlib.suppress(BackupError):  # it is there
        await a_backup(shop, kept)
    shutil.copytree(kept, folder)


async def test_a_restored_system_has_the_same_rows_and_files(shop: Shop, tmp_path: Path, empty_url: str) -> None:
    made = await a_backup(shop, tmp_path / "b")
    before = await rows_at(shop.database.url)
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
    done = await restore(tmp_path / "b", empty_url, store)
    assert await rows_at(empty_url) == before
    assert (done.files, done.missing, done.damaged, done.faults, done.applied) == (2, 0, 0, [], [])
    assert (made.counts["jobs"], made.counts["job_queue"], made.counts["workspace_assets"]) == (2, 1, 1)
    for entry in entries(tmp_path / "b"):
        data = await store.get(entry["bucket"], entry["key"])
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert data == await shop.blobs.get(entry["bucket"], entry["key"])


async def test_a_waiting_job_runs_in_the_restored_system_and_its_roles_are_held(
    shop: Shop, tmp_path: Path, empty_url: str
) -> None:
    from db.pool import as_user, open_pool

    await a_backup(shop, tmp_path / "b")
    await restore(tmp_path / "b", empty_url, BlobStore.from_url(f"file://{tmp_path / 'new'}"))
    worker, owner = await open_pool(empty_url, role="ourvidz_worker"), await open_pool(empty_url)
    try:
        (claim,) = await Queue(worker).claim("sdxl", uuid4(), 1)
        done = Settlement(job_id=claim.job_id, attempt=claim.attempt, status=Status.CANCELLED)
        assert await Queue(worker).settle([done])
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await worker.fetch("SELECT * FROM api_keys")
        async with as_user(owner, shop.user) as connection:
            assert await connection.fetchval("SELECT count(*) FROM jobs") == 2
        async with as_user(owner, uuid4()) as connection:
            assert await connection.fetchval("SELECT count(*) FROM jobs") == 0
    finally:
        await worker.close()
        await owner.close()


async def test_a_backup_under_load_is_of_one_point(
    shop: Shop, tmp_path: Path, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    written = dumps.dump

    async def dump_and_look(url: str, snapshot: str, file: Path, server_major: int) -> dumps.Program:
        """The real dump, and beside it all rows as the same snapshot shows them, after others have written."""
        turned.clear()
        await asyncio.wait_for(turned.wait(), 60)
        connection = await asyncpg.connect(url, server_settings={"timezone": "UTC"})
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            seen.update(await rows_of(connection))
        await connection.close()
        program = await written(url, snapshot, file, server_major)
        turned.clear()
        await asyncio.wait_for(turned.wait(), 60)
        return program

    monkeypatch.setattr("db.backup.dump", dump_and_look)
    stop, turned = asyncio.Event(), asyncio.Event()
    trading = asyncio.create_task(shop.trade(stop, turned))
    try:
        await asyncio.wait_for(turned.wait(), 60)
        made = await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    finally:
        stop.set()
        await trading
    assert await rows_at(shop.database.url) != seen
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
    done = await restore(tmp_path / "b", empty_url, store)
    assert await rows_at(empty_url) == seen
    assert (done.faults, done.damaged) == ([], 0)
    spoken_of = {
        json.loads(row)[name] for row in seen["workspace_assets"] for name in ("temp_storage_path", "thumbnail_path")
    }
    listed = {entry["key"]: entry for entry in entries(tmp_path / "b")}
    assert listed.keys() == spoken_of
    lost = {key for key, entry in listed.items() if "missing" in entry}
    # a job that was erased after the point had files at the point: it is in the rows, and the list says what is gone
    assert len(lost) == made.missing == done.missing > 0
    for key in spoken_of - lost:
        assert hashlib.sha256(await store.get("workspace-temp", key)).hexdigest() == listed[key]["sha256"]


async def test_a_file_that_is_gone_is_listed(shop: Shop, tmp_path: Path, empty_url: str) -> None:
    await shop.accept()
    job_id = await shop.complete()
    await shop.blobs.delete("workspace-temp", [f"{shop.user}/{job_id}/1/0.png"])
    made = await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    assert (made.files, made.missing) == (1, 1)
    lost = [entry for entry in entries(tmp_path / "b") if "missing" in entry]
    assert lost == [{"bucket": "workspace-temp", "key": f"{shop.user}/{job_id}/1/0.png", "missing": "deleted"}]
    done = await restore(tmp_path / "b", empty_url, BlobStore.from_url(f"file://{tmp_path / 'new'}"))
    assert (done.missing, done.faults) == (1, [])


async def test_a_file_with_another_size_than_its_row_is_told(shop: Shop, tmp_path: Path, empty_url: str) -> None:
    await shop.accept()
    job_id = await shop.complete()
    await shop.blobs.put("workspace-temp", f"{shop.user}/{job_id}/1/0.png", b"cut", "image/png")
    made = await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    assert (made.files, made.damaged) == (2, 1)
    (damaged,) = [entry for entry in entries(tmp_path / "b") if "expected" in entry]
    assert (damaged["size"], damaged["expected"]) == (3, 2000)
    done = await restore(tmp_path / "b", empty_url, BlobStore.from_url(f"file://{tmp_path / 'new'}"))
    assert (done.damaged, done.faults) == (1, [])


async def test_references_and_saved_files_are_in_it(shop: Shop, tmp_path: Path) -> None:
    reference, saved = f"{shop.user}/{uuid4()}.png", f"{shop.user}/saved.png"
    await shop.blobs.put("reference_images", reference, b"reference", "image/png")
    await shop.blobs.put("user-library", saved, b"saved", "image/png")
    mask = {"bucket": "reference_images", "key": reference.replace(".png", ".mask.png")}
    await shop.blobs.put(mask["bucket"], mask["key"], b"mask", "image/png")
    await shop.accept(params={"reference": {"bucket": mask["bucket"], "key": reference, "strength": 0.5, "mask": mask}})
    await shop.database.pool.execute(
        """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
                                     model_used) VALUES ($1, 'image', $2, 5, 'image/png', 'p', 'm')""",
        shop.user,
        saved,
    )
    await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    assert sorted((entry["bucket"], entry["key"]) for entry in entries(tmp_path / "b")) == [
        ("reference_images", mask["key"]),
        ("reference_images", reference),
        ("user-library", saved),
    ]


async def test_the_archives_are_in_it(shop: Shop, tmp_path: Path, empty_url: str) -> None:
    await shop.blobs.put("archive", "a1/manifest.json", b"{}", "application/json")
    await shop.blobs.put("archive", "a1/jobs.csv.gz", b"rows", "application/gzip")
    await shop.blobs.put("archive", "a2/jobs.csv.gz", b"half", "application/gzip")
    await shop.database.pool.execute(
        """INSERT INTO archives (name, cutoff, keeps_files, job_ids, verified_at, finished_at, jobs)
           VALUES ('a1', now(), true, NULL, now(), now(), 1), ('a2', now(), true, '{}', NULL, NULL, NULL)"""
    )
    await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    # what an archive writes before it is verified, it writes again
    assert {entry["key"] for entry in entries(tmp_path / "b")} == {"a1/manifest.json", "a1/jobs.csv.gz"}
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
    assert (await restore(tmp_path / "b", empty_url, store)).faults == []
    assert await store.get("archive", "a1/jobs.csv.gz") == b"rows"


LINKS = {  # what a client or an operator gives, and no file is known by
    "jobs.callback_url",
    "api_models.endpoint_path",
    "api_models.model_key",
    "api_usage_logs.endpoint_path",
    "api_providers.base_url",
    "api_providers.docs_url",
    "character_scenes.image_url",
    "character_scenes.previous_scene_image_url",
    "characters.image_url",
    "characters.preview_image_url",
    "characters.reference_image_url",
    "projects.preview_url",
    "projects.reference_image_url",
    "scenes.final_stitched_url",
    "scenes.image_url",
}


async def test_every_column_that_names_a_file_is_known_to_the_backup(shop: Shop) -> None:
    """Whoever adds one must add it to the statement `files`, and then here."""
    found = await shop.database.pool.fetch(
        r"""SELECT table_name || '.' || column_name FROM information_schema.columns
            JOIN information_schema.tables USING (table_schema, table_name)
            WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
              AND column_name ~ '(_path|_key|bucket|_url|file)s?$'
              AND data_type IN ('text', 'character varying')"""
    )
    names_of_files = {
        "workspace_assets.temp_storage_path",
        "workspace_assets.thumbnail_path",
        "reference_uploads.storage_path",
        "user_library.storage_path",
        "user_library.thumbnail_path",
    }
    assert {name for (name,) in found} - LINKS == names_of_files


async def test_a_backup_holds_no_secret_and_only_its_owner_reads_it(shop: Shop, tmp_path: Path) -> None:
    await a_backup(shop, tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode & 0o077 == 0


async def test_a_folder_that_is_there_is_left_alone(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(BackupError, match="is there already"):
        await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]


async def test_a_second_backup_to_the_same_folder_is_refused(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "b.partial").mkdir()
    with pytest.raises(BackupError, match=r"b\.partial is there"):
        await back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION)
    assert (tmp_path / "b.partial").exists()


async def test_a_cancelled_backup_leaves_nothing(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = asyncio.Event()

    async def stall(*_: Any) -> dumps.Program:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("db.backup.dump", stall)
    task = asyncio.create_task(back_up(shop.database.url, shop.blobs, tmp_path / "b", VERSION))
    await asyncio.wait_for(reached.wait(), 60)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path) == ["store"]  # noqa: PTH208


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_manifest(folder: Path, **values: Any) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(document | values))


def forge_entry(folder: Path, **values: Any) -> None:
    """Change the first entry of the list, and make the manifest agree with the new list."""
    lines = (folder / "files.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | values)
    data = ("\n".join(lines) + "\n").encode()
    (folder / "files.jsonl").write_bytes(data)
    change_manifest(folder, list={"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})


TAMPERED = {
    "a bit of the dump": lambda b: flip(b / "database.dump"),
    "a bit of the list": lambda b: flip(b / "files.jsonl"),
    "a bit of a file": lambda b: flip(next(path for path in (b / "files").rglob("*.png"))),
    "no dump": lambda b: (b / "database.dump").unlink(),
    "no file": lambda b: next(path for path in (b / "files").rglob("*.webp")).unlink(),
    "no manifest": lambda b: (b / "manifest.json").unlink(),
    "half a manifest": lambda b: (b / "manifest.json").write_text((b / "manifest.json").read_text()[:200]),
    "a list for a manifest": lambda b: (b / "manifest.json").write_text("[]"),
    "another count": lambda b: change_manifest(b, files=7),
    "a field too many": lambda b: change_manifest(b, extra=1),
    "a hash that is none": lambda b: change_manifest(b, dump={"size": 1, "sha256": "x"}),
    "a way out": lambda b: forge_entry(b, key="../../../secret.png"),
    "a link out": lambda b: (
        shutil.rmtree(b / "files" / "workspace-temp"),
        (b / "files" / "workspace-temp").symlink_to("/"),
    ),
    "an entry that is none": lambda b: forge_entry(b, size="5"),
}


@pytest.mark.parametrize("name", TAMPERED)
async def test_a_backup_that_was_changed_is_refused_before_anything_is_written(
    shop: Shop, tmp_path: Path, kept: Path, empty_url: str, name: str
) -> None:
    await a_copy(shop, kept, tmp_path / "b")
    TAMPERED[name](tmp_path / "b")
    with pytest.raises(BackupDamaged):
        await check(tmp_path / "b")
    with pytest.raises(BackupDamaged):
        await restore(tmp_path / "b", empty_url, BlobStore.from_url(f"file://{tmp_path / 'new'}"))
    assert await rows_at(empty_url) == {}
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


async def test_a_partial_folder_is_no_backup(shop: Shop, tmp_path: Path, kept: Path) -> None:
    await a_copy(shop, kept, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    (tmp_path / "b").rename(tmp_path / "b.partial")
    with pytest.raises(BackupDamaged, match="no whole backup"):
        await check(tmp_path / "b.partial")


async def test_a_backup_of_a_newer_version_is_refused(shop: Shop, tmp_path: Path, kept: Path) -> None:
    await a_copy(shop, kept, tmp_path / "b")
    document = json.loads((tmp_path / "b" / "manifest.json").read_text())
    newer = {"number": 9999, "name": "9999_later.sql", "checksum": "0" * 64}
    change_manifest(tmp_path / "b", migrations=[*document["migrations"], newer])
    with pytest.raises(BackupTooNew, match="9999_later"):
        await check(tmp_path / "b")
    change_manifest(tmp_path / "b", format=2)
    with pytest.raises(BackupTooNew, match="format 2"):
        await check(tmp_path / "b")


async def test_a_backup_with_another_migration_of_the_same_number_is_refused(
    shop: Shop, tmp_path: Path, kept: Path
) -> None:
    await a_copy(shop, kept, tmp_path / "b")
    document = json.loads((tmp_path / "b" / "manifest.json").read_text())
    document["migrations"][0]["checksum"] = "0" * 64
    change_manifest(tmp_path / "b", migrations=document["migrations"])
    with pytest.raises(BackupTooNew, match="0001_access"):
        await check(tmp_path / "b")


async def test_an_older_schema_is_brought_up_to_date(
    tmp_path: Path, empty_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = f"older_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{older}"')
    try:
        url, first = with_database(postgres_url, older), migrations()[:6]
        with monkeypatch.context() as patched:
            patched.setattr("db.migrate.migrations", lambda: first)
            connection = await asyncpg.connect(url)
            await migrate(connection)
            await connection.close()
        await back_up(url, BlobStore.from_url(f"file://{tmp_path / 'store'}"), tmp_path / "b", VERSION)
        store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
        done = await restore(tmp_path / "b", empty_url, store)
        assert done.applied == [migration.name for migration in migrations()[6:]]
    finally:
        await server.execute(f'DROP DATABASE "{older}" WITH (FORCE)')
        await server.close()


async def test_nothing_is_restored_over_a_database(shop: Shop, tmp_path: Path) -> None:
    await a_backup(shop, tmp_path / "b")
    before = await rows_at(shop.database.url)
    with pytest.raises(TargetNotEmpty, match="database"):
        await restore(tmp_path / "b", shop.database.url, BlobStore.from_url(f"file://{tmp_path / 'new'}"))
    assert await rows_at(shop.database.url) == before
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


async def test_nothing_is_restored_beside_other_files(shop: Shop, tmp_path: Path, empty_url: str) -> None:
    await a_backup(shop, tmp_path / "b")
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
    await store.put("avatars", "a/b.png", b"mine", "image/png")
    with pytest.raises(TargetNotEmpty, match="avatars"):
        await restore(tmp_path / "b", empty_url, store)
    assert await rows_at(empty_url) == {}


async def test_a_restore_that_died_can_be_begun_again(
    shop: Shop, tmp_path: Path, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_backup(shop, tmp_path / "b")
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")

    async def die(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("db.restore.restore_dump", die)
        with pytest.raises(RuntimeError, match="killed"):
            await restore(tmp_path / "b", empty_url, store)
    assert await rows_at(empty_url) == {}
    assert (await restore(tmp_path / "b", empty_url, store)).faults == []


async def test_a_file_that_the_store_lost_is_found_by_the_last_check(
    shop: Shop, tmp_path: Path, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_backup(shop, tmp_path / "b")
    store = BlobStore.from_url(f"file://{tmp_path / 'new'}")
    restored = dumps.restore

    async def restore_and_lose(*arguments: Any) -> None:
        await restored(*arguments)
        (png,) = (tmp_path / "new").rglob("*.png")
        png.unlink()
        (webp,) = (tmp_path / "new").rglob("*.webp")
        webp.unlink()

    monkeypatch.setattr("db.restore.restore_dump", restore_and_lose)
    done = await restore(tmp_path / "b", empty_url, store)
    assert sorted((fault.key[-4:], fault.reason) for fault in done.faults) == [(".png", "missing"), ("webp", "missing")]


# -------------------------------------------------------------------------------------------------- the programs


async def test_the_program_is_the_oldest_that_is_new_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for major in (14, 16, 17):
        program = tmp_path / f"pg_dump{major}"
        program.write_text(f"#!/bin/sh\necho 'pg_dump (PostgreSQL) {major}.3 (Debian)'\n")
        program.chmod(0o755)
    monkeypatch.setattr(dumps, "_candidates", lambda _: iter(sorted(tmp_path.iterdir(), reverse=True)))
    assert (await dumps.find_program("pg_dump", 15)).major == 16
    assert (await dumps.find_program("pg_dump", 14)).major == 14
    with pytest.raises(dumps.ProgramMissing, match=r"of Postgres 18 or later .* on this machine: 17, 16, 14"):
        await dumps.find_program("pg_dump", 18)


async def test_a_dump_is_not_restored_into_an_older_server(tmp_path: Path) -> None:
    with pytest.raises(dumps.DumpError, match="older 15"):
        await dumps.restore("postgresql://nowhere/", tmp_path / "d", 16, 15)


@pytest.mark.parametrize(
    ("url", "address", "password"),
    [
        ("postgresql://u:p%40ss@h:5/d?sslmode=require", "postgresql://u@h:5/d?sslmode=require", "p@ss"),
        ("postgresql://u@/d?host=/tmp/x", "postgresql://u@/d?host=/tmp/x", None),
        ("postgresql:///d?password=s%26t&user=u", "postgresql:///d?user=u", "s&t"),
    ],
)
def test_the_password_is_never_an_argument(url: str, address: str, password: str | None) -> None:
    said, environment = dumps._without_password(url)
    assert (said, environment.get("PGPASSWORD")) == (address, password)
    assert urlsplit(said).password is None


async def test_a_failed_dump_names_the_fault_and_not_the_password(tmp_path: Path, postgres_url: str) -> None:
    url = with_database(postgres_url, "nowhere") + "&password=hidden-word"
    with pytest.raises(dumps.DumpError) as caught:
        await dumps.dump(url, "00000003-00000001-1", tmp_path / "d", 15)
    assert "nowhere" in str(caught.value)
    assert "hidden-word" not in str(caught.value)
