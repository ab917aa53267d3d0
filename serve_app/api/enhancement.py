"""/functions/v1/enhance-prompt: one prompt, enhanced now. By the language model's replica, or, when that is away, by
rules, or not at all; the answer says which and why. Both dialects are read, and the answer has the names of both."""

import asyncio
from dataclasses import replace
from typing import Any

import structlog
from fastapi import APIRouter, Request
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from db.limits import SystemConfig
from deployments.prompting import EnhanceRequest, choose_template, enhancement_account, load_counter
from models.catalog import Family, RequestRefused
from models.generation import GenerationError
from models.policy import check_signs
from models.prompting.composition import MODIFY_TEMPLATE, compose_modification, compose_within, modify_strategy
from models.prompting.enhancement import Enhancement, enhance
from models.prompting.prompts import WINDOWS, TokenCounter
from serve_app.admission import signs_off_loop
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import json_object
from serve_app.api.wire_enhancement import ANSWER_SECONDS, BODY, SCENE, Asking, read_request
from serve_app.edge import Edge

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

METHODS = {"qwen": "chat_worker", "rule_based": "rule_based"}
MODIFIED = "composition"
UNTOUCHED: dict[str, Any] = {
    "strategy": "none",
    "fallback_used": False,
    "fallback_reason": None,
    "tiers": [],
    "template_name": None,
    "token_limit": None,
    "budget": None,
    "compression_applied": False,
    "model_used": None,
    "execution_time_ms": 0,
    "new_tokens": 0,
    "cached": False,
    "weights_restored": 0,
    "weights_lost": 0,
    "template_selection": None,
    "template_cache_hit": None,
}


@router.post("/enhance-prompt", operation_id="enhancePrompt", openapi_extra=BODY, responses=SCENE)
async def enhance_prompt(request: Request, edge: EdgeDep, user: User) -> dict[str, Any]:
    """Enhance a prompt for a job type. 200 also when rules had to stand in: `fallback_used` says so."""
    if not user.is_admin():
        await SystemConfig(edge.pool).admit_request(user.user_id)
    asked = await read_request(edge, user, await json_object(request))
    if asked.way == "modify":
        return await _modified(edge, asked)
    if asked.way != "enhance":
        counter = await _counter(edge, asked.family)
        account = UNTOUCHED | {"tokens": _counts(counter, asked.text, asked.text), "reason": asked.why_not}
        return _answer(asked, asked.text, account)
    result = await _enhance(edge, asked)
    return _answer(replace(asked, text=result.original_prompt), result.enhanced_prompt, enhancement_account(result))


async def _modified(edge: Edge, asked: Asking) -> dict[str, Any]:
    """The prompt of a changed reference, which no model writes."""
    counter = await _counter(edge, asked.family)
    text, limit, shortened = compose_modification(asked.base, asked.prompt), None, False
    if counter is not None:
        limit = WINDOWS[asked.family] - counter.specials
        composed = await asyncio.to_thread(compose_within, asked.base, asked.prompt, counter, limit)
        text, shortened = composed.text, composed.shortened
    check_signs(await signs_off_loop(text), asked.mode)
    account = UNTOUCHED | {
        "strategy": modify_strategy(asked.prompt),
        "template_name": MODIFY_TEMPLATE,
        "token_limit": limit,
        "tokens": _counts(counter, asked.text, text),
        "compression_applied": shortened,
    }
    return _answer(asked, text, account)


async def _counter(edge: Edge, family: Family) -> TokenCounter | None:
    """The tokenizer of the model that reads the prompt; None where it can't be read now."""
    try:
        return await asyncio.to_thread(load_counter, edge.settings, family)
    except (OSError, GenerationError) as error:
        log.warning("tokenizer_unavailable", family=family.value, error=type(error).__name__)
        return None


def _counts(counter: TokenCounter | None, before: str, after: str) -> dict[str, int] | None:
    return None if counter is None else {"original": counter.count(before), "enhanced": counter.count(after)}


async def _enhance(edge: Edge, asked: Asking) -> Enhancement:
    request = EnhanceRequest(
        prompt=asked.prompt,
        family=asked.family.value,
        format=asked.format.value,
        quality=asked.quality.value,
        enhanced7b=asked.enhanced7b,
        content_mode=asked.mode,
        seed=asked.seed,
        use_case=asked.use_case,
        seconds=asked.seconds,
    )
    absent = "model_unavailable"
    if edge.enhancer is not None:
        try:
            result: Enhancement = await asyncio.wait_for(edge.enhancer.enhance.remote(request), ANSWER_SECONDS)
            return result
        except RayTaskError as error:
            if isinstance(error.cause, RequestRefused):
                raise error.cause from None
            absent = "model_failed"
            log.warning("enhancer_failed", error=type(error.cause).__name__)
        except (RayError, RayServeException, TimeoutError) as error:
            absent = "timed_out" if isinstance(error, TimeoutError) else "replica_unavailable"
            log.warning("enhancer_away", error=type(error).__name__)
    return await _without_model(edge, request, absent)


async def _without_model(edge: Edge, request: EnhanceRequest, absent: str) -> Enhancement:
    wanted = request.wanted
    chosen, hit = await choose_template(edge.prompts, wanted)
    result = await asyncio.to_thread(
        enhance,
        request.prompt,
        chosen.template if chosen else None,
        None,
        await _counter(edge, wanted.target_model),
        wanted.content_mode,
        request.seed,
        quality=wanted.quality,
        absent=absent,
    )
    return replace(result, template_selection=chosen.account() if chosen else None, template_cache_hit=hit)


def _answer(asked: Asking, enhanced: str, account: dict[str, Any]) -> dict[str, Any]:
    original, tokens = asked.text, account["tokens"] or {"original": None, "enhanced": None}
    strategy, ratio = account["strategy"], len(enhanced) / len(original) if original else None
    preset = asked.preset
    return {
        "success": True,
        "original_prompt": original,
        "enhanced_prompt": enhanced,
        "enhancement_strategy": strategy,
        "fallback_used": account["fallback_used"],
        "fallback_reason": account["fallback_reason"],
        "enhancement_metadata": {
            **account,
            "original_length": len(original),
            "enhanced_length": len(enhanced),
            "expansion_percentage": None if ratio is None else f"{100 * ratio:.1f}",
            "job_type": asked.job_type,
            "format": asked.format.value,
            "quality": asked.quality.value,
            "content_mode": asked.mode,
            "target_model": asked.family.value,
            "model_key": asked.model_key,
            # what a job of this preset is given, as this function writes no weights
            "preset": preset
            and {
                "preset_name": preset.preset_name,
                "compel_enabled": preset.enable_compel,
                "compel_weights": preset.compel_weights if preset.enable_compel else None,
            },
            "not_used": asked.not_used,
            "token_count": tokens["enhanced"],
            "cache_hit": bool(account["template_cache_hit"]),
        },
        "enhancedPrompt": enhanced,
        "originalPrompt": original,
        "compressionRatio": ratio,
        "qualityScore": None,
        "tokenCount": {
            "original": tokens["original"],
            "enhanced": tokens["enhanced"],
            "compressed": tokens["enhanced"] if account["compression_applied"] else None,
        },
        "analytics": {
            "enhancementMethod": MODIFIED if asked.way == "modify" else METHODS.get(strategy, "none"),
            "processingTime": account["execution_time_ms"],
            "fallbackUsed": account["fallback_used"],
            "qualityMetrics": {"coherence": None, "visualAppeal": None, "technicalQuality": None},
        },
    }
