"""/functions/v1/generate-content: one name for two functions, by what the body asks for."""

from typing import Any

from fastapi import APIRouter, Request

from db.idempotency import canonical_body
from models.catalog import JOB_TYPES
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import QUEUE_JOB, json_object
from serve_app.api.enhancement import enhance_prompt
from serve_app.api.functions import queue_job
from serve_app.api.jobs import IdempotencyKey
from serve_app.api.wire_enhancement import SCENE

router = APIRouter(prefix="/functions/v1", tags=["functions"])


@router.post("/generate-content", operation_id="generateContent", openapi_extra=QUEUE_JOB, responses=SCENE)
async def generate_content(
    request: Request, edge: EdgeDep, user: User, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """With a job type, `queue-job` whose prompt is enhanced first, unless the body says otherwise or brings an enhanced
    prompt along. Without one, or with `image` or `video`, `enhance-prompt`, and nothing is queued."""
    body = await json_object(request)
    name = body.get("jobType") if "jobType" in body else body.get("job_type")
    if name is None or (isinstance(name, str) and name not in JOB_TYPES):
        return await enhance_prompt(request, edge, user)
    metadata = body.get("metadata") or {}
    if isinstance(metadata, dict):  # anything else is refused there
        body = body | {"metadata": {"user_requested_enhancement": True} | metadata}
    return await queue_job(_with_body(request, canonical_body(body)), edge, user, idempotency_key)


def _with_body(request: Request, body: bytes) -> Request:
    """The same request with another body."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)
