"""/functions/v1: pictures that admins have made, through the same queue as everybody's."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from db.access import Principal
from db.destinations import Destinations
from db.idempotency import canonical_body
from db.jobs import JobRecord, Status
from serve_app.admission import Submission
from serve_app.api.auth import Admin, EdgeDep
from serve_app.api.bodies import AMOUNT, CARRIED, PARAMETERS, TEXT, dialect, json_object, one_of, optional_object
from serve_app.api.jobs import IdempotencyKey, owned
from serve_app.api.problems import DOCUMENTED, Problem
from serve_app.api.queue_requests import read_submission
from serve_app.api.views import asset_view
from serve_app.api.wire import Asset
from serve_app.api.wire import Problem as ProblemDocument
from serve_app.avatars import MOST, avatars_of
from serve_app.edge import Edge
from serve_app.submission import submit, submit_together

router = APIRouter(prefix="/functions/v1", tags=["functions"])

WAIT_SECONDS = 60.0
LOOK_SECONDS = 0.25
LONGEST_MODE = 100
JOB_TYPES = {"fast": "sdxl_image_fast", "high": "sdxl_image_high"}
OWN = ("mode", "wait_seconds", "quality")  # fields that queue-job has not, or has with another meaning
TYPES = ("job_type", "jobType")
IMAGE = one_of(
    dialect(
        "image",
        ("prompt",),
        prompt=TEXT,
        mode=TEXT,
        quality={"type": "string", "enum": list(JOB_TYPES)},
        metadata=CARRIED,
        wait_seconds=AMOUNT,
        **PARAMETERS,
    ),
)
AVATARS = one_of(
    dialect("names", (), names={"type": "array", "items": TEXT, "maxItems": MOST}),
    required=False,
)


@router.post(
    "/generate-admin-image",
    operation_id="generateAdminImage",
    openapi_extra=IMAGE,
    responses={
        202: {"description": "Accepted, and not finished within the time that was waited"},
        500: {"model": ProblemDocument, "description": "The job failed"},
    },
)
async def generate_admin_image(
    request: Request, response: Response, edge: EdgeDep, admin: Admin, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Make a picture and wait for it, at most `wait_seconds` (60 unless less is said): 200 with the picture, or 202
    with a job that goes on and a URL that is null. The body and `metadata` may have what queue-job reads there, such
    as a seed, and `quality`, which is `fast` or `high`. `mode` is a word of the caller's own, which is given back."""
    body = await json_object(request)
    wait = _wait_seconds(body)
    mode = body.get("mode")
    if mode is not None and not (isinstance(mode, str) and len(mode) <= LONGEST_MODE):
        raise Problem(400, "type", f"must be a string of at most {LONGEST_MODE} characters", field="mode")
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    if named := next((name for name in TYPES if body.get(name) is not None), None):
        raise Problem(400, "unsupported", "the quality decides the job type here", field=named)
    kept = metadata if mode is None else metadata | {"mode": mode}
    own = (*OWN, *TYPES)
    asked = {name: value for name, value in body.items() if name not in own}
    asked |= {"job_type": JOB_TYPES[_quality(body, metadata)], "metadata": kept}
    _, submission = await read_submission(edge, asked)
    accepted = await submit(edge, admin, submission, idempotency_key=idempotency_key, body=canonical_body(body))
    record = await _ended(edge, admin, accepted.job_id, wait)
    _check_end(record)
    if record.status is not Status.COMPLETED:
        response.status_code = 202
    return _image_answer(edge, record, mode, metadata)


def _image_answer(edge: Edge, record: JobRecord, mode: str | None, metadata: dict[str, Any]) -> dict[str, Any]:
    row, settings = record.job, edge.settings
    files = [
        asset_view(a, row["id"], edge.signer, settings.public_url, settings.signed_url_seconds) for a in record.assets
    ]
    images = [_image(file, record, mode, metadata) for file in files] or [_image(None, record, mode, metadata)]
    return {
        "success": True,
        "pending": record.status is not Status.COMPLETED,
        "jobId": row["id"],
        "status": row["status"],
        "image": images[0],
        "images": images if files else [],
        "adjustments": row["adjustments"],
    }


