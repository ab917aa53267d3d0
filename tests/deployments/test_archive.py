"""The archive on a real database and store: what is written, what is deleted, and a death between any two steps."""

import csv
import gzip
import hashlib
import io
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.archives import Archives
from db.blobs import BlobStore, StorageUnavailable
from db.callbacks import Callbacks
from db.jobs import Jobs, Status
from db.queue import Queue, Settlement
from deployments.archive import ARCHIVE_BUCKET, Archive, ArchiveBusy, Archived, ArchiveDamaged
from deployments.storing import BUCKET, REFERENCE_BUCKET, attempt_prefix
from deployments.sweep import Sweep
from tests.db.test_queue import asset, new_job

YEAR = timedelta(days=365)
TABLES = {"jobs", "events", "assets", "callbacks", "deliveries", "usage"}


class Died(BaseException):
    """What stands for the end of the process."""


class Store(BlobStore):
    """A store whose process dies at one of its writes or deletions: before it, or right after."""

    dies_at: int | None = None
    changes = 0

    async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        await self._change(super().put(bucket, key, data, content_type))

    async def delete(self, bucket: str, keys: Any) -> None:
        await self._change(super().delete(bucket, keys))

    async def _change(self, change: Any) -> None:
        self.changes += 1
        if self.dies_at == 2 * self.changes:
            change.close()
            raise Died
        await change
        if self.dies_at == 2 * self.changes + 1:
            raise Died


