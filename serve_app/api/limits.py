"""The limits of a request body, held before anything is parsed."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.problems import Problem, respond


class BodyLimit:
    """Refuses bodies that are too large by their header or as they stream in, and bodies that are not JSON."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._refusal(headers)
        body = bytearray()
        if problem is None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                if len(body) > self._max:
                    problem = self._too_large()
                    break
                if not message.get("more_body", False):
                    break
        if problem is None and body and not headers.get("content-type", "").lower().startswith(_JSON_TYPES):
            problem = Problem(415, "unsupported_media_type", "send application/json", field="Content-Type")
        if problem is not None:
            await respond(problem, scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(bytes(body), receive), send)

    def _refusal(self, headers: dict[str, str]) -> Problem | None:
        length = headers.get("content-length", "")
        # so many digits are no length at all, and more than int() takes
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max):
            return self._too_large()
        return None

    def _too_large(self) -> Problem:
        return Problem(413, "body_too_large", f"the body may have at most {self._max} bytes", field="body")


_JSON_TYPES = ("application/json", "application/problem+json")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once and then waits for the disconnect, as the server's own would."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
