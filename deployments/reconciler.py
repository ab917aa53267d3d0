"""The reconciler: compares the rows that speak of files with the files that there are, and mends what it can.

    missing   a row's file is not there      restored from the workspace where that has it, else the row is marked
    size      the file has another size      the same
    healed    a marked row's file is right   the mark is taken away
    orphan    a file that no row speaks of   deleted, once it is older than the grace time
    unknown   a file as none of ours is named    only reported

Sizes are compared, contents are not: rows hold no checksum of the file, and a store's etag is another one after a
restore. It looks at the workspace, the library and the uploads; what jobs keep beside these is the sweep's alone.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

import structlog

from db.blobs import BlobInfo, BlobNotFound, BlobStore, InvalidBlobName
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, LibraryRows
from db.queue import Queue
from db.reconciliation import Fault, Reconciliation, SpokenOf
from db.uploads import UPLOAD_BUCKET
from deployments.expiry import UPLOADED, is_ours
from deployments.library import SAVED, Library
from deployments.states import job_of_state
from deployments.storing import PROBES
from deployments.sweep import attempt_of

log = structlog.get_logger()

BUCKETS = (WORKSPACE_BUCKET, LIBRARY_BUCKET, UPLOAD_BUCKET)

Kind = Literal["missing", "size", "healed", "orphan", "unknown"]
Repair = Literal["restored", "marked", "unmarked", "deleted", "left"]


@dataclass(frozen=True)
class Finding:
    """One thing that does not agree. `row` is None for files, `found` is the size of the file that there is, and
    `repair` what was done about it, None where nothing was to be done yet."""

    kind: Kind
    bucket: str
    key: str
    row: SpokenOf | None
    found: int | None
    modified_at: datetime | None = None
    repair: Repair | None = None


@dataclass
class Tally:
    """What agreed, for telling a damaged store from the wrong one."""

    users: int = 0
    files: int = 0
    agreeing: int = 0


class NothingAgrees(Exception):
    """Not one file is where a row says: this is another database's store, or it is not mounted. Nothing was mended."""

    code = "nothing_agrees"


