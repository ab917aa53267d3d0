"""`ourvidz archive` and `ourvidz users erase` as processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from db.jobs import Jobs, Status
from db.queue import Queue, Settlement
from tests.db.test_queue import new_job
from tests.serve_app.running import run_command


def environment(database: Any, folder: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "OURVIDZ_STATE_DIR": str(folder / "state"),
        "OURVIDZ_DATABASE_URL": database.url,
    } | more


async def ended(database: Any, days: int) -> str:
    """A job that ended that long ago."""
    job = new_job(await database.user(), callback_url=None)
    await Jobs(database.pool).accept(job)
    await Queue(database.pool).settle([Settlement(job_id=job.id, status=Status.CANCELLED)])
    await database.pool.execute(
        """UPDATE jobs SET created_at = created_at - make_interval(days => $2),
                           completed_at = completed_at - make_interval(days => $2) WHERE id = $1""",
        job.id,
        days,
    )
    return str(job.id)


async def jobs(database: Any) -> set[str]:
    return {str(row["id"]) for row in await database.pool.fetch("SELECT id FROM jobs")}


async def test_archive_says_what_it_would_do_and_then_does_it(database: Any, tmp_path: Path) -> None:
    old, young = await ended(database, 400), await ended(database, 100)
    where = environment(database, tmp_path)
    code, out, err = await run_command("archive", "--older-than", "365d", "--dry-run", "--json", environment=where)
    assert (code, json.loads(out)["jobs"]) == (0, 1)
    assert "nothing was changed; the files would be deleted" in err
    assert await jobs(database) == {old, young}

    code, out, err = await run_command("archive", "--older-than", "365d", "--json", environment=where)
    (archived,) = json.loads(out)
    assert (code, archived["jobs"], archived["deleted"]) == (0, 1, 1)
    assert f"{archived['name']}: 1 of 1 jobs deleted" in err
    assert await jobs(database) == {young}
    folder = tmp_path / "state" / "blobs" / "archive" / archived["name"]
    assert "manifest.json" in {path.name for path in folder.iterdir()}

    code, out, err = await run_command("archive", "--older-than", "365d", environment=where)
    assert (code, out, err) == (0, "", "there was nothing to archive\n")


async def test_archive_takes_its_age_from_the_settings(database: Any, tmp_path: Path) -> None:
    old = await ended(database, 50)
    code, out, err = await run_command("archive", environment=environment(database, tmp_path))
    assert (code, out) == (2, "")
    assert "jobs are kept for ever otherwise" in err
    assert await jobs(database) == {old}
    where = environment(database, tmp_path, OURVIDZ_JOB_RETENTION_DAYS="40")
    code, out, _ = await run_command("archive", environment=where)
    assert (code, out.splitlines()[0], await jobs(database)) == (0, "archive\tjobs\tdeleted\tfiles deleted", set())


@pytest.mark.parametrize("age", ["1d", "0", "-5d", "1y", "99999d", ""])
async def test_archive_refuses_an_age_that_is_none(database: Any, tmp_path: Path, age: str) -> None:
    await ended(database, 5000)
    code, out, err = await run_command("archive", f"--older-than={age}", environment=environment(database, tmp_path))
    assert (code, out) == (2, "")
    assert "--older-than is a number of days" in err
    assert len(await jobs(database)) == 1


async def test_erase_wants_a_yes_and_then_leaves_nothing(database: Any, tmp_path: Path) -> None:
    await ended(database, 5)
    await Jobs(database.pool).accept(new_job(await database.user()))
    where = environment(database, tmp_path)
    code, out, err = await run_command("users", "erase", "alice", environment=where)
    assert (code, err) == (2, "nothing was erased; say it with --yes\n")
    assert out.splitlines()[1].split() == ["jobs:", "2"]
    assert len(await jobs(database)) == 2

    user = str(await database.user())
    code, out, err = await run_command("users", "erase", user, "--yes", "--json", environment=where)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["user_id"], told["jobs"], told["open_jobs"], told["erased"]) == (user, 2, 1, True)
    assert await jobs(database) == set()
    assert await database.pool.fetchval("SELECT count(*) FROM profiles") == 0
    row = await database.pool.fetchrow("SELECT user_id, metadata FROM user_activity_log")
    assert (row["user_id"], row["metadata"]["asked_by"]) == (None, "operator")

    code, out, err = await run_command("users", "erase", user, "--yes", environment=where)
    assert (code, out, err) == (2, "", "there is no such user\n")
