"""The enhancer around a real tiny Qwen: a durable stage, and single prompts. Its words are noise, and it says so."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.costs import CostProfiles
from db.prompts import Prompts
from db.queue import Queue
from deployments.enhancer import Enhancer, EnhanceRequest
from deployments.metrics import Metrics
from deployments.prompting import negative_rows, template_rows
from deployments.settings import Settings
from models.denoising.costs import Costs, Shape
from models.generation import InvalidInput, ModelLoadFailed
from models.policy import ContentRejected
from models.qwen import Qwen
from models.writing.language import Completion, Message, Sampling
from tests.deployments.conftest import Desk

PROMPT = "a lighthouse on a cliff"
NO_LANGUAGE_MODEL = """
name: wordless
description: no language model
laptop: true
models:
  sdxl: {model_name: tiny-sdxl, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0}
"""
MISSING = """
name: missing
description: a language model that is not there
laptop: true
models:
  sdxl: {model_name: tiny-sdxl, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0}
  qwen: {model_name: none, source: /nonexistent/qwen, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0}
"""


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, made once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
async def settings(database: Any, tmp_path: Path, state_dir: Path) -> Settings:
    await Prompts(database.pool).seed(template_rows(), negative_rows())
    return Settings(
        database_url=database.url,
        state_dir=state_dir,
        blob_url=f"file://{tmp_path / 'blobs'}",
        renew_seconds=0.5,
        poll_seconds=0.1,
    )


def with_profile(settings: Settings, folder: Path, text: str) -> Settings:
    path = folder / "profile.yaml"
    path.write_text(text)
    return settings.model_copy(update={"profile": str(path)})


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Enhancer]:
    enhancer = Enhancer(settings, Metrics())
    await enhancer.start()
    try:
        assert enhancer.health() is None
        yield enhancer
    finally:
        await enhancer.stop(0)


async def accept(desk: Desk, **changes: Any) -> UUID:
    values = {
        "stage": "enhance",
        "queue": "qwen",
        "original_prompt": PROMPT,
        "params": {"prompt": PROMPT, "seed": 7, "steps": 1},
    }
    (job_id,) = await desk.accept(**(values | changes))
    return job_id


def asked(prompt: str = PROMPT, mode: str = "sfw", family: str = "sdxl", format: str = "image") -> EnhanceRequest:
    return EnhanceRequest(prompt, family, format, "fast", False, mode, 7)


async def moved(desk: Desk, job_id: UUID, queue: str = "sdxl") -> Any:
    """The job's row once it has moved on."""
    await desk.until(
        "SELECT count(*) FROM job_queue WHERE job_id = $1 AND queue = $2 AND state = 'ready'", job_id, queue
    )
    return await desk.database.pool.fetchrow("SELECT * FROM jobs WHERE id = $1", job_id)


