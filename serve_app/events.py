"""Server-sent events: a job's state and history as they change. A deployment of its own, because a stream stays
open as long as its job, and must take no room from the API.

What is streamed comes from a watch, which all streams of one viewer and job share (`serve_app.watches`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from serve_app import watches as watching
from serve_app.api.auth import EdgeDep, User
from serve_app.api.jobs import owned
from serve_app.api.views import event_view
from serve_app.watches import Watches

router = APIRouter(tags=["events"])


def watches_of(request: Request) -> Watches:
    """The watches of this process."""
    watches: Watches = request.app.state.watches
    return watches


async def may_follow(job_id: UUID, edge: EdgeDep, user: User) -> None:
    """404 before the stream begins, for a job that is not the caller's."""
    await owned(edge, user, job_id)


@router.get(
    "/jobs/{job_id}", dependencies=[Depends(may_follow)], operation_id="streamJob", response_class=EventSourceResponse
)
async def stream_job(
    job_id: UUID,
    user: User,
    watches: Annotated[Watches, Depends(watches_of)],
    last_event_id: Annotated[int, Header(ge=0, lt=2**63, description="Replay the history after this event.")] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """A job as it changes: `job` carries the whole job, `event` one line of its history, `preview` a new preview of a
    job that asked for them. Ends with the job, or when the API key or token no longer opens it."""
    told, shown, previewed, number = last_event_id, None, None, 0
    async with watches.watching(user, job_id) as watch:
        await watch.fresh()
        while watches.holds(user):
            sight = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(watching.LOOK_SECONDS * watching.KEY_LOOKS):
                    sight = await watch.after(number)
            if sight is None:
                if watch.over:
                    return
                continue  # to see whether the key still holds
            number = sight.number
            for event in sight.events:
                if event.id > told:
                    told = event.id
                    data = event_view(event.id, event.job_id, event.attempt, event.kind, event.at, event.data)
                    yield ServerSentEvent(event="event", id=str(event.id), data=data)
            if sight.face != shown:
                shown = sight.face
                yield ServerSentEvent(event="job", raw_data=sight.job)
            preview = sight.preview
            if preview is not None and (preview.attempt, preview.step) != previewed:
                previewed = preview.attempt, preview.step
                yield ServerSentEvent(event="preview", raw_data=preview.model_dump_json())
            if sight.ended:
                return
