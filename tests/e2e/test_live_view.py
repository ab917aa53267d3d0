"""The functions that older clients poll, as views of a real cluster, and a picture placed by its upkeep."""

import asyncio
import functools

import asyncpg
import pytest

from tests.e2e.conftest import DEADLINE_SECONDS, Running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_the_worker_functions_show_the_live_cluster(running: Running) -> None:
    health = running.client.post("/functions/v1/health-check-workers", json={}).json()["healthResults"]
    assert {name: one["isHealthy"] for name, one in health.items()} == {
        "chatWorker": True,
        "sdxlWorker": True,
        "wanWorker": True,
    }
    told = running.client.post("/functions/v1/system-metrics", json={}).json()
    known = {worker["id"] for worker in running.client.get("/v1/workers").json()["data"]}
    assert {worker["id"] for kind in told["workers"].values() for worker in kind} <= known
    assert [one["status"] for one in told["workers"]["sdxl"]] == ["healthy"]
    deployments = told["deployments"]
    assert {"api", "qwen", "sdxl", "wan", "upkeep", "events"} <= deployments.keys()
    assert deployments["sdxl"]["status"] == "HEALTHY"
    assert deployments["sdxl"]["replicas"]["RUNNING"] == 1


def test_an_admins_image_comes_with_the_answer_and_is_placed(running: Running) -> None:
    running.submit(job_type="sdxl_image_fast", prompt="a warm engine", steps=1)
    body = {"prompt": "a lighthouse", "metadata": {"quality": "fast", "steps": 1, "seed": 3}}
    answer = running.client.post("/functions/v1/generate-admin-image", json=body)
    assert answer.status_code == 200, answer.text
    image = answer.json()["image"]
    assert image["metadata"]["seed"] == 3
    assert running.client.get(image["url"]).content.startswith(b"\x89PNG")
    eta = running.client.post("/functions/v1/system-metrics", json={}).json()["etaSeconds"]["sdxl"]
    assert eta is not None, "a run has been measured"


async def test_upkeep_places_what_a_job_was_made_for(running: Running) -> None:
    connection = await asyncpg.connect(await asyncio.to_thread(running.settings.postgres))
    try:
        character = await connection.fetchval(
            "INSERT INTO characters (name, description) VALUES ('Ada', 'a keeper of the light') RETURNING id"
        )
        ask = functools.partial(running.client.post, "/functions/v1/generate-avatars", json={"names": ["Ada"]})
        (result,) = (await asyncio.to_thread(ask)).json()["results"]
        await asyncio.to_thread(running.wait, result["jobId"])
        async with asyncio.timeout(DEADLINE_SECONDS):
            shown = None
            while shown is None:
                await asyncio.sleep(0.1)
                shown = await connection.fetchval("SELECT image_url FROM characters WHERE id = $1", character)
        assert shown == "avatars/characters/ada.png"
        assert (running.settings.state_dir / "blobs/avatars/characters/ada.png").read_bytes().startswith(b"\x89PNG")
    finally:
        await connection.close()
