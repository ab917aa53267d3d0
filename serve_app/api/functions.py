"""/functions/v1/queue-job: the route that existing clients of the functions submit by, in both of their dialects.

Only the wire differs from /v1: what is accepted goes through the same submission. Errors are JSON with the status
codes that those clients know, and come in this order: 405, 401, 413 and 415, 400 for what is no JSON object or no job
type, 503 for a model that is not there, and then 400, 403 and 503 by field.
"""

from typing import Any

from fastapi import APIRouter, Request

from db.access import Principal
from db.idempotency import canonical_body
from db.jobs import Accepted, Status
from models.catalog import FAMILIES, Family, JobType
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import QUEUE_JOB, json_object
from serve_app.api.jobs import IdempotencyKey, owned
from serve_app.api.queue_requests import read_submission
from serve_app.edge import Edge
from serve_app.submission import submit

router = APIRouter(prefix="/functions/v1", tags=["functions"])


@router.post("/queue-job", operation_id="queueJob", openapi_extra=QUEUE_JOB)
async def queue_job(
    request: Request, edge: EdgeDep, user: User, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Queue a job: `{job_type, prompt, …}` or `{jobType, metadata: {prompt, …}}`. The answer suits both dialects."""
    body = await json_object(request)
    job_type, asked = await read_submission(edge, body)
    accepted = await submit(edge, user, asked, idempotency_key=idempotency_key, body=canonical_body(body))
    return await _answer(edge, user, job_type, accepted)


async def _answer(edge: Edge, user: Principal, job_type: JobType, accepted: Accepted) -> dict[str, Any]:
    record = await owned(edge, user, accepted.job_id)
    row, facts = record.job, FAMILIES[job_type.family]
    # as it was accepted, though a replica may have it by now: clients look for this word
    status = row["status"] if accepted.replayed else Status.QUEUED.value
    negative = row["params"]["negative_prompt"]
    depth = sum(d.jobs for d in await edge.queue.depth() if d.queue == (record.queue or {}).get("queue"))
    return {
        "success": True,
        "jobId": row["id"],
        "job_id": row["id"],
        "status": status,
        "queueName": facts.legacy_queue,
        "queue": facts.legacy_queue,
        "message": "Job queued successfully",
        "job": {
            "id": row["id"],
            "user_id": row["user_id"],
            "job_type": row["job_type"],
            "format": row["format"],
            "quality": row["quality"],
            "model_type": row["model_type"],
            "status": status,
            "original_prompt": row["original_prompt"],
            "enhanced_prompt": row["enhanced_prompt"],
            "template_name": row["template_name"],
            "created_at": row["created_at"],
            "metadata": row["metadata"],
            "params": row["params"],
        },
        "jobType": row["job_type"],
        "queueLength": depth,
        "modelVariant": facts.legacy_variant,
        "isSDXL": job_type.family is Family.SDXL,
        "negativePromptSupported": True,
        "adjustments": row["adjustments"],
        "fixes_applied": [f"{one['field']}: {one['reason']}" for one in row["adjustments"]],
        "debug": {
            "userId": row["user_id"],
            "hasPrompt": bool(row["original_prompt"]),
            "promptLength": len(row["original_prompt"]),
            "promptWordCount": len(row["original_prompt"].split()),
            "hasNegativePrompt": bool(negative),
            "negativePromptLength": len(negative),
            "negativePromptWordCount": len(negative.split()),
            "negativePromptError": None,
            "redisConfigured": False,
            "metadataFields": len(row["metadata"]),
            "timestamp": row["created_at"],
        },
    }
