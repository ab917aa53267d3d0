"""Previews of a running job: made and stored beside the run, told by the next renewal, deleted when the run ends.

Each lies under its attempt, in a file of its own, so that no reader meets one that is being overwritten. A row speaks
of it only under the fence of the renewal. What a replica that died left is found by the sweep: no preview is kept for
an attempt that does not run.
"""

import asyncio
from collections.abc import Callable
from uuid import UUID

import structlog

from db.blobs import BlobStore, StorageUnavailable
from deployments.held import Held
from deployments.storing import BUCKET, attempt_prefix
from models.denoising.preview import PreviewFailed, Snapshot, Snapshots, render

log = structlog.get_logger()

NAME = "preview-"
SHOWN = "shown"
_cleaning: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive


def preview_key(user_id: object, job_id: UUID, attempt: int, step: int) -> str:
    """Where the preview after that step lies in the bucket `workspace-temp`."""
    return f"{attempt_prefix(user_id, job_id, attempt)}{NAME}{step}.webp"


def is_preview(key: str) -> bool:
    """Whether a key of that bucket is a preview's."""
    return key.rpartition("/")[2].startswith(NAME)


async def cleaned() -> None:
    """Returns when no preview of an ended run is being deleted any more."""
    await asyncio.gather(*_cleaning)


class Previews:
    """The previews of one run, if its job asked for them: else `snapshots` is None, and nothing happens here.

    Nothing raises either: what fails is logged and counted, and the job goes on. `count` is called with `shown`, or
    with the code of what failed.
    """

    def __init__(self, held: Held, seconds: float, blobs: BlobStore, count: Callable[[str], None]) -> None:
        self._held, self._blobs, self._count = held, blobs, count
        self._params = held.claim.job["params"]
        self.snapshots = Snapshots(seconds) if self._params.get("previews") else None
        self._task: asyncio.Task[None] | None = None
        self._keys: list[str] = []
        self._ended = False

    def look(self) -> None:
        """Begin with the next preview, if there is one and none is being made. Returns at once."""
        if self.snapshots is not None and (self._task is None or self._task.done()):
            try:
                snapshot = self.snapshots.take()
            except PreviewFailed as error:
                self._failed(error)
                return
            if snapshot is not None:
                self._task = asyncio.create_task(self._show(snapshot))

    def end(self) -> None:
        """The run has ended: delete its previews, in the background, so that a slow store does not hold the slot."""
        self._ended = True
        if self._task is not None:
            cleaning = asyncio.create_task(self._clean(self._task))
            _cleaning.add(cleaning)
            cleaning.add_done_callback(_cleaning.discard)

    async def _clean(self, last: "asyncio.Task[None]") -> None:
        # after whatever is being stored, which else would come behind
        await asyncio.gather(last, return_exceptions=True)
        try:
            await self._blobs.delete(BUCKET, self._keys)
        except StorageUnavailable as error:
            self._failed(error)  # the sweep will find them

    async def _show(self, snapshot: Snapshot) -> None:
        claim = self._held.claim
        key = preview_key(claim.job["user_id"], claim.job_id, claim.attempt, snapshot.step)
        try:
            data = await asyncio.to_thread(render, snapshot, self._params["width"], self._params["height"])
            if self._ended or self._held.stop_reason is not None:
                return
            self._keys.append(key)  # before it is stored: a store may keep what it says that it refused
            await self._blobs.put(BUCKET, key, data, "image/webp")
        except (PreviewFailed, StorageUnavailable) as error:
            self._failed(error)
        else:
            self._held.preview = (snapshot.step, snapshot.of)
            self._count(SHOWN)

    def _failed(self, error: PreviewFailed | StorageUnavailable) -> None:
        claim = self._held.claim
        log.warning(
            "preview_failed", job_id=str(claim.job_id), attempt=claim.attempt, code=error.code, reason=str(error)
        )
        self._count(error.code)