def _image(file: Asset | None, record: JobRecord, mode: str | None, metadata: dict[str, Any]) -> dict[str, Any]:
    """One picture; of a job that goes on still, what is known already."""
    return {
        "id": file.id if file else record.job["id"],
        "url": file.url if file else None,
        "thumbnail_url": file.thumbnail_url if file else None,
        "prompt": record.job["original_prompt"],
        "mode": mode,
        "timestamp": record.job["completed_at"] or record.job["created_at"],
        "metadata": metadata | {"seed": file.seed if file else record.job["params"]["seed"]},
    }


@router.post(
    "/generate-avatars", operation_id="generateAvatars", openapi_extra=AVATARS, responses={409: DOCUMENTED[409]}
)
async def generate_avatars(
    request: Request, edge: EdgeDep, admin: Admin, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Queue an avatar for each of these characters; without names, for the installation's own that have no picture.
    Each `path` is there, and in the character's `image_url`, when its job has completed."""
    body = await optional_object(request)
    names = body.get("names")
    if names is not None and not _are_names(names):
        raise Problem(400, "type", f"must be a list of at most {MOST} different names", field="names")
    avatars = await avatars_of(Destinations(edge.pool), names)
    submissions = [
        Submission(
            job_type=JOB_TYPES["high"],
            given={"prompt": avatar.prompt, "num_images": 1},
            metadata={
                "destination": "character_avatar",
                "character_id": str(avatar.character_id),
                "avatar": avatar.key,
            },
        )
        for avatar in avatars
    ]
    accepted = (
        await submit_together(edge, admin, submissions, idempotency_key=idempotency_key, body=canonical_body(body))
        if submissions
        else []
    )
    results = [
        {
            "name": avatar.name,
            "path": avatar.path,
            "characterId": avatar.character_id,
            "jobId": one.job_id,
            "status": "queued",
        }
        for avatar, one in zip(avatars, accepted, strict=True)
    ]
    return {"success": True, "results": results, "timestamp": datetime.now(UTC)}


def _are_names(names: Any) -> bool:
    return (
        isinstance(names, list)
        and len(names) <= MOST
        and all(isinstance(name, str) and name and name.isprintable() and len(name) <= 200 for name in names)
        and len(set(names)) == len(names)
    )


def _quality(body: dict[str, Any], metadata: dict[str, Any]) -> str:
    given = {"quality": body.get("quality"), "metadata.quality": metadata.get("quality")}
    said = {field: value for field, value in given.items() if value is not None}
    for field, value in said.items():
        if not isinstance(value, str) or value not in JOB_TYPES:
            raise Problem(400, "choice", "must be fast or high", field=field)
        if value != next(iter(said.values())):
            raise Problem(400, "conflict", "is not the quality that is given", field=field)
    return next(iter(said.values()), "high")


def _wait_seconds(body: dict[str, Any]) -> float:
    value = body.get("wait_seconds", WAIT_SECONDS)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= WAIT_SECONDS:
        raise Problem(400, "range", f"must be between 0 and {WAIT_SECONDS:g}", field="wait_seconds")
    return float(value)


async def _ended(edge: Edge, user: Principal, job_id: Any, wait_seconds: float) -> JobRecord:
    """The job once it has ended, or as it is when the time is over."""
    until = time.monotonic() + wait_seconds
    while True:
        bare = await edge.jobs.read_bare(job_id)
        if bare is None or Status(bare["status"]).terminal or time.monotonic() >= until:
            return await owned(edge, user, job_id)
        await asyncio.sleep(LOOK_SECONDS)


def _check_end(record: JobRecord) -> None:
    row = record.job
    if record.status is Status.FAILED:
        raise Problem(500, "generation_failed", f"the job {row['id']} failed: {row['error_code']}")
    if record.status is Status.CANCELLED:
        raise Problem(409, "cancelled", f"the job {row['id']} was cancelled")
