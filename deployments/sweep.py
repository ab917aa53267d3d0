"""The sweep: files that nothing speaks of and nothing ever will.

A replica that dies while it stores, or loses its lease, leaves files under its attempt; the API that dies between a
reference image and its job's row leaves the image; a preview is spoken of only while its attempt runs, and a state
while its job is open. Each is found by its key, and deleted once it is older than the grace time. A file whose key is
of no form that we make is left alone: clients may reach the bucket of the references by themselves.
"""

import re
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from db.blobs import BlobInfo, BlobStore
from db.queue import Queue
from deployments.previews import is_preview
from deployments.states import job_of_state
from deployments.storing import BUCKET, REFERENCE_BUCKET

log = structlog.get_logger()

PAGE = 500
_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_OUR_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# a job of our own has an id of version 7 (RFC 9562, section 5.7); one that was taken over brings any, and a random part
_REFERENCE = re.compile(
    rf"{_ID}/(?:({_OUR_ID})|({_ID})\.[0-9a-f]{{16}})(?:\.ref[1-9][0-9]*)?(?:\.mask)?\.(?:png|jpeg|webp)"
)


class Sweep:
    """Looks through the buckets that jobs write to."""

    def __init__(self, blobs: BlobStore, queue: Queue, grace_seconds: float) -> None:
        self._blobs, self._queue, self._grace = blobs, queue, grace_seconds

    async def once(self) -> int:
        """Go through everything once; returns how many files were deleted. Raises `StorageUnavailable`."""
        deleted = 0
        async for page in old_files(self._blobs, BUCKET, self._grace):
            states = {info.key: job for info in page if (job := job_of_state(info.key))}
            still_open = await self._queue.open_jobs(set(states.values()))
            deleted += await delete_orphans(
                self._blobs, BUCKET, (key for key, job in states.items() if job not in still_open)
            )
            attempts = {info.key: attempt_of(info.key) for info in page}
            live = await self._queue.live_attempts({attempt for attempt in attempts.values() if attempt})
            # the winner's results stay, and its previews go: they are of a running job only
            shown = await self._queue.running_attempts({a for k, a in attempts.items() if a and is_preview(k)})
            orphans = (k for k, a in attempts.items() if a and a not in (shown if is_preview(k) else live))
            deleted += await delete_orphans(self._blobs, BUCKET, orphans)
        async for page in old_files(self._blobs, REFERENCE_BUCKET, self._grace):
            jobs = {info.key: job_of_reference(info.key) for info in page}
            known = await self._queue.known_jobs({job for job in jobs.values() if job})
            deleted += await delete_orphans(
                self._blobs, REFERENCE_BUCKET, (k for k, j in jobs.items() if j and j not in known)
            )
        return deleted


async def old_files(blobs: BlobStore, bucket: str, grace_seconds: float) -> AsyncIterator[list[BlobInfo]]:
    """The files of a bucket that are older than that, a page at a time."""
    newest = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    page: list[BlobInfo] = []
    async for info in blobs.list(bucket):
        if info.modified_at > newest:
            continue
        page.append(info)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


async def delete_orphans(blobs: BlobStore, bucket: str, keys: Iterable[str]) -> int:
    """Delete files that nothing speaks of; returns how many."""
    orphans = list(keys)
    await blobs.delete(bucket, orphans)
    if orphans:
        log.warning("orphans_deleted", bucket=bucket, files=len(orphans))
    return len(orphans)


def attempt_of(key: str) -> tuple[UUID, int] | None:
    """The job and attempt of a key `<user>/<job>/<attempt>/<file>`; None for any other key."""
    parts = key.split("/")
    try:
        return (UUID(parts[1]), int(parts[2])) if len(parts) == 4 else None
    except ValueError:
        return None


def job_of_reference(key: str) -> UUID | None:
    """The job that a reference or a mask was stored for, by the names that `serve_app.references` gives them.

    None for any other key, such as an upload's, or that of a file which a client has put there under a random id.
    """
    named = _REFERENCE.fullmatch(key)
    return None if named is None else UUID(named[1] or named[2])
