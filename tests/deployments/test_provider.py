"""Jobs at an outside provider, from a queued row to stored files, with a provider's API on a real socket."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from db.blobs import BlobStore
from db.notify import Notifier
from db.queue import Queue
from deployments.provider.run import Pace
from deployments.settings import Settings
from models.media import read_xmp
from tests.deployments.conftest import Desk
from tests.deployments.providing import PROMPT, claiming, ended, run_now, settings_for, submit, usage
from tests.provider_standin import Standin, document, picture, standing_in, turn_on


@pytest.fixture
async def provider() -> AsyncIterator[Standin]:
    async with standing_in() as standin:
        yield standin


@pytest.fixture
def settings(database: Any, tmp_path: Path, provider: Standin) -> Settings:
    return settings_for(database, tmp_path, provider)


async def test_a_job_is_made_stored_and_told(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.makes = [("image/png", picture("orange")), ("image/jpeg", picture("teal", (80, 40), "JPEG"))]
    async with claiming(settings):
        job_id = await submit(desk, model)
        assert await ended(desk, job_id) == ("completed", None)
        (log,) = await usage(desk)
    (prediction,) = provider.created
    assert prediction["version"] == model_version(provider)
    given = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 12, "refine": "no_refiner", "num_outputs": 1}
    assert prediction["input"].items() >= given.items()
    (create,) = provider.asked("POST", "/v1/predictions")
    assert (create.headers["prefer"], create.headers["cancel-after"]) == ("respond-async", "1800s")
    for fetched in provider.asked("GET", "/files/"):
        assert "authorization" not in fetched.headers

    row = await desk.database.pool.fetchrow("SELECT * FROM jobs WHERE id = $1", job_id)
    used = row["generation_settings"]
    assert (used["ran_at"], used["provider"], used["provider_model"]) == ("provider", "replicate", "them/rv51")
    assert (used["prediction_id"], used["seed"], used["outputs"]) == (prediction["id"], 7, 2)
    assert PROMPT not in str(used)
    assets = await desk.database.pool.fetch("SELECT * FROM workspace_assets ORDER BY asset_index")
    assert [(a["width"], a["height"], a["mime_type"], a["generation_seed"]) for a in assets] == [
        (64, 48, "image/png", None),  # which seed made which of several is not known
        (80, 40, "image/png", None),
    ]
    blobs = BlobStore.from_url(settings.blobs())
    for asset, colour in zip(assets, ((255, 165, 0), (0, 128, 128)), strict=True):
        data = await blobs.get("workspace-temp", asset["temp_storage_path"])
        with Image.open(io.BytesIO(data)) as image:
            pixel = image.convert("RGB").getpixel((5, 5))
            assert isinstance(pixel, tuple)
            assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 6
        assert "trainedAlgorithmicMedia" in (read_xmp(data) or "")
        assert await blobs.get("workspace-temp", asset["thumbnail_path"])
    assert await desk.events(job_id) == ["queued", "started", "completed"]

    assert (float(log["cost_usd"]), log["response_status"], log["tokens_total"]) == (0.004, 200, None)
    assert log["error_message"] is None
    assert log["response_time_ms"] >= 0
    assert log["request_payload"]["num_inference_steps"] == 12
    assert "prompt" not in log["request_payload"]
    assert log["provider_metadata"]["prediction_id"] == prediction["id"]
    aggregate = await desk.database.pool.fetchrow("SELECT * FROM api_usage_aggregates")
    assert (aggregate["request_count"], aggregate["success_count"], aggregate["error_count"]) == (1, 1, 0)


def model_version(provider: Standin) -> str:
    return str(provider.created[0]["version"])


async def test_a_lone_output_has_its_seed(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    async with claiming(settings):
        await ended(desk, await submit(desk, model))
    assert await desk.database.pool.fetchval("SELECT generation_seed FROM workspace_assets") == 7


async def test_a_seed_that_is_not_sent_is_not_told(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider, capabilities={"allowed_input_keys": ["prompt", "words"]})
    async with claiming(settings):
        job_id = await submit(desk, model)
        assert await ended(desk, job_id) == ("completed", None)
    assert provider.created[0]["input"] == {"prompt": PROMPT, "refine": "no_refiner"}
    row = await desk.database.pool.fetchrow("SELECT generation_settings AS used FROM jobs WHERE id = $1", job_id)
    assert (row["used"]["seed"], row["used"]["steps"]) == (None, None)
    assert await desk.database.pool.fetchval("SELECT generation_seed FROM workspace_assets") is None


async def test_a_reference_goes_along_as_a_data_url(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    await BlobStore.from_url(settings.blobs()).put("reference_images", "u/r.png", picture(), "image/png")
    reference = {"bucket": "reference_images", "key": "u/r.png", "strength": 0.75}
    async with claiming(settings):
        job_id = await submit(desk, model, references=(reference,))
        assert await ended(desk, job_id) == ("completed", None)
    given = provider.created[0]["input"]
    assert given["image"].startswith("data:image/png;base64,")
    assert given["prompt_strength"] == 0.25
    row = await desk.database.pool.fetchval("SELECT generation_settings FROM jobs WHERE id = $1", job_id)
    assert "image" not in row["input"]


# ------------------------------------------------------------------------------------------- crashes and resumption


async def test_another_attempt_goes_on_with_the_same_prediction(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT prediction_id IS NOT NULL FROM ourvidz.provider_predictions")
    # drained: it goes on at the provider
    assert provider.created[0]["status"] == "starting"
    assert await desk.queued(job_id) == ("ready", 0)
    provider.succeed(provider.created[0]["id"])
    async with claiming(settings):
        assert await ended(desk, job_id) == ("completed", None)
    assert len(provider.created) == 1
    assert await desk.database.pool.fetchval("SELECT attempts FROM jobs WHERE id = $1", job_id) == 2


async def test_a_request_whose_answer_was_lost_is_found_again(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)

    def break_off() -> None:
        provider.after_create = None
        raise ConnectionResetError

    provider.after_create = break_off
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("completed", None)
    assert len(provider.created) == 1  # and paid for once
    assert len(provider.asked("POST", "/v1/predictions")) == 1
    assert await desk.events(job_id) == ["queued", "started", "requeued provider_unavailable", "started", "completed"]


async def test_a_request_that_was_not_taken_is_made_again(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    first = [document(500, {"detail": "no"})]
    provider.fault = lambda request: first.pop() if request.method == "POST" and first else None
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("completed", None)
        logs = await usage(desk)
    assert len(provider.created) == 1
    assert sorted(bool(log["error_message"]) for log in logs) == [False, True]


async def test_another_jobs_prediction_is_not_taken(desk: Desk, settings: Settings, provider: Standin) -> None:
    """Two jobs of the same words: each has one of its own, though the second's answer is lost."""
    model = await turn_on(desk.database.pool, provider)
    async with claiming(settings):
        await ended(desk, await submit(desk, model))
        first = [document(502, {})]
        provider.fault = lambda request: first.pop() if request.method == "POST" and first else None
        job_id = await submit(desk, model)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("completed", None)
    assert len(provider.created) == 2


