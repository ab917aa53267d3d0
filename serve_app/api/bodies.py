"""Bodies of the routes that read more than one dialect, and so can't be declared as one model."""

from typing import Any

from fastapi import Request

from serve_app.api.problems import Problem

# far above what any client sends, and low enough for whoever walks through a body afterwards
MAX_NESTING = 400


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. 400 for anything else."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise Problem(400, "invalid_json", "the body is not JSON", field="body") from None
    return object_of(body)


async def optional_object(request: Request) -> dict[str, Any]:
    """The same, where a body that is empty is one that says nothing."""
    return await json_object(request) if await request.body() else {}


def object_of(body: Any) -> dict[str, Any]:
    """JSON that was read, if it is an object that may be walked through. 400 for anything else."""
    if not isinstance(body, dict):
        raise Problem(400, "type", "the body must be a JSON object", field="body")
    for name, value in body.items():
        if _nested(value):
            raise Problem(400, "nesting", f"may be nested at most {MAX_NESTING} deep", field=_printable(name))
    return body


def _nested(value: Any) -> bool:
    """Whether lists and objects are in one another more than `MAX_NESTING` deep."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def _printable(name: str) -> str:
    """A field's name as an answer may repeat it."""
    return name if name.isprintable() and len(name) <= 100 else "body"


def one_of(*dialects: dict[str, Any], required: bool = True) -> dict[str, Any]:
    """The request body of such a route, for the OpenAPI document: any of these objects."""
    content = {"application/json": {"schema": {"anyOf": list(dialects)}}}
    return {"requestBody": {"required": required, "content": content}}


def dialect(title: str, required: tuple[str, ...], **fields: dict[str, Any]) -> dict[str, Any]:
    """One dialect's object by its main fields. It may have others."""
    return {"title": title, "type": "object", "required": list(required), "properties": fields}


TEXT: dict[str, Any] = {"type": "string"}
SWITCH: dict[str, Any] = {"type": "boolean"}
COUNT: dict[str, Any] = {"type": "integer"}
AMOUNT: dict[str, Any] = {"type": "number"}
CARRIED: dict[str, Any] = {"type": "object"}
PICTURE: dict[str, Any] = {"type": "string", "format": "uri-reference"}

PARAMETERS: dict[str, Any] = {
    **dict.fromkeys(("seed", "num_images", "steps", "width", "height", "frames", "fps"), COUNT),
    **dict.fromkeys(("guidance_scale", "shift", "reference_strength", "denoise_strength"), AMOUNT),
    **dict.fromkeys(("negative_prompt", "scheduler", "aspect_ratio"), TEXT),
    **dict.fromkeys(("reference_image_url", "callback_url"), PICTURE),
    "reference_type": {"type": "string", "enum": ["image", "style", "character", "composition"]},
    "compel_enabled": SWITCH,
    "compel_weights": {"anyOf": [TEXT, {"type": "object"}]},
    "enhancement_strategy": {"type": "string", "enum": ["none", "qwen", "compel", "hybrid"]},
    **dict.fromkeys(("previews", "reproducible"), SWITCH),
    "guidance_interval": {"type": "array", "items": AMOUNT, "minItems": 2, "maxItems": 2},
    "loras": {"type": "array", "items": CARRIED},
    **{name: {"type": "string", "enum": ["sfw", "nsfw"]} for name in ("contentType", "content_mode")},
}
_MODES: dict[str, Any] = {
    **dict.fromkeys(("exact_copy_mode", "skip_enhancement", "user_requested_enhancement"), SWITCH),
    **dict.fromkeys(("start_reference_url", "end_reference_url"), PICTURE),
    "reference_mode": {"type": "string", "enum": ["modify", "copy"]},
    "video_reference_mode": {"type": "string", "enum": ["none", "single", "start", "end", "both"]},
    "originalEnhancedPrompt": TEXT,
}
_IN_METADATA = CARRIED | {"required": ["prompt"], "properties": {"prompt": TEXT, **PARAMETERS, **_MODES}}
_BESIDE = CARRIED | {"properties": _MODES}
QUEUE_JOB = one_of(
    dialect(
        "snake_case", ("job_type",), job_type=TEXT, prompt=TEXT, enhanced_prompt=TEXT, metadata=_BESIDE, **PARAMETERS
    ),
    dialect("camelCase", ("jobType", "metadata"), jobType=TEXT, enhancedPrompt=TEXT, metadata=_IN_METADATA),
)
