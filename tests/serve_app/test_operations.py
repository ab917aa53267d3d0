"""Pausing queues, looking at and replaying callbacks, erasing jobs."""

from typing import Any
from uuid import UUID

import httpx2

from db.callbacks import Attempt, Callbacks
from db.jobs import Status
from deployments.storing import BUCKET, attempt_prefix
from tests.db.test_queue import asset
from tests.serve_app.conftest import InProcess, a_job

HOOK = "https://93.184.215.14/hook"  # an address, so that nothing is looked up; nothing is sent in these tests


async def submit(client: httpx2.AsyncClient, **changes: Any) -> str:
    answer = await client.post("/v1/jobs", json=a_job(**changes))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def test_a_paused_queue_accepts_and_waits(server: InProcess, alice: httpx2.AsyncClient) -> None:
    admin = await server.user("root", "admin")
    assert (await alice.post("/v1/queues/sdxl/pause")).status_code == 403
    paused = await admin.post("/v1/queues/sdxl/pause")
    assert (paused.status_code, paused.json()["paused"]) == (200, True)
    await submit(alice)
    states = {queue["name"]: queue for queue in (await admin.get("/v1/queues")).json()["data"]}
    assert (states["sdxl"]["ready"], states["sdxl"]["running"], states["wan"]["paused"]) == (1, 0, False)
    assert await server.queue.claim("sdxl", UUID(int=1), 1) == []
    assert (await admin.post("/v1/queues/sdxl/resume")).json()["paused"] is False
    assert len(await server.queue.claim("sdxl", UUID(int=1), 1)) == 1
    assert (await admin.post("/v1/queues/nonsense/pause")).status_code == 404


async def test_callbacks_are_logged_and_replayed_by_their_owner(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice, callback_url=HOOK, callback_events=["cancelled"])
    await alice.post(f"/v1/jobs/{job}/cancel")
    outbox = Callbacks(server.worker_pool)
    (delivery,) = await outbox.claim_due(5, 30, per_host=5)
    path = f"/v1/jobs/{job}/callbacks"
    assert (await alice.post(f"{path}/{delivery.id}/replay")).status_code == 409  # it is under way
    await outbox.dead(delivery, Attempt(status=410, error="gone", elapsed_ms=3))

    (log,) = (await alice.get(path)).json()["data"]
    assert (log["event"], log["state"], log["next_at"]) == ("job.cancelled", "dead", None)
    assert [(a["status"], a["error"]) for a in log["attempts"]] == [(410, "gone")]
    bob = await server.user("bob")
    assert (await bob.get(path)).status_code == 404
    assert (await bob.post(f"{path}/{delivery.id}/replay")).status_code == 404
    replayed = await alice.post(f"{path}/{delivery.id}/replay")
    assert (replayed.status_code, replayed.json()["data"][0]["state"]) == (200, "due")
    (again,) = await outbox.claim_due(5, 30, per_host=5)
    assert (again.id, again.body) == (delivery.id, delivery.body)


async def test_erasing_a_job_leaves_one_audit_row_and_nothing_else(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    before = await server.stored()
    job = await submit(alice, callback_url=HOOK)
    assert (await alice.delete(f"/v1/jobs/{job}")).status_code == 409  # it is open
    claim = await server.claim()
    key = attempt_prefix(claim.job["user_id"], claim.job_id, 1) + "0.png"
    await server.blobs.put(BUCKET, key, b"x", "image/png")
    made = asset(claim.job_id, 1)
    await server.end(claim, status=Status.COMPLETED, assets=[type(made)(**vars(made) | {"key": key})])
    assert (await (await server.user("bob")).delete(f"/v1/jobs/{job}")).status_code == 404

    assert (await alice.delete(f"/v1/jobs/{job}")).status_code == 204
    assert (await alice.get(f"/v1/jobs/{job}")).status_code == 404
    after = await server.stored()
    changed = {table: after[table] - before[table] for table in after if after[table] != before[table]}
    for told in ("profiles", "user_roles", "api_keys", "queues", "fair_shares"):  # bob, and the share of alice
        changed.pop(told, None)
    assert changed == {"usage_logs": 1, "user_activity_log": 1}  # what was charged stays charged