async def test_where_the_list_cannot_tell_nothing_is_paid_for_twice(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)

    def fault(request: Any) -> Any:
        if request.method == "POST":
            return document(500, {})
        return document(404, {}) if request.target == "/v1/predictions" else None

    provider.fault = fault
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("failed", "provider_uncertain")
    assert len(provider.asked("POST")) == 1


# --------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("by", "end"), [("user", ("cancelled", None)), ("deadline", ("failed", "deadline_exceeded"))])
async def test_a_stop_goes_through_to_the_provider(
    desk: Desk, settings: Settings, provider: Standin, by: str, end: tuple[str, str | None]
) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT prediction_id IS NOT NULL FROM ourvidz.provider_predictions")
        queue = Queue(desk.database.pool)
        assert await (queue.cancel(job_id) if by == "user" else queue.flag_deadline(job_id))
        assert await ended(desk, job_id) == end
    assert provider.created[0]["status"] == "canceled"
    assert await desk.database.pool.fetchval("SELECT status FROM ourvidz.provider_predictions") == "canceled"


async def test_a_prediction_that_takes_too_long_is_stopped(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    async with claiming(settings.model_copy(update={"provider_seconds": 0.2})):
        job_id = await submit(desk, model)
        assert await ended(desk, job_id) == ("failed", "provider_timeout")
    assert provider.created[0]["status"] == "canceled"


async def test_what_goes_on_for_a_job_that_has_ended_is_stopped(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    async with claiming(settings):
        job_id = await submit(desk, model)
        await desk.until("SELECT prediction_id IS NOT NULL FROM ourvidz.provider_predictions")
    assert await Queue(desk.database.pool).cancel(job_id) == "cancelled"  # while it waited for its next attempt
    async with claiming(settings):
        await desk.until("SELECT ended_at IS NOT NULL FROM ourvidz.provider_predictions")
    assert provider.created[0]["status"] == "canceled"


async def test_news_are_looked_at_at_once(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    slow = Pace(poll=3600.0)
    async with claiming(settings, slow):
        job_id = await submit(desk, model)
        await desk.until("SELECT prediction_id IS NOT NULL FROM ourvidz.provider_predictions")
        provider.succeed(provider.created[0]["id"])
        notifier = Notifier(desk.database.pool)
        async with asyncio.timeout(30):
            while (await desk.status(job_id))[0] != "completed":
                notifier.queue(f"provider/{job_id}")
                await notifier.close()
    assert len(provider.asked("GET", "/v1/predictions/")) >= 1
