"""The archive: old jobs as compressed CSV in the object store, then out of the database.

    ArchiveError
    ├── ArchiveBusy      another archive command is at work
    └── ArchiveDamaged   what was read back is not what was written; nothing more was deleted

One archive is a folder of the bucket `archive`: a file for each table, the files of the jobs where asked for, and last
`manifest.json`, which says what each must hold. Only when all of it was read back are its jobs deleted, and of those
only the ones that have not changed since. Wherever the process dies, the next command goes on with the same archive:
before that point it writes the files anew, after it it reads them back and deletes the rest.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from db.archives import ArchivedJob, Archives, Plan, Snapshot, Survey
from db.blobs import BlobNotFound, BlobStore, InvalidBlobName, content_type_of
from deployments.storing import BUCKET, REFERENCE_BUCKET

log = structlog.get_logger()

ARCHIVE_BUCKET = "archive"
MANIFEST = "manifest.json"
FILES = "files"
FORMAT = "ourvidz-archive-1"
JOBS = 10_000  # in one archive: its tables must fit into memory, compressed
DELETED_AT_ONCE = 1000  # jobs in a transaction; each takes a dozen rows of other tables with it


class ArchiveError(Exception):
    """An archive can't be made."""

    code = "archive"


class ArchiveBusy(ArchiveError):
    """Another archive command is at work on this database."""

    code = "archive_busy"


class ArchiveDamaged(ArchiveError):
    """A file of an archive is missing, or is not what was written. Nothing more was deleted."""

    code = "archive_damaged"


@dataclass(frozen=True)
class Archived:
    """An archive that is finished: how many jobs it holds, and how many of them were deleted. The rest have changed
    since, and stay."""

    name: str
    jobs: int
    deleted: int
    files_deleted: int


@dataclass(frozen=True)
class _File:
    """A file of a job, and what of it lies in the archive: nothing where it was missing already."""

    job_id: UUID
    bucket: str
    key: str
    archived_as: str = ""
    size: int = 0
    sha256: str = ""