class Reconciler:
    """Works on a running system: what moves meanwhile is looked at twice, and young files are left alone."""

    def __init__(
        self, rows: Reconciliation, library: LibraryRows, queue: Queue, blobs: BlobStore, grace_seconds: float
    ) -> None:
        """All of them act as the owner of the tables."""
        self._rows, self._library, self._queue, self._blobs = rows, library, queue, blobs
        self._grace = timedelta(seconds=grace_seconds)
        self.tally = Tally()

    async def compare(self) -> list[Finding]:
        """Everything that does not agree. Changes nothing. Raises `StorageUnavailable`."""
        self.tally = Tally()
        users = {user_id async for user_id in self._rows.users()}
        found = []
        for user_id in users:
            self.tally.users += 1
            found += [finding async for finding in self._of_user(user_id)]
        for bucket in BUCKETS:
            strangers = [info async for info in self._listed(bucket) if _owner(info.key) not in users]
            self.tally.files += len(strangers)
            found += [finding async for finding in self._unspoken(bucket, strangers)]
        return found

    async def repair(self, findings: Iterable[Finding]) -> list[Finding]:
        """Mend what `compare` found; each comes back with what was done. Raises `NothingAgrees` and
        `StorageUnavailable`."""
        given = list(findings)
        if given and not self.tally.agreeing:
            raise NothingAgrees("not one file is where a row says: is this the store of this database?")
        return [replace(finding, repair=await self._mend(finding)) for finding in given]

    async def _of_user(self, user_id: UUID) -> AsyncIterator[Finding]:
        stored: dict[tuple[str, str], BlobInfo] = {}
        for bucket in BUCKETS:
            async for info in self._listed(bucket, str(user_id)):
                stored[bucket, info.key] = info
        self.tally.files += len(stored)
        rows = await self._rows.files_of(user_id)
        for row in rows:
            if finding := await self._look(row, stored.get((row.bucket, row.key))):
                yield finding
        spoken_of = {(row.bucket, row.key) for row in rows}
        for bucket in BUCKETS:
            rest = [info for (where, key), info in stored.items() if where == bucket and (where, key) not in spoken_of]
            async for finding in self._unspoken(bucket, rest):
                yield finding

    async def _listed(self, bucket: str, prefix: str = "") -> AsyncIterator[BlobInfo]:
        try:
            async for info in self._blobs.list(bucket, prefix):
                yield info
        except BlobNotFound:
            return  # a bucket that nobody has written to yet

    async def _look(self, row: SpokenOf, info: BlobInfo | None) -> Finding | None:
        """What is wrong with a row's file. The list may be older than the row, so what it lacks is asked for."""
        if info is None:
            info = await self._head(row.bucket, row.key)
        fault: Fault | None = None
        if info is None:
            fault = "missing"
        elif row.size is not None and info.size != row.size:
            fault = "size"
        else:
            self.tally.agreeing += 1
        if fault is None and row.fault is None:
            return None
        return Finding(fault or "healed", row.bucket, row.key, row, None if info is None else info.size)

    async def _head(self, bucket: str, key: str) -> BlobInfo | None:
        try:
            return await self._blobs.head(bucket, key)
        except (BlobNotFound, InvalidBlobName):
            return None

    async def _unspoken(self, bucket: str, files: list[BlobInfo]) -> AsyncIterator[Finding]:
        """Which of these files, of which no row of their owner speaks, are orphans, and which are not of our making."""
        attempts = {attempt for info in files if bucket == WORKSPACE_BUCKET and (attempt := attempt_of(info.key))}
        running = await self._queue.running_attempts(attempts) if attempts else set()
        states = {job for info in files if bucket == WORKSPACE_BUCKET and (job := job_of_state(info.key))}
        still_open = await self._queue.open_jobs(states) if states else set()
        kept = await self._kept(bucket, [info.key for info in files])
        for info in files:
            if info.key in kept:  # by a row of somebody else's folder
                continue
            ours = True
            if bucket == WORKSPACE_BUCKET:
                if info.key.startswith(f"{PROBES}/"):
                    continue
                if job_of_state(info.key) in still_open or attempt_of(info.key) in running:
                    continue
                ours = bool(attempt_of(info.key) or job_of_state(info.key))
            elif bucket == LIBRARY_BUCKET:
                ours = is_ours(info.key, SAVED)
            else:
                if len(info.key.split("/")) == 2:
                    continue  # a job's reference
                ours = is_ours(info.key, UPLOADED)
            yield Finding("orphan" if ours else "unknown", bucket, info.key, None, info.size, info.modified_at)

    async def _mend(self, finding: Finding) -> Repair:
        row = finding.row
        if row is None:
            return await self._forget(finding)
        if row.extra:
            return "left"  # a row is whole without its thumbnail
        if finding.kind == "healed":
            await self._rows.mark(row.table, [row.id], None)
            return "unmarked"
        if row.table == "user_library":
            item = await self._library.item(row.id)
            if item is not None and item.key == row.key and await Library(self._library, self._blobs).restore(item):
                return "restored"
        if row.fault == finding.kind:
            return "left"
        await self._rows.mark(row.table, [row.id], finding.kind if finding.kind == "size" else "missing")
        return "marked"

    async def _forget(self, finding: Finding) -> Repair:
        """Delete an orphan that is old enough, unless a row has come to speak of it."""
        if finding.kind != "orphan" or finding.modified_at is None:
            return "left"
        if finding.modified_at > datetime.now(UTC) - self._grace or await self._is_kept(finding.bucket, finding.key):
            return "left"
        await self._blobs.delete(finding.bucket, [finding.key])
        log.warning("orphans_deleted", bucket=finding.bucket, files=1)
        return "deleted"

    async def _is_kept(self, bucket: str, key: str) -> bool:
        if bucket == WORKSPACE_BUCKET:
            attempt, state = attempt_of(key), job_of_state(key)
            if state is not None and await self._queue.open_jobs({state}):
                return True
            if attempt is not None and await self._queue.running_attempts({attempt}):
                return True
        return bool(await self._kept(bucket, [key]))

    async def _kept(self, bucket: str, keys: list[str]) -> set[str]:
        """Of these files, those that a row speaks of, whoever's it is."""
        if bucket != WORKSPACE_BUCKET:
            return await self._library.kept_files(bucket, keys)
        return await self._rows.results_kept({key: attempt[0] for key in keys if (attempt := attempt_of(key))})


def _owner(key: str) -> UUID | None:
    try:
        return UUID(key.partition("/")[0])
    except ValueError:
        return None
