"""Ending a job by the report of the outside provider that runs it: files first, then one transaction.

Files come from the provider's `output_hosts`, or lie in the job's own folder of `workspace-temp` already, where a
worker of the operator's has put them. Either way they are decoded and written anew, so sizes and types are measured,
never taken from the report; what it says besides is kept as reported.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from db.blobs import BlobNotFound, InvalidBlobName
from db.jobs import Status
from db.queue import Claim, Settlement
from db.reports import Open, Reported, Reports
from deployments.egress import EgressError
from deployments.provider.outputs import FETCH_SECONDS, MAX_OUTPUTS, TYPES, encode, host_allowed
from deployments.storing import BUCKET, EncodedFile, Finishing, StorageFailed, Storing
from models.engine import GenerationError
from serve_app.api.problems import UNAVAILABLE, Problem
from serve_app.edge import Edge

log = structlog.get_logger()

STORE_SECONDS = 10.0  # of patience with the object store while the job's row is locked
LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Report:
    """What a provider says, after its dialect has been read. `assets` are URLs or paths, each with its metadata."""

    job_id: UUID
    status: Status
    assets: Sequence[tuple[str, Mapping[str, Any]]] = ()
    error: str | None = None
    metadata: Mapping[str, Any] | None = None


async def take(edge: Edge, job: Reported, report: Report) -> bool:
    """Do what a report says. False when the job has ended already, or ends meanwhile: then nothing is changed. Raises
    `Problem` for files that can't be had; then the job goes on."""
    if job.ended:
        return False
    reports = Reports(edge.pool)
    if report.status is Status.PROCESSING:
        await reports.begin(report.job_id)
        return True
    files: list[EncodedFile] = []
    if report.status is Status.COMPLETED:
        if not 0 < len(report.assets) <= MAX_OUTPUTS:
            message = f"a completed job has 1 to {MAX_OUTPUTS} assets"
            raise Problem(400, "length" if report.assets else "missing", message, field="assets")
        files = [await _file(edge, job, report, n) for n in range(len(report.assets))]
    async with reports.held(report.job_id) as (connection, row):
        if row is None:
            return False
        end = await _end(edge, job, report, files, row)
        if not await edge.queue.settle([end], connection):
            return False
    edge.notifier.job(report.job_id)
    edge.notifier.queue("callbacks")
    log.info("provider_report_taken", job_id=str(report.job_id), status=report.status, assets=len(files))
    return True


async def _end(edge: Edge, job: Reported, report: Report, files: list[EncodedFile], row: Open) -> Settlement:
    said = dict(report.metadata or {})
    if report.status is not Status.COMPLETED:
        failed = report.status is Status.FAILED
        return Settlement(
            job_id=report.job_id,
            attempt=row.fence,
            status=report.status,
            error_code="provider_failed" if failed else None,
            error_message=(report.error or "the provider gave no reason")[:LONGEST_MESSAGE] if failed else None,
            retryable=True if failed else None,
        )
    settings = {"ran_at": "provider", "provider": job.provider, "reported": said}
    storing = Storing(edge.blobs, edge.signer, edge.settings.callback_url_seconds, STORE_SECONDS)
    claim = Claim({**vars(job), "id": report.job_id}, row.attempt, 0, 1)
    try:
        assets = await storing.put(claim, files, settings, job.model_type, lambda: None)
    except StorageFailed as error:
        raise Problem(503, "storage_unavailable", error.message, headers=UNAVAILABLE) from None
    seconds = said.get("generation_time")
    taken = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e6
    return Settlement(
        job_id=report.job_id,
        attempt=row.fence,
        status=Status.COMPLETED,
        settings=settings,
        generation_time_ms=round(seconds * 1000) if taken and seconds is not None else None,
        assets=assets,
        callback_assets=storing.references(assets),
        facts={"num_images": sum(asset.asset_type == "image" for asset in assets), "provider": job.provider},
    )


async def _file(edge: Edge, job: Reported, report: Report, number: int) -> EncodedFile:
    """One asset of a report, as a file of ours."""
    place, about = report.assets[number]
    field, limits = f"assets.{number}", edge.settings
    if place.startswith(("https://", "http://")):
        if not host_allowed(place, job.output_hosts):
            message = "lies at a host that is not among the provider's output_hosts"
            raise Problem(400, "output_host", message, field=field)
        try:
            data = (await edge.egress.fetch(place, limits.max_output_bytes, FETCH_SECONDS, TYPES[job.format])).data
        except EgressError as error:
            raise Problem(400, error.code, str(error), field=field) from None
    else:
        data = await _stored(edge, job, report.job_id, place, field)
    seed = about.get("seed", (report.metadata or {}).get("seed"))
    seed = seed if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63 else None
    finishing = await asyncio.to_thread(Finishing.of, edge.settings)
    pixels = limits.max_reference_pixels
    try:
        return await asyncio.to_thread(encode, data, job.format, seed, job.model_type, finishing, pixels)
    except GenerationError as error:
        raise Problem(400, error.code, error.message, field=field) from None


async def _stored(edge: Edge, job: Reported, job_id: UUID, place: str, field: str) -> bytes:
    """A file that lies in the job's own folder."""
    key = place.removeprefix(f"{BUCKET}/")
    if not key.startswith(f"{job.user_id}/{job_id}/"):
        message = "is neither a URL nor a path in the job's own folder"
        raise Problem(400, "asset_path", message, field=field)
    try:
        info = await edge.blobs.head(BUCKET, key)
        if info.size > edge.settings.max_output_bytes:
            raise Problem(400, "length", f"has more than {edge.settings.max_output_bytes} bytes", field=field)
        return await edge.blobs.get(BUCKET, key)
    except (BlobNotFound, InvalidBlobName):
        raise Problem(400, "asset_file_missing", "is not in the store", field=field) from None
