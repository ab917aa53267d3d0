"""/functions/v1: the routes that existing clients of the functions call, in both of their dialects.

Only the wire differs from /v1: what is accepted goes through the same submission. Errors are JSON with the status
codes that those clients know.
"""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from db.access import Principal
from db.idempotency import canonical_body
from deployments.prompting import negatives_of
from models.catalog import FAMILIES, Family, Format, JobType, resolve
from models.negatives import GenerationMode, negative_prompt
from models.params import ContentMode
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import QUEUE_JOB, json_object
from serve_app.api.jobs import IdempotencyKey, owned
from serve_app.api.problems import Problem
from serve_app.api.wire import Adjusted
from serve_app.edge import Edge
from serve_app.submission import Submission, submit

router = APIRouter(prefix="/functions/v1", tags=["functions"])

# read alike in both dialects, and like the fields of /v1
PLAIN = (
    "seed",
    "num_images",
    "steps",
    "width",
    "height",
    "frames",
    "fps",
    "scheduler",
    "shift",
    "compel_enabled",
    "previews",
)
# what is read from the body; anything else is carried in the job's metadata, so that nothing is lost
READ = {
    *PLAIN,
    "job_type",
    "jobType",
    "prompt",
    "original_prompt",
    "originalPrompt",
    "enhanced_prompt",
    "enhancedPrompt",
    "negative_prompt",
    "guidance_scale",
    "compel_weights",
    "reference_image_url",
    "reference_strength",
    "denoise_strength",
    "callback_url",
    "contentType",
    "content_type",
    "aspect_ratio",
    "metadata",
}
NAMES_OF_FORMAT = {Format.IMAGE: ("image", "png"), Format.VIDEO: ("video", "mp4")}
RATIOS = {"1:1": 1.0, "16:9": 16 / 9, "9:16": 9 / 16, "4:3": 4 / 3, "3:4": 3 / 4, "3:2": 3 / 2, "2:3": 2 / 3}


