"""/v1/jobs/batch: several jobs in one transaction, all or none."""

import asyncio
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests.serve_app.conftest import InProcess, a_job


def batch(*changes: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": [a_job(**change) for change in changes]}


async def test_jobs_are_accepted_in_their_order_and_in_one_transaction(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    answer = await alice.post("/v1/jobs/batch", json=batch(*({"seed": n} for n in range(100))))
    assert answer.status_code == 202, answer.text
    jobs = answer.json()["data"]
    assert [job["params"]["seed"] for job in jobs] == list(range(100))
    assert await server.pool.fetchval("SELECT count(DISTINCT xmin::text) FROM jobs") == 1
    assert len(await server.queue.claim("sdxl", uuid4(), 100)) == 100


async def test_jobs_of_several_models_go_to_their_queues(server: InProcess, alice: httpx2.AsyncClient) -> None:
    answer = await alice.post("/v1/jobs/batch", json=batch({}, {"job_type": "video_fast"}, {"enhance": True}))
    assert answer.status_code == 202, answer.text
    rows = await server.pool.fetch("SELECT queue FROM job_queue ORDER BY job_id")
    assert [row["queue"] for row in rows] == ["sdxl", "wan", "qwen"]


@pytest.mark.parametrize(
    ("wrong", "status", "field"),
    [
        ({"steps": 0}, 422, "jobs.1.steps"),  # found by the rules of the family
        ({"prompt": 7}, 422, "jobs.1.prompt"),  # found by the shape
        ({"job_type": "nothing"}, 422, "jobs.1.job_type"),
        ({"callback_url": "http://127.0.0.1/"}, 422, "jobs.1.callback_url"),
        ({"reference_image_url": "https://127.0.0.1/a.png"}, 422, "jobs.1.reference_image_url"),
        ({"content_mode": "nsfw"}, 403, "jobs.1.content_mode"),
    ],
)
async def test_one_wrong_job_is_named_and_nothing_is_stored(
    server: InProcess, alice: httpx2.AsyncClient, wrong: dict[str, Any], status: int, field: str
) -> None:
    before = await server.stored()
    answer = await alice.post("/v1/jobs/batch", json=batch({}, wrong, {}))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (status, field)
    assert await server.stored() == before


@pytest.mark.parametrize("jobs", [[], [a_job()] * 101])
async def test_too_few_and_too_many_are_refused(
    server: InProcess, alice: httpx2.AsyncClient, jobs: list[dict[str, Any]]
) -> None:
    before = await server.stored()
    answer = await alice.post("/v1/jobs/batch", json={"jobs": jobs})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "jobs")
    assert await server.stored() == before


async def test_repeating_a_key_gives_the_same_jobs_in_their_order(alice: httpx2.AsyncClient) -> None:
    body, key = batch({"seed": 1}, {"seed": 2}, {"seed": 3}), {"Idempotency-Key": "three"}
    first = await alice.post("/v1/jobs/batch", json=body, headers=key)
    again = await alice.post("/v1/jobs/batch", json=body, headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.headers["idempotency-replayed"] == "true"
    assert [job["id"] for job in again.json()["data"]] == [job["id"] for job in first.json()["data"]]


@pytest.mark.parametrize("other", [batch({"seed": 1}), batch({"seed": 1}, {"seed": 9})])
async def test_a_key_stands_for_one_body(server: InProcess, alice: httpx2.AsyncClient, other: dict[str, Any]) -> None:
    key = {"Idempotency-Key": "two"}
    assert (await alice.post("/v1/jobs/batch", json=batch({"seed": 1}, {"seed": 2}), headers=key)).status_code == 202
    before = await server.stored()
    for path, body in (("/v1/jobs/batch", other), ("/v1/jobs", other["jobs"][0])):
        answer = await alice.post(path, json=body, headers=key)
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert await server.stored() == before


async def test_many_at_once_with_one_key_make_one_set(server: InProcess, alice: httpx2.AsyncClient) -> None:
    body, key = batch({"seed": 1}, {"seed": 2}), {"Idempotency-Key": "race"}
    answers = await asyncio.gather(*(alice.post("/v1/jobs/batch", json=body, headers=key) for _ in range(8)))
    assert {answer.status_code for answer in answers} <= {200, 202, 409}
    assert [answer.status_code for answer in answers].count(202) == 1
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 2


async def test_others_do_not_see_them(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = (await alice.post("/v1/jobs/batch", json=batch({}))).json()["data"][0]
    bob = await server.user("bob")
    assert (await bob.get(f"/v1/jobs/{job['id']}")).status_code == 404


async def test_without_a_key_of_the_api_nothing_is_accepted(server: InProcess) -> None:
    stranger = await server.client()
    assert (await stranger.post("/v1/jobs/batch", json=batch({}))).status_code == 401
