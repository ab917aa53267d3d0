"""What is checked of a job before it is accepted. The order of the checks is the order of the code; none of them reads
a byte of a reference, fetches or stores anything.
"""

import asyncio
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from db.access import Principal
from db.idempotency import canonical_body
from db.providers import ApiModel
from deployments.destinations import EgressError
from deployments.storing import REFERENCE_BUCKET
from models.catalog import FamilyDefaults, Format, JobType, resolve
from models.guiding.reference import FRAMES
from models.params import FieldError, GenerationParams, GivenParams, InvalidParams, Resolved, resolve_params
from models.policy import NO_SIGNS, check_signs, signs_in, with_weighted_terms
from models.profile import ModelSpec
from models.prompting.signs import Signs
from serve_app.api.problems import Problem
from serve_app.api.wire import Adjusted
from serve_app.destined import check_destination
from serve_app.edge import Edge
from serve_app.lora_names import known_loras
from serve_app.outside import Outside, placed, stand_in
from serve_app.references import (
    AskedReference,
    Located,
    check_made_here,
    check_sfw,
    locate_references,
    not_made_here,
    signs_shown,
)
from serve_app.strategies import read_strategy

MAX_METADATA_BYTES = 16_384
MAX_METADATA_DEPTH = 32
_AT_ONCE = 400  # characters that are judged faster than a thread could be asked to


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a caller asks for, after the dialect has been read."""

    job_type: str
    given: Mapping[str, Any]  # canonical parameter names
    enhance: bool | None = None
    strategy: str | None = None  # none, qwen, compel or hybrid: `enhance` and `compel_enabled` in one word
    enhanced_prompt: str | None = None  # given by the caller: no enhancement is run
    references: Sequence[AskedReference] = ()
    template_name: str | None = None  # of what put the prompt together, where the caller's dialect names it
    callback_url: str | None = None
    callback_events: list[str] | None = None
    interactive: bool = True
    start_after_seconds: float | None = None
    start_deadline_seconds: float | None = None
    deadline_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    adjustments: Sequence[Adjusted] = ()  # what was said in the caller's dialect and could not be used as given
    traceparent: str | None = None
    provider_model: ApiModel | None = None  # where the caller wants it made at an outside provider
    job_id: UUID | None = None  # the id that another system gave it, which it keeps; else a new one


@dataclass(frozen=True)
class Checked:
    """A submission that passed every check that can be made without reading its references."""

    job_type: JobType
    resolved: Resolved
    enhanced: str | None
    enhances: bool
    located: tuple[Located, ...] = ()
    outside: Outside | None = None  # the provider's model that makes it; None: it is made here


async def check(edge: Edge, user: Principal, asked: Submission) -> Checked:
    """Everything that can be said of a submission before its references are read. Raises as `submit` does."""
    check_metadata(asked.metadata)
    job_type = resolve(asked.job_type)
    spec = await stand_in(edge, job_type, asked.provider_model) or installed(edge, job_type)
    compel, own = asked.given.get("compel_enabled"), bool(asked.enhanced_prompt)
    enhance, compel = read_strategy(asked.strategy, job_type, asked.enhance, compel, enhanced=own)
    asked = replace(asked, enhance=enhance, given={**asked.given, "compel_enabled": compel})
    await check_destination(edge, user, job_type, asked.metadata)
    given = _given(asked, job_type, spec)
    check_content_mode(edge, user, given.content_mode, with_upload=False)
    assert spec.defaults is not None  # every media family has them
    try:
        known = await known_loras(edge, spec, given.loras or ())
        resolved = resolve_params(job_type, given, spec.defaults, known, spec.reference_methods)
    except InvalidParams as error:
        raise _as_given(error, asked) from None
    params = resolved.params
    enhanced = _enhanced_prompt(job_type, asked, spec.defaults)
    said = await check_words(params, params.prompt, enhanced)
    enhances = _enhances(job_type, asked, params)
    try:
        outside = await placed(edge, job_type, asked.provider_model, given, enhances=enhances)
    except InvalidParams as error:
        raise _as_given(error, asked) from None
    await _check_callback(edge, asked)
    located = await locate_references(edge, user, asked.references)
    if params.content_mode == "nsfw":
        check_made_here(located)
    else:
        check_sfw(located)
    shown = signs_shown(located)
    for signs in said:  # a picture says what it was made from: a prompt beside it is judged as if it said that too
        check_signs(signs | shown, params.content_mode)
    return Checked(job_type, resolved, enhanced, enhances, located, outside)


async def check_words(params: GenerationParams, *prompts: str | None, beside: Signs = NO_SIGNS) -> list[Signs]:
    """The content policy over each of the prompts of a job, with the terms that its weights may add and what lies
    `beside` it. Returns the signs of each. Raises `ContentRejected`."""
    said = []
    for text in (with_weighted_terms(prompt, params) for prompt in prompts if prompt is not None):
        said.append(await signs_off_loop(text) | beside)
        check_signs(said[-1], params.content_mode)
    return said


async def signs_off_loop(text: str) -> Signs:
    """The signs of a text, with the event loop free where it is long."""
    short = len(text) <= _AT_ONCE and len(unicodedata.normalize("NFKC", text)) <= _AT_ONCE
    return signs_in(text) if short else await asyncio.to_thread(signs_in, text)


def installed(edge: Edge, job_type: JobType) -> ModelSpec:
    """The profile's model for a job type. Raises `Problem` where it has none."""
    spec = edge.settings.loaded_profile.models.get(job_type.family)
    if spec is None:
        name = edge.settings.loaded_profile.name
        message = f"the profile {name} has no {job_type.family.value} model, which {job_type.name} needs"
        raise Problem(503, "model_not_installed", message, field="job_type")
    return spec


