"""Bodies of the routes that read more than one dialect, and so can't be declared as one model."""

from typing import Any

from fastapi import Request

from serve_app.api.problems import Problem


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. 400 for anything else."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise Problem(400, "invalid_json", "the body is not JSON", field="body") from None
    if not isinstance(body, dict):
        raise Problem(400, "type", "the body must be a JSON object", field="body")
    return body
