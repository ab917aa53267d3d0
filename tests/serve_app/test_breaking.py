"""What others may send to break things: characters that can't be stored, wherever a text comes in unread; depth; and
bodies of older clients, which must not break."""

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from db.jobs import Status
from serve_app.token_keys import KeySet, KeysUnavailable
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.signing import key_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEBHOOK_SECRET = "w" * 40
JSON = {"Content-Type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(
    shared_database: Any, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InProcess]:
    """One API for the whole module, which takes webhooks."""
    changes = {"state_dir": state_dir, "replicate_webhook_secret": WEBHOOK_SECRET}
    async with in_process(shared_database, tmp_path_factory.mktemp("breaking"), **changes) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def alice(opened: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an ordinary user."""
    return await opened.client(await opened.key("alice"), raise_app_exceptions=False)


def signed(secret: str, body: bytes) -> tuple[str, str]:
    stamp = str(int(time.time()))
    return stamp, hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/jobs/{}/retry", 422), ("/v1/jobs/{}/cancel", 422), ("/v1/queues/{}/pause", 404)]
)
async def test_a_path_of_an_admin_that_can_not_be_logged_is_refused(opened: InProcess, path: str, status: int) -> None:
    admin = await opened.client(await opened.key("root", "admin"), raise_app_exceptions=False)
    answer = await admin.post(path.format("x%00y"))
    assert answer.status_code == status, answer.text
    logged = "SELECT resource_id FROM user_activity_log ORDER BY created_at DESC LIMIT 1"
    assert await opened.pool.fetchval(logged) == "x\ufffdy"


async def test_an_unknown_input_is_named_only_where_it_can_be(alice: httpx2.AsyncClient) -> None:
    body = {"prompt": "a lighthouse", "input": {"\ud800": 1}}
    answer = await alice.post("/functions/v1/replicate-image", content=json.dumps(body), headers=JSON)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, "input")


@pytest.mark.parametrize("error", ["no\0 memory", "no\ud800 memory"], ids=["null", "surrogate"])
async def test_a_report_of_failure_ends_the_job_whatever_its_words(
    opened: InProcess, alice: httpx2.AsyncClient, error: str
) -> None:
    job_id = (await alice.post("/v1/jobs", json=a_job())).json()["id"]
    await opened.pool.execute("UPDATE jobs SET provider = 'elsewhere' WHERE id = $1", job_id)
    body = json.dumps({"job_id": job_id, "status": "failed", "error_message": error}).encode()
    assert opened.settings.job_callback_secret is not None
    stamp, code = signed(opened.settings.job_callback_secret.get_secret_value(), body)
    headers = JSON | {"X-Callback-Timestamp": stamp, "X-Callback-Signature": f"sha256={code}"}
    answer = await alice.post("/functions/v1/job-callback", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    job = (await alice.get(f"/v1/jobs/{job_id}")).json()
    assert job["status"] == "failed"
    assert job["error"]["message"].startswith("no")


@pytest.mark.parametrize(
    "name", ["p\0", "p\ud800", "../predictions", "p" * 5000], ids=["null", "surrogate", "path", "long"]
)
async def test_a_webhook_about_no_name_of_a_prediction_finds_nothing(alice: httpx2.AsyncClient, name: str) -> None:
    body = json.dumps({"id": name, "status": "succeeded"}).encode()
    stamp, code = signed(WEBHOOK_SECRET, body)
    headers = JSON | {"X-Callback-Timestamp": stamp, "X-Replicate-Signature": code}
    answer = await alice.post("/functions/v1/replicate-webhook", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


async def test_a_bottomless_list_of_keys_is_none() -> None:
    async with key_server() as auth:
        auth.body = b"[" * 60_000
        keys = KeySet(auth.url)
        with pytest.raises(KeysUnavailable):
            await keys.find("one")
        await keys.close()


async def test_a_description_of_a_scene_is_enhanced_for_the_older_client(alice: httpx2.AsyncClient) -> None:
    body = {"prompt": "a lighthouse", "contentType": "scene_description", "jobType": "text_enhancement"}
    answer = await alice.post("/functions/v1/enhance-prompt", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["enhancement_metadata"]["format"] == "image"


@pytest.mark.parametrize(
    ("now", "status", "code"),
    [({"content_mode": "nsfw"}, 403, "nsfw_not_allowed"), ({"prompt": "a nude child"}, 422, "content_minors")],
    ids=["mode", "words"],
)
async def test_what_is_not_made_any_more_is_not_retried(
    opened: InProcess, alice: httpx2.AsyncClient, now: dict[str, str], status: int, code: str
) -> None:
    job_id = (await alice.post("/v1/jobs", json=a_job())).json()["id"]
    await alice.post(f"/v1/jobs/{job_id}/cancel")
    accepted_once = "UPDATE jobs SET params = params || $2::jsonb WHERE id = $1"
    await opened.pool.execute(accepted_once, job_id, now)
    answer = await alice.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert (await alice.get(f"/v1/jobs/{job_id}")).json()["status"] == Status.CANCELLED


async def test_a_copy_of_the_library_is_no_job_to_retry(opened: InProcess, alice: httpx2.AsyncClient) -> None:
    job_id = (await alice.post("/v1/jobs", json=a_job())).json()["id"]
    await alice.post(f"/v1/jobs/{job_id}/cancel")
    copied = "UPDATE jobs SET params = '{}', provider = 'library', status = 'completed' WHERE id = $1"
    await opened.pool.execute(copied, job_id)
    answer = await alice.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_retryable")
