"""/functions/v1/replicate-image: an outside provider's images as existing clients know them.

A job of it is a job like any other. Its `predictionId` is the job's id: the provider is asked later, by the replica
that claims the job, and its own name for the prediction is in the answer to a lookup once it is known. Where no
provider is turned on the job is made here.
"""

import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request

from db.access import Principal
from db.idempotency import canonical_body
from db.jobs import Status
from db.providers import REPLICATE, ApiModel, Providers
from deployments.provider.api import VERSION
from deployments.provider.inputs import task_of
from deployments.storing import BUCKET
from models.catalog import Format, JobType, default_for, resolve
from serve_app.admission import Submission
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import CARRIED, COUNT, TEXT, dialect, json_object, one_of
from serve_app.api.fields import Fields, is_number, text
from serve_app.api.jobs import IdempotencyKey, owned
from serve_app.api.problems import Problem
from serve_app.api.queue_requests import RATIOS, nearest_size
from serve_app.api.wire import Adjusted
from serve_app.api.wire_requests import JobRequest
from serve_app.edge import Edge
from serve_app.modes import nearest_strength
from serve_app.negatives import Asked, Negative, negative_of_job, takes_rows
from serve_app.outside import stand_in
from serve_app.references import AskedReference
from serve_app.submission import submit

router = APIRouter(prefix="/functions/v1", tags=["functions"])

PREFIXES = ("sdxl_image", "rv51", "image")  # of the job types that are images
METHODS = ("i2i_reference", "hybrid", "seed_locked")
INPUT = {  # their names to ours
    "steps": "steps",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "scheduler": "scheduler",
    "negative_prompt": "negative_prompt",
    "num_outputs": "num_images",
    "num_images": "num_images",
}
PICTURE = ("image", "strength", "prompt_strength")
CONTENT_MODE, RATIO = ("contentType", "content_type", "content_mode"), ("aspectRatio", "aspect_ratio")
READ = {
    *("prompt", "apiModelId", "jobType", "job_type", "quality", "input", "metadata", "predictionId"),
    *("reference_image_url", *INPUT, *PICTURE, *CONTENT_MODE, *RATIO),
}
# fields of /v1 that this function has never had: refused, so that nobody takes them for honoured
ELSEWHERE = JobRequest.model_fields.keys() - READ - {"reference_strength"}
IMAGE = one_of(
    dialect(
        "a job",
        ("prompt",),
        **dict.fromkeys(("prompt", "apiModelId", "job_type", "quality", "negative_prompt"), TEXT),
        **dict.fromkeys(("seed", "steps"), COUNT),
        contentType={"type": "string", "enum": ["sfw", "nsfw"]},
        input=CARRIED,
    ),
    dialect("a lookup", ("predictionId",), predictionId=TEXT),
)
STATES = {
    Status.QUEUED: "starting",
    Status.PROCESSING: "processing",
    Status.COMPLETED: "succeeded",
    Status.FAILED: "failed",
    Status.CANCELLED: "canceled",
}


