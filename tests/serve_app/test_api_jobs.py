"""/v1/jobs as its callers see it: accepting, repeating, paging, reading, stopping and running again."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx2
import pytest

from db.jobs import Status
from tests.serve_app.conftest import BASE, InProcess, a_job


async def submit(client: httpx2.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post("/v1/jobs", json=a_job(**changes))
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_create_answers_202_with_the_place_of_the_job(server: InProcess, alice: httpx2.AsyncClient) -> None:
    answer = await alice.post("/v1/jobs", json=a_job(seed=0))
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == job["urls"]["self"] == f"{BASE}/v1/jobs/{job['id']}"
    assert (job["status"], job["params"]["seed"], job["attempt"], job["assets"]) == ("queued", 0, 0, [])
    assert await server.pool.fetchval("SELECT count(*) FROM job_queue") == 1


async def test_create_draws_a_seed_when_none_is_given(alice: httpx2.AsyncClient) -> None:
    seeds = {(await submit(alice))["params"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


async def test_create_says_what_it_adjusted(alice: httpx2.AsyncClient) -> None:
    job = await submit(alice, job_type="video_fast", frames=83)
    assert job["params"]["frames"] == 81
    assert [(a["field"], a["given"], a["used"]) for a in job["adjustments"]] == [("frames", 83, 81)]


async def test_create_with_enhancement_waits_for_the_language_model(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    job = await submit(alice, enhance=True)
    assert job["stage"] == "enhance"
    assert await server.pool.fetchval("SELECT queue FROM job_queue") == "qwen"


async def test_the_queue_knows_what_a_job_asks_of_a_forward(server: InProcess, alice: httpx2.AsyncClient) -> None:
    place = "SELECT shape, rows FROM job_queue"
    job = await submit(alice, num_images=3, guidance_scale=5.0, width=128, height=192)
    assert tuple(await server.pool.fetchrow(place)) == ("128x192x1", 6)
    await alice.post(f"/v1/jobs/{job['id']}/cancel")
    await alice.post(f"/v1/jobs/{job['id']}/retry")
    assert tuple(await server.pool.fetchrow(place)) == ("128x192x1", 6)


async def test_create_charges_the_credits_of_the_type(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await submit(alice, job_type="sdxl_image_high")
    assert await server.pool.fetchval("SELECT credits_consumed FROM usage_logs") == 2


async def test_create_carries_metadata_and_gives_it_back(alice: httpx2.AsyncClient) -> None:
    metadata = {"order": 17, "tags": ["a", {"b": None}], "ü": "ß"}
    assert (await submit(alice, metadata=metadata))["metadata"] == metadata


@pytest.mark.parametrize("job_type", ["wan_video_fast", "video7b_high_enhanced", "image_high"])
async def test_create_keeps_the_name_of_the_type(alice: httpx2.AsyncClient, job_type: str) -> None:
    assert (await submit(alice, job_type=job_type))["job_type"] == job_type


async def test_create_wakes_the_replicas_of_its_queue(server: InProcess, alice: httpx2.AsyncClient) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    connection = await asyncpg.connect(server.settings.postgres())
    try:
        await connection.add_listener("ourvidz_queue", lambda *args: heard.put_nowait(str(args[3])))
        await submit(alice)
        assert await asyncio.wait_for(heard.get(), 10) == "sdxl"
    finally:
        await connection.close()


# ------------------------------------------------------------------------------------------------ idempotency


async def test_a_repeat_answers_200_and_says_so(server: InProcess, alice: httpx2.AsyncClient) -> None:
    body, headers = a_job(), {"Idempotency-Key": "order-17"}
    first = await alice.post("/v1/jobs", json=body, headers=headers)
    again = await alice.post("/v1/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 1


async def test_a_repeat_may_write_its_json_otherwise(alice: httpx2.AsyncClient) -> None:
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    first = await alice.post("/v1/jobs", content=b'{"job_type":"image_fast","prompt":"x"}', headers=headers)
    again = await alice.post("/v1/jobs", content=b'{ "prompt": "x", "job_type": "image_fast" }', headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


async def test_a_used_key_with_another_body_is_refused(server: InProcess, alice: httpx2.AsyncClient) -> None:
    headers = {"Idempotency-Key": "order-17"}
    await alice.post("/v1/jobs", json=a_job(), headers=headers)
    other = await alice.post("/v1/jobs", json=a_job(prompt="a mill"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert other.json()["errors"][0]["field"] == "Idempotency-Key"
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 1


async def test_keys_of_two_users_do_not_meet(server: InProcess, alice: httpx2.AsyncClient) -> None:
    bob, headers = await server.user("bob"), {"Idempotency-Key": "order-17"}
    answers = [await client.post("/v1/jobs", json=a_job(), headers=headers) for client in (alice, bob)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert len({answer.json()["id"] for answer in answers}) == 2


async def test_repeats_at_the_same_time_make_one_job(server: InProcess, alice: httpx2.AsyncClient) -> None:
    headers = {"Idempotency-Key": "order-17"}
    answers = await asyncio.gather(*(alice.post("/v1/jobs", json=a_job(), headers=headers) for _ in range(12)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(202) == 1
    assert set(codes) <= {200, 202, 409}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 409)
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 1


# ------------------------------------------------------------------------------------------------------ lists


async def test_list_pages_from_new_to_old_without_gap_or_double(alice: httpx2.AsyncClient) -> None:
    made = [(await submit(alice))["id"] for _ in range(5)][::-1]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = (await alice.get("/v1/jobs", params=query)).json()
        ids = [job["id"] for job in page["data"]]
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        seen += ids
        if not page["has_more"]:
            break
        query["before"] = page["last_id"]
    assert seen == made


async def test_list_after_a_job_gives_the_next_newer_ones(alice: httpx2.AsyncClient) -> None:
    made = [(await submit(alice))["id"] for _ in range(5)]
    page = (await alice.get("/v1/jobs", params={"after": made[0], "limit": 2})).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([made[2], made[1]], True)
    rest = (await alice.get("/v1/jobs", params={"after": made[2], "limit": 2})).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([made[4], made[3]], False)


async def test_list_between_two_jobs_gives_what_lies_between(alice: httpx2.AsyncClient) -> None:
    made = [(await submit(alice))["id"] for _ in range(4)]
    page = (await alice.get("/v1/jobs", params={"after": made[0], "before": made[3]})).json()
    assert [job["id"] for job in page["data"]] == [made[2], made[1]]


async def test_list_filters(server: InProcess, alice: httpx2.AsyncClient) -> None:
    image, video = await submit(alice), await submit(alice, job_type="video_fast")
    await alice.post(f"/v1/jobs/{video['id']}/cancel")

    async def ids(**query: Any) -> list[str]:
        return [job["id"] for job in (await alice.get("/v1/jobs", params=query)).json()["data"]]

    assert await ids(status="cancelled") == [video["id"]]
    assert await ids(job_type="sdxl_image_fast") == [image["id"]]
    assert await ids(created_after=(datetime.now(UTC) + timedelta(hours=1)).isoformat()) == []
    assert await ids(created_after=(datetime.now(UTC) - timedelta(hours=1)).isoformat()) == [video["id"], image["id"]]


async def test_list_of_nothing_is_an_empty_page(alice: httpx2.AsyncClient) -> None:
    assert (await alice.get("/v1/jobs")).json() == {"data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"status": "done"}, "status"),
        ({"before": "x"}, "before"),
        ({"created_after": "yesterday"}, "created_after"),
        ({"job_type": "no_such_type"}, "job_type"),
        ({"job_type": "\0"}, "job_type"),
    ],
)
async def test_list_refuses_a_bad_query(alice: httpx2.AsyncClient, query: dict[str, Any], field: str) -> None:
    answer = await alice.get("/v1/jobs", params=query)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert [error["field"] for error in answer.json()["errors"]] == [field]


# ------------------------------------------------------------------------------------------------ other people


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events")],
)
@pytest.mark.parametrize("role", ["basic_user", "premium_user", "guest", "moderator"])
async def test_a_job_of_somebody_else_is_not_there(server: InProcess, method: str, path: str, role: str) -> None:
    alice, bob = await server.user("alice"), await server.user("bob", role)
    job = await submit(alice)
    before = await server.stored()
    answer = await bob.request(method, f"/v1/jobs/{job['id']}{path}")
    unknown = await bob.request(method, f"/v1/jobs/{uuid4()}{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
    # nothing tells a job of somebody else from one that never was
    assert {**answer.json(), "instance": ""} == {**unknown.json(), "instance": ""}
    assert await server.stored() == before
    assert (await alice.get(f"/v1/jobs/{job['id']}")).json()["status"] == "queued"


async def test_a_list_holds_no_job_of_somebody_else(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await submit(alice)
    for role in ("basic_user", "moderator", "admin"):
        other = await server.user(role, role)
        assert (await other.get("/v1/jobs")).json()["data"] == []


async def test_an_admin_reads_and_stops_the_job_of_anybody(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job, admin = await submit(alice), await server.user("root", "admin")
    assert (await admin.get(f"/v1/jobs/{job['id']}")).json()["id"] == job["id"]
    assert (await admin.post(f"/v1/jobs/{job['id']}/cancel")).json()["status"] == "cancelled"


# -------------------------------------------------------------------------------------------- cancel and retry


async def test_cancel_ends_a_waiting_job_and_repeats_quietly(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice)
    answers = [await alice.post(f"/v1/jobs/{job['id']}/cancel") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.json()["status"] for answer in answers] == ["cancelled", "cancelled"]
    assert await server.events(job["id"]) == ["queued", "cancelled"]
    assert await server.queue.claim("sdxl", uuid4(), 1) == []


async def test_cancel_of_a_running_job_flags_it(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice)
    await server.claim()
    answer = await alice.post(f"/v1/jobs/{job['id']}/cancel")
    assert (answer.json()["status"], answer.json()["cancelling"]) == ("processing", True)


async def test_cancel_of_an_ended_job_changes_nothing(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice)
    await server.end(await server.claim(), status=Status.COMPLETED)
    answer = await alice.post(f"/v1/jobs/{job['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert await server.events(job["id"]) == ["queued", "started", "completed"]


async def test_retry_queues_a_cancelled_job_again(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice)
    await alice.post(f"/v1/jobs/{job['id']}/cancel")
    answer = await alice.post(f"/v1/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["status"], answer.json()["completed_at"]) == (202, "queued", None)
    assert (await server.claim()).job_id == UUID(job["id"])


async def test_retry_of_a_failed_job_has_a_new_budget_and_a_new_attempt(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    job = await submit(alice)
    failed = {"status": Status.FAILED, "error_code": "oom", "error_message": "out of memory", "counts": True}
    await server.end(await server.claim(), **failed)
    read = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    assert (read["error"]["code"], read["failures"]) == ("oom", 1)
    again = (await alice.post(f"/v1/jobs/{job['id']}/retry")).json()
    assert (again["error"], again["failures"]) == (None, 0)
    assert (await server.claim()).attempt == 2


async def test_retry_keeps_the_class_of_the_job(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice, priority="batch")
    await alice.post(f"/v1/jobs/{job['id']}/cancel")
    await alice.post(f"/v1/jobs/{job['id']}/retry")
    assert await server.pool.fetchval("SELECT class FROM job_queue") == 0


@pytest.mark.parametrize("status", ["queued", "processing", "completed"])
async def test_retry_of_any_other_job_is_a_conflict(server: InProcess, alice: httpx2.AsyncClient, status: str) -> None:
    job = await submit(alice)
    if status != "queued":
        claim = await server.claim()
        if status == "completed":
            await server.end(claim, status=Status.COMPLETED)
    before = await server.stored()
    answer = await alice.post(f"/v1/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_retryable")
    assert await server.stored() == before


async def test_retry_goes_back_to_the_stage_that_failed(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await submit(alice, enhance=True)
    await alice.post(f"/v1/jobs/{job['id']}/cancel")
    await alice.post(f"/v1/jobs/{job['id']}/retry")
    assert await server.pool.fetchval("SELECT queue FROM job_queue") == "qwen"


# ------------------------------------------------------------------------------------------- position and time


async def test_position_counts_the_jobs_ahead(server: InProcess, alice: httpx2.AsyncClient) -> None:
    bob = await server.user("bob")
    first, second, third = await submit(alice), await submit(bob), await submit(bob)
    positions = [
        (await client.get(f"/v1/jobs/{job['id']}")).json()["position"]
        for client, job in ((alice, first), (bob, second), (bob, third))
    ]
    assert positions == [0, 1, 2]
    await server.claim()
    assert (await alice.get(f"/v1/jobs/{first['id']}")).json()["position"] is None
    assert (await bob.get(f"/v1/jobs/{second['id']}")).json()["position"] == 0


async def test_eta_is_null_until_a_run_was_measured(server: InProcess, alice: httpx2.AsyncClient) -> None:
    assert (await submit(alice))["eta_seconds"] is None
    await server.end(await server.claim(), status=Status.COMPLETED, generation_time_ms=8000)
    assert (await submit(alice))["eta_seconds"] == 8.0
    assert (await submit(alice))["eta_seconds"] == 16.0


async def test_progress_shows_while_it_runs(server: InProcess, alice: httpx2.AsyncClient) -> None:
    from db.queue import Renewal

    job, worker = await submit(alice), uuid4()
    (claim,) = await server.queue.claim("sdxl", worker, 1)
    await server.queue.renew(worker, [Renewal(claim.job_id, 1, "denoise", 3, 15)])
    read = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    assert (read["status"], read["progress"]) == ("processing", {"phase": "denoise", "step": 3, "steps": 15})


async def test_deadlines_and_delays_reach_the_queue(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await submit(alice, start_after_seconds=60.0, start_deadline_seconds=90.0, deadline_seconds=120.0)
    row = await server.pool.fetchrow(
        """SELECT state::text, round(extract(epoch FROM run_at - enqueued_at)) AS run,
                  round(extract(epoch FROM start_deadline - enqueued_at)) AS start,
                  round(extract(epoch FROM deadline - enqueued_at)) AS total FROM job_queue"""
    )
    assert tuple(row) == ("scheduled", 60, 90, 120)


async def test_events_redirect_to_the_streams(alice: httpx2.AsyncClient) -> None:
    job = await submit(alice)
    answer = await alice.get(f"/v1/jobs/{job['id']}/events")
    assert (answer.status_code, answer.headers["location"]) == (307, f"/v1/events/jobs/{job['id']}")


# ------------------------------------------------------------------------------------------------------- keys


async def test_keys_are_made_by_admins_only(server: InProcess, alice: httpx2.AsyncClient) -> None:
    admin = await server.user("root", "admin")
    before = await server.stored()
    refused = await alice.post("/v1/keys", json={"username": "eve", "role": "admin"})
    assert (refused.status_code, refused.json()["code"]) == (403, "admin_only")
    assert await server.stored() == before
    made = await admin.post("/v1/keys", json={"username": "eve", "name": "laptop", "expires_in_days": 3})
    assert made.status_code == 201
    eve = await server.client(made.json()["key"])
    assert [key["name"] for key in (await eve.get("/v1/keys")).json()["data"]] == ["laptop"]


async def test_a_key_is_shown_once(server: InProcess) -> None:
    admin = await server.user("root", "admin")
    made = (await admin.post("/v1/keys", json={"username": "eve"})).json()
    listed = await admin.get("/v1/keys", params={"all": True})
    assert {key["key"] for key in listed.json()["data"]} == {None}
    assert made["key"] not in listed.text
    assert made["key"].startswith(made["prefix"])


async def test_everybodys_keys_are_for_admins(alice: httpx2.AsyncClient) -> None:
    answer = await alice.get("/v1/keys", params={"all": True})
    assert (answer.status_code, answer.json()["code"]) == (403, "admin_only")


async def test_a_key_ends_at_once_and_only_by_its_owner_or_an_admin(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    bob, admin = await server.user("bob"), await server.user("root", "admin")
    (key,) = (await alice.get("/v1/keys")).json()["data"]
    assert (await bob.delete(f"/v1/keys/{key['id']}")).status_code == 404
    assert (await alice.get("/v1/jobs")).status_code == 200
    assert (await admin.delete(f"/v1/keys/{key['id']}")).json()["revoked_at"] is not None
    assert (await alice.get("/v1/jobs")).status_code == 401


async def test_the_callback_secret_is_each_users_own_and_rotates(server: InProcess, alice: httpx2.AsyncClient) -> None:
    bob = await server.user("bob")
    first = (await alice.get("/v1/callbacks/secret")).json()
    assert first["secret"] != (await bob.get("/v1/callbacks/secret")).json()["secret"]
    assert (first["version"], first["previous"]) == (1, None)
    second = (await alice.post("/v1/callbacks/secret/rotate")).json()
    assert (second["version"], second["previous"]) == (2, first["secret"])
    assert second["secret"] != first["secret"]
    assert (await bob.get("/v1/callbacks/secret")).json()["version"] == 1
