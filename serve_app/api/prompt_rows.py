"""/functions/v1: what the operator's prompt rows come to: negative prompts, and their reading anew."""

from typing import Any, cast

from fastapi import APIRouter, Request

from db.inventory import Inventory
from models.params import ContentMode
from models.prompting.negatives import GenerationMode
from serve_app.api.auth import Admin, EdgeDep, User
from serve_app.api.bodies import SWITCH, dialect, one_of, optional_object
from serve_app.api.problems import Problem
from serve_app.negatives import READERS, Asked, negative

router = APIRouter(prefix="/functions/v1", tags=["functions"])

CHOICES: dict[str, tuple[str, ...]] = {
    "modelType": tuple(READERS),
    "contentMode": ("sfw", "nsfw"),
    "generationMode": ("txt2img", "i2i"),
}
DEFAULTS = {"modelType": "sdxl", "contentMode": "sfw", "generationMode": "txt2img"}
ASKED = one_of(
    dialect(
        "choices",
        (),
        **{
            name: {"type": "string", "enum": list(values), "default": DEFAULTS[name]}
            for name, values in CHOICES.items()
        },
    ),
    required=False,
)
REFRESH = one_of(dialect("refresh", (), force_refresh=SWITCH), required=False)


@router.post("/get-negative-prompt", operation_id="getNegativePrompt", openapi_extra=ASKED)
async def get_negative_prompt(request: Request, edge: EdgeDep, user: User) -> dict[str, Any]:
    """The negative prompt that a job without words of its own gets, from the rows as they are now. Groups that wait for
    words of a prompt are not in it."""
    body = await optional_object(request)
    given = {name: DEFAULTS[name] if body.get(name) is None else body[name] for name in CHOICES}
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise Problem(400, "choice", f"must be one of {', '.join(CHOICES[name])}", field=name)
    asked = Asked(
        content_mode=cast(ContentMode, given["contentMode"]),
        generation_mode=cast(GenerationMode, given["generationMode"]),
    )
    told = await negative(edge, given["modelType"], READERS[given["modelType"]], asked)
    return {"success": True, "baseNegativePrompt": told.text, **given}


@router.post("/refresh-prompt-cache", operation_id="refreshPromptCache", openapi_extra=REFRESH)
async def refresh_prompt_cache(request: Request, edge: EdgeDep, admin: Admin) -> dict[str, Any]:
    """Have every process read the prompt rows anew. An edit of a row needs no such call: it is in force at once. Hits,
    misses and entries are those of the process that answers."""
    body = await optional_object(request)
    if not isinstance(body.get("force_refresh"), bool | None):
        raise Problem(400, "type", "must be true or false", field="force_refresh")
    before = edge.prompts.stats()
    version = await edge.prompts.renew()
    rows = await Inventory(edge.pool).prompts()
    return {
        "success": True,
        "message": f"{rows.templates} templates and {rows.negatives} negative prompts are in force",
        "cache_stats": {
            "lastUpdated": rows.at,
            "templateCount": rows.templates,
            "negativePromptCount": rows.negatives,
            "nsfwTermCount": None,
            "version": str(version),
            "integrityHash": rows.digest,
            "hits": before.hits,
            "misses": before.misses,
            "evictions": before.evictions,
            "entries": before.entries,
            "capacity": before.capacity,
        },
        "cached_data": {
            "template_categories": list(rows.use_cases),
            "model_types": list(rows.models),
            "negative_prompt_categories": list(rows.negative_models),
        },
    }
