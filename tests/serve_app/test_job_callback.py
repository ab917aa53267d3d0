"""/functions/v1/job-callback about jobs that an outside provider runs: what ends them, and what does not."""

import hashlib
import hmac
import io
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from PIL import Image

from tests.serve_app.conftest import InProcess, a_job, in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(
    shared_database: Any, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InProcess]:
    """One API for the whole module."""
    async with in_process(shared_database, tmp_path_factory.mktemp("reports"), state_dir=state_dir) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def server(opened: InProcess) -> InProcess:
    """The API, with no job of an earlier test."""
    await opened.pool.execute("DELETE FROM jobs")
    return opened


@pytest_asyncio.fixture(loop_scope="module")
async def alice(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an ordinary user."""
    return await server.user("alice")


async def outside(server: InProcess, alice: httpx2.AsyncClient, **changes: Any) -> dict[str, Any]:
    """A job that a provider runs, as an operator's own integration has taken it."""
    answer = await alice.post("/v1/jobs", json=a_job(**changes))
    assert answer.status_code == 202, answer.text
    await server.pool.execute("UPDATE jobs SET provider = 'elsewhere'")
    row = await server.pool.fetchrow("SELECT id, user_id FROM jobs")
    return {"id": str(row["id"]), "folder": f"{row['user_id']}/{row['id']}"}


async def picture(server: InProcess, key: str, size: tuple[int, int] = (32, 24)) -> None:
    """A picture that a worker has put into the store."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    await server.blobs.put("workspace-temp", key, buffer.getvalue(), "image/png")


async def report(server: InProcess, answered: int = 200, **body: Any) -> Any:
    raw = json.dumps(body).encode()
    assert server.settings.job_callback_secret is not None
    secret = server.settings.job_callback_secret.get_secret_value().encode()
    stamp = str(int(time.time()))
    code = hmac.new(secret, stamp.encode() + b"." + raw, hashlib.sha256).hexdigest()
    headers = {"X-Callback-Timestamp": stamp, "X-Callback-Signature": f"sha256={code}"}
    headers["Content-Type"] = "application/json"
    client = await server.client(raise_app_exceptions=False)
    answer = await client.post("/functions/v1/job-callback", content=raw, headers=headers)
    assert answer.status_code == answered, answer.text
    return answer.json()


async def assets(server: InProcess) -> list[Any]:
    return await server.pool.fetch("SELECT * FROM workspace_assets ORDER BY asset_index")


@pytest.mark.parametrize("dialect", ["strings", "objects", "legacy"])
async def test_a_report_ends_a_job_with_its_files(server: InProcess, alice: httpx2.AsyncClient, dialect: str) -> None:
    job = await outside(server, alice)
    keys = [f"{job['folder']}/up-{n}.png" for n in range(2)]
    for n, key in enumerate(keys):
        await picture(server, key, (32 + n, 24))
    if dialect == "strings":
        body: dict[str, Any] = {"job_id": job["id"], "assets": [f"workspace-temp/{keys[0]}", keys[1]]}
        body["metadata"] = {"seed": 5, "generation_time": 2.5}
    elif dialect == "objects":
        listed = [{"type": "image", "url": key, "metadata": {"seed": 5, "width": 9999}} for key in keys]
        body = {"job_id": job["id"], "assets": listed, "metadata": {"generation_time": 2.5}}
    else:
        listed = [{"assetType": "image", "tempStoragePath": key, "fileSizeBytes": 1} for key in keys]
        body = {"jobId": job["id"], "results": {"assets": listed}, "metadata": {"seed": 5, "generation_time": 2.5}}
    told = await report(server, status="completed", **body)
    assert (told["success"], told["jobId"], told["status"], told["debug"]["assetsProcessed"]) == (
        True,
        job["id"],
        "completed",
        2,
    )
    shown = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    assert (shown["status"], shown["generation_seconds"]) == ("completed", 2.5)
    assert [(a["index"], a["width"], a["height"], a["seed"]) for a in shown["assets"]] == [
        (0, 32, 24, 5),
        (1, 33, 24, 5),
    ]
    for asset in shown["assets"]:
        assert (await alice.get(asset["url"])).content.startswith(b"\x89PNG")
        assert (await alice.get(asset["thumbnail_url"])).status_code == 200
    before = await assets(server)
    again = await report(server, status="completed", **body)
    late = await report(server, status="failed", job_id=job["id"], error_message="late")
    assert (again["skipped"], late["skipped"]) == (True, True)
    assert await assets(server) == before
    assert (await alice.get(f"/v1/jobs/{job['id']}")).json()["status"] == "completed"


async def test_the_first_report_of_work_sets_the_start(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await outside(server, alice)
    await report(server, jobId=job["id"], status="processing")
    first = await server.pool.fetchrow("SELECT started_at, completed_at FROM jobs")
    await report(server, job_id=job["id"], status="processing")
    assert (first["started_at"] is not None, first["completed_at"]) == (True, None)
    assert await server.pool.fetchval("SELECT started_at FROM jobs") == first["started_at"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"errorMessage": "a"}, "a"),
        ({"error_message": "b"}, "b"),
        ({"error": "c"}, "c"),
        ({"metadata": {"error_type": "d"}}, "d"),
        ({}, "the provider gave no reason"),
    ],
)
async def test_a_failure_is_told_in_every_spelling(
    server: InProcess, alice: httpx2.AsyncClient, said: dict[str, Any], message: str
) -> None:
    job = await outside(server, alice)
    await report(server, job_id=job["id"], status="failed", **said)
    error = (await alice.get(f"/v1/jobs/{job['id']}")).json()["error"]
    assert (error["code"], error["message"], error["retryable"]) == ("provider_failed", message, True)


async def test_a_late_report_after_a_cancel_changes_nothing(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await outside(server, alice)
    await picture(server, f"{job['folder']}/up.png")
    await alice.post(f"/v1/jobs/{job['id']}/cancel")
    told = await report(server, job_id=job["id"], status="completed", assets=[f"{job['folder']}/up.png"])
    assert told["skipped"] is True
    assert await assets(server) == []
    assert (await alice.get(f"/v1/jobs/{job['id']}")).json()["status"] == "cancelled"


async def test_files_that_can_not_be_had_leave_the_job_open(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await outside(server, alice)
    await server.blobs.put("workspace-temp", f"{job['folder']}/text.png", b"no picture", "image/png")
    for listed, code in (
        ([], "missing"),
        ([""], "missing"),
        ([{"type": "image"}], "missing"),
        (["someone/else.png"], "asset_path"),
        ([f"{job['folder']}/../../x.png"], "asset_file_missing"),
        ([f"{job['folder']}/gone.png"], "asset_file_missing"),
        ([f"{job['folder']}/text.png"], "provider_output_unreadable"),
        (["https://files.example/x.png"], "output_host"),
        (["http://127.0.0.1/x.png"], "output_host"),
        ([f"{job['folder']}/text.png"] * 17, "length"),
    ):
        told = await report(server, 400, job_id=job["id"], status="completed", assets=listed)
        assert told["code"] == code, listed
    assert await assets(server) == []
    assert (await alice.get(f"/v1/jobs/{job['id']}")).json()["status"] == "queued"


async def test_a_row_that_can_not_be_written_leaves_the_job_open(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await outside(server, alice)
    await picture(server, f"{job['folder']}/up.png")
    body = {"job_id": job["id"], "status": "completed", "assets": [f"{job['folder']}/up.png"]}
    await server.pool.execute("ALTER TABLE workspace_assets ADD CONSTRAINT none CHECK (width <> 32) NOT VALID")
    try:
        await report(server, 500, **body)
    finally:
        await server.pool.execute("ALTER TABLE workspace_assets DROP CONSTRAINT none")
    assert (await alice.get(f"/v1/jobs/{job['id']}")).json()["status"] == "queued"
    assert (await report(server, **body))["status"] == "completed"


async def test_copies_of_the_library_never_run_anywhere(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await outside(server, alice)
    await server.pool.execute("UPDATE jobs SET provider = 'library'")
    assert (await report(server, job_id=job["id"], status="failed"))["skipped"] is True
