"""The language model's replica in this process, with what a Serve handle offers for a stream."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2

from deployments.enhancer import Enhancer
from deployments.metrics import Metrics
from deployments.settings import Settings
from serve_app.app import api
from tests.serve_app.conftest import InProcess, in_process


class Stream:
    """A streaming call. `cancel` ends it in the replica, as that of Serve does."""

    def __init__(self, handle: "Handle", parts: Any) -> None:
        self._handle, self._parts, self._cancelled = handle, parts, False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._parts)

    def cancel(self) -> None:
        """Stop the replica's work."""
        self._handle.cancelled += 1
        self._handle.closing.append(self._parts)


class Enhancing:
    """A call whose answer is awaited."""

    def __init__(self, handle: "Handle") -> None:
        self._handle = handle

    async def remote(self, request: Any) -> Any:
        """Call it."""
        self._handle.enhanced.append(request)
        return await self._handle.enhancer.enhance(request)


class Handle:
    """A handle of one replica: a real model behind it. It notes what it was asked."""

    def __init__(self, enhancer: Enhancer) -> None:
        self.enhancer, self.cancelled = enhancer, 0
        self.asked: list[tuple[Any, Any, str]] = []
        self.enhanced: list[Any] = []
        self.closing: list[Any] = []

    def options(self, *, stream: bool) -> "Handle":
        """A handle for streams."""
        assert stream
        return self

    @property
    def enhance(self) -> "Enhancing":
        """The method to call."""
        return Enhancing(self)

    @property
    def chat(self) -> "Handle":
        """The method to call."""
        return self

    def remote(self, messages: Any, sampling: Any, content_mode: str) -> Stream:
        """Call it."""
        self.asked.append((messages, sampling, content_mode))
        return Stream(self, self.enhancer.chat(messages, sampling, content_mode))  # type: ignore[arg-type]

    async def settled(self) -> None:
        """Close the streams that were cancelled, as a replica does on its own loop."""
        for parts in self.closing:
            await parts.aclose()
        self.closing.clear()


@contextlib.asynccontextmanager
async def talking(database: Any, folder: Path, **changes: Any) -> AsyncIterator[tuple[InProcess, Handle]]:
    """The API in this process with a real tiny language model behind it."""
    async with in_process(database, folder, **changes) as server, model(server.settings) as handle:
        app = api(server.settings, handle)
        async with app.router.lifespan_context(app):
            server.app = app
            yield server, handle


@contextlib.asynccontextmanager
async def model(settings: Settings) -> AsyncIterator[Handle]:
    """A replica that has loaded its model."""
    enhancer = Enhancer(settings, Metrics())
    await enhancer.start()
    handle = Handle(enhancer)
    try:
        assert enhancer.load_error is None
        yield handle
    finally:
        await handle.settled()
        await enhancer.stop(0)


async def until(holds: Callable[[], bool]) -> None:
    """Until that is so; other tasks run meanwhile."""
    async with asyncio.timeout(30):
        while True:
            if holds():
                return
            await asyncio.sleep(0)


def events(text: str) -> list[tuple[str, str]]:
    """Server-sent events as name and data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in lines:
            found.append((lines["event"], lines["data"]))
    return found


def refused(answer: httpx2.Response) -> tuple[int, str]:
    """Status and code of a problem."""
    return answer.status_code, answer.json()["code"]
