"""/functions/v1/enhance-prompt: one prompt, enhanced now. By the language model's replica, or, when that is away, by
rules; the answer says which. Both dialects are read, and the answer has the names of both."""

import asyncio
import secrets
from typing import Any

import structlog
from fastapi import APIRouter, Request
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from db.access import Principal
from deployments.enhancer import EnhanceRequest, enhancement_account, load_counter
from deployments.prompting import templates_of
from models.catalog import JOB_TYPES, Family, Format, Quality, RequestRefused, resolve
from models.enhancement import Enhancement, enhance
from models.params import ContentMode, clean_prompt
from models.policy import check_prompt
from models.prompts import NoTemplate, select_template
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import json_object
from serve_app.api.problems import Problem
from serve_app.edge import Edge

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

ANSWER_SECONDS = 60.0


@router.post("/enhance-prompt", operation_id="enhancePrompt")
async def enhance_prompt(request: Request, edge: EdgeDep, user: User) -> dict[str, Any]:
    """Enhance a prompt for a job type. 200 also when rules had to stand in: `fallback_used` says so."""
    body = await json_object(request)
    prompt = clean_prompt("prompt", body.get("prompt") or body.get("original_prompt") or "")
    for name in ("jobType", "job_type", "format", "quality", "model", "contentType", "contentRating"):
        if not isinstance(body.get(name), str | None):
            raise Problem(400, "type", "must be a string", field=name)
    mode = _mode(edge, user, body)
    check_prompt(prompt, mode)
    family, format, quality, enhanced7b, job_type = _target(edge, body)
    asked = EnhanceRequest(
        prompt, family.value, format.value, quality.value, enhanced7b, mode, secrets.randbelow(2**31)
    )
    try:
        result = await _enhance(edge, asked)
    except NoTemplate as error:
        raise Problem(503, error.code, str(error)) from None
    return _answer(result, job_type, format, quality, mode)


async def _enhance(edge: Edge, asked: EnhanceRequest) -> Enhancement:
    if edge.enhancer is not None:
        try:
            result: Enhancement = await asyncio.wait_for(edge.enhancer.enhance.remote(asked), ANSWER_SECONDS)
            return result
        except RayTaskError as error:
            if isinstance(error.cause, RequestRefused | NoTemplate):
                raise error.cause from None
            log.warning("enhancer_failed", error=type(error.cause).__name__)
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("enhancer_away", error=type(error).__name__)
    return await _by_rules(edge, asked)


async def _by_rules(edge: Edge, asked: EnhanceRequest) -> Enhancement:
    family, quality = Family(asked.family), Quality(asked.quality)
    mode: ContentMode = "nsfw" if asked.content_mode == "nsfw" else "sfw"
    templates = templates_of(await edge.prompts.templates())
    template, _ = select_template(templates, family, Format(asked.format), quality, asked.enhanced7b, mode)
    counter = await asyncio.to_thread(load_counter, edge.settings, family)
    return await asyncio.to_thread(enhance, asked.prompt, template, None, counter, mode, asked.seed, quality=quality)


def _mode(edge: Edge, user: Principal, body: dict[str, Any]) -> ContentMode:
    wanted = body.get("contentType") or body.get("contentRating") or "sfw"
    if wanted not in ("sfw", "nsfw"):
        message = "only plain prompts are enhanced here; scenes need the chat routes"
        raise Problem(501, "not_implemented", message, field="contentType")
    if wanted == "nsfw" and not (edge.settings.loaded_profile.nsfw_allowed and user.age_verified):
        raise Problem(403, "nsfw_not_allowed", "nsfw content is not open to you here", field="contentType")
    return "nsfw" if wanted == "nsfw" else "sfw"


def _target(edge: Edge, body: dict[str, Any]) -> tuple[Family, Format, Quality, bool, str]:
    """What the prompt is for: a job type of the catalog, or just `image` or `video`."""
    name = body.get("jobType") or body.get("job_type") or body.get("format") or "image"
    if isinstance(name, str) and name in JOB_TYPES:
        job_type = resolve(name)
        family, format, quality, enhanced = job_type.family, job_type.format, job_type.quality, job_type.enhanced
    elif name in ("image", "video"):
        family, enhanced = (Family.WAN if name == "video" else Family.SDXL), False
        format, quality = Format(name), Quality.FAST
    else:
        raise Problem(400, "unknown_job_type", "is no job type", field="jobType")
    quality = Quality(_choice(body, "quality", ("fast", "high")) or quality)
    family = Family(_choice(body, "model", ("sdxl", "wan")) or family)
    if not any(known.family is family and known.format is format for known in JOB_TYPES.values()):
        raise Problem(400, "conflict", f"a {family.value} model makes no {format.value}", field="model")
    if family not in edge.settings.loaded_profile.models:
        raise Problem(503, "model_not_installed", f"the profile has no {family.value} model", field="jobType")
    return family, format, quality, enhanced, str(name)


def _choice(body: dict[str, Any], name: str, values: tuple[str, ...]) -> str | None:
    value = body.get(name)
    if value is not None and value not in values:
        raise Problem(400, "choice", f"must be one of {', '.join(values)}", field=name)
    return value


def _answer(result: Enhancement, job_type: str, format: Format, quality: Quality, mode: str) -> dict[str, Any]:
    account = enhancement_account(result)
    original, enhanced = len(result.original_prompt), len(result.enhanced_prompt)
    return {
        "success": True,
        "original_prompt": result.original_prompt,
        "enhanced_prompt": result.enhanced_prompt,
        "enhancement_strategy": result.strategy,
        "fallback_used": result.fallback_used,
        "fallback_reason": result.fallback_reason,
        "enhancement_metadata": {
            **account,
            "original_length": original,
            "enhanced_length": enhanced,
            "expansion_percentage": f"{100 * enhanced / original:.1f}",
            "job_type": job_type,
            "format": format.value,
            "quality": quality.value,
            "content_mode": mode,
            "token_count": result.tokens.enhanced,
            "cache_hit": False,
        },
        "enhancedPrompt": result.enhanced_prompt,
        "originalPrompt": result.original_prompt,
        "compressionRatio": enhanced / original,
        "qualityScore": None,
        "tokenCount": {
            "original": result.tokens.original,
            "enhanced": result.tokens.enhanced,
            "compressed": result.tokens.enhanced if result.compression_applied else None,
        },
        "analytics": {
            "enhancementMethod": "chat_worker" if result.strategy == "qwen" else "rule_based",
            "processingTime": result.execution_time_ms,
            "fallbackUsed": result.fallback_used,
            "qualityMetrics": {"coherence": None, "visualAppeal": None, "technicalQuality": None},
        },
    }
