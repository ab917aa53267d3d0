"""`replicate-webhook`: whom it believes, and that it wakes and changes nothing."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from standardwebhooks import Webhook

from db.notify import QUEUE_CHANNEL, Listener
from db.providers import Providers
from tests.provider_standin import VERSION, Standin, turn_on
from tests.serve_app.conftest import InProcess, a_job, in_process

IMAGE, WEBHOOK = "/functions/v1/replicate-image", "/functions/v1/replicate-webhook"
JSON = {"Content-Type": "application/json"}
KEY = base64.b64encode(b"k" * 32).decode()


@pytest.fixture
async def outside(database: Any, tmp_path: Path, state_dir: Path, provider: Standin) -> AsyncIterator[InProcess]:
    """An API that may reach the provider's stand-in, and takes its webhooks."""
    changes = {"replicate_webhook_secret": f"whsec_{KEY}", "egress_allow": (provider.origin,), "renew_seconds": 0.2}
    async with in_process(database, tmp_path, state_dir=state_dir, **changes) as opened:
        yield opened


@pytest.fixture
async def bob(outside: InProcess) -> httpx2.AsyncClient:
    return await outside.user("bob")


async def with_prediction(server: InProcess, client: httpx2.AsyncClient, provider: Standin) -> UUID:
    """A job in the hands of a replica, whose prediction is called `p1`."""
    await turn_on(server.pool, provider)
    await client.post("/v1/jobs", json=a_job(job_type="rv51_fast"))
    worker, providers = uuid4(), Providers(server.pool)
    (claim,) = await server.queue.claim("provider", worker, 1)
    model = await providers.model_of(claim.job_id)
    assert model is not None
    asked = await providers.ask(claim.job_id, claim.attempt, worker, model, VERSION, "h")
    assert asked is not None
    assert await providers.name(asked, "p1", "starting") == "p1"
    return claim.job_id


def standard(body: bytes, at: float | None = None, key: str = KEY) -> dict[str, str]:
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    signature = Webhook(key).sign("m1", moment, body.decode())
    return {"webhook-id": "m1", "webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": signature}


def plain(body: bytes, at: float | None = None, secret: str = f"whsec_{KEY}") -> dict[str, str]:
    stamp = str(int(time.time() if at is None else at))
    code = hmac.new(secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    return {"X-Callback-Timestamp": stamp, "X-Replicate-Signature": f"sha256={code}"}


def bare(body: bytes) -> dict[str, str]:
    return {"Replicate-Signature": hmac.new(f"whsec_{KEY}".encode(), body, hashlib.sha256).hexdigest()}


async def test_a_webhook_wakes_whoever_holds_the_job_and_changes_nothing(
    outside: InProcess, bob: httpx2.AsyncClient, provider: Standin
) -> None:
    job_id = await with_prediction(outside, bob, provider)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = Listener(outside.settings.postgres(), QUEUE_CHANNEL, heard.put_nowait)
    listener.start()
    await listener.connected.wait()
    client, row = await outside.client(), "SELECT * FROM jobs"
    before = (await outside.stored(), await outside.pool.fetchrow(row))
    body = json.dumps({"id": "p1", "status": "succeeded", "output": ["https://8.8.8.8/x.png"]}).encode()
    for headers in (standard(body), standard(body), plain(body)):
        answer = await client.post(WEBHOOK, content=body, headers=JSON | headers)
        assert answer.json() == {"success": True, "jobId": str(job_id), "status": "processing"}, answer.text
    now = json.dumps({"id": "p1", "status": "failed", "completed_at": datetime.now(UTC).isoformat()}).encode()
    assert (await client.post(WEBHOOK, content=now, headers=JSON | bare(now))).status_code == 200
    assert (await outside.stored(), await outside.pool.fetchrow(row)) == before
    await outside.edge.notifier.close()
    async with asyncio.timeout(30):
        while await heard.get() != f"provider/{job_id}":
            pass
    await listener.close()

    unknown = json.dumps({"id": "p2", "status": "succeeded"}).encode()
    assert (await client.post(WEBHOOK, content=unknown, headers=JSON | standard(unknown))).status_code == 404
    await outside.queue.cancel(job_id)
    await outside.pool.execute("DELETE FROM job_queue")
    await outside.pool.execute("UPDATE jobs SET status = 'cancelled', completed_at = now()")
    answer = await client.post(WEBHOOK, content=body, headers=JSON | standard(body))
    assert (answer.status_code, answer.json()) == (200, {"ok": True, "skipped": True})


def forged(body: bytes) -> dict[str, dict[str, str]]:
    old = json.dumps({"id": "p1", "completed_at": "2020-01-01T00:00:00Z"}).encode()
    return {
        "nothing": {},
        "another key": standard(body, key=base64.b64encode(b"x" * 32).decode()),
        "an hour old": standard(body, time.time() - 3600),
        "an hour ahead": standard(body, time.time() + 3600),
        "another body": standard(body + b" "),
        "no time": {k: v for k, v in standard(body).items() if k != "webhook-timestamp"},
        "a time that is none": standard(body) | {"webhook-timestamp": "9" * 400},
        "another secret": plain(body, secret="x" * 40),
        "plain and old": plain(body, time.time() - 3600),
        "plain with a new time": plain(body, time.time() - 3600) | {"X-Callback-Timestamp": str(int(time.time()))},
        "bare without a time": bare(body),
        "bare of another body": bare(old),
        "empty": {"X-Replicate-Signature": ""},
    }


async def test_a_webhook_needs_a_fresh_signature_over_its_body(outside: InProcess) -> None:
    client, body = await outside.client(), json.dumps({"id": "p1", "status": "succeeded"}).encode()
    for name, headers in forged(body).items():
        answer = await client.post(WEBHOOK, content=body, headers=JSON | headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_signature"), name


async def test_a_webhook_without_a_secret_is_not_believed(server: InProcess) -> None:
    body = json.dumps({"id": "p1"}).encode()
    answer = await (await server.client()).post(WEBHOOK, content=body, headers=JSON | standard(body))
    assert (answer.status_code, answer.json()["code"]) == (503, "webhook_not_configured")


async def test_a_report_about_a_providers_job_wakes_and_changes_nothing(
    outside: InProcess, bob: httpx2.AsyncClient, provider: Standin
) -> None:
    job_id = await with_prediction(outside, bob, provider)
    before = await outside.pool.fetchrow("SELECT * FROM jobs")
    body = json.dumps({"job_id": str(job_id), "status": "completed", "assets": [{"url": "x.png"}]}).encode()
    stamp = str(int(time.time()))
    secret = outside.settings.secret("job_callback_secret")
    code = hmac.new(secret, f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    headers = JSON | {"X-Callback-Timestamp": stamp, "X-Callback-Signature": f"sha256={code}"}
    answer = await (await outside.client()).post("/functions/v1/job-callback", content=body, headers=headers)
    assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text
    assert await outside.pool.fetchrow("SELECT * FROM jobs") == before
