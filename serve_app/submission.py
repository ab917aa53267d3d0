"""Accepting a job: from what a caller said, in whatever dialect, to a row. The order of the checks is the order
of the code; nothing is stored before all of them have passed, but for the reference image just before the row.
"""

import asyncio
import contextlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from uuid6 import uuid7

from db.access import Principal
from db.blobs import StorageUnavailable
from db.jobs import Accepted, NewJob, Stage, canonical_body
from deployments.destinations import EgressError
from deployments.storing import REFERENCE_BUCKET
from models.catalog import Family, FamilyDefaults, JobType, resolve
from models.media import open_reference
from models.params import FieldError, GenerationParams, GivenParams, InvalidParams, Reference, resolve_params
from models.policy import check_prompt
from models.profile import ModelSpec
from serve_app.api.problems import Problem
from serve_app.api.wire import Adjusted
from serve_app.edge import Edge

REFERENCE_SECONDS = 20.0
REFERENCE_TYPES = ("image/png", "image/jpeg", "image/webp")
ENHANCE_SECONDS = 3.0  # of predicted work, until runs have been measured
# decoding a large reference takes a second and hundreds of megabytes: off the event loop, and few at a time
_decoding = asyncio.Semaphore(2)
MAX_METADATA_BYTES = 16_384
MAX_METADATA_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a caller asks for, after the dialect has been read."""

    job_type: str
    given: Mapping[str, Any]  # canonical parameter names
    enhance: bool | None = None
    enhanced_prompt: str | None = None  # given by the caller: no enhancement is run
    reference_url: str | None = None
    reference_strength: float | None = None
    reference_kind: str | None = None
    callback_url: str | None = None
    callback_events: list[str] | None = None
    interactive: bool = True
    start_after_seconds: float | None = None
    start_deadline_seconds: float | None = None
    deadline_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    adjustments: Sequence[Adjusted] = ()  # what was said in the caller's dialect and could not be used as given
    traceparent: str | None = None


async def submit(
    edge: Edge, user: Principal, asked: Submission, *, idempotency_key: str | None = None, body: bytes = b""
) -> Accepted:
    """Accept a job. Raises `Problem`, `RequestRefused`, `InvalidInput` or `EgressError`; then nothing is stored."""
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body)
        if earlier is not None:
            return Accepted(earlier, replayed=True)
    check_metadata(asked.metadata)
    job_type = resolve(asked.job_type)
    spec = _installed(edge, job_type)
    given = _given(asked)
    _check_content_mode(edge, user, given, asked)
    assert spec.defaults is not None  # every media family has them
    try:
        resolved = resolve_params(job_type, given, spec.defaults)
    except InvalidParams as error:
        raise _as_given(error) from None
    params = resolved.params
    check_prompt(params.prompt, params.content_mode)
    enhanced = _enhanced_prompt(job_type, asked, spec.defaults)
    if enhanced:
        check_prompt(enhanced, params.content_mode)
    enhances = _enhances(job_type, asked, params)
    await _check_callback(edge, asked)
    if params.seed is None:
        params = params.model_copy(update={"seed": secrets.randbelow(2**32)})

    job_id = UUID(int=uuid7().int)
    params, stored = await _keep_reference(edge, user, job_id, asked, params)
    stage = Stage.ENHANCE if enhances else Stage.GENERATE
    job = NewJob(
        id=job_id,
        user_id=user.user_id,
        job_type=job_type.name,
        format=job_type.format.value,
        quality=job_type.quality.value,
        model_type=job_type.family.value,
        stage=stage,
        queue=Family.QWEN.value if enhances else job_type.family.value,
        cost=ENHANCE_SECONDS if enhances else await predicted_seconds(edge, job_type),
        credits=job_type.credits,
        original_prompt=params.prompt,
        enhanced_prompt=enhanced,
        params=params.model_dump(mode="json"),
        content_mode=params.content_mode,
        metadata=asked.metadata,
        adjustments=[dict(vars(a)) for a in (*asked.adjustments, *resolved.adjustments)],
        klass=int(asked.interactive),
        max_attempts=edge.settings.max_attempts,
        callback_url=asked.callback_url,
        callback_events=asked.callback_events or ("processing", "completed", "failed", "cancelled"),
        traceparent=asked.traceparent,
        start_after_seconds=asked.start_after_seconds,
        start_deadline_seconds=asked.start_deadline_seconds,
        deadline_seconds=asked.deadline_seconds,
    )
    try:
        accepted = await edge.jobs.accept(job, idempotency_key=idempotency_key, body=body)
    except BaseException:
        await _forget(edge, stored)
        raise
    if accepted.replayed:
        await _forget(edge, stored)
    else:
        edge.notifier.queue(job.queue)
    return accepted


async def predicted_seconds(edge: Edge, job_type: JobType) -> float:
    """What a run costs in fair sharing: the measured mean, or the catalog's guess before the first run."""
    measured = await edge.jobs.run_seconds(job_type.name)
    return max(measured if measured is not None else job_type.initial_seconds, 0.001)


def _installed(edge: Edge, job_type: JobType) -> ModelSpec:
    spec = edge.settings.loaded_profile.models.get(job_type.family)
    if spec is None:
        name = edge.settings.loaded_profile.name
        message = f"the profile {name} has no {job_type.family.value} model, which {job_type.name} needs"
        raise Problem(503, "model_not_installed", message, field="job_type")
    return spec