class Past:
    """Jobs that ended long ago, with everything that hangs on them."""

    def __init__(self, database: Any, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.blobs = self.store()

    def store(self, dies_at: int | None = None) -> Store:
        opened = Store.from_url(f"file://{self.folder}")
        opened.dies_at = dies_at
        return opened

    async def job(self, *, days: int = 400, delivered: bool = True, reference: bool = False) -> UUID:
        """A completed job with two files, its events, and a callback that was tried once."""
        user = await self.database.user()
        job = new_job(user, original_prompt='a "lighthouse",\nat dusk ü', callback_events=["completed"])
        if reference:
            key = f"{user}/{job.id}.png"
            mask = {"bucket": REFERENCE_BUCKET, "key": f"{user}/{job.id}.mask.png"}
            job = replace(job, params={"reference": {"bucket": REFERENCE_BUCKET, "key": key, "mask": mask}})
            await self.blobs.put(REFERENCE_BUCKET, key, b"reference", "image/png")
            await self.blobs.put(REFERENCE_BUCKET, mask["key"], b"mask", "image/png")
        await Jobs(self.database.pool).accept(job)
        queue = Queue(self.database.worker_pool)
        await queue.claim("sdxl", uuid4(), 100)
        prefix = attempt_prefix(user, job.id, 1)
        files = {f"{prefix}0.png": b"image", f"{prefix}0.thumb.webp": b"small"}
        for key, data in files.items():
            await self.blobs.put(BUCKET, key, data, "image/png" if key.endswith("png") else "image/webp")
        made = replace(asset(job.id, 1), key=f"{prefix}0.png", thumbnail_key=f"{prefix}0.thumb.webp")
        done = Settlement(job_id=job.id, attempt=1, status=Status.COMPLETED, assets=[made])
        assert await queue.settle([done])
        if delivered:
            await self.database.pool.execute(
                """UPDATE callback_outbox SET state = 'delivered', delivered_at = now() WHERE job_id = $1""", job.id
            )
        await self.database.pool.execute(
            """INSERT INTO callback_attempts (callback_id, attempt, at, status, response_excerpt)
               SELECT id, 1, now() - make_interval(days => $2), 200, 'ok' FROM callback_outbox WHERE job_id = $1""",
            job.id,
            days,
        )
        await self.database.pool.execute(
            """UPDATE jobs SET created_at = now() - make_interval(days => $2),
                               completed_at = now() - make_interval(days => $2) WHERE id = $1""",
            job.id,
            days,
        )
        return job.id

    async def archive(
        self, *, keep_files: bool = False, jobs: int = 100, blobs: BlobStore | None = None
    ) -> list[Archived]:
        made = Archive(self.database.pool, blobs or self.blobs, jobs)
        return [archived async for archived in made.run(YEAR, keep_files=keep_files)]

    async def left(self) -> set[UUID]:
        return {row["id"] for row in await self.database.pool.fetch("SELECT id FROM jobs")}

    async def counts(self) -> dict[str, int]:
        tables = ("jobs", "job_events", "workspace_assets", "callback_outbox", "callback_attempts")
        return {t: await self.database.pool.fetchval(f"SELECT count(*) FROM {t}") for t in tables}  # noqa: S608

    async def keys(self, bucket: str) -> set[str]:
        return {info.key async for info in self.blobs.list(bucket)}

    async def table(self, archive: str, name: str) -> list[dict[str, str]]:
        packed = await self.blobs.get(ARCHIVE_BUCKET, f"{archive}/{name}.csv.gz")
        return list(csv.DictReader(io.StringIO(gzip.decompress(packed).decode(), newline="")))


@pytest.fixture
async def past(database: Any, tmp_path: Path) -> Past:
    return Past(database, tmp_path)


async def test_old_jobs_are_written_with_all_that_hangs_on_them_and_deleted(past: Past) -> None:
    old, young = await past.job(), await past.job(days=300)
    (archived,) = await past.archive()
    assert (archived.jobs, archived.deleted, archived.files_deleted) == (1, 1, 2)
    assert await past.left() == {young}
    assert await past.counts() == {
        "jobs": 1,
        "job_events": 3,
        "workspace_assets": 1,
        "callback_outbox": 1,
        "callback_attempts": 1,
    }
    tables = {name: await past.table(archived.name, name) for name in TABLES}
    assert {name: len(rows) for name, rows in tables.items()} == {
        "jobs": 1,
        "events": 3,
        "assets": 1,
        "callbacks": 1,
        "deliveries": 1,
        "usage": 1,
    }
    (job,) = tables["jobs"]
    assert (job["id"], job["original_prompt"]) == (str(old), 'a "lighthouse",\nat dusk ü')
    assert [event["kind"] for event in tables["events"]] == ["queued", "started", "completed"]
    assert tables["deliveries"][0]["response_excerpt"] == "ok"
    body = json.loads(bytes.fromhex(tables["callbacks"][0]["body"].removeprefix("\\x")))
    assert (body["job_id"], body["status"]) == (str(old), "completed")
    for name in TABLES - {"jobs"}:
        assert {row["job_id"] for row in tables[name]} == {str(old)}
    # what was charged stays, though it no longer says for which job
    assert await past.database.pool.fetchval("SELECT count(*) FROM usage_logs WHERE job_id IS NULL") == 1


async def test_the_manifest_says_what_each_file_must_hold(past: Past) -> None:
    await past.job()
    await past.job(days=500)
    (archived,) = await past.archive()
    manifest = json.loads(await past.blobs.get(ARCHIVE_BUCKET, f"{archived.name}/manifest.json"))
    assert (manifest["format"], manifest["name"], manifest["jobs"]) == ("ourvidz-archive-1", archived.name, 2)
    assert manifest["schema_version"] == await past.database.pool.fetchval("SELECT max(number) FROM schema_migrations")
    assert manifest["created_at"]["first"] < manifest["created_at"]["last"] < manifest["cutoff"]
    assert set(manifest["files"]) == {f"{name}.csv.gz" for name in TABLES}
    for name, told in manifest["files"].items():
        data = await past.blobs.get(ARCHIVE_BUCKET, f"{archived.name}/{name}")
        assert told["sha256"] == hashlib.sha256(data).hexdigest()
        assert told["bytes"] == len(data)
        assert told["rows"] == len(await past.table(archived.name, name.removesuffix(".csv.gz")))


async def test_files_are_deleted_with_their_jobs_and_no_others(past: Past) -> None:
    await past.job(reference=True)
    young = await past.job(days=10, reference=True)
    await past.blobs.put("user-library", "u/saved.png", b"x", "image/png")
    await past.archive()
    user = await past.database.user()
    assert await past.keys(BUCKET) == {f"{user}/{young}/1/0.png", f"{user}/{young}/1/0.thumb.webp"}
    assert await past.keys(REFERENCE_BUCKET) == {f"{user}/{young}.png", f"{user}/{young}.mask.png"}
    assert await past.keys("user-library") == {"u/saved.png"}


async def test_files_are_copied_into_the_archive_where_asked_for(past: Past) -> None:
    old, user = await past.job(reference=True), await past.database.user()
    (archived,) = await past.archive(keep_files=True)
    files = await past.table(archived.name, "files")
    kept = {row["key"]: await past.blobs.get(ARCHIVE_BUCKET, f"{archived.name}/{row['archived_as']}") for row in files}
    assert kept == {
        f"{user}/{old}/1/0.png": b"image",
        f"{user}/{old}/1/0.thumb.webp": b"small",
        f"{user}/{old}.png": b"reference",
        f"{user}/{old}.mask.png": b"mask",
    }
    assert await past.keys(BUCKET) == await past.keys(REFERENCE_BUCKET) == set()
    # the sweep does not look here
    assert await Sweep(past.blobs, Queue(past.database.worker_pool), grace_seconds=0).once() == 0
    assert len(await past.keys(ARCHIVE_BUCKET)) == len(TABLES) + 4 + 2


async def test_a_file_that_was_missing_already_is_told(past: Past) -> None:
    await past.job()
    await past.blobs.delete(BUCKET, [key for key in await past.keys(BUCKET) if key.endswith("webp")])
    (archived,) = await past.archive(keep_files=True)
    files = await past.table(archived.name, "files")
    assert sorted((row["archived_as"] != "", row["bytes"]) for row in files) == [(False, "0"), (True, "5")]


# --------------------------------------------------------------------------------------------- what is never taken


async def test_a_job_with_a_callback_to_send_stays_until_it_was_sent(past: Past) -> None:
    job_id = await past.job(delivered=False)
    assert await past.archive() == []
    callbacks = Callbacks(past.database.worker_pool)
    (_,) = await callbacks.claim_due(5, 30, per_host=5)
    assert await past.archive() == []  # it is under way
    assert await past.left() == {job_id}


async def test_an_open_job_stays_however_old(past: Past) -> None:
    await past.job()
    waiting = new_job(await past.database.user())
    await Jobs(past.database.pool).accept(waiting)
    retried = await past.job()
    await past.database.pool.execute("UPDATE jobs SET status = 'failed', error_code = 'oom' WHERE id = $1", retried)
    await Jobs(past.database.pool).retry(retried, queue="sdxl", cost=1.0)
    await past.database.pool.execute("UPDATE jobs SET created_at = now() - interval '900 days'")
    assert sum(archived.deleted for archived in await past.archive()) == 1
    assert await past.left() == {waiting.id, retried}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET quality_rating = 5",
        "UPDATE callback_outbox SET state = 'due', delivered_at = NULL",
        "INSERT INTO callback_attempts (callback_id, attempt) SELECT id, 2 FROM callback_outbox",
    ],
)
async def test_a_job_that_changed_since_it_was_written_stays(past: Past, change: str) -> None:
    changed = await past.job()
    pool = past.database.pool

    class Changing(Store):
        async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
            await super().put(bucket, key, data, content_type)
            if key.endswith("manifest.json"):
                await pool.execute(change)

    blobs = Changing.from_url(f"file://{past.folder}")
    (first,) = await past.archive(blobs=blobs)
    assert (first.jobs, first.deleted, first.files_deleted) == (1, 0, 0)
    assert await past.left() == {changed}
    assert len(await past.keys(BUCKET)) == 2
    # next time it goes as it is then
    await pool.execute("UPDATE callback_outbox SET state = 'delivered', delivered_at = now()")
    (again,) = await past.archive()
    assert (again.deleted, await past.left()) == (1, set())


