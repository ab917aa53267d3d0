"""The commands `backup` and `restore`, and the API over what was restored into a Postgres of its own."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest

from db import embedded
from db.pool import open_pool
from tests.conftest import TestDatabase, state_folder, with_database
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.running import Site, run_command, running


@pytest.fixture
async def site(database: Any, tmp_path: Path) -> Any:
    async with running(database, tmp_path) as opened:
        yield opened


async def jobs_made(site: Site) -> tuple[str, str, bytes]:
    """One finished and one waiting job; their ids and the finished one's picture."""
    async with httpx2.AsyncClient(base_url=site.url, headers={"Authorization": f"Bearer {site.api_key}"}) as client:
        done, waits = [(await client.post("/v1/jobs", json=a_job())).json()["id"] for _ in range(2)]
    data = await site.finish(await site.claim())
    return done, waits, data


async def test_a_system_restored_into_a_new_postgres_answers_and_works_on(site: Site, tmp_path: Path) -> None:
    done, waits, data = await jobs_made(site)
    folder = tmp_path / "backup"
    rc, out, err = await site.command("backup", str(folder))
    assert (rc, out) == (0, f"{folder}\n"), err
    assert "2 jobs, 1 job_queue, 1 workspace_assets" in err

    with state_folder() as other:
        state = other / "state"
        environment = {n: v for n, v in site.environment.items() if n != "OURVIDZ_DATABASE_URL"}
        environment["OURVIDZ_STATE_DIR"] = str(state)
        rc, out, err = await run_command("restore", str(folder), environment=environment)
        assert rc == 0, err
        assert "jobs:" in out
        url = embedded.ensure_running(state / "postgres")
        pool, worker_pool = await open_pool(url), await open_pool(url, role="ourvidz_worker")
        try:
            restored = TestDatabase(url, pool, worker_pool)
            async with in_process(restored, other, blob_url=f"file://{state / 'blobs'}") as api:
                await look_around(api, site.api_key, done, waits, data)
        finally:
            await worker_pool.close()
            await pool.close()
        again = await run_command("restore", str(folder), environment=environment)
        assert again[0] == 1
        assert "not empty" in again[2]


async def look_around(api: InProcess, key: str, done: str, waits: str, data: bytes) -> None:
    """The old key opens the restored API; the finished job has its file, the waiting one can be run."""
    client = await api.client(key)
    job = (await client.get(f"/v1/jobs/{done}")).json()
    assert job["status"] == "completed"
    assert (await client.get(job["assets"][0]["url"])).content == data
    claim = await api.claim()
    assert str(claim.job_id) == waits
    await api.end(claim, status="cancelled")
    assert (await client.get(f"/v1/jobs/{waits}")).json()["status"] == "cancelled"


async def test_a_backup_can_be_checked_and_a_damaged_one_is_refused(site: Site, tmp_path: Path) -> None:
    await jobs_made(site)
    folder = tmp_path / "backup"
    rc, out, _ = await site.command("backup", str(folder), "--json")
    said = json.loads(out)
    assert (rc, said["files"], said["missing"]) == (0, 1, 0)
    assert (await site.command("restore", str(folder), "--check"))[0] == 0
    (png,) = await asyncio.to_thread(lambda: list((folder / "files").rglob("*.png")))
    png.write_bytes(b"other")
    rc, _, err = await site.command("restore", str(folder), "--check")
    assert (rc, "is not what was written" in err) == (1, True)


async def test_restoring_over_the_running_system_is_refused(site: Site, tmp_path: Path) -> None:
    done, _, _ = await jobs_made(site)
    folder = tmp_path / "backup"
    assert (await site.command("backup", str(folder)))[0] == 0
    rc, _, err = await site.command("restore", str(folder))
    assert (rc, "the database is not empty" in err) == (1, True)
    rc, _, err = await site.command(
        "restore", str(folder), "--into", site.database.url, "--store", f"file://{tmp_path}/x"
    )
    assert (rc, "the database is not empty" in err) == (1, True)
    assert await site.database.pool.fetchval("SELECT status FROM jobs WHERE id = $1::uuid", done) == "completed"


async def test_what_is_no_folder_is_usage(site: Site, tmp_path: Path) -> None:
    assert (await site.command("backup", "s3://bucket/x"))[0] == 2
    assert (await site.command("restore", str(tmp_path / "none")))[0] == 1
    assert (await site.command("backup", str(tmp_path / "b"), OURVIDZ_DATABASE_URL="postgresql://127.0.0.1:1/x"))[
        0
    ] == 3


async def test_a_database_that_was_never_migrated_is_told(site: Site, tmp_path: Path, postgres_url: str) -> None:
    server = await asyncpg.connect(site.database.url)
    bare = with_database(postgres_url, "bare_one")
    await server.execute("CREATE DATABASE bare_one")
    try:
        rc, _, err = await site.command("backup", str(tmp_path / "b"), OURVIDZ_DATABASE_URL=bare)
        assert (rc, "not migrated" in err) == (1, True), err
    finally:
        await server.execute("DROP DATABASE bare_one WITH (FORCE)")
        await server.close()
