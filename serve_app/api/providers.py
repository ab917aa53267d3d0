"""/functions/v1/job-callback: what outside providers report about jobs that they run for us.

Signed with a shared secret over the raw body. It carries no fence, so it may end only jobs that an outside provider
holds; about jobs of our own replicas, and about jobs that have ended, it answers 200 and changes nothing.
"""

import hashlib
import hmac
import re
import time
from typing import Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Request

from db.jobs import Status
from db.providers import PROVIDER_QUEUE, REPLICATE
from db.reports import Reports
from serve_app.admission import check_metadata
from serve_app.api.auth import EdgeDep
from serve_app.api.bodies import CARRIED, TEXT, dialect, json_object, one_of
from serve_app.api.problems import Problem
from serve_app.edge import Edge
from serve_app.provider_reports import Report, take

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

STATUSES = ("processing", "completed", "failed", "cancelled")
TOLERANCE_SECONDS = 300
_STATUS = {"type": "string", "enum": list(STATUSES)}
_ASSETS = {"type": "array", "items": {"anyOf": [TEXT, CARRIED]}}
REPORT = one_of(
    dialect("snake_case", ("job_id", "status"), job_id=TEXT, status=_STATUS, assets=_ASSETS),
    dialect("camelCase", ("jobId", "status"), jobId=TEXT, status=_STATUS, results=CARRIED),
)
HELD_HERE = ("local", "library")  # our replicas, and copies that never ran
NOT_OURS = {"success": True, "skipped": True, "message": "nothing was changed"}


@router.post("/job-callback", operation_id="jobCallback", openapi_extra=REPORT)
async def job_callback(request: Request, edge: EdgeDep) -> dict[str, Any]:
    """Take a provider's report. Headers: `X-Callback-Timestamp` (Unix seconds) and `X-Callback-Signature`
    (`sha256=` and the hex HMAC-SHA256 of timestamp, a full stop and the body)."""
    raw = await request.body()
    _check_signature(edge, request, raw)
    body = await json_object(request)
    job_id, status = _job_id(body), body.get("status")
    if status not in STATUSES:
        raise Problem(400, "choice", f"must be one of {', '.join(STATUSES)}", field="status")
    results = body.get("results")
    assets = body.get("assets") or (results.get("assets") if isinstance(results, dict) else results) or []
    if not isinstance(assets, list) or not all(isinstance(asset, str | dict) for asset in assets):
        raise Problem(400, "type", "must be a list of paths or objects", field="assets")
    report = Report(job_id, Status(status), _assets(assets), _error(body), _metadata(body))
    job = await Reports(edge.pool).find(job_id)
    if job is None or job.provider in HELD_HERE:
        log.info("provider_report_skipped", job_id=str(job_id), status=status)
        return NOT_OURS | {"jobId": str(job_id), "status": status}
    if job.provider == REPLICATE:  # a report is no proof: whoever holds the job asks the provider itself
        edge.notifier.queue(f"{PROVIDER_QUEUE}/{job_id}")
        return {"success": True, "jobId": str(job_id), "status": status, "message": "the provider is being asked"}
    if not await take(edge, job, report):
        log.info("provider_report_skipped", job_id=str(job_id), status=status)
        return NOT_OURS | {"jobId": str(job_id), "status": status}
    message = "Job callback processed successfully"
    debug = {"job_id": str(job_id), "jobStatus": status, "format": job.format, "assetsProcessed": len(assets)}
    return {"success": True, "jobId": str(job_id), "status": status, "message": message, "debug": debug}


def _assets(assets: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Where each file is, and what is said of it. An asset is a text, or an object in either dialect."""
    read = []
    for number, asset in enumerate(assets):
        about = asset if isinstance(asset, dict) else {}
        place = (
            asset if isinstance(asset, str) else asset.get("url") or asset.get("path") or asset.get("tempStoragePath")
        )
        if not isinstance(place, str) or not place:
            raise Problem(400, "missing", "an asset has a url or a path", field=f"assets.{number}")
        nested = about.get("metadata")
        read.append((place, about | (nested if isinstance(nested, dict) else {})))
    return read


def _error(body: dict[str, Any]) -> str | None:
    """What went wrong, under whichever of the names is given."""
    said = [body.get(name) for name in ("errorMessage", "error_message", "error")]
    said.append(_metadata(body).get("error_type"))
    # characters that can't be stored are no reason to leave the job open
    texts = (text.replace("\0", "").encode(errors="replace").decode() for text in said if isinstance(text, str))
    return next(filter(None, texts), None)


def _metadata(body: dict[str, Any]) -> dict[str, Any]:
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    check_metadata(metadata)
    return metadata


def _check_signature(edge: Edge, request: Request, raw: bytes) -> None:
    stamp = request.headers.get("x-callback-timestamp", "")
    given = request.headers.get("x-callback-signature", "").removeprefix("sha256=")
    fresh = re.fullmatch(r"[0-9]{1,12}", stamp) is not None and abs(time.time() - int(stamp)) <= TOLERANCE_SECONDS
    secret = edge.settings.secret("job_callback_secret")
    expected = hmac.new(secret, stamp.encode() + b"." + raw, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogatepass")) or not fresh:
        raise Problem(401, "invalid_signature", "Unauthorized")


def _job_id(body: dict[str, Any]) -> UUID:
    try:
        return UUID(str(body.get("job_id") or body.get("jobId")))
    except ValueError:
        raise Problem(400, "missing", "Missing required fields: job_id/jobId, status", field="job_id") from None
