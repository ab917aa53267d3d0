"""Jobs that an outside provider makes: which of its models takes one, and what it can't take. Nothing is asked of the
provider here; that is the work of `deployments.provider.claims`.

A job goes there when its caller chose so (`replicate-image`), or when the profile has no model of its family and an
admin has turned on a provider's model for it. That is never silent: the job's adjustments say it.
"""

from dataclasses import dataclass

from db.providers import ApiModel, Providers
from deployments.provider.inputs import key_of, refusals, task_of
from models.catalog import Family, JobType, default_for
from models.params import FieldError, GivenParams, InvalidParams
from models.profile import ModelSpec
from serve_app.api.problems import Problem
from serve_app.api.wire import Adjusted
from serve_app.edge import Edge


@dataclass(frozen=True)
class Outside:
    """The model that a job is accepted for, and what its caller is told of that."""

    model: ApiModel
    adjustments: tuple[Adjusted, ...] = ()


async def stand_in(edge: Edge, job_type: JobType, chosen: ApiModel | None = None) -> ModelSpec | None:
    """What a provider's model takes, in the form of a profile's: the family's defaults, and none of its extras. None
    where the job is made here."""
    if job_type.family is Family.QWEN or (chosen is None and job_type.family in edge.settings.loaded_profile.models):
        return None
    model = chosen
    for has_reference in (False, True):
        model = model or await _offered(edge, job_type, has_reference)
    if model is None:
        return None
    return ModelSpec(
        family=job_type.family,
        model_name=model.model_key,
        source=model.provider.name,
        defaults=default_for(job_type.family),
        memory_gib=0,
        disk_gib=0,
    )


async def taker(edge: Edge, job_type: JobType, *, has_reference: bool) -> ApiModel | None:
    """The provider's model that a job goes to whose caller chose none; None where it is made here, or nowhere."""
    if job_type.family in edge.settings.loaded_profile.models:
        return None
    return await _offered(edge, job_type, has_reference)


async def placed(
    edge: Edge, job_type: JobType, chosen: ApiModel | None, given: GivenParams, *, enhances: bool
) -> Outside | None:
    """Where a job goes: None for here. Raises `Problem` or `InvalidParams` for what a provider can't be asked."""
    profile = edge.settings.loaded_profile
    if chosen is None and job_type.family in profile.models:
        return None
    model = chosen or await _offered(edge, job_type, bool(given.references))
    if model is None:
        task = task_of(job_type.format, bool(given.references))
        message = f"neither the profile {profile.name} nor a provider has a {job_type.family.value} model for {task}"
        raise Problem(503, "model_not_installed", message, field="job_type")
    if given.content_mode == "nsfw" and not model.provider.nsfw_allowed:
        message = f"nsfw jobs may not go to the provider {model.provider.name}"
        raise Problem(403, "nsfw_not_allowed", message, field="content_mode")
    errors = refusals(model, {name: getattr(given, name) for name in given.model_fields_set - {"references"}})
    errors += _references(model, given)
    if enhances:
        errors.append(FieldError("enhance", "prompts of jobs at an outside provider are not enhanced", "unsupported"))
    if errors:
        raise InvalidParams(errors)
    return Outside(model, () if chosen is not None else (_told(model, job_type, profile.name),))


def _references(model: ApiModel, given: GivenParams) -> list[FieldError]:
    errors = []
    for number, reference in enumerate(given.references):
        if reference.kind != "image":
            errors.append(FieldError(f"references.{number}.kind", "a provider takes plain images only", "unsupported"))
            continue
        needed = {
            "image": True,
            "strength": "strength" in reference.model_fields_set,
            "mask": reference.mask is not None,
        }
        errors += [
            FieldError(f"references.{number}.{part}", "the provider's model does not take it", "unsupported")
            for part, wanted in needed.items()
            if wanted and key_of(model, part) is None
        ]
    return errors


def _told(model: ApiModel, job_type: JobType, profile: str) -> Adjusted:
    reason = f"the profile {profile} has no {job_type.family.value} model; {model.model_key} at the provider makes it"
    return Adjusted(field="provider", given="local", used=model.provider.name, reason=reason)


async def _offered(edge: Edge, job_type: JobType, has_reference: bool) -> ApiModel | None:
    task = task_of(job_type.format, has_reference)
    return await Providers(edge.pool).offered(job_type.family.value, job_type.format.value, task)
