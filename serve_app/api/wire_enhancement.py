"""What a body of /functions/v1/enhance-prompt asks for, in either dialect. What is given and has no effect is told."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from db.access import Principal
from db.prompts import PresetChoice
from models.catalog import JOB_TYPES, Family, Format, Quality, resolve
from models.fields import cleaned
from models.params import ContentMode, clean_prompt
from models.policy import check_signs
from models.prompting.selection import ENHANCEMENT
from serve_app.admission import signs_off_loop
from serve_app.api.bodies import SWITCH, TEXT, dialect, one_of
from serve_app.api.problems import Problem
from serve_app.api.wire import Problem as ProblemDocument
from serve_app.edge import Edge

ANSWER_SECONDS = 60.0
LANGUAGE_MODELS = ("qwen_instruct", "qwen")
SCENES = ("scene_creation", "scene_starters")
TEXT_ENHANCEMENT = "text_enhancement"  # what clients say for a description of a scene, which is of no job type
STRINGS = (
    "jobType",
    "job_type",
    "format",
    "quality",
    "model",
    "contentType",
    "contentRating",
    "selectedModel",
    "enhancement_model",
    "model_id",
)
READ = {*STRINGS, "prompt", "original_prompt", "regeneration", "selectedPresets", "metadata"}
READ_METADATA = {"exact_copy_mode", "reference_mode", "originalEnhancedPrompt"}
UNUSED = {
    "user_id": "the caller is known by its key",
    "userId": "the caller is known by its key",
    "sessionId": "prompts are enhanced one by one",
}
MAX_UNUSED = 20

_SHARED: dict[str, Any] = {
    "format": {"type": "string", "enum": ["image", "video"]},
    "quality": {"type": "string", "enum": ["fast", "high"]},
    "model": {"type": "string", "enum": ["sdxl", "wan", "auto"]},
    "model_id": {"type": "string", "format": "uuid"},
    "contentType": {"type": "string", "enum": ["sfw", "nsfw", "scene_description"]},
    "contentRating": {"type": "string", "enum": ["sfw", "nsfw"]},
    "regeneration": SWITCH,
    "selectedPresets": {"type": "array", "items": TEXT, "maxItems": 1},
    "metadata": {
        "type": "object",
        "properties": {
            "exact_copy_mode": SWITCH,
            "reference_mode": {"type": "string", "enum": ["modify", "copy"]},
            "originalEnhancedPrompt": TEXT,
        },
    },
}
BODY = one_of(
    dialect("snake_case", ("original_prompt",), original_prompt=TEXT, job_type=TEXT, enhancement_model=TEXT, **_SHARED),
    dialect("camelCase", ("prompt",), prompt=TEXT, jobType=TEXT, selectedModel=TEXT, **_SHARED),
)

SCENE: dict[int | str, dict[str, Any]] = {501: {"model": ProblemDocument, "description": "A scene, which is no prompt"}}


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One request. `text` is the prompt as it was given; `prompt` has single spaces. `why_not` goes with way `none`."""

    way: Literal["enhance", "exact_copy", "modify", "none"]
    why_not: str | None
    text: str
    prompt: str
    base: str
    mode: ContentMode
    use_case: str
    family: Family
    format: Format
    quality: Quality
    enhanced7b: bool
    job_type: str
    seed: int
    seconds: float | None
    preset: PresetChoice | None
    model_key: str | None
    not_used: list[dict[str, str]]


async def read_request(edge: Edge, user: Principal, body: Mapping[str, Any]) -> Asking:
    """The request of a body. Raises `Problem` or `RequestRefused`."""
    for name in STRINGS:
        if not isinstance(body.get(name), str | None):
            raise Problem(400, "type", "must be a string", field=name)
    metadata = _metadata(body)
    exact, modify = _flag("metadata.exact_copy_mode", metadata.get("exact_copy_mode")), _modifies(metadata)
    if exact and modify:
        raise Problem(400, "conflict", "is no modification", field="metadata.exact_copy_mode")
    field = "original_prompt" if body.get("prompt") in (None, "") and body.get("original_prompt") else "prompt"
    text = "" if body.get(field) is None else body[field]
    base = _base(metadata)
    prompt = cleaned(field, text) if modify and base and isinstance(text, str) else clean_prompt(field, text)
    mode, use_case = _mode(edge, user, body)
    check_signs(await signs_off_loop(f"{prompt}, {base}" if modify else prompt), mode)
    not_used = _not_used(body, metadata, modify)
    preset = await _preset(edge, body)
    family, format, quality, enhanced7b, job_type, model_key = await _target(edge, body, preset, not_used)
    why_not = _why_not(edge, body, preset)
    fresh = _flag("regeneration", body.get("regeneration"))
    return Asking(
        way="exact_copy" if exact else "modify" if modify else "none" if why_not else "enhance",
        why_not=None if exact or modify else why_not,
        text=text,
        prompt=prompt,
        base=base,
        mode=mode,
        use_case=use_case,
        family=family,
        format=format,
        quality=quality,
        enhanced7b=enhanced7b,
        job_type=job_type,
        # the same prompt gets the same answer, until another one is asked for
        seed=secrets.randbelow(2**31) if fresh else _seed_of(prompt),
        seconds=_seconds(preset, not_used),
        preset=preset,
        model_key=model_key,
        not_used=not_used,
    )


