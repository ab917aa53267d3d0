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
from models.catalog import Format, JobType, resolve
from serve_app.admission import Submission
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import CARRIED, COUNT, TEXT, dialect, json_object, one_of
from serve_app.api.fields import Fields, is_number, text
from serve_app.api.jobs import IdempotencyKey, owned
from serve_app.api.problems import Problem
from serve_app.api.queue_requests import RATIOS, nearest_size
from serve_app.api.wire import Adjusted
from serve_app.edge import Edge
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
}
PICTURE = ("image", "strength", "prompt_strength")
READ = {"prompt", "apiModelId", "jobType", "job_type", "quality", "input", "metadata", "reference_image_url", "seed"}
IMAGE = one_of(
    dialect("a job", ("prompt",), prompt=TEXT, apiModelId=TEXT, job_type=TEXT, quality=TEXT, input=CARRIED, seed=COUNT),
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
    metadata, given_input = (_object(body, name) for name in ("metadata", "input"))
    if unknown := sorted(set(given_input) - set(INPUT) - set(PICTURE)):
        field = f"input.{unknown[0]}"[:100] if unknown[0].isprintable() else "input"
        raise Problem(400, "unknown", "is no input of this function", field=field)
    fields = Fields(body, metadata)
    job_type = _job_type(fields)
    reference = _reference(fields, given_input)
    model = await _model(edge, job_type, body.get("apiModelId"), reference is not None)
    given: dict[str, Any] = {"prompt": fields.text("prompt"), "content_mode": _content_mode(metadata)}
    for theirs, ours in INPUT.items():
        if given_input.get(theirs) is not None:
            if given.get(ours, given_input[theirs]) != given_input[theirs]:
                raise Problem(400, "conflict", f"is given twice, as {theirs} too", field=f"input.{ours}")
            given[ours] = given_input[theirs]
    if body.get("seed") is not None:
        given.setdefault("seed", body["seed"])
    if model is not None:
        given["scheduler"] = _scheduler(model, given.get("scheduler"))
    given |= await _size(edge, job_type, model, fields, given)
    named = fields.text("jobType", "job_type") or job_type.name
    reason = "the job type that replicate-image makes of it"
    notes = (
        [Adjusted(field="jobType", given=named, used=job_type.name, reason=reason)] if named != job_type.name else []
    )
    return Submission(
        job_type=job_type.name,
        adjustments=notes,
        given=given,
        enhance=False,
        references=() if reference is None else (reference,),
        metadata={name: value for name, value in body.items() if name not in READ} | dict(metadata),
        provider_model=model,
    )


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


def _reference(fields: Fields, given: Mapping[str, Any]) -> AskedReference | None:
    image = text("input.image", given.get("image")) or fields.inner_text("reference_image_url")
    method = fields.choice("consistency_method", METHODS, "metadata.consistency_method")
    if image is None or image == "":
        if method in ("i2i_reference", "hybrid"):
            raise Problem(400, "missing", f"{method} needs a reference image", field="reference_image_url")
        if noise := next((name for name in PICTURE[1:] if given.get(name) is not None), None):
            raise Problem(400, "conflict", "needs a reference image", field=f"input.{noise}")
        return None
    kept = fields.share("reference_strength")
    for name in PICTURE[1:]:
        noise_share = given.get(name)
        if noise_share is None:
            continue
        if not is_number(noise_share) or not 0 <= noise_share <= 1:
            raise Problem(400, "range", "must be between 0 and 1", field=f"input.{name}")
        if kept is not None and abs(kept - (1 - noise_share)) > 1e-6:
            raise Problem(400, "conflict", "must be 1 less the reference's strength", field=f"input.{name}")
        kept = round(1 - noise_share, 6)
    return AskedReference(image=image, strength=kept)


def _content_mode(metadata: Mapping[str, Any]) -> str | None:
    mode = metadata.get("contentType")
    if mode not in (None, "sfw", "nsfw"):
        raise Problem(400, "choice", "must be sfw or nsfw", field="metadata.contentType")
    return mode


async def _size(
    edge: Edge, job_type: JobType, model: ApiModel | None, fields: Fields, given: Mapping[str, Any]
) -> dict[str, int]:
    ratio = text("metadata.aspectRatio", fields.metadata.get("aspectRatio"))
    if ratio is None or given.get("width") is not None or given.get("height") is not None:
        return {}
    if ratio not in RATIOS:
        raise Problem(400, "choice", f"must be one of {', '.join(RATIOS)}", field="metadata.aspectRatio")
    spec = await stand_in(edge, job_type, model) or edge.settings.loaded_profile.models.get(job_type.family)
    if spec is None or spec.defaults is None:
        return {}  # the submission refuses the job type itself
    width, height = nearest_size(spec.defaults, RATIOS[ratio])
    return {"width": width, "height": height}
