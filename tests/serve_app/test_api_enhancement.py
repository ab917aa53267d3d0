"""/functions/v1/enhance-prompt: which template, which way, and what became of everything that was given."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray.exceptions import RayActorError

from models.prompting.composition import MODIFY_TEMPLATE, SAME_SUBJECT
from serve_app.api.wire_enhancement import LANGUAGE_MODELS
from tests.serve_app.conftest import InProcess
from tests.serve_app.language import Handle, talking

ENHANCE = "/functions/v1/enhance-prompt"


def body(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a lighthouse", "job_type": "sdxl_image_fast"} | changes


async def said(client: httpx2.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post(ENHANCE, json=body(**changes))
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def unused(answer: dict[str, Any]) -> list[str]:
    return [entry["field"] for entry in answer["enhancement_metadata"]["not_used"]]


async def test_the_answer_says_which_template_was_asked_for_and_taken(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    metadata = (await said(alice))["enhancement_metadata"]
    assert metadata["template_name"] == metadata["template_selection"]["taken"]["template_name"] == "SDXL_FAST"
    assert metadata["template_selection"]["misfits"] == []
    assert metadata["budget"] == {"limit": 75, "window": 77, "specials": 2, "windows": 1, "clamped": False}
    assert metadata["tiers"] == [
        {"name": "qwen", "outcome": "failed", "reason": "model_unavailable"},
        {"name": "rule_based", "outcome": "used", "reason": None},
    ]
    await server.pool.execute("UPDATE prompt_templates SET is_active = false WHERE template_name = 'SDXL_FAST'")
    selection = (await said(alice))["enhancement_metadata"]["template_selection"]
    assert (selection["taken"]["template_name"], selection["misfits"]) == ("SDXL_HIGH", ["quality"])
    assert selection["reason"] == "no active template is for quality fast"


async def test_an_edit_is_in_force_at_once_and_the_cache_told(server: InProcess, alice: httpx2.AsyncClient) -> None:
    hits = [(await said(alice))["enhancement_metadata"]["cache_hit"] for _ in range(2)]
    assert hits == [False, True]
    await server.pool.execute("UPDATE prompt_templates SET token_limit = 5 WHERE template_name = 'SDXL_FAST'")
    answer = await said(alice, prompt=" ".join(["cat"] * 12))
    assert answer["enhanced_prompt"] == " ".join(["cat"] * 5)
    assert answer["tokenCount"] == {"original": 12, "enhanced": 5, "compressed": 5}
    assert answer["enhancement_metadata"]["cache_hit"] is False


async def test_without_a_template_the_prompt_comes_back_and_it_says_so(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    await server.pool.execute("UPDATE prompt_templates SET is_active = false WHERE content_mode = 'sfw'")
    answer = await said(alice)
    assert (answer["success"], answer["enhanced_prompt"]) == (True, "a lighthouse")
    assert answer["enhancement_strategy"] == answer["fallback_reason"] == "no_template_available"
    assert (answer["fallback_used"], answer["enhancement_metadata"]["template_name"]) == (True, None)


async def test_a_modification_is_put_together_without_a_model(alice: httpx2.AsyncClient) -> None:
    modify = {"reference_mode": "modify"}
    described = modify | {"originalEnhancedPrompt": "a red fox, forest"}
    for changes, text, strategy in (
        ({"prompt": "in the snow", "metadata": described}, "in the snow, a red fox, forest", "with_prompt"),
        ({"prompt": "in the snow", "metadata": modify}, f"in the snow, {SAME_SUBJECT}", "with_prompt"),
        ({"prompt": " ", "metadata": described}, "a red fox, forest", "base_only"),
    ):
        answer = await said(alice, **changes)
        assert (answer["enhanced_prompt"], answer["enhancement_strategy"]) == (text, f"reference_modify_{strategy}")
        assert answer["enhancement_metadata"]["template_name"] == MODIFY_TEMPLATE
        assert (answer["fallback_used"], answer["enhancement_metadata"]["model_used"]) == (False, None)
    long = await said(alice, prompt="in the snow", metadata=modify | {"originalEnhancedPrompt": "cat " * 100})
    assert long["tokenCount"]["enhanced"] == 75 == long["tokenCount"]["compressed"]


async def test_a_modification_is_judged_as_a_whole(alice: httpx2.AsyncClient) -> None:
    parts = {"reference_mode": "modify", "originalEnhancedPrompt": "a toddler"}
    answer = await alice.post(ENHANCE, json=body(prompt="nude", metadata=parts))
    assert (answer.status_code, answer.json()["code"]) == (400, "content_minors")


async def test_a_model_id_names_the_reader(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made = """INSERT INTO api_models (provider_id, model_key, display_name, modality, model_family, is_active)
              SELECT id, $1, $1, $2, $3, $4 FROM api_providers LIMIT 1 RETURNING id"""
    await server.pool.execute("INSERT INTO api_providers (name, display_name) VALUES ('p', 'P') ON CONFLICT DO NOTHING")
    video = await server.pool.fetchval(made, "w", "video", "wan", True)
    other = await server.pool.fetchval(made, "f", "image", "flux", True)
    chat = await server.pool.fetchval(made, "c", "chat", "qwen", True)
    off = await server.pool.fetchval(made, "o", "image", "sdxl", False)
    answer = await said(alice, job_type=None, model_id=str(video))
    assert answer["enhancement_metadata"]["template_name"] == "WAN_FAST"
    assert answer["enhancement_metadata"]["model_key"] == "w"
    answer = await said(alice, model_id=str(other))
    assert (answer["enhancement_metadata"]["target_model"], unused(answer)) == ("sdxl", ["model_id"])
    for wrong in ({"model_id": str(video)}, {"model_id": str(chat)}, {"model_id": str(off)}, {"model_id": "x"}):
        refusal = await alice.post(ENHANCE, json=body(**wrong))
        assert (refusal.status_code, refusal.json()["errors"][0]["field"]) == (400, "model_id"), wrong


async def test_a_preset_has_effect(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await server.pool.execute(
        """INSERT INTO ourvidz.enhancement_presets
             (preset_name, enable_qwen, enable_compel, auto_enhancement, compel_weights, qwen_settings)
           VALUES ('Careful', true, true, true, '{"quality": 1.3}',
                   '{"max_time_ms": 5, "expansion_target": 2500, "quality_focus": "high"}'),
                  ('Weights', false, true, true, '{"quality": 1.2}', null), ('Off', false, false, false, null, null)"""
    )
    careful = await said(alice, selectedPresets=["Careful"])
    metadata = careful["enhancement_metadata"]
    assert (metadata["template_name"], metadata["quality"]) == ("SDXL_HIGH", "high")
    assert metadata["preset"] == {
        "preset_name": "Careful",
        "compel_enabled": True,
        "compel_weights": {"quality": 1.3},
    }
    assert unused(careful) == ["selectedPresets.expansion_target"]
    assert (await said(alice, selectedPresets=["Careful"], quality="fast"))["enhancement_metadata"]["quality"] == "fast"
    for name, weighs in (("Weights", True), ("Off", False)):
        answer = await said(alice, selectedPresets=[name])
        assert (answer["enhanced_prompt"], answer["enhancement_strategy"]) == ("a lighthouse", "none")
        assert answer["enhancement_metadata"]["preset"]["compel_enabled"] is weighs
        assert name in answer["enhancement_metadata"]["reason"]
    for wrong in (["Nobody's"], ["Off", "Weights"], "Off", [1], ["a\0"]):
        refusal = await alice.post(ENHANCE, json=body(selectedPresets=wrong))
        assert (refusal.status_code, refusal.json()["errors"][0]["field"]) == (400, "selectedPresets"), wrong


@pytest.mark.parametrize("given", [{"job_type": "sdxl_image_fast"}, {"job_type": None, "jobType": "video_fast"}])
async def test_the_model_auto_is_none_given(alice: httpx2.AsyncClient, given: dict[str, Any]) -> None:
    auto, none = await said(alice, model="auto", **given), await said(alice, **given)
    metadata = [answer["enhancement_metadata"] for answer in (auto, none)]
    assert metadata[0]["target_model"] == metadata[1]["target_model"]
    assert unused(auto) == []


async def test_what_has_no_effect_is_told_or_refused(alice: httpx2.AsyncClient) -> None:
    assert unused(await said(alice)) == []
    for name in ("enhancement_model", "selectedModel"):
        assert (await said(alice, **{name: LANGUAGE_MODELS[0]}))["enhancement_strategy"] == "rule_based"
        none = await said(alice, **{name: "none"})
        assert (none["enhanced_prompt"], none["enhancement_strategy"]) == ("a lighthouse", "none")
    answer = await said(
        alice, user_id="x", sessionId="y", hurry=True, metadata={"style": "noir", "originalEnhancedPrompt": "a fox"}
    )
    assert unused(answer) == [
        "user_id",
        "sessionId",
        "hurry",
        "metadata.style",
        "metadata.originalEnhancedPrompt",
    ]
    for wrong, status, field in (
        ({"selectedModel": "gpt-4"}, 503, "selectedModel"),
        ({"selectedModel": "none", "enhancement_model": "qwen"}, 400, "selectedModel"),
        ({"regeneration": "yes"}, 400, "regeneration"),
        ({"metadata": {"reference_mode": "blend"}}, 400, "metadata.reference_mode"),
        ({"metadata": {"reference_mode": "modify", "exact_copy_mode": True}}, 400, "metadata.exact_copy_mode"),
        (
            {"metadata": {"reference_mode": "modify", "originalEnhancedPrompt": 5}},
            400,
            "metadata.originalEnhancedPrompt",
        ),
        ({"contentType": "sfw", "contentRating": "nsfw"}, 400, "contentRating"),
        ({"contentType": "scene_starters"}, 501, "contentType"),
    ):
        refusal = await alice.post(ENHANCE, json=body(**wrong))
        told = (refusal.status_code, [error["field"] for error in refusal.json()["errors"]])
        assert told == (status, [field]), wrong


async def test_a_scene_description_is_enhanced_as_a_plain_prompt_and_it_says_so(alice: httpx2.AsyncClient) -> None:
    selection = (await said(alice, contentType="scene_description"))["enhancement_metadata"]["template_selection"]
    assert (selection["asked"]["use_case"], selection["misfits"]) == ("scene_description", ["use_case"])


# ------------------------------------------------------------------------------------------ with a language model


@pytest.fixture
async def talk(database: Any, tmp_path: Path) -> AsyncIterator[tuple[InProcess, Handle, httpx2.AsyncClient]]:
    async with talking(database, tmp_path) as (server, handle):
        yield server, handle, await server.client(await server.key())


async def test_the_same_prompt_gets_the_same_answer_until_another_is_asked_for(
    talk: tuple[InProcess, Handle, httpx2.AsyncClient],
) -> None:
    _, handle, alice = talk
    first, second, other = await said(alice), await said(alice), await said(alice, regeneration=True)
    seeds = [request.seed for request in handle.enhanced]
    assert seeds[0] == seeds[1] != seeds[2]
    cached = [answer["enhancement_metadata"]["cached"] for answer in (first, second, other)]
    assert cached == [False, True, False]
    # a random model writes noise, and the tiers say so
    tiers = first["enhancement_metadata"]["tiers"]
    assert [(tier["name"], tier["outcome"]) for tier in tiers] == [("qwen", "failed"), ("rule_based", "used")]
    assert tiers[0]["reason"] == first["fallback_reason"]


async def test_a_replica_that_is_away_is_told(
    talk: tuple[InProcess, Handle, httpx2.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle, alice = talk
    for error, reason in ((TimeoutError(), "timed_out"), (RayActorError(), "replica_unavailable")):

        async def fail(request: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(handle.enhancer, "enhance", fail)
        answer = await said(alice)
        assert (answer["enhancement_strategy"], answer["fallback_reason"]) == ("rule_based", reason)
        assert answer["enhancement_metadata"]["tiers"][0] == {"name": "qwen", "outcome": "failed", "reason": reason}
