"""Server-sent events: a job's state and history as they change. A deployment of its own, because a stream stays
open as long as its job, and must take no room from the API.

One LISTEN connection per process wakes the streams; each also looks by itself now and then, since a notification is
a hint only. What is streamed is read from the rows, in the caller's name.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from db.notify import JOB_CHANNEL, Listener
from db.pool import as_user
from serve_app.api.auth import EdgeDep, User
from serve_app.api.jobs import owned, read_job
from serve_app.api.views import event_view

LOOK_SECONDS = 2.0
KEY_LOOKS = 5  # the key that opened a stream is looked at again after so many times LOOK_SECONDS

router = APIRouter(tags=["events"])


class Bell:
    """Wakes the streams of a job when a notification names it."""

    def __init__(self, url: str) -> None:
        self._streams: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._listener = Listener(url, JOB_CHANNEL, self._ring)

    def start(self) -> None:
        """Begin to listen."""
        self._listener.start()

    async def close(self) -> None:
        """Stop listening."""
        await self._listener.close()

    @contextlib.contextmanager
    def waiting(self, job_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set at every change of the job."""
        changed = asyncio.Event()
        streams = self._streams[str(job_id)]
        streams.add(changed)
        try:
            yield changed
        finally:
            streams.discard(changed)
            if not streams:
                self._streams.pop(str(job_id), None)

    def _ring(self, payload: str) -> None:
        named = [self._streams.get(payload, set())] if payload else list(self._streams.values())
        for streams in named:
            for changed in streams:
                changed.set()


def bell_of(request: Request) -> Bell:
    """The bell of this process."""
    bell: Bell = request.app.state.bell
    return bell


async def may_follow(job_id: UUID, edge: EdgeDep, user: User) -> None:
    """404 before the stream begins, for a job that is not the caller's."""
    await owned(edge, user, job_id)


@router.get(
    "/jobs/{job_id}", dependencies=[Depends(may_follow)], operation_id="streamJob", response_class=EventSourceResponse
)
async def stream_job(
    job_id: UUID,
    edge: EdgeDep,
    user: User,
    bell: Annotated[Bell, Depends(bell_of)],
    last_event_id: Annotated[int, Header(ge=0, lt=2**63, description="Replay the history after this event.")] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """A job as it changes: `job` carries the whole job, `event` one line of its history. Ends with the job,
    or when the API key no longer opens it."""
    seen, shown = last_event_id, None
    clock = asyncio.get_running_loop().time
    checked = clock()
    with bell.waiting(job_id) as changed:
        while True:
            changed.clear()
            if clock() - checked >= LOOK_SECONDS * KEY_LOOKS:
                if user.key_id is None or not await edge.access.key_holds(user.key_id):
                    return
                checked = clock()
            async with as_user(edge.pool, user.user_id) as connection:
                events = await edge.jobs.events_after(connection, job_id, seen)
            for event in events:
                seen = event.id
                data = event_view(event.id, event.job_id, event.attempt, event.kind, event.at, event.data)
                yield ServerSentEvent(event="event", id=str(event.id), data=data)
            job = await read_job(edge, user, job_id)
            face = job.model_dump(mode="json", exclude={"assets", "eta_seconds"})
            if face != shown:
                shown = face
                yield ServerSentEvent(event="job", data=job.model_dump(mode="json"))
            if job.status in ("completed", "failed", "cancelled") and not events:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05 if events else LOOK_SECONDS):
                    await changed.wait()
