"""What a provider's model is given: our parameters under its names, as the model's row says.

`api_models.capabilities` has three keys for it: `allowed_input_keys` (the model's own names that may be sent; all where
it is missing), `input_key_mappings` (from our names to the model's) and `scheduler_aliases` (from our schedulers to the
model's). `input_defaults` are sent beneath what the job says. A parameter that the caller gave and the model does not
take is refused at acceptance; one that nobody asked for is left out, and what was sent is in the job's settings.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from db.providers import ApiModel
from models.catalog import Format
from models.params import FieldError, GenerationParams

# our names to those of Replicate's image models, where they differ
NAMES = {
    "steps": "num_inference_steps",
    "num_images": "num_outputs",
    "frames": "num_frames",
    "strength": "prompt_strength",
}
FILES = ("image", "mask")
TEXTS = ("prompt", "negative_prompt")
NEVER = {  # what happens inside our engine, and no provider does for us
    "compel_enabled": "prompt weights",
    "compel_weights": "prompt weights",
    "loras": "LoRAs",
    "previews": "previews",
    "reproducible": "reproducible runs",
    "guidance_interval": "a guidance interval",
}


def task_of(output: Format, has_reference: bool) -> str:
    """The task, as `api_models.tasks` names it."""
    return ("i2" if has_reference else "t2") + ("v" if output is Format.VIDEO else "i")


def key_of(model: ApiModel, name: str) -> str | None:
    """The model's name for a parameter of ours; None where it does not take it."""
    mappings, allowed = model.capabilities.get("input_key_mappings"), model.capabilities.get("allowed_input_keys")
    mapped = mappings.get(name) if isinstance(mappings, dict) else None
    key = mapped if isinstance(mapped, str) else NAMES.get(name, name)
    return key if not isinstance(allowed, list) or key in allowed else None


def refusals(model: ApiModel, given: Mapping[str, Any]) -> list[FieldError]:
    """What is wrong with giving these parameters (our names; only those that the caller said) to a model."""
    errors = []
    for name, value in given.items():
        if value is None or name == "content_mode" or (name in NEVER and not value):
            continue
        if name in NEVER:
            errors.append(FieldError(name, f"{NEVER[name]} are not to be had at an outside provider", "unsupported"))
        elif name == "scheduler":
            if key_of(model, name) is None or value not in _schedulers(model):
                known = ", ".join(_schedulers(model)) or "none"
                errors.append(FieldError(name, f"the provider's model takes: {known}", "choice"))
        elif name in ("num_images", "frames") and value == 1:
            continue
        elif key_of(model, name) is None:
            errors.append(FieldError(name, "the provider's model does not take it", "unsupported"))
    return errors


def build(model: ApiModel, params: GenerationParams, prompt: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The input of a prediction. `files` maps `image` and `mask` to their URLs."""
    values: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": params.negative_prompt or None,
        "seed": params.seed,
        "num_images": params.num_images,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "guidance_scale": params.guidance_scale,
        "scheduler": _schedulers(model).get(params.scheduler),
        **files,
    }
    if params.fps is not None:
        values |= {"frames": params.frames, "fps": params.fps, "shift": params.shift}
    if params.reference is not None:
        # how much of the image is made anew, where ours is how much of it is kept
        values["strength"] = round(1 - params.reference.strength, 6)
    named = {key_of(model, name): value for name, value in values.items() if value is not None}
    named.pop(None, None)
    return {**model.input_defaults, **{key: value for key, value in named.items() if key is not None}}


def facts(model: ApiModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """An input without its words and files, which may be kept with the settings and in the log of usage."""
    hidden = _keys(model, (*TEXTS, *FILES))
    return {
        key: value
        for key, value in given.items()
        if key not in hidden
        and (isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 64))
    }


def input_hash(model: ApiModel, given: Mapping[str, Any]) -> str:
    """SHA-256 of an input without its files, whose URLs are others each time, in hexadecimal."""
    hidden = _keys(model, FILES)
    plain = {key: _canonical(value) for key, value in given.items() if key not in hidden}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """A number that JSON may write in two ways, written in one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _keys(model: ApiModel, names: Collection[str]) -> set[str]:
    return {key for name in names if (key := key_of(model, name)) is not None} | set(names)


def _schedulers(model: ApiModel) -> dict[str, str]:
    aliases = model.capabilities.get("scheduler_aliases")
    return {k: v for k, v in aliases.items() if isinstance(v, str)} if isinstance(aliases, dict) else {}
