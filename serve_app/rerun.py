"""Making a completed job again: the same parameters, seed, words and reference, as a job of its own."""

from typing import Any
from uuid import UUID

from pydantic import ValidationError
from uuid6 import uuid7

from db.access import Principal
from db.blobs import BlobNotFound
from db.jobs import Accepted, JobRecord, NewJob, Stage, Status
from models.catalog import resolve
from models.denoising.costs import rows_of, shape_name
from models.lora.loras import lora_errors
from models.params import GenerationParams, InvalidParams
from models.policy import signs_beside
from models.prompting.enhancement import strategy_of
from serve_app.admission import check_content_mode, check_words, installed
from serve_app.api.problems import Problem
from serve_app.edge import Edge
from serve_app.lora_names import known_loras
from serve_app.references import copy_references
from serve_app.submission import kept_references


async def rerun(
    edge: Edge, user: Principal, record: JobRecord, *, idempotency_key: str | None = None, body: bytes = b""
) -> Accepted:
    """Accept the same job again, for the one who asks. Its words are checked anew, as the rules may have changed; its
    prompt is not enhanced again, but used as it was. Raises `Problem`, `RequestRefused`, `InvalidParams`; then nothing
    is stored."""
    row = record.job
    if record.status is not Status.COMPLETED or row["provider"] != "local":
        raise Problem(409, "not_rerunnable", f"a job that is {record.status} here can't be made again")
    try:
        params = GenerationParams.model_validate(row["params"])
    except ValidationError:
        message = "the job is of a version whose parameters are not known here"
        raise Problem(409, "not_rerunnable", message) from None
    job_type = resolve(row["job_type"])
    known = await known_loras(edge, installed(edge, job_type), params.loras)
    if errors := lora_errors(params.loras, known, job_type.name):
        raise InvalidParams(errors)
    check_content_mode(edge, user, params.content_mode, with_upload=bool(params.references))
    await check_words(params, params.prompt, row["enhanced_prompt"], beside=signs_beside(params))
    # previews change no pixel; alone in its forwards, the job is as it would be at any time
    params = params.model_copy(update={"previews": False, "reproducible": True})
    job_id = UUID(int=uuid7().int)
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body)
        if earlier is not None:
            return earlier[0]
    params = await _with_own_references(edge, params, f"{user.user_id}/{job_id}")
    batch_size = _batch_size(row, params)
    job = NewJob(
        id=job_id,
        user_id=user.user_id,
        job_type=job_type.name,
        format=job_type.format.value,
        quality=job_type.quality.value,
        model_type=job_type.family.value,
        stage=Stage.GENERATE,
        queue=job_type.family.value,
        cost=await edge.predictions.seconds(job_type, params),
        credits=job_type.credits,
        exempt=user.is_admin(),
        original_prompt=row["original_prompt"],
        enhanced_prompt=row["enhanced_prompt"],
        enhancement_strategy=strategy_of(False, params.compel_enabled),
        params=params.model_dump(mode="json"),
        shape=shape_name(params),
        rows=rows_of(params.model_copy(update={"num_images": batch_size or params.num_images})),
        loras=[use.name for use in params.loras],
        content_mode=params.content_mode,
        metadata={"rerun_of": row["id"]},
        max_attempts=edge.settings.max_attempts,
        batch_size=batch_size,
    )
    stored = [key for one in params.references for key in one.keys]
    async with kept_references(edge, stored) as keep:
        accepted = await edge.jobs.accept(job, idempotency_key=idempotency_key, body=body)
        keep(not accepted.replayed)
    if not accepted.replayed:
        edge.notifier.queue(job.queue)
    return accepted


def _batch_size(row: Any, params: GenerationParams) -> int | None:
    """How many images at a time the run made, where that was fewer than all: it moves the last bits of a result."""
    size = (row["generation_settings"] or {}).get("batch_size")
    return size if isinstance(size, int) and 0 < size < params.num_images else None


async def _with_own_references(edge: Edge, params: GenerationParams, name: str) -> GenerationParams:
    """The parameters with copies of the references and their masks."""
    if not params.references:
        return params
    try:
        references = await copy_references(edge, params.references, name)
    except BlobNotFound:
        raise Problem(409, "not_rerunnable", "a reference image of the job is no longer stored") from None
    return params.model_copy(update={"references": references})
