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
from serve_app.api.bodies import SWITCH, TEXT, dialect, json_object, one_of
from serve_app.api.problems import Problem
from serve_app.edge import Edge

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

ANSWER_SECONDS = 60.0
METHODS = {"qwen": "chat_worker", "rule_based": "rule_based", "none": "none"}
NAMES = ("jobType", "job_type", "format", "quality", "model", "contentType", "contentRating")
_SHARED: dict[str, Any] = {
    "format": {"type": "string", "enum": ["image", "video"]},
    "quality": {"type": "string", "enum": ["fast", "high"]},
    "model": {"type": "string", "enum": ["sdxl", "wan"]},
    "contentType": {"type": "string", "enum": ["sfw", "nsfw"]},
    "metadata": {"type": "object", "properties": {"exact_copy_mode": SWITCH}},
}
BODY = one_of(
    dialect("snake_case", ("original_prompt",), original_prompt=TEXT, job_type=TEXT, **_SHARED),
    dialect("camelCase", ("prompt",), prompt=TEXT, jobType=TEXT, **_SHARED),
)


@router.post("/enhance-prompt", operation_id="enhancePrompt", openapi_extra=BODY)
async def enhance_prompt(request: Request, edge: EdgeDep, user: User) -> dict[str, Any]:
    """Enhance a prompt for a job type. 200 also when rules had to stand in: `fallback_used` says so."""
    body = await json_object(request)
    field = "original_prompt" if body.get("prompt") in (None, "") and body.get("original_prompt") else "prompt"
    text = body.get(field)
    prompt = clean_prompt(field, "" if text is None else text)
    for name in NAMES:
        if not isinstance(body.get(name), str | None):
            raise Problem(400, "type", "must be a string", field=name)
    mode = _mode(edge, user, body)
    check_prompt(prompt, mode)
    family, format, quality, enhanced7b, job_type = _target(edge, body)
    facts = {"job_type": job_type, "format": format.value, "quality": quality.value, "content_mode": mode}
    if _exact_copy(body):
        return _answer(str(text), str(text), await _no_account(edge, family, str(text)), facts)
    asked = EnhanceRequest(
        prompt, family.value, format.value, quality.value, enhanced7b, mode, secrets.randbelow(2**31)
    )
    try:
        result = await _enhance(edge, asked)
    except NoTemplate as error:
        raise Problem(503, error.code, str(error)) from None
    return _answer(result.original_prompt, result.enhanced_prompt, enhancement_account(result), facts)


def _exact_copy(body: dict[str, Any]) -> bool:
    """Whether the prompt is for an exact copy of an image, which changes no word of it."""
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    wanted = metadata.get("exact_copy_mode")
    if not isinstance(wanted, bool | None):
        raise Problem(400, "type", "must be true or false", field="metadata.exact_copy_mode")
    return bool(wanted)


async def _no_account(edge: Edge, family: Family, text: str) -> dict[str, Any]:
    """The account of an enhancement that was not made."""
    counter = await asyncio.to_thread(load_counter, edge.settings, family)
    tokens = await asyncio.to_thread(counter.count, text)
    return {
        "strategy": "none",
        "fallback_used": False,
        "fallback_reason": None,
        "template_name": None,
        "token_limit": None,
        "tokens": {"original": tokens, "enhanced": tokens},
        "compression_applied": False,
        "model_used": None,
        "execution_time_ms": 0,
        "new_tokens": 0,
        "cached": False,
    }


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


def _answer(original: str, enhanced: str, account: dict[str, Any], facts: dict[str, str]) -> dict[str, Any]:
    tokens = account["tokens"]
    return {
        "success": True,
        "original_prompt": original,
        "enhanced_prompt": enhanced,
        "enhancement_strategy": account["strategy"],
        "fallback_used": account["fallback_used"],
        "fallback_reason": account["fallback_reason"],
        "enhancement_metadata": {
            **account,
            "original_length": len(original),
            "enhanced_length": len(enhanced),
            "expansion_percentage": f"{100 * len(enhanced) / len(original):.1f}",
            **facts,
            "token_count": tokens["enhanced"],
            "cache_hit": False,
        },
        "enhancedPrompt": enhanced,
        "originalPrompt": original,
        "compressionRatio": len(enhanced) / len(original),
        "qualityScore": None,
        "tokenCount": {
            "original": tokens["original"],
            "enhanced": tokens["enhanced"],
            "compressed": tokens["enhanced"] if account["compression_applied"] else None,
        },
        "analytics": {
            "enhancementMethod": METHODS[account["strategy"]],
            "processingTime": account["execution_time_ms"],
            "fallbackUsed": account["fallback_used"],
            "qualityMetrics": {"coherence": None, "visualAppeal": None, "technicalQuality": None},
        },
    }