def _given(asked: Submission) -> GivenParams:
    values = {name: value for name, value in asked.given.items() if value is not None}
    errors = []
    if asked.reference_url is not None:
        if asked.reference_kind in ("style", "character"):
            message = f"this profile has no adapter for {asked.reference_kind} references"
            raise Problem(503, "reference_type_unavailable", message, field="reference_type")
        reference: dict[str, Any] = {"bucket": REFERENCE_BUCKET, "key": "pending"}
        if asked.reference_strength is not None:
            reference["strength"] = asked.reference_strength
        if asked.reference_kind is not None:
            reference["kind"] = asked.reference_kind
        values["reference"] = reference
    else:
        for name, value in (("strength", asked.reference_strength), ("type", asked.reference_kind)):
            if value is not None:
                errors.append(FieldError(f"reference_{name}", "needs a reference_image_url", "conflict"))
    if errors:
        raise InvalidParams(errors)
    try:
        return GivenParams(**values)
    except InvalidParams as error:
        raise _as_given(error) from None


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise `Problem` for metadata that is too large, or that could not be kept and given back as it is."""
    fault = _unkept(metadata)
    if fault is None and len(canonical_body(metadata)) > MAX_METADATA_BYTES:
        fault = f"may have at most {MAX_METADATA_BYTES} bytes of JSON"
    if fault is not None:
        raise Problem(422, "metadata", fault, field="metadata")


def _unkept(value: Any, depth: int = 0) -> str | None:
    if isinstance(value, str):
        bad = any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)
        return "holds a character that can't be stored" if bad else None
    if isinstance(value, float) and not math.isfinite(value):
        return "holds a number that JSON does not have"
    if not isinstance(value, Mapping | list):
        return None
    if depth == MAX_METADATA_DEPTH:
        return f"may be nested at most {MAX_METADATA_DEPTH} deep"
    inner = [*value, *value.values()] if isinstance(value, Mapping) else value
    return next((fault for item in inner if (fault := _unkept(item, depth + 1)) is not None), None)


def _enhanced_prompt(job_type: JobType, asked: Submission, defaults: FamilyDefaults) -> str | None:
    """The caller's own enhancement, under the rules that hold for every prompt."""
    if not asked.enhanced_prompt:
        return None
    try:
        return resolve_params(job_type, GivenParams(prompt=asked.enhanced_prompt), defaults).params.prompt
    except InvalidParams as error:
        raise InvalidParams([FieldError("enhanced_prompt", e.message, e.code) for e in error.errors]) from None


def _enhances(job_type: JobType, asked: Submission, params: GenerationParams) -> bool:
    if job_type.enhanced and asked.enhance is False:
        raise InvalidParams([FieldError("enhance", f"{job_type.name} always enhances", "conflict")])
    if asked.enhance and not params.prompt:
        raise InvalidParams([FieldError("enhance", "needs a prompt", "conflict")])
    return (job_type.enhanced or bool(asked.enhance)) and not asked.enhanced_prompt


_WIRE_NAMES = {
    "reference": "reference_image_url",
    "reference.strength": "reference_strength",
    "reference.kind": "reference_type",
}


def _as_given(error: InvalidParams) -> InvalidParams:
    """The same errors, with the names that the caller knows the fields by."""
    return InvalidParams([FieldError(_WIRE_NAMES.get(e.field, e.field), e.message, e.code) for e in error.errors])


def _check_content_mode(edge: Edge, user: Principal, given: GivenParams, asked: Submission) -> None:
    if given.content_mode != "nsfw":
        return
    if not edge.settings.loaded_profile.nsfw_allowed:
        raise Problem(403, "nsfw_not_allowed", "this installation makes sfw content only", field="content_mode")
    if not user.age_verified:
        raise Problem(403, "age_not_verified", "nsfw content needs an age-verified user", field="content_mode")
    if asked.reference_url is not None:
        message = "in nsfw mode a reference must be an image that this system made"
        raise Problem(403, "reference_not_allowed", message, field="reference_image_url")


async def _check_callback(edge: Edge, asked: Submission) -> None:
    if asked.callback_url is None:
        if asked.callback_events is not None:
            raise Problem(422, "missing", "callback_events need a callback_url", field="callback_url")
        return
    try:
        await edge.egress.check(asked.callback_url)
    except EgressError as error:
        raise Problem(422, error.code, str(error), field="callback_url") from None


async def _keep_reference(
    edge: Edge, user: Principal, job_id: UUID, asked: Submission, params: GenerationParams
) -> tuple[GenerationParams, str | None]:
    """Fetch, look at and store the reference, so that replicas read it from us and never from the internet."""
    if asked.reference_url is None or params.reference is None:
        return params, None
    settings = edge.settings
    try:
        fetched = await edge.egress.fetch(
            asked.reference_url, settings.max_reference_bytes, REFERENCE_SECONDS, REFERENCE_TYPES
        )
    except EgressError as error:
        raise Problem(422, error.code, str(error), field="reference_image_url") from None
    async with _decoding:
        await asyncio.to_thread(
            open_reference, fetched.data, settings.max_reference_pixels, settings.max_reference_bytes
        )
    key = f"{user.user_id}/{job_id}.{fetched.content_type.partition('/')[2]}"
    await edge.blobs.put(REFERENCE_BUCKET, key, fetched.data, fetched.content_type)
    reference = Reference(**(params.reference.model_dump() | {"bucket": REFERENCE_BUCKET, "key": key}))
    return params.model_copy(update={"reference": reference}), key


async def _forget(edge: Edge, key: str | None) -> None:
    if key is not None:
        with contextlib.suppress(StorageUnavailable):
            await edge.blobs.delete(REFERENCE_BUCKET, [key])