# --------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("keep_files", [False, True])
async def test_a_death_at_any_step_loses_nothing_and_the_next_command_converges(past: Past, keep_files: bool) -> None:
    died = 0
    for step in range(2, 60):
        jobs = {await past.job(reference=True), await past.job()}
        folders = {key.split("/")[0] for key in await past.keys(ARCHIVE_BUCKET)}
        survived = False
        try:
            await past.archive(keep_files=keep_files, blobs=past.store(dies_at=step))
            survived = True
        except Died:
            died += 1
        gone = jobs - await past.left()
        assert not gone or gone == jobs
        await past.archive(keep_files=keep_files)
        assert await past.left() == set()
        assert set((await past.counts()).values()) == {0}
        assert await past.keys(BUCKET) == await past.keys(REFERENCE_BUCKET) == set()
        (new,) = {key.split("/")[0] for key in await past.keys(ARCHIVE_BUCKET)} - folders
        assert {UUID(row["id"]) for row in await past.table(new, "jobs")} == jobs
        made = Archive(past.database.pool, past.blobs)
        await made.read_back(new)  # whole
        assert await past.database.pool.fetchval("SELECT count(*) FROM archives WHERE finished_at IS NULL") == 0
        if survived:
            break
    # it died before and after every write and deletion: tables, kept files and their list, manifest, files of two jobs
    assert survived
    assert died == 2 * (len(TABLES) + 1 + (7 if keep_files else 0) + 2)