@router.post("/queue-job", operation_id="queueJob", openapi_extra=QUEUE_JOB)
async def queue_job(
    request: Request, edge: EdgeDep, user: User, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Queue a job: `{job_type, prompt, …}` or `{jobType, metadata: {prompt, …}}`. The answer suits both dialects."""
    body = await json_object(request)
    job_type, asked = await read_submission(edge, body)
    accepted = await submit(edge, user, asked, idempotency_key=idempotency_key, body=canonical_body(body))
    return await _answer(edge, user, job_type, accepted.job_id)


async def read_submission(edge: Edge, body: Mapping[str, Any]) -> tuple[JobType, Submission]:
    """What a body of `queue-job` asks for, in either dialect. Raises `Problem` or `RequestRefused`."""
    legacy = "jobType" in body
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    name = body.get("jobType") if legacy else body.get("job_type")
    if not isinstance(name, str) or not name:
        raise Problem(400, "missing", "is required", field="jobType" if legacy else "job_type")
    job_type = resolve(name)
    return job_type, await _submission(edge, job_type, body, metadata)


async def _submission(
    edge: Edge, job_type: JobType, body: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Submission:
    def either(*names: str) -> Any:
        """The first of these that is given, at the top level before the metadata. A seed of 0 is given."""
        for place in (body, metadata):
            for name in names:
                if place.get(name) is not None:
                    return place[name]
        return None

    reference = _text("reference_image_url", metadata.get("reference_image_url") or body.get("reference_image_url"))
    for name in ("start_reference_url", "end_reference_url"):
        if metadata.get(name):
            message = "this profile's video model takes no reference frames"
            raise Problem(503, "reference_type_unavailable", message, field=f"metadata.{name}")
    prompt = _text("prompt", either("prompt", "original_prompt", "originalPrompt"))
    _agree("quality", either("quality"), (job_type.quality.value,), job_type)
    _agree("format", either("format"), NAMES_OF_FORMAT[job_type.format], job_type)
    given: dict[str, Any] = {name: either(name) for name in (*PLAIN, "guidance_scale")}
    given |= {"prompt": prompt, "content_mode": _content_mode(job_type, body, metadata)}
    if weights := _text("compel_weights", either("compel_weights")):
        if not given["compel_enabled"]:
            raise Problem(400, "conflict", "needs compel_enabled", field="compel_weights")
        given["prompt"] = f"{prompt}, {weights}" if prompt else weights
    own = _text("negative_prompt", either("negative_prompt"))
    strength, adjustments = _strength(bool(reference), either("reference_strength"), either("denoise_strength"))
    exact = _flag(metadata, "exact_copy_mode")
    if reference:
        copy = exact and not prompt and not metadata.get("originalEnhancedPrompt")
        presets = (0.95, 1.0, 15) if copy else (0.80, 6.0, 20)
        strength = presets[0] if strength is None else strength
        guidance = given["guidance_scale"]
        if copy:
            _note_unused(own, guidance, presets[1], adjustments)
            own = None
        if guidance is None or (copy and _is_number(guidance)):
            given["guidance_scale"] = presets[1]
        given["steps"] = presets[2] if given["steps"] is None else given["steps"]
    given |= _size(edge, job_type, _text("aspect_ratio", either("aspect_ratio")), given)
    given["negative_prompt"] = await _negative(edge, job_type, given, own, bool(reference))
    enhanced = _text("enhanced_prompt", body.get("enhanced_prompt") or body.get("enhancedPrompt"))
    skip = _flag(metadata, "skip_enhancement") or metadata.get("enhancement_model") == "none"
    wanted = _flag(metadata, "user_requested_enhancement") and bool(prompt)  # an exact copy has none to enhance
    return Submission(
        job_type=job_type.name,
        given=given,
        # nothing is said of it where nothing was: the enhanced types enhance then
        enhance=False if skip else True if wanted else None,
        enhanced_prompt=enhanced if enhanced != prompt else None,
        reference_url=reference or None,
        reference_strength=strength,
        callback_url=_text("callback_url", either("callback_url")),
        metadata=_carried(body, metadata),
        adjustments=adjustments,
    )


def _carried(body: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the job keeps for its caller: the metadata, and what else is in the body and read by nobody."""
    return {name: value for name, value in body.items() if name not in READ} | dict(metadata)


def _text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise Problem(400, "type", "must be a string", field=name)


def _flag(metadata: Mapping[str, Any], name: str) -> bool:
    value = metadata.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Problem(400, "type", "must be true or false", field=f"metadata.{name}")


def _agree(name: str, value: Any, accepted: tuple[str, ...], job_type: JobType) -> None:
    """Refuse what contradicts the job type."""
    if value is not None and value not in accepted:
        message = f"must be {' or '.join(accepted)}, as {job_type.name} is"
        raise Problem(400, "conflict", message, field=name)


def _content_mode(job_type: JobType, body: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    modes = set()
    for place in (body, metadata):
        for name in ("contentType", "content_type"):
            value = place.get(name)
            if value in ("sfw", "nsfw"):
                modes.add(value)
            elif name == "content_type" and value in ("image", "video"):
                # in the older dialect it is the format of the output
                _agree(name, value, (job_type.format.value,), job_type)
            elif value is not None:
                raise Problem(400, "choice", "must be sfw or nsfw", field=name)
    if len(modes) > 1:
        raise Problem(400, "conflict", "is given as both sfw and nsfw", field="contentType")
    return next(iter(modes), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 <= value <= 1:
        raise Problem(400, "range", "must be between 0 and 1", field=name)
    return float(value)


def _strength(referenced: bool, kept: Any, noise: Any) -> tuple[float | None, list[Adjusted]]:
    """How much of the reference is kept, and what was given without effect: clients send both, always."""
    strength, denoise = _share("reference_strength", kept), _share("denoise_strength", noise)
    if not referenced:
        given = {"reference_strength": strength, "denoise_strength": denoise}
        return None, [
            Adjusted(field=name, given=value, used="none", reason="there is no reference image")
            for name, value in given.items()
            if value is not None
        ]
    if denoise is None:
        return strength, []
    used = round(1 - denoise, 6)
    if strength is None or abs(strength - used) < 1e-6:
        return used, []
    reason = "denoise_strength goes first, and is 1 less the strength"
    return used, [Adjusted(field="reference_strength", given=strength, used=used, reason=reason)]


def _note_unused(own: str | None, guidance: Any, used: float, adjustments: list[Adjusted]) -> None:
    """An exact copy has no guidance and no negative prompt: notes which of the caller's own are not used."""
    reason = "an exact copy is made without guidance"
    if _is_number(guidance) and guidance != used:
        adjustments.append(Adjusted(field="guidance_scale", given=guidance, used=used, reason=reason))
    if own:
        # of the text only how long it was: adjustments are shown where prompts are not
        given = f"{len(own)} characters"
        adjustments.append(Adjusted(field="negative_prompt", given=given, used="none", reason=reason))


def _size(edge: Edge, job_type: JobType, ratio: str | None, given: Mapping[str, Any]) -> dict[str, int]:
    """The family's size that is nearest to an aspect ratio, and of those alike the one nearest to its usual area."""
    if ratio is None:
        return {}
    if ratio not in RATIOS:
        raise Problem(400, "choice", f"must be one of {', '.join(RATIOS)}", field="metadata.aspect_ratio")
    if given["width"] is not None or given["height"] is not None:
        raise Problem(400, "conflict", "is given beside a width and height", field="aspect_ratio")
    spec = edge.settings.loaded_profile.models.get(job_type.family)
    if spec is None or spec.defaults is None:
        return {}  # the submission refuses the job type itself
    usual = spec.defaults.width * spec.defaults.height

    def misfit(size: tuple[int, int]) -> tuple[int, float]:
        # shapes within a tenth or so count as the same; among those, the size nearest to the usual area
        shape = abs(math.log(size[0] / size[1] / RATIOS[ratio]))
        return int(shape / 0.15), abs(math.log(size[0] * size[1] / usual))

    width, height = min(spec.defaults.sizes, key=misfit)
    return {"width": width, "height": height}


async def _negative(
    edge: Edge, job_type: JobType, given: Mapping[str, Any], own: str | None, from_reference: bool
) -> str | None:
    """The operator's presets and the caller's own words, for SDXL; other families get the caller's own only."""
    guidance = given["guidance_scale"]
    if isinstance(guidance, int | float) and guidance <= 1:
        return own  # nothing would come of the presets, and the caller did not choose them
    if job_type.family is not Family.SDXL or not isinstance(given["prompt"], str):
        return own
    presets = negatives_of(await edge.prompts.negatives())
    mode: ContentMode = "nsfw" if given["content_mode"] == "nsfw" else "sfw"
    kind: GenerationMode = "i2i" if from_reference else "txt2img"
    return negative_prompt(job_type.family, given["prompt"], own or "", mode, kind, presets)


async def _answer(edge: Edge, user: Principal, job_type: JobType, job_id: Any) -> dict[str, Any]:
    record = await owned(edge, user, job_id)
    row, facts = record.job, FAMILIES[job_type.family]
    depth = sum(d.jobs for d in await edge.queue.depth() if d.queue == (record.queue or {}).get("queue"))
    return {
        "success": True,
        "jobId": row["id"],
        "job_id": row["id"],
        "status": row["status"],
        "queueName": facts.legacy_queue,
        "queue": facts.legacy_queue,
        "message": "Job queued successfully",
        "job": {
            "id": row["id"],
            "user_id": row["user_id"],
            "job_type": row["job_type"],
            "format": row["format"],
            "quality": row["quality"],
            "model_type": row["model_type"],
            "status": row["status"],
            "created_at": row["created_at"],
            "metadata": row["metadata"],
            "params": row["params"],
        },
        "jobType": row["job_type"],
        "queueLength": depth,
        "modelVariant": facts.legacy_variant,
        "isSDXL": job_type.family is Family.SDXL,
        "negativePromptSupported": True,
        "adjustments": row["adjustments"],
        "fixes_applied": [],
        "debug": {
            "userId": row["user_id"],
            "hasPrompt": bool(row["original_prompt"]),
            "promptLength": len(row["original_prompt"]),
            "promptWordCount": len(row["original_prompt"].split()),
            "hasNegativePrompt": bool(row["params"]["negative_prompt"]),
            "timestamp": row["created_at"],
        },
    }
