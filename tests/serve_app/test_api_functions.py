"""/functions/v1: the routes of older clients, in both of their dialects."""

import hashlib
import hmac
import json
import time
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.jobs import Status
from tests.serve_app.conftest import InProcess, a_job

QUEUE = "/functions/v1/queue-job"
ENHANCE = "/functions/v1/enhance-prompt"
REPORT = "/functions/v1/job-callback"


@pytest.mark.parametrize("path", [QUEUE, ENHANCE, REPORT])
async def test_functions_know_the_status_codes_of_the_original(server: InProcess, path: str) -> None:
    stranger, alice = await server.client(), await server.user("alice")
    assert (await stranger.post(path, json={})).status_code == 401
    for method in ("GET", "PUT", "DELETE"):
        answer = await alice.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (405, "application/json")
        assert answer.json()["success"] is False


async def test_functions_answer_preflights_of_browsers(server: InProcess) -> None:
    stranger = await server.client()
    headers = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-client-info, apikey, content-type",
    }
    answer = await stranger.options(QUEUE, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["access-control-expose-headers"] == "idempotency-replayed, retry-after"


# --------------------------------------------------------------------------------------------- enhance-prompt


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a lighthouse", "job_type": "sdxl_image_fast"},
        {"original_prompt": "a lighthouse", "jobType": "sdxl_image_high"},
        {"prompt": "a lighthouse", "format": "image", "quality": "high"},
        {"prompt": "a lighthouse", "jobType": "video_fast"},
        {"prompt": "a lighthouse", "jobType": "video", "model": "wan"},
    ],
)
async def test_enhance_prompt_says_that_rules_stood_in(
    server: InProcess, alice: httpx2.AsyncClient, body: dict[str, Any]
) -> None:
    before = await server.stored()
    answer = await alice.post(ENHANCE, json=body)
    said = answer.json()
    assert answer.status_code == 200
    assert (said["success"], said["enhancement_strategy"], said["fallback_used"]) == (True, "rule_based", True)
    assert said["fallback_reason"] == "model_unavailable"
    assert (said["original_prompt"], said["originalPrompt"]) == ("a lighthouse", "a lighthouse")
    assert said["enhanced_prompt"] == said["enhancedPrompt"]
    assert said["enhanced_prompt"].startswith("a lighthouse")
    assert said["analytics"] | {"processingTime": 0} == {
        "enhancementMethod": "rule_based",
        "processingTime": 0,
        "fallbackUsed": True,
        "qualityMetrics": {"coherence": None, "visualAppeal": None, "technicalQuality": None},
    }
    assert said["qualityScore"] is None
    assert await server.stored() == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": "  "}, 400),
        ({"prompt": 5}, 400),
        ({"prompt": "a" * 100_000}, 400),
        ({"prompt": "a\0b"}, 400),
        ({"prompt": "x", "jobType": "nonsense"}, 400),
        ({"prompt": "x", "jobType": ["video"]}, 400),
        ({"prompt": "x", "jobType": {"a": 1}}, 400),
        ({"prompt": "x", "contentType": "scene_creation"}, 501),
        ({"prompt": "x", "contentType": "scene"}, 400),
        ({"prompt": "x", "contentType": ["nsfw"]}, 400),
        ({"prompt": "x", "contentType": "nsfw"}, 403),
        ({"prompt": "x", "contentRating": "nsfw"}, 403),
        ({"prompt": "x", "jobType": "rv51_fast"}, 503),
        ({"prompt": "x", "jobType": "video", "model": "sdxl"}, 400),
        ({"prompt": "x", "quality": "best"}, 400),
        ({"prompt": "x", "model": "flux"}, 400),
    ],
)
async def test_enhance_prompt_refuses(alice: httpx2.AsyncClient, body: dict[str, Any], status: int) -> None:
    answer = await alice.post(ENHANCE, json=body)
    assert (answer.status_code, answer.json()["success"]) == (status, False), answer.text
    assert len(answer.json()["errors"]) == 1


# ------------------------------------------------------------------------------------------------ job-callback


def signed(body: bytes, secret: str, at: int | None = None, **changes: str) -> dict[str, str]:
    stamp = str(int(time.time()) if at is None else at)
    code = hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    headers = {"X-Callback-Timestamp": stamp, "X-Callback-Signature": f"sha256={code}"}
    return {"Content-Type": "application/json", **headers, **changes}


async def report(server: InProcess, body: dict[str, Any], **headers: str) -> httpx2.Response:
    raw = json.dumps(body).encode()
    assert server.settings.job_callback_secret is not None
    secret = server.settings.job_callback_secret.get_secret_value()
    provider = await server.client()
    return await provider.post(REPORT, content=raw, headers=signed(raw, secret, **headers))