async def test_a_database_that_goes_away_between_two_deletions_is_gone_on_with(
    past: Past, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {await past.job() for _ in range(4)}
    monkeypatch.setattr("deployments.archive.DELETED_AT_ONCE", 1)
    real, calls = Archives.delete, 0

    async def delete(self: Archives, *arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ConnectionResetError
        return await real(self, *arguments)

    monkeypatch.setattr(Archives, "delete", delete)
    with pytest.raises(ConnectionResetError):
        await past.archive()
    assert len(await past.left()) == 2
    assert len(await past.keys(BUCKET)) == 8  # files go last
    (archived,) = await past.archive()
    assert (archived.jobs, archived.deleted, await past.left()) == (4, 4, set())
    assert {UUID(row["id"]) for row in await past.table(archived.name, "jobs")} == jobs
    assert await past.keys(BUCKET) == set()


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest", "kept file"])
async def test_nothing_is_deleted_when_what_is_read_back_is_not_what_was_written(past: Past, damage: str) -> None:
    job_id = await past.job()

    class Damaging(Store):
        async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
            if damage == "changed" and key.endswith("events.csv.gz"):
                data = gzip.compress(b"id,job_id\n")
            if damage == "cut" and key.endswith("jobs.csv.gz"):
                data = data[:-20]
            if damage == "kept file" and key.endswith(".png"):
                data = b"other"
            missing = {"missing": "usage.csv.gz", "no manifest": "manifest.json"}.get(damage, "-")
            if not key.endswith(missing):
                await super().put(bucket, key, data, content_type)

    with pytest.raises(ArchiveDamaged):
        await past.archive(keep_files=True, blobs=Damaging.from_url(f"file://{past.folder}"))
    assert await past.left() == {job_id}
    assert len(await past.keys(BUCKET)) == 2
    (archived,) = await past.archive(keep_files=True)  # it is written anew
    assert (archived.deleted, await past.left()) == (1, set())


async def test_a_store_that_is_away_changes_nothing(past: Past) -> None:
    job_id = await past.job()

    class Away(Store):
        async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
            raise StorageUnavailable("away")

    with pytest.raises(StorageUnavailable):
        await past.archive(blobs=Away.from_url(f"file://{past.folder}"))
    assert await past.left() == {job_id}


async def test_a_plan_whose_jobs_all_came_back_is_given_up(past: Past) -> None:
    job_id = await past.job()
    with pytest.raises(Died):
        await past.archive(blobs=past.store(dies_at=2))
    await past.database.pool.execute("UPDATE jobs SET status = 'failed', error_code = 'oom'")
    assert await Jobs(past.database.pool).retry(job_id, queue="sdxl", cost=1.0)
    assert await past.archive() == []
    assert await past.database.pool.fetchval("SELECT count(*) FROM archives") == 0
    assert await past.left() == {job_id}


async def test_only_one_archive_command_works_at_a_time(past: Past) -> None:
    await past.job()
    async with past.database.pool.acquire() as connection, Archives(connection).locked() as held:
        assert held
        with pytest.raises(ArchiveBusy):
            await past.archive()
    assert len(await past.archive()) == 1
    assert await past.database.pool.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_a_lost_connection_hides_no_error_of_an_archive(past: Past) -> None:
    pool = past.database.pool

    async def cut() -> None:
        async with pool.acquire() as connection, Archives(connection).locked():
            await pool.fetchval("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            raise Died

    with pytest.raises(Died):
        await cut()
    async with pool.acquire() as connection, Archives(connection).locked() as held:
        assert held


async def test_many_jobs_make_many_archives_the_oldest_first(past: Past) -> None:
    days = {await past.job(days=age): age for age in (500, 420, 460, 480, 440)}
    done = await past.archive(jobs=2)
    assert [archived.jobs for archived in done] == [2, 2, 1]
    ages = [sorted(days[UUID(row["id"])] for row in await past.table(a.name, "jobs")) for a in done]
    assert ages == [[480, 500], [440, 460], [420]]


async def test_a_survey_changes_nothing(past: Past) -> None:
    await past.job()
    await past.job(days=10)
    before = await past.counts()
    found = await Archive(past.database.pool, past.blobs).survey(YEAR)
    assert (found.jobs, found.assets, found.asset_bytes) == (1, 1, 10)
    assert await past.counts() == before
    assert await past.keys(ARCHIVE_BUCKET) == set()


async def test_equal_rows_give_equal_bytes(past: Past) -> None:
    await past.job()
    async with past.database.pool.acquire() as connection:
        archives = Archives(connection)
        plan = await archives.plan(await archives.cutoff(YEAR), 10, False)
        assert plan is not None
        first, second = await archives.snapshot(plan), await archives.snapshot(plan)
    assert first is not None
    assert second is not None
    assert [copied.data for copied in first.tables] == [copied.data for copied in second.tables]


async def test_an_archive_can_be_read_back_into_postgres(past: Past) -> None:
    await past.job(reference=True)
    pool, sources = past.database.pool, {"jobs": "jobs", "events": "job_events", "callbacks": "callback_outbox"}
    before = {name: await pool.fetch(f"SELECT * FROM {source} ORDER BY id") for name, source in sources.items()}  # noqa: S608
    (archived,) = await past.archive()
    for name, source in sources.items():
        packed = await past.blobs.get(ARCHIVE_BUCKET, f"{archived.name}/{name}.csv.gz")
        async with pool.acquire() as connection:
            await connection.execute(f"CREATE TEMP TABLE restored (LIKE {source})")
            table = io.BytesIO(gzip.decompress(packed))
            await connection.copy_to_table("restored", source=table, format="csv", header=True)
            assert await connection.fetch("SELECT * FROM restored ORDER BY id") == before[name]
            await connection.execute("DROP TABLE restored")
