"""/v1/users: what is stored of a person, and its erasure."""

from uuid import UUID

import asyncpg
import structlog
from fastapi import APIRouter, Response

from db.blobs import StorageUnavailable
from db.erasures import Erasures
from db.pool import CONNECTION_FAULTS
from deployments.erasure import Erasure
from serve_app.api.auth import EdgeDep, User
from serve_app.api.problems import Problem

router = APIRouter(prefix="/v1/users", tags=["access"])

log = structlog.get_logger()

ERASE_SECONDS = 20.0  # how long a request waits for the last row to go


@router.delete(
    "/{user_id}/data",
    status_code=204,
    operation_id="eraseUser",
    responses={202: {"description": "Durably requested; upkeep deletes the rest."}},
)
async def erase_user(user_id: UUID, edge: EdgeDep, user: User) -> Response:
    """Erase a user with everything that is theirs: yourself, or as an admin anybody. Keys, jobs, files, callbacks,
    endpoints and the profile are gone for good. 202 when there is so much that it goes on after the answer."""
    erasures = Erasures(edge.pool)
    if (user.user_id != user_id and not user.is_admin()) or await erasures.find(user_id) is None:
        raise Problem(404, "user_not_found", "there is no such user")
    stopped = await erasures.request(user_id, "user" if user.user_id == user_id else "admin", user.user_id)
    for job_id in stopped:
        edge.notifier.job(job_id)
    try:
        done = await Erasure(erasures, edge.blobs).carry_out(user_id, ERASE_SECONDS)
    except (StorageUnavailable, asyncpg.PostgresError, *CONNECTION_FAULTS) as error:
        log.warning("erasure_interrupted", error=type(error).__name__)
        done = False  # it was asked for durably; upkeep goes on
    return Response(status_code=204 if done else 202)