@router.post("/replicate-image", operation_id="replicateImage", openapi_extra=IMAGE)
async def replicate_image(
    request: Request, edge: EdgeDep, user: User, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Queue an image at the provider, or where none is turned on, here. With `predictionId`: how that one stands."""
    body = await json_object(request)
    if body.get("predictionId") is not None:
        return await _lookup(edge, user, body["predictionId"])
    asked = await _read(edge, body)
    accepted = await submit(edge, user, asked, idempotency_key=idempotency_key, body=canonical_body(body))
    record = await owned(edge, user, accepted.job_id)
    return {
        "success": True,
        "jobId": str(accepted.job_id),
        "predictionId": str(accepted.job_id),
        "status": "queued",
        "provider": record.job["provider"],
        "apiModelId": record.job["api_model_id"],
        "adjustments": record.job["adjustments"],
    }


async def _lookup(edge: Edge, user: Principal, name: Any) -> dict[str, Any]:
    """A prediction by the job's id or by the provider's name for it, to the job's owner."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
        raise Problem(400, "type", "must be a prediction's id", field="predictionId")
    providers = Providers(edge.pool)
    try:
        job_id: UUID | None = UUID(name)
    except ValueError:
        job_id = await providers.job_of(name)
    if job_id is None:
        raise Problem(404, "job_not_found", "there is no such prediction")
    record = await owned(edge, user, job_id)
    job = record.job
    seconds = edge.settings.signed_url_seconds
    error = {"code": "PREDICTION_CREATE_ERROR"} if job["error_code"] in ("provider_refused",) else {}
    return {
        "id": str(job_id),
        "jobId": str(job_id),
        "predictionId": str(job_id),
        "providerPredictionId": await providers.latest_prediction(job_id),
        "provider": job["provider"],
        "status": STATES[record.status],
        "output": [edge.signer.sign(BUCKET, asset["temp_storage_path"], seconds) for asset in record.assets],
        "error": job["error_message"] or job["error_code"],
        "created_at": job["created_at"],
        "started_at": job["started_at"],
        "completed_at": job["completed_at"],
        **error,
    }


async def _read(edge: Edge, body: Mapping[str, Any]) -> Submission:
    metadata, given_input = _object(body, "metadata"), _object(body, "input")
    if unknown := sorted(set(given_input) - set(INPUT) - set(PICTURE)):
        field = f"input.{unknown[0]}"[:100] if unknown[0].isprintable() else "input"
        raise Problem(400, "unknown", "is no input of this function", field=field)
    given_input = _with_top(given_input, body)
    for name in sorted(ELSEWHERE & body.keys()):
        if body[name] is not None and body[name] is not False:
            raise Problem(400, "unsupported", "is a field of /v1/jobs alone", field=name)
    fields, notes = Fields(body, metadata), list[Adjusted]()
    job_type = _job_type(fields)
    reference = _reference(fields, given_input, notes)
    model = await _model(edge, job_type, body.get("apiModelId"), reference is not None)
    given: dict[str, Any] = {"prompt": fields.text("prompt"), "content_mode": _content_mode(body, metadata)}
    for theirs, ours in INPUT.items():
        if given_input.get(theirs) is not None:
            if given.get(ours, given_input[theirs]) != given_input[theirs]:
                raise Problem(400, "conflict", f"is given twice, as {theirs} too", field=f"input.{ours}")
            given[ours] = given_input[theirs]
    if model is not None:
        given["scheduler"] = _scheduler(model, given.get("scheduler"))
        negative = await _negative(edge, job_type, model, given, has_reference=reference is not None)
        notes += [] if negative is None else negative.notes(given.get("negative_prompt") or "")
        given |= {} if negative is None else {"negative_prompt": negative.text or None}
    given |= await _size(edge, job_type, model, fields, given, notes)
    named = fields.text("jobType", "job_type") or job_type.name
    if named != job_type.name:
        reason = "the job type that replicate-image makes of it"
        notes.append(Adjusted(field="jobType", given=named, used=job_type.name, reason=reason))
    return Submission(
        job_type=job_type.name,
        adjustments=notes,
        given=given,
        enhance=False,
        references=() if reference is None else (reference,),
        metadata={name: value for name, value in body.items() if name not in READ} | dict(metadata),
        provider_model=model,
    )


def _with_top(given: dict[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The input with what stands at the top of the body instead. Raises `Problem` for what is in both and differs."""
    top = {name: body[name] for name in (*INPUT, *PICTURE) if body.get(name) is not None}
    for name, value in top.items():
        if given.get(name) is not None and given[name] != value:
            raise Problem(400, "conflict", f"is another one than input.{name}", field=name)
    return given | top


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise Problem(400, "type", "must be an object", field=name)
    return value or {}


def _job_type(fields: Fields) -> JobType:
    """The job type that is meant: what begins like an image's is one, of the quality that is said."""
    name, quality = fields.text("jobType", "job_type") or "sdxl_image", fields.choice("quality", ("fast", "high"))
    prefix = next((p for p in PREFIXES if name == p or name.startswith(f"{p}_")), None)
    if prefix is None:
        raise Problem(400, "choice", "must be an image's job type", field="jobType")
    said = name.removeprefix(prefix).removeprefix("_")
    if said not in ("", "fast", "high") or (said and quality and said != quality):
        raise Problem(400, "choice", "must be a job type of the quality that is given", field="jobType")
    # an image of no family in particular is one of SDXL's: the others of that name are single frames of a video model
    return resolve(f"{'sdxl_image' if prefix == 'image' else prefix}_{said or quality or 'high'}")


async def _model(edge: Edge, job_type: JobType, asked: Any, has_reference: bool) -> ApiModel | None:
    """The model that is named, or the provider's default. None where no provider is turned on: then it is made here."""
    providers = Providers(edge.pool)
    if asked is None:
        task = task_of(Format.IMAGE, has_reference)
        return await providers.offered(job_type.family.value, Format.IMAGE.value, task)
    try:
        model = await providers.model(UUID(str(asked)))
    except ValueError:
        raise Problem(400, "type", "must be a UUID", field="apiModelId") from None
    usable = model is not None and model.is_active and model.provider.is_active and model.provider.name == REPLICATE
    if model is None or not usable or model.modality != "image" or not VERSION.fullmatch(model.version or ""):
        message = "there is no such model of the provider that is turned on and has a version"
        raise Problem(400, "MODEL_VERSION_NOT_FOUND", message, field="apiModelId")
    return model


def _scheduler(model: ApiModel, name: Any) -> Any:
    """Our name of a scheduler that is given by the model's name for it."""
    aliases = model.capabilities.get("scheduler_aliases")
    ours = {theirs: ours for ours, theirs in aliases.items()} if isinstance(aliases, dict) else {}
    return ours.get(name, name) if isinstance(name, str) else name


async def _negative(
    edge: Edge, job_type: JobType, model: ApiModel, given: Mapping[str, Any], *, has_reference: bool
) -> Negative | None:
    """The operator's words for the provider's model, and the caller's. None where the caller's stay as they are."""
    own, prompt, guidance = given.get("negative_prompt"), given.get("prompt"), given.get("guidance_scale")
    if guidance is None:
        guidance = default_for(job_type.family).guidance.of(job_type.quality)
    if not isinstance(own, str | None) or not is_number(guidance) or not takes_rows(guidance, model):
        return None
    asked = Asked(
        prompt=prompt or "",
        own=own or "",
        content_mode="nsfw" if given.get("content_mode") == "nsfw" else "sfw",
        generation_mode="i2i" if has_reference else "txt2img",
    )
    return await negative_of_job(edge, job_type, model, asked)


def _reference(fields: Fields, given: Mapping[str, Any], notes: list[Adjusted]) -> AskedReference | None:
    image = text("input.image", given.get("image")) or fields.inner_text("reference_image_url")
    method = fields.choice("consistency_method", METHODS, "metadata.consistency_method")
    if image is None or image == "":
        if method in ("i2i_reference", "hybrid"):
            raise Problem(400, "missing", f"{method} needs a reference image", field="reference_image_url")
        if noise := next((name for name in PICTURE[1:] if given.get(name) is not None), None):
            raise Problem(400, "conflict", "needs a reference image", field=f"input.{noise}")
        if (unused := fields.share("reference_strength")) is not None:
            reason = "there is no reference image"
            notes.append(Adjusted(field="reference_strength", given=unused, used="none", reason=reason))
        return None
    said, kept = "reference_strength", fields.share("reference_strength")
    for name in PICTURE[1:]:
        noise_share = given.get(name)
        if noise_share is None:
            continue
        if not is_number(noise_share) or not 0 <= noise_share <= 1:
            raise Problem(400, "range", "must be between 0 and 1", field=f"input.{name}")
        if kept is not None and abs(kept - (1 - noise_share)) > 1e-6:
            raise Problem(400, "conflict", "must be 1 less the reference's strength", field=f"input.{name}")
        said, kept = f"input.{name}", round(1 - noise_share, 6)
    if kept is None:
        return AskedReference(image=image)
    used, reason = nearest_strength(kept, starts=True)
    if used != kept:
        asked, got = (kept, used) if said == "reference_strength" else (round(1 - kept, 6), round(1 - used, 6))
        notes.append(Adjusted(field=said, given=asked, used=got, reason=reason))
    return AskedReference(image=image, strength=used)


def _content_mode(body: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    """The content mode, wherever it stands. In the older dialect `content_type` is the format of the output."""
    given = {
        f"{prefix}{name}": place[name]
        for prefix, place in (("", body), ("metadata.", metadata))
        for name in CONTENT_MODE
        if place.get(name) is not None and (name != "content_type" or place[name] != Format.IMAGE.value)
    }
    for field, mode in given.items():
        if mode not in ("sfw", "nsfw"):
            raise Problem(400, "choice", "must be sfw or nsfw", field=field)
    if "nsfw" in given.values() and "sfw" in given.values():
        raise Problem(400, "conflict", "is given as both sfw and nsfw", field=next(iter(given)))
    return next(iter(given.values()), None)


async def _size(
    edge: Edge,
    job_type: JobType,
    model: ApiModel | None,
    fields: Fields,
    given: Mapping[str, Any],
    notes: list[Adjusted],
) -> dict[str, int]:
    ratio = text("metadata.aspectRatio", fields.either(*RATIO))
    if ratio is None:
        return {}
    if ratio not in RATIOS:
        raise Problem(400, "choice", f"must be one of {', '.join(RATIOS)}", field="metadata.aspectRatio")
    if given.get("width") is not None or given.get("height") is not None:
        reason = "the width and height that are given go first"
        notes.append(Adjusted(field="aspectRatio", given=ratio, used="none", reason=reason))
        return {}
    spec = await stand_in(edge, job_type, model) or edge.settings.loaded_profile.models.get(job_type.family)
    if spec is None or spec.defaults is None:
        return {}  # the submission refuses the job type itself
    width, height = nearest_size(spec.defaults, RATIOS[ratio])
    return {"width": width, "height": height}
