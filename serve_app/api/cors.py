"""CORS of /functions/: clients in browsers call these from anywhere, and need to read every answer, errors too.

FastAPI's own middleware stands inside of the place where an unexpected error is answered, and does nothing where no
`Origin` is sent; so these routes have this one, around everything.
"""

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.problems import problem_of, respond

PREFIX = "/functions/"
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "authorization, x-client-info, apikey, content-type, idempotency-key",
    "Access-Control-Expose-Headers": "idempotency-replayed, retry-after",
}


class FunctionsCors:
    """Answers OPTIONS, and adds the headers to every other answer under `PREFIX`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS":
            await PlainTextResponse("ok", headers=HEADERS)(scope, receive, send)
            return
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._app(scope, receive, with_headers)
        except Exception as error:
            if not begun:
                await respond(problem_of(error), scope["path"])(scope, receive, with_headers)
            raise
