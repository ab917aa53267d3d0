"""/v1/jobs/{id}: the manifests of a job's files, and making the job again."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Response

from db.idempotency import canonical_body
from db.pool import as_user
from models.origin.manifest import Manifest
from serve_app.api.auth import EdgeDep, User
from serve_app.api.jobs import IdempotencyKey, may_see, read_job
from serve_app.api.problems import Problem
from serve_app.api.wire import Job
from serve_app.rerun import rerun

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{job_id}/assets/{index}/manifest", operation_id="getManifest")
async def get_manifest(job_id: UUID, index: Annotated[int, Path(ge=0, le=1000)], edge: EdgeDep, user: User) -> Manifest:
    """What a file was made from and by: everything that its pixels depend on, and their hash."""
    async with as_user(edge.pool, user.user_id) as connection:
        may_see(user, await edge.jobs.read(connection, job_id))
        manifest = await edge.jobs.manifest(connection, job_id, index)
    if manifest is None:
        raise Problem(404, "no_manifest", "the job has no such file, or the file has no manifest")
    return Manifest.model_validate(manifest)


@router.post("/{job_id}/rerun", status_code=202, operation_id="rerunJob")
async def rerun_job(
    job_id: UUID, response: Response, edge: EdgeDep, user: User, idempotency_key: IdempotencyKey = None
) -> Job:
    """Make a completed job again with its own seed, parameters, words and reference. It counts as any other job."""
    async with as_user(edge.pool, user.user_id) as connection:
        record = may_see(user, await edge.jobs.read(connection, job_id))
    body = canonical_body({"rerun": str(job_id)})
    accepted = await rerun(edge, user, record, idempotency_key=idempotency_key, body=body)
    job = await read_job(edge, user, accepted.job_id)
    response.headers["Location"] = job.urls.self
    if accepted.replayed:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return job
