"""From rows to what clients see. URLs are signed here, on read."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from db.access import ApiKey
from db.blobs import UrlSigner
from db.jobs import JobRecord, Status
from deployments.previews import preview_key
from deployments.storing import BUCKET
from models.denoising.preview import preview_size
from serve_app.api.wire import Adjusted, Asset, CallbackDelivery, Job, JobError, JobUrls, Key, Preview, Progress

PREVIEW_URL_SECONDS = 60


def job_view(
    record: JobRecord,
    signer: UrlSigner,
    base: str,
    seconds: int,
    eta: float | None = None,
    preview: Preview | None = None,
) -> Job:
    """A job as its owner sees it. `base` is the public URL, `seconds` how long signed URLs work."""
    row, queue = record.job, record.queue or {}
    error = None
    if row["error_code"] is not None:
        error = JobError(code=row["error_code"], message=row["error_message"], retryable=row["retryable"])
    progress = None
    if queue.get("state") == "running" and queue.get("phase"):
        progress = Progress(phase=queue["phase"], step=queue["step"], steps=queue["steps"])
    url = f"{base}/v1/jobs/{row['id']}"
    return Job(
        id=row["id"],
        job_type=row["job_type"],
        status=row["status"],
        stage=row["stage"],
        format=row["format"],
        quality=row["quality"],
        model=row["model_type"],
        content_mode=row["content_mode"],
        prompt=row["original_prompt"],
        enhanced_prompt=row["enhanced_prompt"],
        enhancement=row["enhancement"],
        enhancement_strategy=row["enhancement_strategy"],
        params=row["params"],
        adjustments=[Adjusted(**a) for a in row["adjustments"]],
        settings=row["generation_settings"],
        progress=progress,
        position=(record.standing or {}).get("ahead") if record.status is Status.QUEUED else None,
        eta_seconds=eta,
        cancelling=queue.get("cancel") is not None,
        attempt=queue.get("attempt", row["attempts"]),
        failures=queue.get("failures", row["failures"]),
        max_attempts=row["max_attempts"],
        error=error,
        assets=[asset_view(asset, row["id"], signer, base, seconds) for asset in record.assets],
        callback_url=row["callback_url"],
        callbacks=[callback_view(callback) for callback in record.callbacks],
        metadata=row["metadata"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        queue_wait_seconds=_seconds(row["queue_wait_ms"]),
        generation_seconds=_seconds(row["generation_time_ms"]),
        enhancement_seconds=_seconds(row["enhancement_time_ms"]),
        urls=JobUrls(
            self=url,
            events=f"{base}/v1/events/jobs/{row['id']}",
            cancel=f"{url}/cancel",
            retry=f"{url}/retry",
            rerun=f"{url}/rerun" if record.status is Status.COMPLETED else None,
            preview=preview.url if preview else None,
        ),
    )


def preview_view(record: JobRecord, signer: UrlSigner) -> Preview | None:
    """The latest preview of a running job, with a fresh signed URL; None where there is none."""
    row, queue = record.job, record.queue or {}
    if queue.get("state") != "running" or queue.get("preview_step") is None:
        return None
    key = preview_key(row["user_id"], row["id"], queue["attempt"], queue["preview_step"])
    width, height = preview_size(row["params"]["width"], row["params"]["height"])
    return Preview(
        job_id=row["id"],
        attempt=queue["attempt"],
        step=queue["preview_step"],
        of=queue["preview_steps"],
        url=signer.sign(BUCKET, key, PREVIEW_URL_SECONDS),
        width=width,
        height=height,
    )


def asset_view(row: Mapping[str, Any], job_id: str, signer: UrlSigner, base: str, seconds: int) -> Asset:
    """One file of a job, with fresh signed URLs."""
    thumbnail = row["thumbnail_path"]
    return Asset(
        id=row["id"],
        index=row["asset_index"],
        type=row["asset_type"],
        url=signer.sign(BUCKET, row["temp_storage_path"], seconds),
        thumbnail_url=signer.sign(BUCKET, thumbnail, seconds) if thumbnail else None,
        bucket=BUCKET,
        key=row["temp_storage_path"],
        thumbnail_key=thumbnail,
        mime_type=row["mime_type"],
        file_size_bytes=row["file_size_bytes"],
        width=row["width"],
        height=row["height"],
        frames=row["frames"],
        fps=row["fps"],
        duration_seconds=row["duration_seconds"],
        seed=row["generation_seed"],
        model=row["model_used"],
        expires_at=row["expires_at"],
        moderation_status=row["moderation_status"],
        moderation_reason=row["moderation_reason"],
        manifest_url=f"{base}/v1/jobs/{job_id}/assets/{row['asset_index']}/manifest" if row["has_manifest"] else None,
    )


def callback_view(row: Mapping[str, Any]) -> CallbackDelivery:
    """One callback and how far it got."""
    return CallbackDelivery(
        id=row["id"],
        event=row["event_type"],
        state=row["state"],
        attempts=row["attempts"],
        last_status=row["last_status"],
        last_error=row["last_error"],
        delivered_at=row["delivered_at"],
    )


def key_view(key: ApiKey) -> Key:
    """An API key; with the key itself only where it was just made."""
    return Key(
        id=key.id,
        user_id=key.user_id,
        username=key.username,
        name=key.name,
        prefix=key.prefix,
        created_at=key.created_at,
        last_used_at=key.last_used_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        key=key.secret,
    )


def event_view(
    event_id: int, job_id: UUID, attempt: int, kind: str, at: datetime, data: Mapping[str, Any]
) -> dict[str, Any]:
    """One line of a job's history."""
    return {
        "id": event_id,
        "job_id": str(job_id),
        "attempt": attempt,
        "kind": kind,
        "at": at.isoformat(),
        "data": dict(data),
    }


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