@pytest.mark.parametrize("status", ["completed", "failed", "processing", "cancelled"])
async def test_a_report_about_our_own_job_changes_nothing(
    server: InProcess, alice: httpx2.AsyncClient, status: str
) -> None:
    job = (await alice.post("/v1/jobs", json=a_job(callback_url="https://8.8.8.8/hook"))).json()
    before, row = await server.stored(), await server.pool.fetchrow("SELECT * FROM jobs")
    for body in (
        {"job_id": job["id"], "status": status, "assets": [{"type": "image", "url": "x"}]},
        {"jobId": job["id"], "status": status, "results": {"assets": ["a.png"]}, "errorMessage": "x"},
    ):
        answer = await report(server, body)
        assert (answer.status_code, answer.json()["skipped"]) == (200, True)
    assert await server.stored() == before
    assert await server.pool.fetchrow("SELECT * FROM jobs") == row


async def test_a_report_about_an_ended_job_changes_nothing(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = (await alice.post("/v1/jobs", json=a_job())).json()
    await server.end(await server.claim(), status=Status.FAILED, error_code="oom")
    answer = await report(server, {"job_id": job["id"], "status": "completed"})
    assert answer.status_code == 200
    assert await server.pool.fetchval("SELECT status FROM jobs") == "failed"


async def test_a_report_about_an_unknown_job_is_taken_quietly(server: InProcess) -> None:
    answer = await report(server, {"job_id": str(uuid4()), "status": "completed"})
    assert (answer.status_code, answer.json()["skipped"]) == (200, True)


async def test_a_report_about_another_providers_job_is_not_taken_as_done(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    job = (await alice.post("/v1/jobs", json=a_job())).json()
    await server.pool.execute("UPDATE jobs SET provider = 'elsewhere'")
    answer = await report(server, {"job_id": job["id"], "status": "completed"})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, "assets")


BODY = json.dumps({"job_id": "00000000-0000-0000-0000-000000000000", "status": "completed"}).encode()
NOW = int(time.time())


def forged(secret: str) -> dict[str, dict[str, str]]:
    good = signed(BODY, secret)
    old, future = signed(BODY, secret, NOW - 3600), signed(BODY, secret, NOW + 3600)
    return {
        "unsigned": {"Content-Type": "application/json"},
        "no time": {name: value for name, value in good.items() if name != "X-Callback-Timestamp"},
        "no signature": {name: value for name, value in good.items() if name != "X-Callback-Signature"},
        "another secret": signed(BODY, "x" * 40),
        "another body": signed(BODY + b" ", secret),
        "an hour old": old,
        "an hour ahead": future,
        "an old signature with a new time": old | {"X-Callback-Timestamp": str(int(time.time()))},
        "a time that is no number": signed(BODY, secret, **{"X-Callback-Timestamp": "now"}),
        "a time in rare digits": signed(BODY, secret, **{"X-Callback-Timestamp": "\u00b2\u00b2"}),
        "a time of 5000 digits": signed(BODY, secret, **{"X-Callback-Timestamp": "1" * 5000}),
        "a negative time": signed(BODY, secret, **{"X-Callback-Timestamp": "-1"}),
        "an empty signature": signed(BODY, secret, **{"X-Callback-Signature": "sha256="}),
        "a rare signature": signed(BODY, secret, **{"X-Callback-Signature": "sha256=\u00e9"}),
    }


@pytest.mark.parametrize("name", list(forged("s" * 40)))
async def test_a_report_needs_a_fresh_signature_over_its_body(server: InProcess, name: str) -> None:
    assert server.settings.job_callback_secret is not None
    headers = forged(server.settings.job_callback_secret.get_secret_value())[name]
    provider = await server.client()
    raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
    answer = await provider.post(REPORT, content=BODY, headers=raw)
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_signature")


async def test_a_key_of_the_api_is_no_signature(server: InProcess, alice: httpx2.AsyncClient) -> None:
    answer = await alice.post(REPORT, content=BODY, headers={"Content-Type": "application/json"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "job_id"),
        ({"job_id": "x", "status": "completed"}, "job_id"),
        ({"job_id": [1], "status": "completed"}, "job_id"),
        ({"job_id": str(UUID(int=0))}, "status"),
        ({"job_id": str(UUID(int=0)), "status": "done"}, "status"),
        ({"job_id": str(UUID(int=0)), "status": ["completed"]}, "status"),
        ({"job_id": str(UUID(int=0)), "status": "completed", "assets": {"a": 1}}, "assets"),
        ({"job_id": str(UUID(int=0)), "status": "completed", "assets": [5]}, "assets"),
        ({"job_id": str(UUID(int=0)), "status": "completed", "results": "x"}, "assets"),
        ({"job_id": str(UUID(int=0)), "status": "completed", "results": {"assets": 5}}, "assets"),
    ],
)
async def test_a_signed_report_that_says_nothing_is_refused(
    server: InProcess, body: dict[str, Any], field: str
) -> None:
    answer = await report(server, body)
    assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (400, [field])
