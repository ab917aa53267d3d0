"""What operators do to queues and callbacks, and what owners see of deliveries."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path

from serve_app.api.auth import Admin, EdgeDep, User
from serve_app.api.jobs import owned
from serve_app.api.problems import Problem
from serve_app.api.wire import CallbackList, CallbackLog, Delivered, QueueList, QueueState, WorkerList
from serve_app.edge import Edge

router = APIRouter(prefix="/v1", tags=["operations"])

QueueName = Annotated[str, Path(description="A model family: qwen, sdxl, wan or rv51.")]


@router.get("/queues", operation_id="listQueues")
async def list_queues(edge: EdgeDep, admin: Admin) -> QueueList:
    """Every queue of the profile: what waits, what runs, whether it is paused."""
    return QueueList(data=await _queues(edge))


@router.post("/queues/{name}/pause", operation_id="pauseQueue")
async def pause_queue(name: QueueName, edge: EdgeDep, admin: Admin) -> QueueState:
    """Stop the claims of a queue. Running jobs go on, and new ones are accepted and wait; it is drained when `running`
    is 0."""
    return await _set_paused(edge, name, True)


@router.post("/queues/{name}/resume", operation_id="resumeQueue")
async def resume_queue(name: QueueName, edge: EdgeDep, admin: Admin) -> QueueState:
    """Let replicas claim from a queue again."""
    state = await _set_paused(edge, name, False)
    edge.notifier.queue(name)
    return state


@router.get("/workers", operation_id="listWorkers")
async def list_workers(edge: EdgeDep, admin: Admin) -> WorkerList:
    """The replicas seen within the last minute."""
    return WorkerList(data=[vars(worker) for worker in await edge.workers.list()])


@router.get("/jobs/{job_id}/callbacks", operation_id="listCallbacks", tags=["jobs"])
async def list_callbacks(job_id: UUID, edge: EdgeDep, user: User) -> CallbackList:
    """The callbacks of one of your jobs, with every attempt to deliver them."""
    await owned(edge, user, job_id)
    logs = []
    for callback in await edge.callbacks.for_job(job_id):
        tried = await edge.callbacks.attempts_of(callback.id)
        attempts = [Delivered.model_validate(attempt, from_attributes=True) for attempt in tried]
        logs.append(
            CallbackLog(
                id=callback.id,
                endpoint_id=callback.endpoint_id,
                event=callback.event_type,
                url=callback.url,
                state=callback.state,
                attempts=attempts,
                next_at=callback.next_at if callback.state == "due" else None,
                delivered_at=callback.delivered_at,
            )
        )
    return CallbackList(data=logs)


@router.post("/jobs/{job_id}/callbacks/{callback_id}/replay", operation_id="replayCallback", tags=["jobs"])
async def replay_callback(job_id: UUID, callback_id: str, edge: EdgeDep, user: User) -> CallbackList:
    """Send a callback that is dead or delivered once more, under the same id and with the same bytes."""
    await owned(edge, user, job_id)
    if callback_id not in {callback.id for callback in await edge.callbacks.for_job(job_id)}:
        raise Problem(404, "callback_not_found", "the job has no such callback")
    if not await edge.callbacks.replay(callback_id):
        raise Problem(
            409, "not_replayable", "it is under way, or pointless since the job's end, or its endpoint is disabled"
        )
    edge.notifier.queue("callbacks")
    return await list_callbacks(job_id, edge, user)


async def _set_paused(edge: Edge, name: str, paused: bool) -> QueueState:
    if name not in {family.value for family in edge.settings.loaded_profile.models}:
        raise Problem(404, "queue_not_found", "the profile has no such queue")
    await edge.queue.pause(name, paused)
    (state,) = [state for state in await _queues(edge) if state.name == name]
    return state


async def _queues(edge: Edge) -> list[QueueState]:
    depth, paused = await edge.queue.depth(), await edge.queue.paused()
    states = []
    for family in edge.settings.loaded_profile.models:
        rows = {row.state: row for row in depth if row.queue == family.value}
        counts = {
            state: rows[state].jobs if state in rows else 0 for state in ("ready", "scheduled", "blocked", "running")
        }
        states.append(
            QueueState(
                name=family.value,
                paused=family.value in paused,
                oldest_ready_at=rows["ready"].oldest if "ready" in rows else None,
                ready_cost_seconds=rows["ready"].cost_seconds if "ready" in rows else 0.0,
                **counts,
            )
        )
    return states