def _metadata(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    return metadata


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise Problem(400, "type", "must be true or false", field=name)
    return bool(value)


def _modifies(metadata: Mapping[str, Any]) -> bool:
    wanted = metadata.get("reference_mode")
    if wanted not in (None, "modify", "copy"):
        raise Problem(400, "choice", "must be one of modify, copy", field="metadata.reference_mode")
    return bool(wanted == "modify")


def _base(metadata: Mapping[str, Any]) -> str:
    """What the reference of a modification was made from."""
    base = metadata.get("originalEnhancedPrompt")
    if not isinstance(base, str | None):
        raise Problem(400, "type", "must be a string", field="metadata.originalEnhancedPrompt")
    return cleaned("metadata.originalEnhancedPrompt", base or "")


def _mode(edge: Edge, user: Principal, body: Mapping[str, Any]) -> tuple[ContentMode, str]:
    """The content mode, and the use case that a content type may name."""
    kind, rating = body.get("contentType"), body.get("contentRating")
    use_case = ENHANCEMENT
    if kind == "scene_description":
        kind, use_case = None, "scene_description"
    if kind in SCENES:
        message = "only plain prompts are enhanced here; scenes need the chat routes"
        raise Problem(501, "not_implemented", message, field="contentType")
    if kind not in (None, "", "sfw", "nsfw"):
        raise Problem(400, "choice", "must be one of sfw, nsfw, scene_description", field="contentType")
    if rating not in (None, "", "sfw", "nsfw"):
        raise Problem(400, "choice", "must be one of sfw, nsfw", field="contentRating")
    if kind and rating and kind != rating:
        raise Problem(400, "conflict", "is not the contentType", field="contentRating")
    wanted = kind or rating or "sfw"
    if wanted == "nsfw" and not (edge.settings.loaded_profile.nsfw_allowed and user.age_verified):
        raise Problem(403, "nsfw_not_allowed", "nsfw content is not open to you here", field="contentType")
    return ("nsfw" if wanted == "nsfw" else "sfw"), use_case


def _not_used(body: Mapping[str, Any], metadata: Mapping[str, Any], modify: bool) -> list[dict[str, str]]:
    unread = [(name, UNUSED.get(name, "is no field of this function")) for name in body if name not in READ]
    unread += [
        (f"metadata.{name}", "is carried by jobs, not by this function")
        for name in metadata
        if name not in READ_METADATA
    ]
    if metadata.get("originalEnhancedPrompt") and not modify:
        unread.append(("metadata.originalEnhancedPrompt", "needs reference_mode modify"))
    printable = [(name, reason) for name, reason in unread if name.isprintable() and len(name) <= 100]
    return [{"field": name, "reason": reason} for name, reason in printable[:MAX_UNUSED]]


async def _preset(edge: Edge, body: Mapping[str, Any]) -> PresetChoice | None:
    names = body.get("selectedPresets")
    if names in (None, []):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Problem(400, "type", "must be a list of names", field="selectedPresets")
    if len(names) > 1:
        raise Problem(400, "length", "one preset at a time", field="selectedPresets")
    preset = await edge.prompts.preset(names[0]) if "\0" not in names[0] else None
    if preset is None:
        raise Problem(400, "unknown", "is no preset of this installation", field="selectedPresets")
    return preset


def _why_not(edge: Edge, body: Mapping[str, Any], preset: PresetChoice | None) -> str | None:
    """Why no enhancement is wanted. Refuses a language model that is not here."""
    given = {name: body[name] for name in ("enhancement_model", "selectedModel") if body.get(name)}
    if len(set(given.values())) > 1:
        raise Problem(400, "conflict", "is not the enhancement_model", field="selectedModel")
    for name, value in given.items():
        if value == "none":
            return f"{name} is none"
        if not is_ours(edge, value):
            raise not_installed(name)
    if preset is not None and not preset.enable_qwen:
        return f"the preset {preset.preset_name} rewrites no prompts"
    return None


def is_ours(edge: Edge, name: str) -> bool:
    """Whether a language model is the one that enhances prompts here, by one of its names."""
    spec = edge.settings.loaded_profile.models.get(Family.QWEN)
    return name in (*LANGUAGE_MODELS, spec.model_name if spec else None)


def not_installed(field: str) -> Problem:
    """The refusal of a language model that is not here."""
    return Problem(503, "model_not_installed", f"prompts are enhanced by {LANGUAGE_MODELS[0]} here", field=field)


def _seed_of(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) >> 1


def _seconds(preset: PresetChoice | None, not_used: list[dict[str, str]]) -> float | None:
    """How long the language model may take, as the preset says."""
    if preset is None or not preset.qwen_settings or not preset.enable_qwen:
        return None
    if "expansion_target" in preset.qwen_settings:
        reason = "the token limit of the model that reads the prompt decides its length"
        not_used.append({"field": "selectedPresets.expansion_target", "reason": reason})
    limit = preset.qwen_settings.get("max_time_ms")
    if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0:
        return min(limit / 1000, ANSWER_SECONDS)
    return None


async def _target(
    edge: Edge, body: Mapping[str, Any], preset: PresetChoice | None, not_used: list[dict[str, str]]
) -> tuple[Family, Format, Quality, bool, str, str | None]:
    """What the prompt is for: a job type of the catalog, or just `image` or `video`, or a model by its id."""
    model_family, modality, model_key = await _model(edge, body, not_used)
    name = body.get("jobType") or body.get("job_type") or body.get("format") or modality or "image"
    if name == TEXT_ENHANCEMENT:
        name = modality or "image"
    if name in JOB_TYPES:
        job_type = resolve(name)
        family, format, quality, enhanced = job_type.family, job_type.format, job_type.quality, job_type.enhanced
    elif name in ("image", "video"):
        family, enhanced = (Family.WAN if name == "video" else Family.SDXL), False
        format, quality = Format(name), Quality.FAST
    else:
        raise Problem(400, "unknown_job_type", "is no job type", field="jobType")
    if preset is not None and preset.enable_qwen:
        focus = (preset.qwen_settings or {}).get("quality_focus")
        quality = Quality.HIGH if focus == "high" else quality
    quality = Quality(_choice(body, "quality", ("fast", "high")) or quality)
    given = _choice(body, "model", ("sdxl", "wan", "auto"))
    given = None if given == "auto" else given
    if model_family is not None and (modality != format.value or given not in (None, model_family.value)):
        raise Problem(400, "conflict", "is a model for something else", field="model_id")
    family = model_family or Family(given or family)
    if not any(known.family is family and known.format is format for known in JOB_TYPES.values()):
        raise Problem(400, "conflict", f"a {family.value} model makes no {format.value}", field="model")
    if family not in edge.settings.loaded_profile.models:
        raise Problem(503, "model_not_installed", f"the profile has no {family.value} model", field="jobType")
    return family, format, quality, enhanced, name, model_key


async def _model(
    edge: Edge, body: Mapping[str, Any], not_used: list[dict[str, str]]
) -> tuple[Family | None, str | None, str | None]:
    """Family, modality and key of the row of `api_models` that is named."""
    given = body.get("model_id")
    if not given:
        return None, None, None
    try:
        row = await edge.prompts.model(UUID(given))
    except ValueError:
        raise Problem(400, "type", "must be a UUID", field="model_id") from None
    if row is None or not row.is_active:
        raise Problem(400, "unknown", "is no active model of this installation", field="model_id")
    if row.modality not in ("image", "video"):
        raise Problem(400, "conflict", "is no model that prompts are enhanced for", field="model_id")
    usual = Family.WAN if row.modality == "video" else Family.SDXL
    if row.model_family not in (Family.SDXL, Family.RV51, Family.WAN):
        reason = f"no templates for its family; those of {usual.value} are used"
        not_used.append({"field": "model_id", "reason": reason})
        return usual, row.modality, row.model_key
    return Family(row.model_family), row.modality, row.model_key


def _choice(body: Mapping[str, Any], name: str, values: tuple[str, ...]) -> str | None:
    value: str | None = body.get(name)
    if value is not None and value not in values:
        raise Problem(400, "choice", f"must be one of {', '.join(values)}", field=name)
    return value
