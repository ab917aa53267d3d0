"""/healthz, /readyz and /metrics."""

import asyncio
import hmac
from datetime import UTC, datetime
from typing import Any

import asyncpg
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from db.limits import SystemConfig
from db.pool import CONNECTION_FAULTS
from serve_app.api.auth import EdgeDep
from serve_app.api.problems import Problem
from serve_app.edge import Edge
from serve_app.version import VERSION

router = APIRouter(tags=["health"])

READY_SECONDS = 2.0  # a database that takes longer to say who is there is not ready either


@router.get("/healthz", operation_id="health")
async def health() -> dict[str, str]:
    """This process answers. It says nothing of anything else."""
    return {"status": "ok", "version": VERSION}


@router.get("/readyz", operation_id="ready", responses={503: {"model": dict[str, Any], "description": "Not ready"}})
async def ready(edge: EdgeDep, response: Response) -> dict[str, Any]:
    """Whether jobs can be taken and run: 503 without the database or without a live replica for each model."""
    wanted = [family.value for family in edge.settings.loaded_profile.models]
    try:
        async with asyncio.timeout(READY_SECONDS):
            workers = await edge.workers.list(within_seconds=max(30.0, 4 * edge.settings.renew_seconds))
            maintenance = await SystemConfig(edge.pool).maintenance()
    except (*CONNECTION_FAULTS, asyncpg.PostgresError):
        response.status_code = 503
        return {"ready": False, "database": "unavailable", "models": {}}
    models = {}
    for family in wanted:
        states = [worker.state for worker in workers if worker.queue == family and worker.state != "stopped"]
        models[family] = {"ready": "ready" in states, "replicas": len(states), "states": sorted(set(states))}
    everything = all(model["ready"] for model in models.values())
    if not everything:
        response.status_code = 503
    # reads, and what runs, go on in maintenance: nothing is to be routed elsewhere
    return {"ready": everything, "database": "ok", "maintenance": maintenance, "models": models}


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(edge: EdgeDep, request: Request) -> Response:
    """For Prometheus: what Postgres says now, so that every replica of the API answers the same. What is counted inside
    processes is exported by Ray, as `ray_ourvidz_…`."""
    token = edge.settings.metrics_token
    if token is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.get_secret_value().encode()):
            raise Problem(401, "invalid_key", "Invalid authorization", headers={"WWW-Authenticate": "Bearer"})
    return Response(generate_latest(await _registry(edge)), media_type=CONTENT_TYPE_LATEST)


async def _registry(edge: Edge) -> CollectorRegistry:
    registry = CollectorRegistry()
    jobs = Gauge("ourvidz_jobs", "Open jobs.", ("queue", "state"), registry=registry)
    seconds = Gauge("ourvidz_queued_seconds", "Predicted work of open jobs.", ("queue", "state"), registry=registry)
    oldest = Gauge("ourvidz_oldest_queued_seconds", "Age of the oldest waiting job.", ("queue",), registry=registry)
    workers = Gauge("ourvidz_workers", "Replicas seen lately.", ("queue", "state"), registry=registry)
    due = Gauge("ourvidz_callbacks_due", "Callbacks that wait to be delivered.", registry=registry)
    info = Gauge("ourvidz_build_info", "The version that answers.", ("version",), registry=registry)
    info.labels(VERSION).set(1)
    depth, alive, callbacks = await asyncio.gather(
        edge.queue.depth(), edge.workers.list(within_seconds=30), edge.callbacks.due_count()
    )
    now = datetime.now(UTC)
    for row in depth:
        jobs.labels(row.queue, row.state).set(row.jobs)
        seconds.labels(row.queue, row.state).set(row.cost_seconds)
        if row.state == "ready":
            oldest.labels(row.queue).set(max((now - row.oldest).total_seconds(), 0))
    for worker in alive:
        workers.labels(worker.queue, worker.state).inc()
    due.set(callbacks)
    return registry
