"""Accepting a job: from what a caller said, in whatever dialect, to a row. The order of the checks is the order
of the code; nothing is stored before all of them have passed, but for reference images just before the row.
"""

import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from uuid6 import uuid7

from db.access import Principal
from db.idempotency import canonical_body
from db.jobs import Accepted, NewJob, Stage
from db.pool import CONNECTION_FAULTS
from deployments.destinations import EgressError
from deployments.storing import REFERENCE_BUCKET
from models.catalog import Family, FamilyDefaults, JobType, resolve
from models.costs import shape_name
from models.params import FieldError, GenerationParams, GivenParams, InvalidParams, Resolved, resolve_params
from models.policy import check_prompt
from models.profile import ModelSpec
from serve_app.api.problems import Problem, problem_of
from serve_app.api.wire import Adjusted, FieldProblem
from serve_app.edge import Edge
from serve_app.lora_names import known_loras
from serve_app.references import forget_references, keep_reference

ENHANCE_SECONDS = 3.0  # of predicted work, until runs have been measured
MAX_BATCH_REFERENCES = 5
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
    mask_url: str | None = None  # of the reference
    callback_url: str | None = None
    callback_events: list[str] | None = None
    interactive: bool = True
    start_after_seconds: float | None = None
    start_deadline_seconds: float | None = None
    deadline_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    adjustments: Sequence[Adjusted] = ()  # what was said in the caller's dialect and could not be used as given
    traceparent: str | None = None
    job_id: UUID | None = None  # the id that another system gave it, which it keeps; else a new one


@dataclass(frozen=True)
class Checked:
    """A submission that passed every check that can be made without fetching its reference."""

    job_type: JobType
    resolved: Resolved
    enhanced: str | None
    enhances: bool


async def submit(
    edge: Edge, user: Principal, asked: Submission, *, idempotency_key: str | None = None, body: bytes = b""
) -> Accepted:
    """Accept a job. Raises `Problem`, `RequestRefused`, `InvalidInput` or `EgressError`; then nothing is stored."""
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body)
        if earlier is not None:
            return earlier[0]
    job, stored = await _prepare(edge, user, asked, await check(edge, user, asked))
    async with kept_references(edge, stored) as keep:
        accepted = await edge.jobs.accept(job, idempotency_key=idempotency_key, body=body)
        keep(not accepted.replayed)
    if not accepted.replayed:
        edge.notifier.queue(job.queue)
    return accepted


async def submit_together(
    edge: Edge, user: Principal, asked: Sequence[Submission], *, idempotency_key: str | None = None, body: bytes = b""
) -> list[Accepted]:
    """Accept several jobs, all or none. A `Problem` of one of them has `jobs.N` before its fields."""
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body, len(asked))
        if earlier is not None:
            return earlier
    if sum(one.reference_url is not None for one in asked) > MAX_BATCH_REFERENCES:
        message = f"at most {MAX_BATCH_REFERENCES} jobs of a batch may have a reference image, which is fetched first"
        raise Problem(422, "too_many_references", message, field="jobs")
    checked, jobs, stored = [], [], list[str]()
    for n, one in enumerate(asked):
        with _numbered(n):
            checked.append(await check(edge, user, one))
    async with kept_references(edge, stored) as keep:
        for n, one in enumerate(asked):
            with _numbered(n):
                job, keys = await _prepare(edge, user, one, checked[n])
            jobs.append(job)
            stored += keys
        accepted = await edge.jobs.accept_together(jobs, idempotency_key=idempotency_key, body=body)
        keep(not accepted[0].replayed)
    if not accepted[0].replayed:
        for queue in {job.queue for job in jobs}:
            edge.notifier.queue(queue)
    return accepted


@contextlib.asynccontextmanager
async def kept_references(edge: Edge, references: list[str]) -> AsyncIterator[Callable[[bool], None]]:
    """Keeps stored references if the body says so, and deletes them if not, or if it fails."""
    keep = False

    def decide(value: bool) -> None:
        nonlocal keep
        keep = value

    try:
        yield decide
    except CONNECTION_FAULTS:
        # nobody knows whether the jobs were accepted, and they would need them; where they were not, the sweep finds
        # the files. The same holds for a caller that is gone
        raise
    except Exception:
        await forget_references(edge, references)
        raise
    if not keep:
        await forget_references(edge, references)


