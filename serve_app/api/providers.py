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

from serve_app.api.auth import EdgeDep
from serve_app.api.bodies import CARRIED, TEXT, dialect, json_object, one_of
from serve_app.api.problems import Problem
from serve_app.edge import Edge

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
    provider = await edge.jobs.provider(job_id)
    if provider is None or provider == "local":
        log.info("provider_report_skipped", job_id=str(job_id), status=status)
        return NOT_OURS | {"jobId": str(job_id)}
    raise Problem(501, "not_implemented", f"no adapter for the provider {provider} is installed")


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
