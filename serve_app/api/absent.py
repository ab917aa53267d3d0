"""/functions/v1: functions that clients know and that do nothing here. Each says so, in JSON, with its own status."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter

from serve_app.api.auth import User
from serve_app.api.problems import Problem
from serve_app.api.wire import Problem as ProblemDocument

router = APIRouter(prefix="/functions/v1", tags=["functions"])

INSTEAD = {
    "fal-image": "queue-job makes images and video here",
    "fal-webhook": "no job of this installation runs there",
    "roleplay-chat": "playground-chat answers in the name of a character",
    "character-portrait": "queue-job places a portrait with metadata.destination character_portrait",
    "character-suggestions": "playground-chat has the language model",
    "describe-image": "no model here reads images",
    "scene-narrative": "playground-chat has the language model",
    "score-generation": "no model here rates images",
    "storyboard-ai-assist": "playground-chat has the language model",
    "sync-provider-balances": "no accounts at providers are kept here",
}
"""The functions that are not implemented, and what there is in their place."""


def _absent(name: str) -> Callable[..., Coroutine[Any, Any, None]]:
    async def answer(user: User) -> None:
        raise Problem(501, "not_implemented", f"{name} is not implemented here; {INSTEAD[name]}")

    answer.__doc__ = f"Not implemented: {INSTEAD[name]}."
    return answer


for _name in INSTEAD:
    _title = "".join(part.capitalize() for part in _name.split("-"))
    router.add_api_route(
        f"/{_name}",
        _absent(_name),
        methods=["POST"],
        operation_id=_title[0].lower() + _title[1:],
        name=_name,
        summary=_name,
        status_code=501,
        response_model=ProblemDocument,
        response_description="Not implemented",
    )


@router.post(
    "/replicate-callback",
    operation_id="replicateCallback",
    status_code=410,
    response_model=ProblemDocument,
    response_description="Gone",
)
async def replicate_callback(user: User) -> None:
    """Gone: reports of that provider come to replicate-webhook."""
    raise Problem(410, "gone", "replicate-callback is gone; reports come to replicate-webhook")