@contextlib.contextmanager
def _numbered(n: int) -> Iterator[None]:
    """Problems of one job among several, with its number before the field."""
    try:
        yield
    except Exception as error:
        problem = problem_of(error)
        if problem.status >= 500 and not isinstance(error, Problem):
            raise
        errors = [e.model_copy(update={"field": f"jobs.{n}.{e.field}"}) for e in problem.errors]
        errors = errors or [FieldProblem(field=f"jobs.{n}", message=problem.detail, code=problem.code)]
        raise Problem(problem.status, problem.code, problem.detail, errors=errors) from None


async def _prepare(edge: Edge, user: Principal, asked: Submission, checked: Checked) -> tuple[NewJob, list[str]]:
    """The row of a job, and the keys of the reference and the mask that were stored for it."""
    job_type, params, stored = checked.job_type, checked.resolved.params, list[str]()
    if params.seed is None:
        params = params.model_copy(update={"seed": secrets.randbelow(2**32)})
    job_id = asked.job_id or UUID(int=uuid7().int)
    if asked.reference_url is not None and params.reference is not None:
        # where the id is not a new one, another job may have it, whose file must not be written over
        name = f"{job_id}.{secrets.token_hex(8)}" if asked.job_id else str(job_id)
        reference = await keep_reference(
            edge, asked.reference_url, asked.mask_url, f"{user.user_id}/{name}", params.reference
        )
        params, stored = params.model_copy(update={"reference": reference}), [*reference.keys]
    job = NewJob(
        id=job_id,
        user_id=user.user_id,
        job_type=job_type.name,
        format=job_type.format.value,
        quality=job_type.quality.value,
        model_type=job_type.family.value,
        stage=Stage.ENHANCE if checked.enhances else Stage.GENERATE,
        queue=Family.QWEN.value if checked.enhances else job_type.family.value,
        cost=ENHANCE_SECONDS if checked.enhances else await edge.predictions.seconds(job_type, params),
        credits=job_type.credits,
        original_prompt=params.prompt,
        enhanced_prompt=checked.enhanced,
        params=params.model_dump(mode="json"),
        shape=shape_name(params),
        loras=[use.name for use in params.loras],
        content_mode=params.content_mode,
        metadata=asked.metadata,
        adjustments=[dict(vars(a)) for a in (*asked.adjustments, *checked.resolved.adjustments)],
        klass=int(asked.interactive),
        max_attempts=edge.settings.max_attempts,
        callback_url=asked.callback_url,
        callback_events=asked.callback_events or ("processing", "completed", "failed", "cancelled"),
        traceparent=asked.traceparent,
        start_after_seconds=asked.start_after_seconds,
        start_deadline_seconds=asked.start_deadline_seconds,
        deadline_seconds=asked.deadline_seconds,
    )
    return job, stored


async def check(edge: Edge, user: Principal, asked: Submission) -> Checked:
    """Everything that can be said of a submission before its reference is fetched. Raises as `submit` does."""
    check_metadata(asked.metadata)
    job_type = resolve(asked.job_type)
    spec = installed(edge, job_type)
    given = _given(asked)
    check_content_mode(edge, user, given.content_mode, with_upload=asked.reference_url is not None)
    assert spec.defaults is not None  # every media family has them
    try:
        known = await known_loras(edge, spec, given.loras or ())
        resolved = resolve_params(job_type, given, spec.defaults, known)
    except InvalidParams as error:
        raise _as_given(error) from None
    params = resolved.params
    check_prompt(params.prompt, params.content_mode)
    enhanced = _enhanced_prompt(job_type, asked, spec.defaults)
    if enhanced:
        check_prompt(enhanced, params.content_mode)
    enhances = _enhances(job_type, asked, params)
    await _check_callback(edge, asked)
    return Checked(job_type, resolved, enhanced, enhances)


def installed(edge: Edge, job_type: JobType) -> ModelSpec:
    """The profile's model for a job type. Raises `Problem` where it has none."""
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
        needing = {
            "reference_strength": asked.reference_strength,
            "reference_type": asked.reference_kind,
            "mask_image_url": asked.mask_url,
        }
        errors += [
            FieldError(name, "needs a reference_image_url", "conflict")
            for name, value in needing.items()
            if value is not None
        ]
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


def check_content_mode(edge: Edge, user: Principal, mode: str | None, *, with_upload: bool) -> None:
    """Raise `Problem` where this user may not have that content mode here, with or without an uploaded reference."""
    if mode != "nsfw":
        return
    if not edge.settings.loaded_profile.nsfw_allowed:
        raise Problem(403, "nsfw_not_allowed", "this installation makes sfw content only", field="content_mode")
    if not user.age_verified:
        raise Problem(403, "age_not_verified", "nsfw content needs an age-verified user", field="content_mode")
    if with_upload:
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
