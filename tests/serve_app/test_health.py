"""/healthz, /readyz and /metrics."""

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from db.queue import Renewal
from db.workers import Workers
from serve_app.version import VERSION
from tests.serve_app.conftest import InProcess, a_job, in_process

FAMILIES = ("sdxl", "wan", "qwen")


async def enter(server: InProcess, queue: str, state: str = "ready") -> UUID:
    worker = uuid4()
    await Workers(server.worker_pool).enter(worker, queue, state)
    return worker


async def test_health_needs_nothing(server: InProcess) -> None:
    client = await server.client()
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "version": VERSION})


async def test_not_ready_without_replicas(server: InProcess) -> None:
    answer = await (await server.client()).get("/readyz")
    assert (answer.status_code, answer.json()["ready"], answer.json()["database"]) == (503, False, "ok")
    assert set(answer.json()["models"]) == set(FAMILIES)


async def test_ready_with_a_replica_of_each_model(server: InProcess) -> None:
    client = await server.client()
    for family in FAMILIES:
        assert (await client.get("/readyz")).status_code == 503
        await enter(server, family)
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)


@pytest.mark.parametrize("state", ["loading", "draining", "stopped", "failed"])
async def test_a_replica_that_does_not_claim_makes_nothing_ready(server: InProcess, state: str) -> None:
    client = await server.client()
    for family in FAMILIES:
        await enter(server, family, state if family == "wan" else "ready")
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["models"]["wan"]["ready"]) == (503, False)


async def test_a_silent_replica_makes_nothing_ready(server: InProcess) -> None:
    for family in FAMILIES:
        await enter(server, family)
    await server.pool.execute("UPDATE workers SET seen_at = now() - interval '1 hour' WHERE queue = 'wan'")
    assert (await (await server.client()).get("/readyz")).status_code == 503


async def test_without_the_database_it_says_so(server: InProcess) -> None:
    client = await server.client()
    await server.edge.pool.close()
    ready, metrics = await client.get("/readyz"), await client.get("/metrics")
    assert (ready.status_code, ready.json()["database"]) == (503, "unavailable")
    assert (await client.get("/healthz")).status_code == 200
    assert metrics.status_code == 503
    assert metrics.headers["content-type"] == "application/problem+json"


async def metrics(client: httpx2.AsyncClient) -> dict[str, dict[tuple[str, ...], float]]:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(answer.text)
    }


async def test_metrics_tell_what_the_database_says(server: InProcess, alice: httpx2.AsyncClient) -> None:
    for _ in range(3):
        await alice.post("/v1/jobs", json=a_job(callback_url="https://8.8.8.8/hook"))
    worker = await enter(server, "sdxl")
    (claim,) = await server.queue.claim("sdxl", worker, 1)
    await server.queue.renew(worker, [Renewal(claim.job_id, 1, "denoise")])
    said = await metrics(await server.client())
    assert said["ourvidz_jobs"] == {("sdxl", "ready"): 2, ("sdxl", "running"): 1}
    assert said["ourvidz_queued_seconds"][("sdxl", "ready")] == 8
    assert said["ourvidz_oldest_queued_seconds"][("sdxl",)] >= 0
    assert said["ourvidz_workers"] == {("sdxl", "ready"): 1}
    assert said["ourvidz_callbacks_due"] == {(): 1}
    assert said["ourvidz_build_info"] == {(VERSION,): 1}
    assert all(name.startswith("ourvidz_") for name in said)


async def test_metrics_name_no_user_and_no_prompt(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await alice.post("/v1/jobs", json=a_job(prompt="a very private wish"))
    text = (await (await server.client()).get("/metrics")).text
    assert "private" not in text
    assert "alice" not in text


async def test_metrics_want_their_token_where_there_is_one(database: Any, tmp_path: Path) -> None:
    async with in_process(database, tmp_path, metrics_token="m" * 40) as server:
        client = await server.client()
        codes = [
            (await client.get("/metrics", headers={"Authorization": value})).status_code
            for value in (
                "",
                "Bearer wrong",
                f"Bearer {'m' * 39}",
                f"Bearer {await server.key()}",
                f"Bearer {'m' * 40}",
            )
        ]
        assert codes == [401, 401, 401, 401, 200]
        odd = await client.get("/metrics", headers=[(b"Authorization", "Bearer \u00e9".encode("latin-1"))])
        assert odd.status_code == 401
