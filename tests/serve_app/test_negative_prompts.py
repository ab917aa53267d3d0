"""Negative prompts of the functions: the operator's rows and the caller's words, in the room that the model has."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from models.catalog import Family
from models.prompting.prompts import TokenCounter
from tests.provider_standin import Standin, turn_on
from tests.serve_app.conftest import InProcess, in_process

QUEUE, ROWS, IMAGE = (f"/functions/v1/{name}" for name in ("queue-job", "get-negative-prompt", "replicate-image"))
OWN = ", ".join(["snow"] * 25)
LONG = ", ".join(["snow"] * 60)
OUTSIDE = "worst quality, low quality, lowres, bad anatomy, extra limbs, deformed hands, extra fingers, watermark, text"

TURBO = """
name: turbo
description: a laptop whose fast SDXL runs without guidance, and whose tokenizer is not to be had
laptop: true
models:
  sdxl: {model_name: turbo, source: /srv/no/such/checkpoint, device: cpu, memory_gib: 0, disk_gib: 0.01,
         defaults: {sizes: [[128, 128]], width: 128, height: 128, guidance: {fast: 1.0}}}
"""
WITHOUT_SDXL = """
name: video
description: a laptop without SDXL
laptop: true
models:
  wan: {model_name: tiny-wan, source: tiny, device: cpu, memory_gib: 0, disk_gib: 0.01}
