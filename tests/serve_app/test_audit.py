"""The audit log: every operation of the document that changes something leaves a row when an admin asks for it."""

import re
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from db.access import Principal
from serve_app.api.auth import OWN_ACTS
from serve_app.app import openapi_document
from tests.serve_app.conftest import InProcess, a_job

DOCUMENT = openapi_document()
CHANGING = {
    operation["operationId"]: (method.upper(), path, bool(operation.get("security")))
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method in ("post", "put", "patch", "delete")
}
SIGNED = {  # that no user asks for: an outside provider does, and signs it
    "jobCallback",
    "replicateWebhook",
}


async def entries(server: InProcess) -> list[dict[str, Any]]:
    rows = await server.pool.fetch("SELECT * FROM user_activity_log ORDER BY created_at, id")
    return [dict(row) for row in rows]


def filled(path: str) -> str:
    """A path with something in its places that may or may not be there."""
    path = path.replace("{name}", "sdxl").replace("{callback_id}", "msg_1").replace("{index}", "0")
    return re.sub(r"\{\w+\}", str(uuid4()), path)


def test_every_exception_is_an_operation_that_there_is() -> None:
    assert set(OWN_ACTS) - set(CHANGING) == set()
    assert {name for name, (_, _, secured) in CHANGING.items() if not secured} == SIGNED
    assert all(OWN_ACTS.values())


async def test_every_other_operation_of_an_admin_leaves_a_row(server: InProcess) -> None:
    admin = await server.user("root", "admin")
    root = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'root'")
    listed = [name for name in CHANGING if name not in OWN_ACTS and name not in SIGNED and name != "eraseUser"]
    assert len(listed) > 15
    for name in listed:
        method, path, _ = CHANGING[name]
        await server.pool.execute("DELETE FROM user_activity_log")
        answer = await admin.request(method, filled(path), json={})
        assert answer.status_code < 500 or answer.status_code in (501, 503), name
        noted = {entry["action"]: entry for entry in await entries(server)}
        assert f"request.{name}" in noted, name
        entry = noted[f"request.{name}"]
        assert entry["user_id"] == root
        if "{" in path:
            assert entry["resource_id"], name


async def test_no_operation_of_admins_alone_goes_untold(server: InProcess) -> None:
    client = await server.user("alice")
    for name, reason in OWN_ACTS.items():
        method, path, _ = CHANGING[name]
        answer = await client.request(method, filled(path), json={})
        assert answer.status_code != 403 or reason.startswith("changes nothing"), name


async def test_operations_on_the_own_things_leave_none(server: InProcess) -> None:
    admin = await server.user("root", "admin")
    (await admin.post("/v1/jobs", json=a_job())).raise_for_status()
    assert await entries(server) == []


async def test_what_others_do_with_their_own_is_no_act_of_an_admin(server: InProcess) -> None:
    for role in ("basic_user", "premium_user", "moderator"):
        client = await server.user(role, role)
        job = (await client.post("/v1/jobs", json=a_job())).json()
        (await client.post(f"/v1/jobs/{job['id']}/cancel")).raise_for_status()
        assert (await client.post("/v1/queues/sdxl/pause")).status_code == 403
    assert await entries(server) == []


async def test_an_act_on_anothers_job_is_told_with_the_job_and_not_what_it_holds(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    admin = await server.user("root", "admin")
    job = (await alice.post("/v1/jobs", json=a_job(prompt="hush"))).json()
    (await admin.post(f"/v1/jobs/{job['id']}/cancel")).raise_for_status()
    (await admin.post(f"/v1/jobs/{job['id']}/callbacks/msg_1/replay"))
    cancelled, replayed = await entries(server)
    assert (cancelled["action"], cancelled["resource_type"], cancelled["resource_id"]) == (
        "request.cancelJob",
        "jobs",
        job["id"],
    )
    assert replayed["metadata"] == {"also_1": "msg_1"}
    assert "hush" not in str([cancelled, replayed])


async def test_keys_and_roles_are_told_with_what_came_of_it(server: InProcess) -> None:
    admin = await server.user("root", "admin")
    made = (await admin.post("/v1/keys", json={"username": "carol", "name": "k", "role": "moderator"})).json()
    carol = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'carol'")
    for _ in range(2):
        (await admin.delete(f"/v1/keys/{made['id']}")).raise_for_status()
    told = [(entry["action"], entry["resource_id"], entry["metadata"]) for entry in await entries(server)]
    assert told == [
        ("request.createKey", None, {}),
        ("role.granted", str(carol), {"role": "moderator"}),
        ("api_key.created", made["id"], {"owner": str(carol)}),
        ("request.revokeKey", made["id"], {}),
        ("api_key.revoked", made["id"], {"owner": str(carol)}),
        ("request.revokeKey", made["id"], {}),
    ]
    secret = made.get("key") or made["secret"]
    assert secret not in str(told)


async def test_an_erasure_is_told_and_stays_told(server: InProcess, alice: httpx2.AsyncClient) -> None:
    admin = await server.user("root", "admin")
    user = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'alice'")
    assert (await admin.delete(f"/v1/users/{user}/data")).status_code == 204
    told = {entry["action"]: entry for entry in await entries(server)}
    assert set(told) == {"request.eraseUser", "user.erased"}
    assert {entry["resource_id"] for entry in told.values()} == {str(user)}


async def test_an_act_is_told_before_it_is_done(server: InProcess) -> None:
    """What can't be told is not done."""
    admin = await server.user("root", "admin")
    await server.pool.execute("ALTER TABLE user_activity_log RENAME TO log_that_is_away")
    answer = await admin.post("/v1/queues/sdxl/pause")
    await server.pool.execute("ALTER TABLE log_that_is_away RENAME TO user_activity_log")
    assert answer.status_code == 500
    assert await server.queue.paused() == set()


@pytest.mark.parametrize("role", ["admin", "moderator"])
def test_a_principal_administers_by_its_role(role: str) -> None:
    principal = Principal(uuid4(), None, frozenset({role}), False)
    assert principal.is_admin() is (role == "admin")