def _given(asked: Submission, job_type: JobType, spec: ModelSpec) -> GivenParams:
    values = {name: value for name, value in asked.given.items() if value is not None}
    for one in asked.references:
        _check_kind(one, job_type, spec)
    if asked.references:
        values["references"] = tuple(_pending(one) for one in asked.references)
    try:
        return GivenParams(**values)
    except InvalidParams as error:
        raise _as_given(error, asked) from None


def _check_kind(one: AskedReference, job_type: JobType, spec: ModelSpec) -> None:
    """Raise `Problem` for a kind of reference that another profile might take. What no model of the job's kind could,
    and what is no kind, is refused with the other parameters."""
    if one.kind is None or one.kind == "image" or one.kind in spec.reference_methods:
        return
    if one.kind in FRAMES and job_type.format is Format.IMAGE:
        return
    message = f"this profile has no model or adapter for {one.kind.replace('_', ' ')} references"
    raise Problem(503, "reference_type_unavailable", message, field=one.names["kind"])


def _pending(one: AskedReference) -> dict[str, Any]:
    """A reference whose files are not stored yet."""
    values: dict[str, Any] = {"bucket": REFERENCE_BUCKET, "key": "pending"}
    given = {"strength": one.strength, "kind": one.kind}
    values |= {name: value for name, value in given.items() if value is not None}
    if one.mask is not None:
        values["mask"] = {"bucket": REFERENCE_BUCKET, "key": "pending"}
    return values


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


def _as_given(error: InvalidParams, asked: Submission) -> InvalidParams:
    """The same errors, with the names that the caller knows the fields by."""
    return InvalidParams([FieldError(_wire_name(e.field, asked), e.message, e.code) for e in error.errors])


def _wire_name(name: str, asked: Submission) -> str:
    """`references.1.strength` as the caller calls it; what is wrong with them together is said of the last one."""
    parts = name.split(".")
    if parts[0] != "references" or not asked.references:
        return name
    place = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1
    names = asked.references[place].names
    return names.get(parts[2] if len(parts) > 2 else "image", names["image"])


def check_content_mode(edge: Edge, user: Principal, mode: str | None, *, with_upload: bool) -> None:
    """Raise `Problem` where this user may not have that content mode here, with or without an uploaded reference."""
    if mode != "nsfw":
        return
    if not edge.settings.loaded_profile.nsfw_allowed:
        raise Problem(403, "nsfw_not_allowed", "this installation makes sfw content only", field="content_mode")
    if not user.age_verified:
        raise Problem(403, "age_not_verified", "nsfw content needs an age-verified user", field="content_mode")
    if with_upload:
        raise not_made_here("reference_image_url")


async def _check_callback(edge: Edge, asked: Submission) -> None:
    if asked.callback_url is None:
        if asked.callback_events is not None:
            raise Problem(422, "missing", "callback_events need a callback_url", field="callback_url")
        return
    try:
        await edge.egress.check(asked.callback_url)
    except EgressError as error:
        raise Problem(422, error.code, str(error), field="callback_url") from None
