"""What the operator's limits, charges and maintenance mode are to clients, on every route that submits work."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from db.jobs import Status
from tests.serve_app.conftest import InProcess, a_job, in_process

QUEUED = {"job_type": "sdxl_image_fast", "prompt": "a lighthouse", "steps": 1}


@pytest.fixture
async def admin(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an admin."""
    return await server.user("operator", "admin")


async def configure(admin: httpx2.AsyncClient, **values: Any) -> None:
    answer = await admin.patch("/v1/config", json=values)
    assert answer.status_code == 200, answer.text


async def an_end(server: InProcess, alice: httpx2.AsyncClient, **values: Any) -> str:
    """The id of a job of alice's that has ended."""
    job_id: str = (await alice.post("/v1/jobs", json=a_job())).json()["id"]
    await server.end(await server.claim(), **({"status": Status.COMPLETED} | values))
    return job_id


def ways(ended: str, failed: str) -> dict[str, tuple[str, Any]]:
    """Every route that makes or revives a job."""
    return {
        "create": ("/v1/jobs", a_job()),
        "batch": ("/v1/jobs/batch", {"jobs": [a_job(), a_job()]}),
        "rerun": (f"/v1/jobs/{ended}/rerun", None),
        "retry": (f"/v1/jobs/{failed}/retry", None),
        "queue-job": ("/functions/v1/queue-job", QUEUED),
        "queue-job, older": (
            "/functions/v1/queue-job",
            {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a lighthouse"}},
        ),
    }


async def seeded(server: InProcess, alice: httpx2.AsyncClient) -> dict[str, tuple[str, Any]]:
    ended = await an_end(server, alice)
    failed = await an_end(server, alice, status=Status.FAILED, error_code="oom", retryable=True)
    return ways(ended, failed)


CASES = [
    ({"maxJobsPerUser": 1}, 429, "user_limit", "maxJobsPerUser"),
    ({"maxConcurrentJobs": 1}, 429, "concurrent_limit", "maxConcurrentJobs"),
    ({"rateLimitRequestsPerMinute": 1, "burst": 1}, 429, "rate_limited", "rateLimitRequestsPerMinute"),
    ({"maintenanceMode": True}, 503, "maintenance", "maintenanceMode"),
    ({"chargeCredits": True}, 402, "credits_exhausted", "token_balance"),
]


@pytest.mark.parametrize(("limits", "status", "code", "setting"), CASES, ids=[case[2] for case in CASES])
async def test_every_way_to_submit_is_limited_and_stores_nothing(
    server: InProcess,
    alice: httpx2.AsyncClient,
    admin: httpx2.AsyncClient,
    limits: dict[str, Any],
    status: int,
    code: str,
    setting: str,
) -> None:
    routes = await seeded(server, alice)
    await configure(admin, **limits)
    if code == "credits_exhausted":
        await server.pool.execute("UPDATE profiles SET token_balance = 0")
    elif code != "maintenance":
        assert (await alice.post("/v1/jobs", json=a_job())).status_code == 202  # which takes the only place
    before = await server.stored()
    for way, (path, body) in routes.items():
        for headers in ({}, {"Idempotency-Key": f"key of {way}"}):
            answer = await alice.post(path, json=body, headers=headers)
            document = answer.json()
            assert (answer.status_code, document["code"]) == (status, code), way
            assert [error["field"] for error in document["errors"]] == [setting]
            wait = answer.headers.get("retry-after")
            fits_later = status != 402 and not (way == "batch" and code in ("user_limit", "concurrent_limit"))
            assert int(wait) >= 1 if fits_later else wait is None
            if path.startswith("/functions/"):
                assert document["success"] is False
    assert await server.stored() == before


async def test_a_batch_that_is_larger_than_the_hour_is_refused_for_good(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    await configure(admin, maxJobsPerHour=2)
    answer = await alice.post("/v1/jobs/batch", json={"jobs": [a_job()] * 3})
    assert (answer.status_code, answer.json()["code"]) == (429, "hourly_limit")
    assert "3 at once never fit" in answer.json()["detail"]
    assert "retry-after" not in answer.headers
    assert (await alice.post("/v1/jobs/batch", json={"jobs": [a_job()] * 2})).status_code == 202


async def test_an_hour_is_full_for_new_jobs_and_not_for_retries(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    routes = await seeded(server, alice)
    await configure(admin, maxJobsPerHour=2)
    for way, (path, body) in routes.items():
        answer = await alice.post(path, json=body)
        assert answer.status_code == (202 if way == "retry" else 429), way
        assert way == "retry" or 3500 < int(answer.headers["retry-after"]) <= 3600


async def test_parallel_requests_take_exactly_the_limit(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    await configure(admin, maxJobsPerUser=10)
    answers = await asyncio.gather(*(alice.post("/v1/jobs", json=a_job()) for _ in range(50)))
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(202), statuses.count(429)) == (10, 40)
    bob = await server.user("bob")
    assert (await bob.post("/v1/jobs", json=a_job())).status_code == 202


async def test_an_admin_is_bound_by_none_of_it(server: InProcess, admin: httpx2.AsyncClient) -> None:
    await configure(
        admin,
        maxJobsPerUser=1,
        maxJobsPerHour=1,
        maxConcurrentJobs=1,
        rateLimitRequestsPerMinute=1,
        burst=1,
        chargeCredits=True,
        maintenanceMode=True,
    )
    for _ in range(3):
        assert (await admin.post("/v1/jobs", json=a_job())).status_code == 202
    assert (await admin.get("/v1/me")).json()["token_balance"] == 100


async def test_a_replay_is_answered_whatever_the_limits_are(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    await configure(admin, chargeCredits=True)
    key = {"Idempotency-Key": "once"}
    first = await alice.post("/v1/jobs", json=a_job(), headers=key)
    await configure(admin, maintenanceMode=True, maxJobsPerUser=1)
    again = await alice.post("/v1/jobs", json=a_job(), headers=key)
    assert (first.status_code, again.status_code, again.json()["id"]) == (202, 200, first.json()["id"])
    assert (await alice.get("/v1/me")).json()["token_balance"] == 99


async def test_a_refused_job_leaves_no_reference_behind(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(picture, "PNG")
    sent = await alice.post("/v1/uploads", content=picture.getvalue(), headers={"Content-Type": "image/png"})
    assert sent.status_code == 201
    await configure(admin, maxStoragePerUserGB=1e-9)
    before = await server.stored()
    refused = await alice.post("/v1/jobs", json=a_job())
    assert (refused.status_code, refused.json()["code"]) == (429, "storage_limit")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(picture, "PNG")
    other = await alice.post("/v1/uploads", content=picture.getvalue(), headers={"Content-Type": "image/png"})
    assert (other.status_code, other.json()["code"]) == (429, "storage_limit")
    assert await server.stored() == before
    same = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(same, "PNG")
    again = await alice.post("/v1/uploads", content=same.getvalue(), headers={"Content-Type": "image/png"})
    assert again.status_code == 200, "it is there already, and takes no more room"


# ----------------------------------------------------------------------------------------------------- /v1/config


async def test_config_is_for_admins(server: InProcess, alice: httpx2.AsyncClient) -> None:
    for role in ("basic_user", "premium_user", "moderator", "guest"):
        client = await server.user(f"a {role}", role)
        assert (await client.get("/v1/config")).status_code == 403
        assert (await client.patch("/v1/config", json={"burst": 1})).status_code == 403


async def test_config_is_changed_piece_by_piece_and_told_in_the_log(
    server: InProcess, admin: httpx2.AsyncClient
) -> None:
    assert set((await admin.get("/v1/config")).json().values()) == {None}, "by default nothing is limited"
    await configure(admin, maxJobsPerHour=20, maxStoragePerUserGB=0.5)
    await configure(admin, maxJobsPerHour=None, chargeCredits=True)
    values = {name: value for name, value in (await admin.get("/v1/config")).json().items() if value is not None}
    assert values == {"maxStoragePerUserGB": 0.5, "chargeCredits": True}
    logged = await server.pool.fetch(
        """SELECT metadata -> 'changed' AS changed FROM user_activity_log WHERE action = 'config.changed'
           ORDER BY created_at"""
    )
    assert logged[1]["changed"] == {
        "maxJobsPerHour": {"before": 20, "after": None},
        "chargeCredits": {"before": None, "after": True},
    }


WRONG = [
    ({"maxJobsPerHour": 0}, "maxJobsPerHour"),
    ({"maxJobsPerHour": "20"}, "maxJobsPerHour"),
    ({"maxJobsPerUser": 1.5}, "maxJobsPerUser"),
    ({"maxJobsPerUser": True}, "maxJobsPerUser"),
    ({"maxStoragePerUserGB": 0}, "maxStoragePerUserGB"),
    ({"maintenanceMode": "on"}, "maintenanceMode"),
    ({"jobTimeoutMinutes": 30}, "jobTimeoutMinutes"),
    ({"max_jobs_per_hour": 20}, "max_jobs_per_hour"),
    ({"burst": 5}, "burst"),
]


async def test_config_refuses_what_it_would_not_hold_to(server: InProcess, admin: httpx2.AsyncClient) -> None:
    for change, field in WRONG:
        answer = await admin.patch("/v1/config", json={"maxConcurrentJobs": 7} | change)
        assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (422, [field])
    assert (await admin.get("/v1/config")).json()["maxConcurrentJobs"] is None


# ------------------------------------------------------------------------------------------------------ credits


async def test_a_balance_is_charged_and_given_back(
    server: InProcess, alice: httpx2.AsyncClient, admin: httpx2.AsyncClient
) -> None:
    await configure(admin, chargeCredits=True)

    async def balance() -> int:
        return int((await alice.get("/v1/me")).json()["token_balance"])

    await alice.post("/v1/jobs/batch", json={"jobs": [a_job(), a_job(job_type="sdxl_image_high")]})
    assert await balance() == 97
    await server.end(await server.claim(), status=Status.FAILED, error_code="oom", retryable=True)
    given_back = await balance()
    assert given_back in (98, 99)  # which of the two ran is the queue's matter
    (waiting,) = (await alice.get("/v1/jobs", params={"status": "queued"})).json()["data"]
    await alice.post(f"/v1/jobs/{waiting['id']}/cancel")
    assert await balance() == 100


# ---------------------------------------------------------------------------------------------------- the age gate


@pytest.fixture
async def open_to_adults(database: Any, tmp_path: Path, state_dir: Path) -> AsyncIterator[InProcess]:
    """An installation that makes nsfw content."""
    import yaml

    laptop = Path(__file__).parents[2] / "configs/profiles/laptop.yaml"
    profile = tmp_path / "adults.yaml"
    profile.write_text(yaml.safe_dump(yaml.safe_load(laptop.read_text(encoding="utf-8")) | {"nsfw_allowed": True}))
    async with in_process(database, tmp_path, state_dir=state_dir, profile=str(profile)) as opened:
        yield opened


NSFW = [
    ("/v1/jobs", a_job(content_mode="nsfw"), 202),
    ("/v1/jobs/batch", {"jobs": [a_job(), a_job(content_mode="nsfw")]}, 202),
    ("/functions/v1/queue-job", QUEUED | {"metadata": {"contentType": "nsfw"}}, 200),
    ("/functions/v1/enhance-prompt", {"prompt": "a lighthouse", "contentType": "nsfw"}, 200),
    ("/functions/v1/playground-chat", {"message": "hello", "content_tier": "nsfw"}, 503),  # no language model runs here
]


async def test_the_birth_date_opens_the_age_gate_of_every_route(open_to_adults: InProcess) -> None:
    alice = await open_to_adults.user("alice")
    for path, body, _ in NSFW:
        assert (await alice.post(path, json=body)).status_code == 403, path
    assert (await alice.patch("/v1/me", json={"birth_date": "1990-05-17"})).json()["age_verified"] is True
    for path, body, status in NSFW:
        assert (await alice.post(path, json=body)).status_code == status, path
    told = await open_to_adults.pool.fetchval(
        "SELECT metadata::text FROM user_activity_log WHERE action = 'profile.birth_date_set'"
    )
    assert "1990" not in str(told)


async def test_a_minor_stays_outside_and_says_so_once(open_to_adults: InProcess) -> None:
    bob = await open_to_adults.user("bob")
    year = await open_to_adults.pool.fetchval("SELECT to_char(now() - interval '17 years', 'YYYY-MM-DD')")
    answer = (await bob.patch("/v1/me", json={"birth_date": year})).json()
    assert (answer["age_verified"], answer["birth_date_set"]) == (False, True)
    again = await bob.patch("/v1/me", json={"birth_date": "1990-05-17"})
    assert (again.status_code, again.json()["code"]) == (409, "birth_date_set")
    for path, body, _ in NSFW:
        assert (await bob.post(path, json=body)).status_code == 403, path


async def test_a_birth_date_is_all_that_users_write_of_themselves(alice: httpx2.AsyncClient) -> None:
    for body in ({"birth_date": "2999-01-01"}, {"birth_date": "1850-01-01"}, {"birth_date": "x"}, {}):
        answer = await alice.patch("/v1/me", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "birth_date")
    for field in ("age_verified", "token_balance", "roles", "username"):
        answer = await alice.patch("/v1/me", json={"birth_date": "1990-05-17", field: 1})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    assert (await alice.get("/v1/me")).json()["birth_date_set"] is False