"""


def body(quality: str = "fast", **changes: Any) -> dict[str, Any]:
    return {"job_type": f"sdxl_image_{quality}", "prompt": "a mill"} | changes


async def made(client: httpx2.AsyncClient, path: str = QUEUE, **asked: Any) -> dict[str, Any]:
    answer = await client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


async def negative(client: httpx2.AsyncClient, **asked: Any) -> str:
    text: str = (await made(client, **asked))["job"]["params"]["negative_prompt"]
    return text


async def counter_of(server: InProcess) -> TokenCounter:
    counter = await server.edge.counters.of(Family.SDXL)
    assert counter is not None
    return counter


# ------------------------------------------------------------------------------------------- the room of the model


@pytest.mark.parametrize("prompt", ["a mill", "a portrait of a miller"])
async def test_the_callers_words_come_in_full_and_the_rows_give_way(
    server: InProcess, alice: httpx2.AsyncClient, prompt: str
) -> None:
    counter = await counter_of(server)
    said = await made(alice, **body(prompt=prompt, negative_prompt=OWN))
    text = said["job"]["params"]["negative_prompt"]
    assert text.endswith(OWN)
    assert counter.count(text) <= 75 < counter.count(f"{text}, bad anatomy, deformed hands")
    assert text.startswith("nudity, sexual content, ")
    assert "anime" not in text
    assert said["adjustments"] == []


@pytest.mark.parametrize("compel", [{"compel_enabled": True}, {"enhancement_strategy": "compel"}])
async def test_with_compel_there_is_room_for_all(alice: httpx2.AsyncClient, compel: dict[str, Any]) -> None:
    text = await negative(alice, **body(prompt="a portrait", negative_prompt=LONG, **compel))
    assert text.endswith(f"anime, cartoon, graphic, crossed eyes, asymmetric eyes, cropped face, {LONG}")
    without = await negative(alice, **body(prompt="a portrait", negative_prompt=LONG, enhancement_strategy="none"))
    assert without == f"nudity, sexual content, {LONG}"


async def test_words_beyond_the_room_are_told(server: InProcess, alice: httpx2.AsyncClient) -> None:
    said = await made(alice, **body(negative_prompt=LONG))
    tokens = (await counter_of(server)).count(said["job"]["params"]["negative_prompt"])
    (note,) = said["adjustments"]
    assert (note["field"], note["given"], note["used"]) == ("negative_prompt", f"{tokens} tokens", "75 tokens")
    assert tokens > 75


async def test_the_rows_alone_fit_as_well(server: InProcess, alice: httpx2.AsyncClient) -> None:
    counter = await counter_of(server)
    told = (await made(alice, ROWS, modelType="sdxl"))["baseNegativePrompt"]
    assert told == await negative(alice, **body())
    assert counter.count(told) <= 75


async def test_a_video_has_the_room_of_its_own_model(alice: httpx2.AsyncClient) -> None:
    text = await negative(alice, job_type="video_fast", prompt="a mill", negative_prompt=OWN)
    assert "jittery motion" in text
    assert text.endswith(f"subtitles, watermark, logo, text, {OWN}")


# ------------------------------------------------------------------------- without a tokenizer, and without guidance


@pytest.fixture
async def turbo(database: Any, tmp_path: Path) -> AsyncIterator[InProcess]:
    profile = tmp_path / "turbo.yaml"
    profile.write_text(TURBO)
    async with in_process(database, tmp_path, profile=str(profile)) as opened:
        yield opened


async def test_without_a_tokenizer_the_callers_words_go_first_and_are_told_so(turbo: InProcess) -> None:
    alice = await turbo.user()
    said = await made(alice, **body("high", negative_prompt="fog"))
    assert said["job"]["params"]["negative_prompt"].startswith("nudity, sexual content, fog, bad anatomy, ")
    (note,) = said["adjustments"]
    assert (note["field"], note["given"]) == ("negative_prompt", "3 characters")
    assert "tokenizer" in note["reason"]
    assert (await made(alice, **body("high")))["adjustments"] == []


async def test_without_guidance_the_rows_are_left_out_and_the_callers_words_refused(turbo: InProcess) -> None:
    alice = await turbo.user()
    assert await negative(alice, **body()) == ""
    assert "bad anatomy" in await negative(alice, **body(guidance_scale=5))
    before = await turbo.stored()
    refused = await alice.post(QUEUE, json=body(negative_prompt="fog"))
    assert (refused.status_code, [e["field"] for e in refused.json()["errors"]]) == (400, ["negative_prompt"])
    assert await turbo.stored() == before


# ------------------------------------------------------------------------------------------------- at a provider


@pytest.fixture
async def outside(database: Any, tmp_path: Path, state_dir: Path, provider: Standin) -> AsyncIterator[InProcess]:
    """An API without SDXL, beside a provider."""
    profile = tmp_path / "video.yaml"
    profile.write_text(WITHOUT_SDXL)
    changes: dict[str, Any] = {"profile": str(profile), "egress_allow": (provider.origin,)}
    async with in_process(database, tmp_path, state_dir=state_dir, **changes) as opened:
        yield opened


async def test_a_model_that_takes_no_negative_prompt_gets_no_rows(outside: InProcess, provider: Standin) -> None:
    alice = await outside.user()
    keys = {"allowed_input_keys": ["prompt", "seed"]}
    await turn_on(outside.pool, provider, family="sdxl", capabilities=keys)
    said = await made(alice, **body())
    assert (said["job"]["params"]["negative_prompt"], [n["field"] for n in said["adjustments"]]) == ("", ["provider"])
    assert (await alice.post(IMAGE, json={"prompt": "a mill"})).status_code == 200
    before = await outside.stored()
    refused = await alice.post(QUEUE, json=body(negative_prompt="fog"))
    assert (refused.status_code, [e["field"] for e in refused.json()["errors"]]) == (400, ["negative_prompt"])
    assert await outside.stored() == before


async def test_a_providers_sdxl_has_rows_of_its_own(outside: InProcess, provider: Standin) -> None:
    alice = await outside.user()
    await turn_on(outside.pool, provider, family="sdxl")
    rows = f"nudity, sexual content, {OUTSIDE}"
    assert await negative(alice, **body()) == rows
    assert (await made(alice, ROWS, modelType="replicate-sdxl"))["baseNegativePrompt"] == rows
    (note,) = ((await made(alice, ROWS, modelType="replicate-sdxl", generationMode="i2i"))["baseNegativePrompt"],)
    assert note == "nudity, sexual content, worst quality, low quality, watermark"
    # nothing here counts its tokens
    said = await made(alice, **body(negative_prompt="fog"))
    assert said["job"]["params"]["negative_prompt"] == f"nudity, sexual content, fog, {OUTSIDE}"
    assert [one["field"] for one in said["adjustments"]] == ["negative_prompt", "provider"]


async def test_replicate_image_has_the_same_rows(outside: InProcess, provider: Standin) -> None:
    alice = await outside.user()
    model = await turn_on(outside.pool, provider, family="sdxl")
    kept = "SELECT params ->> 'negative_prompt' FROM jobs WHERE id = $1::uuid"
    for given, negative_prompt in (
        ({}, f"nudity, sexual content, {OUTSIDE}"),
        ({"input": {"negative_prompt": "fog"}}, f"nudity, sexual content, fog, {OUTSIDE}"),
        ({"input": {"guidance_scale": 1}}, ""),
    ):
        said = await made(alice, IMAGE, prompt="a mill", **given)
        assert await outside.pool.fetchval(kept, said["jobId"]) == negative_prompt
    own = {"negative_prompt": "the model's own row says this"}
    await outside.pool.execute("UPDATE api_models SET input_defaults = $1 WHERE id = $2", own, model)
    said = await made(alice, IMAGE, prompt="a mill")
    assert await outside.pool.fetchval(kept, said["jobId"]) == ""


async def test_a_family_without_rows_for_the_provider_has_its_own(outside: InProcess, provider: Standin) -> None:
    alice = await outside.user()
    await turn_on(outside.pool, provider, family="rv51")
    text = await negative(alice, job_type="rv51_fast", prompt="a mill")
    assert text.endswith("deformed face, text, watermark, logo, signature")