async def test_a_job_is_enhanced_and_moves_on(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as enhancer:
        assert enhancer.load_error is None
        job_id = await accept(desk)
        row = await moved(desk, job_id)
    assert (row["status"], row["stage"], row["attempts"], row["failures"]) == ("queued", "generate", 1, 0)
    assert row["enhanced_prompt"].startswith(PROMPT)
    assert row["enhanced_prompt"] != PROMPT
    account = row["enhancement"]
    # random weights write noise, which is not given out as an enhancement
    assert (account["strategy"], account["fallback_used"], account["fallback_reason"]) == (
        "rule_based",
        True,
        "gibberish",
    )
    # of the strategies of a job, in which rules have no place; the account says what stood in
    assert (row["enhancement_strategy"], row["template_name"]) == ("none", "SDXL_FAST")
    assert account["tiers"][-1] == {"name": "rule_based", "outcome": "used", "reason": None}
    assert account["template_selection"]["misfits"] == []
    assert account["model_used"] == "tiny-qwen" or account["model_used"] is None
    assert account["new_tokens"] > 0
    assert row["enhancement_time_ms"] >= 0
    assert PROMPT not in str(account)
    assert await desk.events(job_id) == ["queued", "started", "enhanced"]


async def test_the_next_stage_is_claimed_with_the_enhanced_prompt(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        job_id = await accept(desk)
        await moved(desk, job_id)
    (claim,) = await desk.queue.claim("sdxl", uuid4(), 1)
    assert (claim.job_id, claim.attempt, claim.failures, claim.job["stage"]) == (job_id, 2, 0, "generate")
    assert claim.job["enhanced_prompt"].startswith(PROMPT)


async def test_a_video_goes_to_the_video_queue(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        job_id = await accept(desk, job_type="video7b_fast_enhanced", format="video", model_type="wan")
        row = await moved(desk, job_id, "wan")
    assert row["template_name"].startswith("WAN")


@pytest.mark.parametrize("profile", [NO_LANGUAGE_MODEL, MISSING])
async def test_without_its_model_rules_stand_in_and_it_says_so(
    desk: Desk, settings: Settings, tmp_path: Path, profile: str
) -> None:
    async with serving(with_profile(settings, tmp_path, profile)) as enhancer:
        assert enhancer.load_error
        row = await moved(desk, await accept(desk))
        direct = await enhancer.enhance(asked())
        worker = await desk.database.pool.fetchrow("SELECT error FROM workers")
    account = row["enhancement"]
    assert (account["strategy"], account["fallback_reason"]) == ("rule_based", "model_unavailable")
    assert (direct.strategy, direct.fallback_used, direct.fallback_reason) == ("rule_based", True, "model_unavailable")
    assert worker["error"]


async def test_a_prompt_is_enhanced_at_once(settings: Settings) -> None:
    async with serving(settings) as enhancer:
        result = await enhancer.enhance(asked())
    assert (result.original_prompt, result.fallback_used, result.fallback_reason) == (PROMPT, True, "gibberish")
    assert result.enhanced_prompt.startswith(PROMPT)
    assert 0 < result.tokens.enhanced <= result.token_limit


async def test_a_prompt_that_is_never_made_is_refused_here_too(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as enhancer:
        with pytest.raises(ContentRejected) as caught:
            await enhancer.enhance(asked("a nude child"))
        assert caught.value.code == "content_minors"
        job_id = await accept(desk, original_prompt="a nude child")
        await desk.until("SELECT status = 'failed' FROM jobs WHERE id = $1", job_id)
    assert await desk.status(job_id) == ("failed", "content_rejected")
    assert await desk.database.pool.fetchval("SELECT enhanced_prompt FROM jobs") is None
    assert "nude" not in await desk.database.pool.fetchval("SELECT error_message FROM jobs")


async def test_an_operators_template_is_used(desk: Desk, settings: Settings) -> None:
    await desk.database.pool.execute("UPDATE prompt_templates SET is_active = false WHERE template_name = 'SDXL_FAST'")
    await desk.database.pool.execute(
        """INSERT INTO prompt_templates (enhancer_model, use_case, template_name, system_prompt, token_limit, job_type,
                                         target_model, quality)
           VALUES ('qwen_instruct', 'enhancement', 'HOUSE_STYLE', 'Rewrite it.', 75, 'image', 'sdxl', 'fast')"""
    )
    async with serving(settings) as enhancer:
        assert (await enhancer.enhance(asked())).template_name == "HOUSE_STYLE"


async def test_an_edited_template_is_used_by_the_next_enhancement(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as enhancer:
        first, second = await enhancer.enhance(asked()), await enhancer.enhance(asked())
        assert (first.template_cache_hit, second.template_cache_hit, first.token_limit) == (False, True, 75)
        await desk.database.pool.execute(
            "UPDATE prompt_templates SET token_limit = 40 WHERE template_name = 'SDXL_FAST'"
        )
        edited = await enhancer.enhance(asked())
    assert (edited.template_cache_hit, edited.token_limit) == (False, 40)


async def test_a_job_without_a_template_goes_on_with_its_own_words(desk: Desk, settings: Settings) -> None:
    await desk.database.pool.execute("UPDATE prompt_templates SET is_active = false")
    async with serving(settings):
        row = await moved(desk, await accept(desk))
    assert (row["enhanced_prompt"], row["template_name"]) == (PROMPT, None)
    account = row["enhancement"]
    assert (account["strategy"], account["fallback_used"]) == ("no_template_available", True)
    assert (row["stage"], row["enhancement_strategy"]) == ("generate", "none")


async def test_a_job_with_weights_may_fill_more_windows_and_is_judged_with_terms_and_references(
    desk: Desk, settings: Settings
) -> None:
    await desk.database.pool.execute("UPDATE prompt_templates SET token_limit = 200 WHERE template_name = 'SDXL_FAST'")
    long = " ".join(["cat"] * 120)
    weighted = {"prompt": long, "seed": 7, "steps": 1, "compel_enabled": True}
    async with serving(settings):
        wide = await moved(desk, await accept(desk, original_prompt=long, params=weighted))
        narrow = await moved(desk, await accept(desk, original_prompt=long))
        refused = await accept(
            desk,
            original_prompt="a toddler",
            params=weighted | {"compel_weights": {"terms": [{"term": "nude", "weight": 1.2}]}},
        )
        reference = {"bucket": "reference_images", "key": "a/b.png", "signs": {"minors": 2, "sexual": 0}}
        shown = await accept(desk, original_prompt="nude", params=weighted | {"references": [reference]})
        for job_id in (refused, shown):
            await desk.until("SELECT status = 'failed' FROM jobs WHERE id = $1", job_id)
    assert (wide["enhancement"]["token_limit"], wide["enhancement"]["compression_applied"]) == (200, False)
    assert (narrow["enhancement"]["token_limit"], narrow["enhancement"]["compression_applied"]) == (75, True)
    assert wide["enhancement_strategy"] == "compel"
    assert await desk.status(refused) == await desk.status(shown) == ("failed", "content_rejected")


async def test_a_prompt_whose_reader_can_not_be_read_stays_as_it_is(
    settings: Settings, tmp_path: Path, desk: Desk
) -> None:
    gone = NO_LANGUAGE_MODEL.replace("source: tiny", "source: /nonexistent/sdxl")
    async with serving(with_profile(settings, tmp_path, gone)) as enhancer:
        result = await enhancer.enhance(asked())
    assert (result.strategy, result.fallback_reason) == ("original", "tokenizer_unavailable")
    assert (result.enhanced_prompt, result.tokens) == (PROMPT, None)


async def test_a_cancelled_stage_ends_the_job(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        pass
    job_id = await accept(desk)
    worker = uuid4()
    await desk.queue.claim("qwen", worker, 1)
    await Queue(desk.database.pool).cancel(job_id)
    await desk.expire(job_id)
    # it comes back to the queue with its flag, and the enhancer must not move it on
    await desk.database.pool.execute(
        "UPDATE job_queue SET state = 'ready', worker = NULL, lease_until = NULL WHERE job_id = $1", job_id
    )
    async with serving(settings):
        await desk.until("SELECT status = 'cancelled' FROM jobs WHERE id = $1", job_id)
    assert await desk.queued(job_id) is None


async def test_many_jobs_are_written_at_a_time(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as enhancer:
        assert enhancer.slots == 8
        jobs = await desk.accept(
            12,
            stage="enhance",
            queue="qwen",
            original_prompt=PROMPT,
            params={"prompt": PROMPT, "seed": 7, "steps": 1},
        )
        for job_id in jobs:
            row = await moved(desk, job_id)
            assert (row["stage"], row["attempts"], row["failures"]) == ("generate", 1, 0)
    # the same question twelve times: those who came later did not ask the model again
    accounts = await desk.database.pool.fetch("SELECT enhancement ->> 'cached' AS cached FROM jobs")
    assert {row["cached"] for row in accounts} <= {"true", "false"}
    assert "false" in {row["cached"] for row in accounts}


async def test_a_chat_is_written_piece_by_piece(settings: Settings) -> None:
    async with serving(settings) as enhancer:
        said = [part async for part in enhancer.chat([Message("user", "hello")], Sampling(40, 1.0, 1.0, 3))]
    *pieces, completion = said
    assert isinstance(completion, Completion)
    assert "".join(map(str, pieces)) == completion.text
    assert len(pieces) > 1


async def test_a_chat_whose_reader_leaves_frees_its_place(settings: Settings) -> None:
    async with serving(settings) as enhancer:
        assert isinstance(enhancer.model, Qwen)
        chat = enhancer.chat([Message("user", "hello")], Sampling(5000, 1.0, 1.0, 3))
        await anext(chat)
        assert enhancer.model.running == 1
        await chat.aclose()
        assert enhancer.model.running == 0


async def test_a_chat_is_refused_where_it_can_not_be(settings: Settings) -> None:
    async with serving(settings) as enhancer:
        with pytest.raises(ContentRejected):
            await anext(enhancer.chat([Message("user", "a nude child")], Sampling(5)))
        with pytest.raises(InvalidInput):
            await anext(enhancer.chat([Message("user", "hello")], Sampling(10**6)))


async def test_a_chat_fails_while_the_model_is_away(settings: Settings, tmp_path: Path) -> None:
    async with serving(with_profile(settings, tmp_path, MISSING)) as enhancer:
        with pytest.raises(ModelLoadFailed):
            await anext(enhancer.chat([Message("user", "hello")], Sampling(5)))


def somebody_waits(model: Qwen) -> None:
    """Returns as soon as a request stands in line."""
    deadline = time.monotonic() + 30
    while model.waiting == 0:
        assert time.monotonic() < deadline


async def test_a_call_that_is_given_up_stops_writing(settings: Settings) -> None:
    async with serving(settings) as enhancer:
        assert isinstance(enhancer.model, Qwen)
        enhancer.model._model.generation_config.eos_token_id = -1
        long = [Message("user", "x")], Sampling(8000, 1.0, 1.0, 3)
        held = [enhancer.model.submit(*long)]  # the cache has room for no other
        call = asyncio.create_task(enhancer.enhance(asked()))
        await asyncio.to_thread(somebody_waits, enhancer.model)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert enhancer.model.waiting == 0
        held[0].cancel()


async def test_a_broken_device_makes_the_replica_ill(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as enhancer:
        assert isinstance(enhancer.model, Qwen)

        def fail(module: object, args: object) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        enhancer.model._model.model.embed_tokens.register_forward_pre_hook(fail)
        job_id = await accept(desk)
        await desk.until("SELECT failures = 1 FROM job_queue WHERE job_id = $1", job_id)
        fault = enhancer.health()
        assert fault is not None
        assert "device-side assert" in fault
        # it goes back to the queue instead of moving on without an enhancement, and is left for another replica
        assert await desk.events(job_id) == ["queued", "started", "requeued device_broken"]


async def test_a_stopped_enhancer_takes_no_more(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        pass
    job_id = await accept(desk)
    assert await desk.queued(job_id) == ("ready", 0)
    assert (await desk.database.pool.fetchrow("SELECT state FROM workers"))["state"] == "stopped"


async def test_the_next_stage_is_costed_by_the_measured_profile(desk: Desk, settings: Settings) -> None:
    measured = Costs()
    measured.measure(Shape(64, 64, 1), float, budget_seconds=1000)  # a second for each row
    await CostProfiles(desk.database.pool).publish("sdxl", "tiny-sdxl", measured.document())
    size: dict[str, Any] = {"width": 64, "height": 64, "frames": 1, "num_images": 1}
    params = {"prompt": PROMPT, "seed": 7, "guidance_scale": 5.0, "scheduler": "heun", **size}
    async with serving(settings):
        for steps in (3, 20):
            job_id = await accept(desk, params=params | {"steps": steps})
            await moved(desk, job_id)
            cost = await desk.database.pool.fetchval("SELECT cost FROM job_queue WHERE job_id = $1", job_id)
            assert cost == pytest.approx(2 * (2 * steps - 1))
