"""LoRAs over HTTP: what callers may name, and what is stored when they name something else."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from db.training import EpochResult, Numbered, TrainingRun, Trainings
from tests.serve_app.conftest import InProcess, a_job, in_process

PROFILE = """
name: studio
description: Tiny weights and two LoRAs
laptop: true
models:
  sdxl:
    model_name: tiny-sdxl
    source: tiny
    device: cpu
    memory_gib: 0
    disk_gib: 0.01
    lora_cache_gib: 0.1
    loras:
      ink: {source: /srv/loras/ink.safetensors, trigger_words: [inkstyle, etching]}
      oil: {source: someone/oil-lora, file: oil.safetensors}
    defaults: {sizes: [[128, 128]], width: 128, height: 128}
  wan:
    model_name: tiny-wan
    source: tiny
    device: cpu
    memory_gib: 0
    disk_gib: 0.01
"""


@pytest.fixture
async def studio(database: Any, tmp_path: Path, state_dir: Path) -> AsyncIterator[InProcess]:
    """An installation with LoRAs for SDXL and none for WAN."""
    profile = tmp_path / "studio.yaml"
    profile.write_text(PROFILE)
    async with in_process(database, tmp_path, state_dir=state_dir, profile=str(profile)) as opened:
        yield opened


@pytest.fixture
async def bob(studio: InProcess) -> httpx2.AsyncClient:
    return await studio.user("bob")


async def test_the_loras_of_the_profile_are_listed_without_their_places(bob: httpx2.AsyncClient) -> None:
    answer = await bob.get("/v1/loras")
    assert answer.status_code == 200
    assert [(lora["name"], lora["model"]) for lora in answer.json()["data"]] == [("ink", "sdxl"), ("oil", "sdxl")]
    ink = answer.json()["data"][0]
    assert ink["trigger_words"] == ["inkstyle", "etching"]
    assert "sdxl_image_fast" in ink["job_types"]
    assert "video_fast" not in ink["job_types"]
    assert "srv" not in answer.text
    assert "someone" not in answer.text


async def test_listing_needs_a_key(studio: InProcess) -> None:
    assert (await (await studio.client()).get("/v1/loras")).status_code == 401


async def test_an_installation_without_loras_lists_none(alice: httpx2.AsyncClient) -> None:
    assert (await alice.get("/v1/loras")).json() == {"data": []}


async def test_queue_job_passes_loras_on(studio: InProcess, bob: httpx2.AsyncClient) -> None:
    given = [{"name": "oil", "weight": -0.5}, {"name": "ink"}]
    for body in (a_job(loras=given), {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a mill", "loras": given}}):
        answer = await bob.post("/functions/v1/queue-job", json=body)
        assert answer.status_code == 200, answer.text
        kept = [{"name": "oil", "weight": -0.5}, {"name": "ink", "weight": 1.0}]
        assert answer.json()["job"]["params"]["loras"] == kept


async def test_a_job_keeps_its_loras(studio: InProcess, bob: httpx2.AsyncClient) -> None:
    given = [{"name": "oil", "weight": -0.5}, {"name": "ink"}]
    answer = await bob.post("/v1/jobs", json=a_job(loras=given))
    assert answer.status_code == 202
    kept = [{"name": "oil", "weight": -0.5}, {"name": "ink", "weight": 1.0}]
    assert answer.json()["params"]["loras"] == kept
    assert (await studio.claim()).job["params"]["loras"] == kept


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"loras": [{"name": "ink"}, {"name": "acid"}]}, "loras.1.name", "choice"),
        ({"loras": [{"name": "/srv/loras/ink.safetensors"}]}, "loras.0.name", "choice"),
        ({"loras": [{"name": "https://example.com/x.safetensors"}]}, "loras.0.name", "choice"),
        ({"loras": [{"name": "ink"}, {"name": "ink"}]}, "loras.0.name", "conflict"),
        ({"loras": [{"name": "ink", "weight": 0}]}, "loras.0.weight", "conflict"),
        ({"loras": [{"name": "ink", "weight": 3}]}, "loras.0.weight", "less_than_equal"),
        ({"loras": [{"name": "ink", "weight": "1"}]}, "loras.0.weight", "float_type"),
        ({"loras": [{"name": "ink", "source": "/x"}]}, "loras.0.source", "extra_forbidden"),
        ({"loras": [{"name": "n" * 64}]}, "loras.0.name", "string_too_long"),
        ({"loras": [{"name": "ink"}], "job_type": "video_fast", "steps": 4}, "loras", "unsupported"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_lora_that_can_not_be_used_is_refused_and_nothing_is_stored(
    studio: InProcess, bob: httpx2.AsyncClient, changes: dict[str, Any], field: str, code: str
) -> None:
    before = await studio.stored()
    answer = await bob.post("/v1/jobs", json=a_job(**changes))
    assert answer.status_code == 422
    assert {"field": field, "code": code} in [
        {"field": error["field"], "code": error["code"]} for error in answer.json()["errors"]
    ]
    assert await studio.stored() == before


async def test_an_unknown_lora_is_told_the_known_ones(bob: httpx2.AsyncClient) -> None:
    answer = await bob.post("/v1/jobs", json=a_job(loras=[{"name": "acid"}]))
    assert "must be one of ink, oil" in answer.json()["detail"]


# ------------------------------------------------------------------------------------- of the training registry


async def register(database: Any, name: str, family: str = "sdxl", **changes: Any) -> None:
    """A run with one epoch in production."""
    run = {"run_name": name, "base_model": "sdxl", "model_family": family, "is_production": True}
    epoch = {
        "run_name": name,
        "epoch_number": 1,
        "checkpoint_path": f"/srv/registered/{name}.safetensors",
        "production_ready": True,
        "lora_name": name,
        "trigger_words": ["pencil"],
    } | changes
    given = [Numbered(1, TrainingRun.model_validate(run)), Numbered(2, EpochResult.model_validate(epoch))]
    await Trainings(database.pool).put(given)


async def test_what_is_in_production_in_the_registry_is_listed_beside_the_profile(
    database: Any, bob: httpx2.AsyncClient
) -> None:
    await register(database, "chalk")
    await register(database, "draft", production_ready=False)
    await register(database, "slow", "wan")  # whose profile has no room for any
    await register(database, "ink")  # the profile's own goes first
    answer = await bob.get("/v1/loras")
    words = {lora["name"]: lora["trigger_words"] for lora in answer.json()["data"]}
    assert words == {"chalk": ["pencil"], "ink": ["inkstyle", "etching"], "oil": []}
    assert "registered" not in answer.text


async def test_a_registered_lora_can_be_named(database: Any, studio: InProcess, bob: httpx2.AsyncClient) -> None:
    await register(database, "chalk")
    answer = await bob.post("/v1/jobs", json=a_job(loras=[{"name": "chalk"}, {"name": "ink", "weight": 0.5}]))
    assert answer.status_code == 202
    kept = [{"name": "chalk", "weight": 1.0}, {"name": "ink", "weight": 0.5}]
    assert (await studio.claim()).job["params"]["loras"] == kept


@pytest.mark.parametrize(
    ("family", "changes", "job"),
    [
        ("sdxl", {"production_ready": False}, {}),
        ("wan", {}, {}),
        ("wan", {}, {"job_type": "video_fast", "steps": 4}),
    ],
)
async def test_one_that_is_not_for_the_model_or_not_in_production_can_not_be_named(
    database: Any, bob: httpx2.AsyncClient, family: str, changes: dict[str, Any], job: dict[str, Any]
) -> None:
    await register(database, "chalk", family, **changes)
    answer = await bob.post("/v1/jobs", json=a_job(loras=[{"name": "chalk"}], **job))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith("loras")


async def test_a_batch_names_the_job_as_well(bob: httpx2.AsyncClient) -> None:
    answer = await bob.post("/v1/jobs/batch", json={"jobs": [a_job(), a_job(loras=[{"name": "acid"}])]})
    assert answer.json()["errors"][0]["field"] == "jobs.1.loras.0.name"
