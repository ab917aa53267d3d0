"""An answer of the language model as one JSON document, or as server-sent events for who asks for them.

What can be refused is refused before the first event, with its own status; what goes wrong later is an event `error`.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from db.access import Principal
from db.conversations import Exchange
from serve_app.answer import answer
from serve_app.api.problems import problem_of, respond
from serve_app.chat import Turn
from serve_app.edge import Edge

log = structlog.get_logger()

REPLAYED = {"Idempotency-Replayed": "true"}
View = Callable[[Exchange], dict[str, Any]]
Parts = AsyncGenerator[str | Exchange, None]


def streams(request: Request) -> bool:
    """Whether the client wants events."""
    return "text/event-stream" in request.headers.get("accept", "").lower()


async def reply(request: Request, edge: Edge, user: Principal, turn: Turn, view: View) -> Response:
    """The answer to a message. Raises `Problem`."""
    parts = answer(edge, user, turn)
    if not streams(request):
        async with contextlib.aclosing(parts):
            async for part in parts:
                if isinstance(part, Exchange):
                    return JSONResponse(view(part))
        raise RuntimeError("an answer without an end")
    first = await anext(parts)
    return _events(_rest(first, parts), request, view)


async def replay(request: Request, exchange: Exchange, view: View) -> Response:
    """The same for what an earlier request with the same key stored."""

    async def only() -> Parts:
        yield exchange

    if not streams(request):
        return JSONResponse(view(exchange), headers=REPLAYED)
    return _events(only(), request, view, REPLAYED)


async def _rest(first: str | Exchange, parts: Parts) -> Parts:
    async with contextlib.aclosing(parts):
        yield first
        async for part in parts:
            yield part


def _events(parts: Parts, request: Request, view: View, headers: dict[str, str] | None = None) -> Response:
    # nginx would gather the events otherwise
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | (headers or {})
    return EventSourceResponse(_encoded(parts, request.url.path, view), headers=headers)


async def _encoded(parts: Parts, path: str, view: View) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                if isinstance(part, Exchange):
                    yield format_sse_event(event="message", data_str=json.dumps(view(part)))
                else:
                    yield format_sse_event(event="piece", data_str=json.dumps({"text": part}))
        except Exception as error:
            problem = problem_of(error)
            if problem.status >= 500:
                log.error("request_failed", path=path, code=problem.code, error=type(error).__name__)
            yield format_sse_event(event="error", data_str=bytes(respond(problem, path).body).decode())
