"""Jobs that an outside provider makes, as the API takes them; `replicate-image`."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.jobs import Status
from deployments.metrics import Metrics
from deployments.provider.claims import ProviderClaims
from deployments.provider.run import Pace
from tests.provider_standin import TOKEN, VERSION, Standin, turn_on
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.queueing import png

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


# ---------------------------------------------------------------------------------------- what the profile has not


async def test_a_job_without_a_model_here_goes_to_the_provider_and_says_so(
    outside: InProcess, bob: httpx2.AsyncClient, provider: Standin
) -> None:
    refused = await bob.post("/v1/jobs", json=a_job(job_type="rv51_fast"))
    assert (refused.status_code, refused.json()["code"]) == (503, "model_not_installed")
    model = await turn_on(outside.pool, provider)
    answer = await bob.post("/v1/jobs", json=a_job(job_type="rv51_fast"))
    assert answer.status_code == 202, answer.text
    (note,) = answer.json()["adjustments"]
    assert (note["field"], note["given"], note["used"]) == ("provider", "local", "replicate")
    row = await outside.pool.fetchrow("SELECT j.provider, j.api_model_id, q.queue FROM jobs j JOIN job_queue q ON true")
    assert tuple(row) == ("replicate", model, "provider")
    here = await bob.post("/v1/jobs", json=a_job())
    assert here.json()["adjustments"] == []
    queue = "SELECT queue FROM job_queue WHERE job_id = $1"
    assert await outside.pool.fetchval(queue, UUID(here.json()["id"])) == "sdxl"

    old = await bob.post("/functions/v1/queue-job", json={"job_type": "rv51_high", "prompt": "a lighthouse"})
    assert old.status_code == 200, old.text
    assert old.json()["adjustments"][0]["field"] == "provider"

    claim = await outside.claim("provider")
    await outside.end(claim, status=Status.FAILED, error_code="provider_failed")
    assert (await bob.post(f"/v1/jobs/{claim.job_id}/retry")).status_code == 202
    assert await outside.pool.fetchval(queue, claim.job_id) == "provider"


async def test_what_the_provider_does_not_take_is_refused(
    outside: InProcess, bob: httpx2.AsyncClient, provider: Standin
) -> None:
    allowed = {"allowed_input_keys": ["prompt", "seed", "num_inference_steps", "scheduler"]}
    aliases = {"scheduler_aliases": {"euler": "K_EULER"}}
    await turn_on(outside.pool, provider, capabilities=allowed | aliases)
    before = await outside.stored()
    for given, field in (
        ({"width": 1024, "height": 1024}, "height"),
        ({"negative_prompt": "blur"}, "negative_prompt"),
        ({"previews": True}, "previews"),
        ({"compel_enabled": True}, "compel_enabled"),
        ({"num_images": 3}, "num_images"),
        ({"scheduler": "dpmpp_2m_karras"}, "scheduler"),
        ({"enhance": True}, "enhance"),
    ):
        answer = await bob.post("/v1/jobs", json=a_job(job_type="rv51_fast") | given)
        assert answer.status_code == 422, (given, answer.text)
        assert field in [error["field"] for error in answer.json()["errors"]]
    assert await outside.stored() == before
    taken = a_job(job_type="rv51_fast", seed=3, scheduler="euler", num_images=1, previews=False)
    assert (await bob.post("/v1/jobs", json=taken)).status_code == 202


async def test_nsfw_goes_only_where_the_row_allows_it(
    database: Any, tmp_path: Path, state_dir: Path, provider: Standin
) -> None:
    async with in_process(database, tmp_path, state_dir=state_dir) as server:
        profile = server.settings.loaded_profile.model_copy(update={"nsfw_allowed": True})
        vars(server.settings)["loaded_profile"] = profile
        client = await server.user("carol")
        await server.pool.execute("UPDATE profiles SET age_verified = true")
        await turn_on(server.pool, provider)
        body = a_job(job_type="rv51_fast", content_mode="nsfw")
        answer = await client.post("/v1/jobs", json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "nsfw_not_allowed")
        await server.pool.execute("UPDATE api_providers SET nsfw_allowed = true")
        assert (await client.post("/v1/jobs", json=body)).status_code == 202


async def test_a_model_that_is_turned_off_or_has_no_version_is_not_offered(
    outside: InProcess, bob: httpx2.AsyncClient, provider: Standin
) -> None:
    model = await turn_on(outside.pool, provider)
    for change in (
        "UPDATE api_models SET is_active = false",
        "UPDATE api_models SET is_active = true, version = 'latest'",
        f"UPDATE api_models SET version = '{VERSION}', tasks = '{{i2i}}'",  # noqa: S608
    ):
        await outside.pool.execute(change + " WHERE id = $1", model)
        answer = await bob.post("/v1/jobs", json=a_job(job_type="rv51_fast"))
        assert (answer.status_code, answer.json()["code"]) == (503, "model_not_installed"), change


# --------------------------------------------------------------------------------------------------- replicate-image


async def test_replicate_image_goes_all_the_way(outside: InProcess, bob: httpx2.AsyncClient, provider: Standin) -> None:
    model = await turn_on(outside.pool, provider, family="sdxl")
    body = {
        "prompt": "a lighthouse at dusk",
        "apiModelId": str(model),
        "jobType": "sdxl_image",
        "quality": "fast",
        "input": {"steps": 9, "guidance_scale": 5.5, "seed": 0, "scheduler": "K_EULER", "num_outputs": 1},
        "metadata": {"aspectRatio": "16:9", "contentType": "sfw", "mine": 1},
    }
    answer = (await bob.post(IMAGE, json=body)).json()
    assert (answer["status"], answer["provider"], answer["apiModelId"]) == ("queued", "replicate", str(model))
    assert answer["predictionId"] == answer["jobId"]
    row = await outside.pool.fetchrow("SELECT job_type, metadata, params FROM jobs")
    assert (row["job_type"], row["metadata"]["mine"]) == ("sdxl_image_fast", 1)
    looked = (await bob.post(IMAGE, json={"predictionId": answer["predictionId"]})).json()
    assert (looked["status"], looked["providerPredictionId"], looked["output"]) == ("starting", None, [])

    settings = outside.settings
    claims = ProviderClaims(settings, Metrics(), pace=Pace(poll=0.05), environment={"TEST_API_TOKEN": TOKEN})
    await claims.start()
    try:
        async with provider.heard:
            await provider.heard.wait_for(lambda: provider.created)
        while looked["status"] not in ("succeeded", "failed"):
            looked = (await bob.post(IMAGE, json={"predictionId": answer["predictionId"]})).json()
    finally:
        await claims.stop(0)
    assert (looked["status"], looked["error"]) == ("succeeded", None)
    (prediction,) = provider.created
    sent = {
        "num_inference_steps": 9,
        "guidance_scale": 5.5,
        "seed": 0,
        "scheduler": "K_EULER",
        "width": 1024,
        "height": 576,
    }
    assert prediction["input"].items() >= sent.items()
    (url,) = looked["output"]
    assert (await bob.get(url)).status_code == 200
    by_name = (await bob.post(IMAGE, json={"predictionId": prediction["id"]})).json()
    assert (by_name["jobId"], by_name["providerPredictionId"]) == (answer["jobId"], prediction["id"])

    mallory = await outside.user("mallory")
    for name in (answer["predictionId"], prediction["id"], str(uuid4()), "nothing"):
        refused = await mallory.post(IMAGE, json={"predictionId": name})
        assert (refused.status_code, refused.json()["code"]) == (404, "job_not_found")
    nobody = await outside.client()
    assert (await nobody.post(IMAGE, json={"predictionId": prediction["id"]})).status_code == 401


async def test_without_a_provider_the_image_is_made_here(outside: InProcess, bob: httpx2.AsyncClient) -> None:
    answer = await bob.post(
        IMAGE, json={"prompt": "a lighthouse", "job_type": "image_high", "input": {"width": 128, "height": 128}}
    )
    assert answer.status_code == 200, answer.text
    assert (answer.json()["provider"], answer.json()["status"]) == ("local", "queued")
    assert [note["field"] for note in answer.json()["adjustments"]] == ["jobType"]
    assert await outside.pool.fetchval("SELECT queue FROM job_queue") == "sdxl"
    assert await outside.pool.fetchval("SELECT job_type FROM jobs") == "sdxl_image_high"
    looked = (await bob.post(IMAGE, json={"predictionId": answer.json()["predictionId"]})).json()
    assert (looked["status"], looked["provider"]) == ("starting", "local")


async def test_what_stands_at_the_top_is_honoured_like_the_input(outside: InProcess, bob: httpx2.AsyncClient) -> None:
    top = {"seed": 5, "steps": 3, "negative_prompt": "fog", "guidance_scale": 4.5, "num_images": 3}
    size = {"width": 128, "height": 128}
    same = {"input": size | {"seed": 5}, "metadata": {"aspectRatio": "16:9", "reference_strength": 0.5, "mine": 1}}
    answer = (await bob.post(IMAGE, json={"prompt": "a mill", "contentType": "sfw"} | top | same)).json()
    assert answer["success"], answer
    row = await outside.pool.fetchrow("SELECT params, metadata FROM jobs")
    params = row["params"]
    assert {name: params[name] for name in top} == top
    assert (params["content_mode"], params["width"], row["metadata"]["mine"]) == ("sfw", 128, 1)
    assert top.keys().isdisjoint(row["metadata"])
    assert [(note["field"], note["given"], note["used"]) for note in answer["adjustments"]] == [
        ("reference_strength", 0.5, "none"),
        ("aspectRatio", "16:9", "none"),
    ]


@pytest.mark.parametrize(
    ("given", "note", "kept"),
    [
        ({"input": {"prompt_strength": 1}}, ("input.prompt_strength", 1.0, 0.9), 0.1),
        ({"input": {"strength": 0}}, ("input.strength", 0.0, 0.01), 0.99),
        ({"reference_strength": 1}, ("reference_strength", 1.0, 0.99), 0.99),
    ],
)
async def test_a_strength_that_can_not_be_is_told(
    outside: InProcess, bob: httpx2.AsyncClient, given: dict[str, Any], note: tuple[Any, ...], kept: float
) -> None:
    sent = await bob.post("/v1/uploads", content=png(), headers={"Content-Type": "image/png"})
    body = {"prompt": "a mill", "jobType": "sdxl_image_fast", "reference_image_url": sent.json()["id"], "steps": 100}
    answer = await bob.post(IMAGE, json=body | given)
    assert answer.status_code == 200, answer.text
    assert [(one["field"], one["given"], one["used"]) for one in answer.json()["adjustments"]] == [note]
    params = await outside.pool.fetchval("SELECT params FROM jobs")
    assert params["references"][0]["strength"] == kept


async def test_replicate_image_refuses(outside: InProcess, bob: httpx2.AsyncClient, provider: Standin) -> None:
    model = str(await turn_on(outside.pool, provider, family="sdxl"))
    off = str(await turn_on(outside.pool, provider, family="sdxl", model_key="off", is_active=False))
    untold = str(await turn_on(outside.pool, provider, family="sdxl", model_key="untold", version=None))
    chat = str(await turn_on(outside.pool, provider, family="sdxl", model_key="chat", modality="chat", tasks=[]))
    ours = """INSERT INTO api_models (provider_id, model_key, display_name, modality, version)
              SELECT id, 'elsewhere', 'M', 'image', $1 FROM api_providers WHERE name = 'other' RETURNING id"""
    await outside.pool.execute("INSERT INTO api_providers (name, display_name) VALUES ('other', 'Other')")
    elsewhere = str(await outside.pool.fetchval(ours, VERSION))
    before = await outside.stored()
    for body, status, code in (
        *(
            ({"apiModelId": one}, 400, "MODEL_VERSION_NOT_FOUND")
            for one in (off, untold, chat, elsewhere, str(uuid4()))
        ),
        ({"apiModelId": "x"}, 400, "type"),
        ({"prompt": ""}, 400, "invalid_params"),
        ({"jobType": "video_fast"}, 400, "choice"),
        ({"jobType": "sdxl_image_fast", "quality": "high"}, 400, "choice"),
        ({"input": {"refiner": "x"}}, 400, "unknown"),
        ({"input": []}, 400, "type"),
        ({"input": {"steps": 3, "num_inference_steps": 4}}, 400, "conflict"),
        ({"input": {"scheduler": "nonsense"}}, 400, "invalid_params"),
        ({"input": {"prompt_strength": 0.5}}, 400, "conflict"),
        ({"metadata": {"consistency_method": "i2i_reference"}}, 400, "missing"),
        ({"metadata": {"consistency_method": "magic"}}, 400, "choice"),
        ({"metadata": {"contentType": "nsfw"}}, 403, "nsfw_not_allowed"),
        ({"contentType": "nsfw"}, 403, "nsfw_not_allowed"),
        ({"contentType": "gore"}, 400, "choice"),
        ({"contentType": "sfw", "metadata": {"contentType": "nsfw"}}, 400, "conflict"),
        ({"seed": 5, "input": {"seed": 6}}, 400, "conflict"),
        ({"steps": 3, "input": {"num_inference_steps": 4}}, 400, "conflict"),
        ({"loras": [{"name": "x"}]}, 400, "unsupported"),
        ({"enhance": True}, 400, "unsupported"),
        ({"predictionId": 5}, 400, "type"),
        ({"predictionId": "a/b"}, 400, "type"),
    ):
        answer = await bob.post(IMAGE, json={"prompt": "a lighthouse", "apiModelId": model} | body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (body, answer.text)
    assert await outside.stored() == before
