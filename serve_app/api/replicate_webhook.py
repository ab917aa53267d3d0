"""/functions/v1/replicate-webhook: an outside provider says that a prediction has ended.

That is no proof of anything but that it may be time to look: the replica that holds the job asks the provider itself.
So a webhook that comes twice, late or never changes nothing but how soon that is.
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import structlog
from fastapi import APIRouter, Request
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from db.jobs import Status
from db.providers import PROVIDER_QUEUE, Providers
from deployments.provider.api import PREDICTION_ID
from serve_app.api.auth import EdgeDep
from serve_app.api.bodies import TEXT, dialect, json_object, one_of
from serve_app.api.problems import Problem
from serve_app.edge import Edge

log = structlog.get_logger()

router = APIRouter(prefix="/functions/v1", tags=["functions"])

TOLERANCE_SECONDS = 300
WEBHOOK = one_of(dialect("a prediction", ("id", "status"), id=TEXT, status=TEXT))


@router.post("/replicate-webhook", operation_id="replicateWebhook", openapi_extra=WEBHOOK)
async def replicate_webhook(request: Request, edge: EdgeDep) -> dict[str, Any]:
    """The provider says that a prediction has ended. Signed after Standard Webhooks (`webhook-id`, `webhook-timestamp`,
    `webhook-signature`), or by `X-Replicate-Signature`: the hex HMAC-SHA256 of `X-Callback-Timestamp`, a full stop and
    the body, or of the body alone when its `completed_at` is as fresh."""
    raw = await request.body()
    _check_signature(edge, request.headers, raw)
    body = await json_object(request)
    name = body.get("id")
    if not isinstance(name, str) or not name:
        raise Problem(400, "missing", "is required", field="id")
    job_id = await Providers(edge.pool).job_of(name) if PREDICTION_ID.fullmatch(name) else None
    job = None if job_id is None else await edge.jobs.read_bare(job_id)
    if job is None:
        raise Problem(404, "job_not_found", "there is no such prediction")
    if Status(job["status"]).terminal:
        return {"ok": True, "skipped": True}
    edge.notifier.queue(f"{PROVIDER_QUEUE}/{job_id}")
    log.info("provider_webhook", job_id=str(job_id), status=job["status"])
    return {"success": True, "jobId": str(job_id), "status": job["status"]}


def _check_signature(edge: Edge, headers: Mapping[str, str], raw: bytes) -> None:
    if edge.settings.replicate_webhook_secret is None:
        raise Problem(503, "webhook_not_configured", "Server misconfigured")
    secret = edge.settings.replicate_webhook_secret.get_secret_value()
    if headers.get("webhook-signature") is not None:
        good = _standard(secret, headers, raw)
    else:
        good = _plain(secret, headers, raw)
    if not good:
        raise Problem(401, "invalid_signature", "Unauthorized")


def _standard(secret: str, headers: Mapping[str, str], raw: bytes) -> bool:
    key = base64.b64encode(_key(secret)).decode()
    sent = {name: headers.get(name, "") for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
    try:
        Webhook(key).verify(raw, sent, json_parse=False)
    except (WebhookVerificationError, ValueError, OverflowError, OSError):  # of times and signatures that are none
        return False
    return True


def _plain(secret: str, headers: Mapping[str, str], raw: bytes) -> bool:
    given = headers.get("x-replicate-signature") or headers.get("replicate-signature") or ""
    stamp = headers.get("x-callback-timestamp")
    signed = raw if stamp is None else stamp.encode("utf-8", "surrogatepass") + b"." + raw
    expected = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
    same = hmac.compare_digest(expected.encode(), given.removeprefix("sha256=").encode("utf-8", "surrogatepass"))
    return same and _fresh(stamp, raw)


def _fresh(stamp: str | None, raw: bytes) -> bool:
    """By the time that was signed along, or by the one in the body, which was signed as well."""
    try:
        if stamp is not None:
            moment = float(stamp) if re.fullmatch(r"[0-9]{1,12}", stamp) else 0.0
        else:
            moment = datetime.fromisoformat(json.loads(raw)["completed_at"]).timestamp()
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False
    return abs(time.time() - moment) <= TOLERANCE_SECONDS


def _key(secret: str) -> bytes:
    """The signing key of a `whsec_` secret; of any other text, its bytes."""
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_") + "==")
        except binascii.Error:
            pass
    return secret.encode()
