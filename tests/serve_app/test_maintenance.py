"""Work that is no job, held to maintenance and the rate; and in maintenance everything else goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from db.access import Access
from db.jobs import Status
from serve_app.version import VERSION
from tests.serve_app.conftest import InProcess, a_job
from tests.serve_app.running import running

WORK = [
    ("/functions/v1/enhance-prompt", {"prompt": "a lighthouse"}),
    ("/functions/v1/playground-chat", {"message": "hello"}),
]


@pytest.fixture
async def admin(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an admin."""
    return await server.user("operator", "admin")


async def test_work_that_is_no_job_is_refused_too(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    conversation = (await alice.post("/v1/conversations", json={"title": "a lighthouse"})).json()["id"]
    await admin.patch("/v1/config", json={"maintenanceMode": True})
    before = await server.stored()
    for path, body in [*WORK, (f"/v1/conversations/{conversation}/messages", {"content": "hello"})]:
        answer = await alice.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "maintenance"), path
        assert answer.headers["retry-after"] == "60"
    assert await server.stored() == before
    assert (await admin.post(WORK[0][0], json=WORK[0][1])).status_code == 200
    await admin.patch("/v1/config", json={"maintenanceMode": False})
    assert (await alice.post(WORK[0][0], json=WORK[0][1])).status_code == 200


async def test_work_that_is_no_job_is_held_to_the_rate(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    conversation = (await alice.post("/v1/conversations", json={"title": "a lighthouse"})).json()["id"]
    await admin.patch("/v1/config", json={"rateLimitRequestsPerMinute": 1, "burst": 1})
    assert (await alice.post(WORK[0][0], json=WORK[0][1])).status_code == 200
    before = await server.stored()
    for path, body in [*WORK, (f"/v1/conversations/{conversation}/messages", {"content": "hello"})]:
        answer = await alice.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited"), path
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert await server.stored() == before
    for _ in range(2):
        assert (await admin.post(WORK[0][0], json=WORK[0][1])).status_code == 200


async def test_reads_cancels_and_what_runs_go_on(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    runs, waits = [(await alice.post("/v1/jobs", json=a_job())).json()["id"] for _ in range(2)]
    claim = await server.claim()
    assert str(claim.job_id) == runs
    await admin.patch("/v1/config", json={"maintenanceMode": True})
    assert (await alice.get("/v1/jobs")).status_code == 200
    assert (await alice.post(f"/v1/jobs/{waits}/cancel")).json()["status"] == "cancelled"
    await server.end(claim, status=Status.COMPLETED)
    assert (await alice.get(f"/v1/jobs/{runs}")).json()["status"] == "completed"
    assert (await alice.delete(f"/v1/jobs/{waits}")).status_code == 204


async def test_readyz_tells_of_it_and_stays_what_it_was(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    before = await alice.get("/readyz")
    await admin.patch("/v1/config", json={"maintenanceMode": True})
    after = await alice.get("/readyz")
    assert (before.json()["maintenance"], after.json()["maintenance"]) == (False, True)
    assert (before.status_code, before.json()["models"]) == (after.status_code, after.json()["models"])
    assert (await alice.get("/healthz")).json() == {"status": "ok", "version": VERSION}


async def test_config_on_the_command_line(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as users:
        key = await Access(database.pool).create_key(await database.user("operator", "admin"), "operator")
        site = replace(users, api_key=key.secret)
        code, out, err = await site.command(
            "config", "set", "maxJobsPerHour=20", "maintenanceMode=on", "moderation=all"
        )
        assert (code, err) == (0, ""), err
        assert {"maxJobsPerHour:             20", 'moderation:                 "all"'} <= set(out.splitlines())
        code, out, _ = await site.command("config", "set", "maintenanceMode=off", "--json")
        assert '"maintenanceMode": null' in out
        assert '"maxJobsPerHour": 20' in out
        assert (await users.command("config", "get"))[0] == 1
        code, out, _ = await site.command("config", "get", "maxJobsPerHour")
        assert (code, out.split()) == (0, ["maxJobsPerHour:", "20"])
        for wrong in ("maxJobsPerHour=many", "nothing=1", "maxJobsPerHour"):
            code, out, err = await site.command("config", "set", wrong)
            assert (code, out) == (2, "")
            assert wrong.partition("=")[0] in err
        assert (await site.command("config", "get", "nothing"))[0] == 2
