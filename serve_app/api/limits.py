"""The limits of a request body, held before anything is parsed."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.problems import Problem, respond

FORM_BYTES = 64_000  # what the frame of a form may take beside its file


@dataclass(frozen=True)
class FileBodies:
    """The route that takes files, of `max_bytes` at most. Its bodies are not held here, but stream to whoever may send
    them, and are cut off where they are too large."""

    path: str
    max_bytes: int


class BodyLimit:
    """Refuses bodies that are too large by their header or as they stream in, and bodies that are not JSON."""

    def __init__(self, app: ASGIApp, max_bytes: int, files: FileBodies) -> None:
        self._app, self._max, self._files = app, max_bytes, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] == "POST" and scope["path"] == self._files.path:
            await self._stream(headers, scope, receive, send)
            return
        problem = self._refusal(headers, self._max)
        body = bytearray()
        if problem is None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                if len(body) > self._max:
                    problem = _too_large(self._max)
                    break
                if not message.get("more_body", False):
                    break
        if problem is None and body and not headers.get("content-type", "").lower().startswith(_JSON_TYPES):
            problem = Problem(415, "unsupported_media_type", "send application/json", field="Content-Type")
        if problem is not None:
            await respond(problem, scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _stream(self, headers: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        form = headers.get("content-type", "").lower().startswith("multipart/")
        most = self._files.max_bytes + (FORM_BYTES if form else 0)
        problem = self._refusal(headers, most)
        if problem is not None:
            await respond(problem, scope["path"])(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _too_large(most)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, headers: dict[str, str], most: int) -> Problem | None:
        length = headers.get("content-length", "")
        # so many digits are no length at all, and more than int() takes
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            return _too_large(most)
        return None


def _too_large(most: int) -> Problem:
    return Problem(413, "body_too_large", f"the body may have at most {most} bytes", field="body")


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
