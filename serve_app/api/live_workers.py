"""/functions/v1: the family of worker addresses, as a view of the live cluster.

Replicas take their work from Postgres, so there is no address that would be called. Registered ones are kept and
shown, and no work is sent to them; every answer of a registration says so.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any, get_args
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, Request

from db.registrations import Registrations
from db.workers import Worker
from serve_app.api.auth import Admin, EdgeDep, User
from serve_app.api.bodies import SWITCH, TEXT, dialect, json_object, one_of, optional_object
from serve_app.api.problems import Problem
from serve_app.edge import Edge
from serve_app.live_workers import ENDPOINTS, QUEUES, LiveWorkers, WorkerType, live_workers

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

NOTE = "the address is kept and shown; no work is sent to it, as replicas take theirs from the queue"
MAX_URL, MAX_WORD = 2048, 200
_REGISTRATION = {"auto_registered": SWITCH, "registration_method": TEXT, "detection_method": TEXT, "timestamp": TEXT}
REGISTRATION = one_of(
    dialect("snake_case", ("worker_url",), worker_url=TEXT, **_REGISTRATION),
    dialect("camelCase", ("workerUrl",), workerUrl=TEXT, **_REGISTRATION),
)
ASKED = one_of(
    dialect("worker type", (), worker_type={"type": "string", "enum": list(get_args(WorkerType)), "default": "wan"}),
    required=False,
)


@router.post("/register-chat-worker", operation_id="registerChatWorker", openapi_extra=REGISTRATION)
async def register_chat_worker(request: Request, edge: EdgeDep, admin: Admin) -> dict[str, Any]:
    """Keep the address of a chat worker. `healthStatus` is of the replicas that answer chats here."""
    url, info = await _registration(request)
    entries = {"chatWorkerUrl": url, "chatWorkerRegistrationInfo": info}
    at = await Registrations(edge.pool).write(entries)
    chat = (await live_workers(edge))["chat"]
    return {
        "success": True,
        "workerUrl": url,
        "healthStatus": "healthy" if chat.fault is None else "unhealthy",
        "healthError": chat.fault,
        "responseTimeMs": None,
        "registrationInfo": info | {"registeredAt": at},
        "redirected": False,
        "message": NOTE,
    }


@router.post("/update-worker-url", operation_id="updateWorkerUrl", openapi_extra=REGISTRATION)
async def update_worker_url(request: Request, edge: EdgeDep, admin: Admin) -> dict[str, Any]:
    """Keep the address of a worker that makes media."""
    url, info = await _registration(request)
    entries = {"workerUrl": url, "worker_url": url, "workerRegistrationInfo": info}
    at = await Registrations(edge.pool).write(entries)
    return {
        "success": True,
        "message": NOTE,
        "worker_url": url,
        "updatedAt": at,
        "auto_registered": info["auto_registered"],
        "registration_method": info["registration_method"],
        "detection_method": info["detection_method"],
        "redirected": False,
    }


@router.post("/get-active-worker-url", operation_id="getActiveWorkerUrl", openapi_extra=ASKED)
async def get_active_worker_url(request: Request, edge: EdgeDep, user: User) -> dict[str, Any]:
    """Where work of a kind is taken, which is this API, and whether a replica is there to do it. 404 for a kind that
    the profile has no model of."""
    body = await optional_object(request)
    kind = body.get("worker_type", "wan")
    if kind not in get_args(WorkerType):
        raise Problem(400, "choice", f"must be one of {', '.join(get_args(WorkerType))}", field="worker_type")
    live = (await live_workers(edge))[kind]
    if not live.families:
        raise Problem(404, "worker_not_found", live.fault or "", field="worker_type")
    registered = await Registrations(edge.pool).read()
    info = registered.get("chatWorkerRegistrationInfo" if kind == "chat" else "workerRegistrationInfo")
    return {
        "success": True,
        "worker_url": edge.settings.public_url,
        "workerUrl": edge.settings.public_url,
        "isHealthy": live.fault is None,
        "healthError": live.fault,
        "registrationInfo": info,
        "worker_type": kind,
        "supportedEndpoints": list(ENDPOINTS[live.type]),
        "workerCapabilities": live.capabilities(),
        "responseTimeMs": None,
        "lastChecked": live.last_seen,
    }


@router.post("/health-check-workers", operation_id="healthCheckWorkers")
async def health_check_workers(edge: EdgeDep, user: User) -> dict[str, Any]:
    """Whether replicas of each kind are there. `lastChecked` is the latest sign of life that one gave by itself."""
    live = await live_workers(edge)
    results = {
        f"{kind}Worker": {
            "isHealthy": one.fault is None,
            "lastChecked": one.last_seen,
            "responseTimeMs": None,
            "healthError": one.fault,
            "workerUrl": edge.settings.public_url if one.families else None,
        }
        for kind, one in live.items()
    }
    return {"success": True, "healthResults": results, "timestamp": datetime.now(UTC)}


@router.post("/system-metrics", operation_id="systemMetrics")
async def system_metrics(edge: EdgeDep, admin: Admin) -> dict[str, Any]:
    """Every replica, what waits in each queue, and for how long: by the older bands, which know the queue's length
    only, and in seconds, null while no run has been measured."""
    live = await live_workers(edge)
    made = {kind: one for kind, one in live.items() if kind != "chat"}
    return {
        "timestamp": datetime.now(UTC),
        "workers": {kind: [_shown(edge, one, worker) for worker in one.replicas] for kind, one in live.items()},
        "queues": {QUEUES[kind]: one.waiting for kind, one in live.items()},
        "running": {QUEUES[kind]: one.running for kind, one in live.items()},
        "etaEstimates": {kind: one.band for kind, one in made.items()},
        "etaSeconds": {kind: one.wait_seconds for kind, one in made.items()},
        "deployments": await asyncio.to_thread(_deployments, edge),
    }


def _shown(edge: Edge, live: LiveWorkers, worker: Worker) -> dict[str, Any]:
    return {
        "type": live.type,
        "url": edge.settings.public_url,
        "lastChecked": worker.seen_at,
        "responseTime": None,
        "status": "healthy" if worker.state == "ready" else worker.state,
        "id": worker.id,
        "model": worker.model_name,
        "device": worker.device,
        "node": worker.node,
        "slots": worker.slots,
        "running": worker.running,
        "error": worker.error,
    }


def _deployments(edge: Edge) -> dict[str, Any] | None:
    """What Serve says of its deployments; None without a cluster, or where its controller does not answer. Blocking."""
    if edge.enhancer is None:
        return None
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        applications = serve.status().applications
    except (RayError, RayServeException) as error:
        log.warning("serve_status_unknown", error=type(error).__name__)
        return None
    return {
        name: {"status": deployment.status.value, "replicas": deployment.replica_states, "application": application}
        for application, told in applications.items()
        for name, deployment in told.deployments.items()
    }


async def _registration(request: Request) -> tuple[str, dict[str, Any]]:
    """The address, and what else was said of it. 400 for what is no address of a worker."""
    body = await json_object(request)
    field = "workerUrl" if "workerUrl" in body and "worker_url" not in body else "worker_url"
    url = body.get(field)
    if not isinstance(url, str) or not url:
        raise Problem(400, "missing", "is required", field=field)
    if not _is_address(url):
        raise Problem(400, "invalid_url", "must be an http or https URL without a user or password", field=field)
    automatic = body.get("auto_registered", False)
    if not isinstance(automatic, bool):
        raise Problem(400, "type", "must be true or false", field="auto_registered")
    info: dict[str, Any] = {"worker_url": url, "auto_registered": automatic}
    for name in ("registration_method", "detection_method", "timestamp"):
        value = body.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_WORD and value.isprintable()):
            raise Problem(400, "type", f"must be a string of at most {MAX_WORD} characters", field=name)
        info[name] = value
    return url, info


def _is_address(url: str) -> bool:
    if len(url) > MAX_URL or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        )
    except ValueError:
        return False