class Archive:
    """Makes archives, one batch of jobs after the other. `pool` acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool, blobs: BlobStore, jobs: int = JOBS) -> None:
        self._pool, self._blobs, self._jobs = pool, blobs, jobs

    async def survey(self, older_than: timedelta) -> Survey:
        """What `run` would take. Changes nothing."""
        async with self._pool.acquire() as connection:
            archives = Archives(connection)
            return await archives.survey(await archives.cutoff(older_than))

    async def run(self, older_than: timedelta, *, keep_files: bool = False) -> AsyncIterator[Archived]:
        """Archive every job that ended that long ago, beginning with what an earlier command left unfinished.

        With `keep_files` the jobs' files are copied into the archive; without, they are deleted with their jobs.
        Raises `ArchiveBusy`, `ArchiveDamaged`, `StorageUnavailable`; what was not finished is gone on with next time.
        """
        async with self._pool.acquire() as connection, (archives := Archives(connection)).locked() as held:
            if not held:
                raise ArchiveBusy("another archive command is at work")
            cutoff = await archives.cutoff(older_than)
            while plan := await archives.unfinished() or await archives.plan(cutoff, self._jobs, keep_files):
                if not plan.verified and not await self._write(archives, plan):
                    await archives.abandon(plan)
                    continue
                archived = await self._replace(archives, plan)
                yield archived
                if not archived.deleted:  # all of its jobs are changing just now: the next command takes them
                    return

    async def _write(self, archives: Archives, plan: Plan) -> bool:
        """Write all files of a plan, the manifest last. False when none of its jobs may go any more."""
        snapshot = await archives.snapshot(plan)
        if snapshot is None:
            return False
        parts = {f"{copied.table}.csv.gz": (copied.data, copied.rows) for copied in snapshot.tables}
        if plan.keeps_files:
            kept = [await self._keep(plan.name, file) for file in _files_of(parts)]
            parts["files.csv.gz"] = (_list(kept), len(kept))
        for name, (data, _) in parts.items():
            await self._put(f"{plan.name}/{name}", data)
        manifest = _manifest(plan, snapshot, parts)
        await self._put(f"{plan.name}/{MANIFEST}", json.dumps(manifest, indent=2).encode())
        log.info("archive_written", archive=plan.name, jobs=manifest["jobs"])
        return True

    async def _put(self, key: str, data: bytes) -> None:
        await self._blobs.put(ARCHIVE_BUCKET, key, data, content_type_of(key))

    async def _keep(self, archive: str, file: _File) -> _File:
        try:
            data = await self._blobs.get(file.bucket, file.key)
        except BlobNotFound:
            log.warning("archived_file_missing", bucket=file.bucket, job_id=str(file.job_id))
            return file
        archived_as = f"{FILES}/{file.bucket}/{file.key}"
        await self._put(f"{archive}/{archived_as}", data)
        return _File(file.job_id, file.bucket, file.key, archived_as, len(data), hashlib.sha256(data).hexdigest())

    async def _replace(self, archives: Archives, plan: Plan) -> Archived:
        """Delete what an archive holds, after reading all of it back."""
        manifest, parts = await self.read_back(plan.name)
        jobs = [
            ArchivedJob(UUID(row["id"]), datetime.fromisoformat(row["updated_at"]))
            for row in _rows(parts["jobs.csv.gz"][0])
        ]
        if not {job.id for job in jobs} <= set(plan.job_ids):
            raise ArchiveDamaged(f"{plan.name}: it holds other jobs than it was begun for")
        await archives.verified(plan, len(jobs))
        for start in range(0, len(jobs), DELETED_AT_ONCE):
            page = jobs[start : start + DELETED_AT_ONCE]
            await archives.delete(page, datetime.fromisoformat(manifest["taken_at"]))
        staying = await archives.existing(jobs)
        files_deleted = await self._delete_files(file for file in _files_of(parts) if file.job_id not in staying)
        await archives.finish(plan)
        log.info("archive_finished", archive=plan.name, jobs=len(jobs), staying=len(staying), files=files_deleted)
        return Archived(plan.name, len(jobs), len(jobs) - len(staying), files_deleted)

    async def _delete_files(self, files: Iterator[_File]) -> int:
        keys: dict[str, list[str]] = {}
        for file in files:
            keys.setdefault(file.bucket, []).append(file.key)
        for bucket, of_bucket in keys.items():
            for start in range(0, len(of_bucket), DELETED_AT_ONCE):
                page = of_bucket[start : start + DELETED_AT_ONCE]
                try:
                    await self._blobs.delete(bucket, page)
                except InvalidBlobName:  # a row of another system's may name a file as none of ours is named
                    for key in page:
                        with contextlib.suppress(InvalidBlobName):
                            await self._blobs.delete(bucket, [key])
        return sum(map(len, keys.values()))

    async def read_back(self, name: str) -> tuple[dict[str, Any], dict[str, tuple[bytes, int]]]:
        """The manifest of an archive and its tables, every byte of both and of the kept files compared.

        Raises `ArchiveDamaged`, `StorageUnavailable`.
        """
        manifest = json.loads(await self._get(name, MANIFEST))
        parts = {}
        for file, told in manifest["files"].items():
            data = await self._get(name, file)
            if hashlib.sha256(data).hexdigest() != told["sha256"]:
                raise ArchiveDamaged(f"{name}: {file} is not what was written")
            if sum(1 for _ in _rows(data)) != told["rows"]:
                raise ArchiveDamaged(f"{name}: {file} has another number of rows than it was written with")
            parts[file] = (data, told["rows"])
        if "files.csv.gz" in parts:
            for row in _rows(parts["files.csv.gz"][0]):
                kept = await self._get(name, row["archived_as"]) if row["archived_as"] else b""
                if row["archived_as"] and hashlib.sha256(kept).hexdigest() != row["sha256"]:
                    raise ArchiveDamaged(f"{name}: a kept file is not what was written")
        return manifest, parts

    async def _get(self, name: str, file: str) -> bytes:
        try:
            return await self._blobs.get(ARCHIVE_BUCKET, f"{name}/{file}")
        except BlobNotFound:
            raise ArchiveDamaged(f"{name}: {file} is missing") from None


def _manifest(plan: Plan, snapshot: Snapshot, parts: Mapping[str, tuple[bytes, int]]) -> dict[str, Any]:
    created = [row["created_at"] for row in _rows(parts["jobs.csv.gz"][0])]
    return {
        "format": FORMAT,
        "name": plan.name,
        "taken_at": snapshot.taken_at.isoformat(),
        "cutoff": plan.cutoff.isoformat(),
        "schema_version": snapshot.schema_version,
        "keeps_files": plan.keeps_files,
        "jobs": len(created),
        "created_at": {"first": min(created), "last": max(created)},
        "files": {
            name: {"rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, (data, rows) in parts.items()
        },
    }


def _rows(packed: bytes) -> Iterator[dict[str, str]]:
    """The rows of a table of an archive; a null is an empty text there."""
    try:
        with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8", newline="") as text:
            yield from csv.DictReader(text)
    except (OSError, EOFError) as error:
        raise ArchiveDamaged("a table can't be unpacked") from error


def _files_of(parts: Mapping[str, tuple[bytes, int]]) -> Iterator[_File]:
    """The files that belong to the jobs of an archive: results, thumbnails, references and masks."""
    for row in _rows(parts["assets.csv.gz"][0]):
        for key in filter(None, (row["temp_storage_path"], row["thumbnail_path"])):
            yield _File(UUID(row["job_id"]), BUCKET, key)
    for row in _rows(parts["jobs.csv.gz"][0]):
        params = json.loads(row["params"])
        references = [*(params.get("references") or ()), params.get("reference") or {}]  # one in older rows
        for image in [image for one in references for image in (one, one.get("mask") or {})]:
            # an image of the job's own; one that belongs to somebody else is none of its files
            if image.get("bucket") == REFERENCE_BUCKET and row["id"] in str(image.get("key")):
                yield _File(UUID(row["id"]), REFERENCE_BUCKET, image["key"])


def _list(files: Sequence[_File]) -> bytes:
    into = io.StringIO(newline="")
    writer = csv.writer(into)
    writer.writerow(("job_id", "bucket", "key", "archived_as", "bytes", "sha256"))
    writer.writerows((f.job_id, f.bucket, f.key, f.archived_as, f.size, f.sha256) for f in files)
    return gzip.compress(into.getvalue().encode(), mtime=0)
