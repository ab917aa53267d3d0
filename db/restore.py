"""Restoring a backup into an empty database and an empty object store.

Everything is checked before anything is written: the hashes of the backup, its versions, and that there is nothing in
the way. Files go first and rows last, in one transaction: a restore that died on its way has left a database that is
still empty, and can be begun again.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import asyncpg

from db.backup import (
    ARCHIVE_BUCKET,
    COPIES,
    DUMP,
    FILES,
    LIST,
    BackupDamaged,
    BackupTooNew,
    Entry,
    Manifest,
    TargetNotEmpty,
    Written,
    connected,
    entry_of,
    measure,
)
from db.blobs import BUCKETS, BlobNotFound, BlobStore, InvalidBlobName, content_type_of
from db.dumps import restore as restore_dump
from db.migrate import migrate, migrations
from db.pool import queries


@dataclass(frozen=True)
class Fault:
    """A file that a row of the restored database speaks of, and that is not there as the row says."""

    bucket: str
    key: str
    reason: str


@dataclass(frozen=True)
class Restored:
    """What a restore did. `missing` and `damaged` are files that were so when the backup was made; `faults` are new."""

    manifest: Manifest
    applied: list[str]
    files: int
    missing: int
    damaged: int
    faults: list[Fault]


async def check(folder: Path) -> Manifest:
    """Read all of a backup and compare it with its hashes. Raises `BackupDamaged`, `BackupTooNew`."""
    manifest = await asyncio.to_thread(Manifest.read, folder)
    known = {migration.number: migration.checksum for migration in migrations()}
    newer = [applied.name for applied in manifest.migrations if applied.number not in known]
    if newer:
        raise BackupTooNew(f"the backup has {newer[0]}, which this version does not know; use {manifest.product}")
    changed = [applied.name for applied in manifest.migrations if known[applied.number] != applied.checksum]
    if changed:
        raise BackupTooNew(f"{changed[0]} is another one here; use version {manifest.product}")
    await asyncio.to_thread(_compare, folder, manifest)
    return manifest


async def restore(folder: Path, url: str, blobs: BlobStore) -> Restored:
    """Fill an empty database and an empty store from a backup, bring the schema up to date, and look at every file.

    Raises `BackupError`, `DumpError`, `MigrationError`, `DatabaseUnavailable`, `StorageUnavailable`.
    """
    manifest = await check(folder)
    sql = queries("backup")
    async with connected(url) as connection:
        if await sql.relations(connection):
            raise TargetNotEmpty("the database is not empty; make a new one and restore into that")
        await _check_store(folder, blobs)
        await _fill_store(folder, blobs)
        await sql.create_roles(connection)
        major = connection.get_server_version().major
        await restore_dump(url, folder / DUMP, manifest.pg_dump_major, major)
        counts = {row["name"]: row["rows"] async for row in sql.counts(connection)}
        wrong = [name for name, rows in manifest.counts.items() if counts.get(name) != rows]
        if wrong:
            raise BackupDamaged(f"after the restore the tables have other row counts: {', '.join(wrong)}")
        applied = await migrate(connection)
        await sql.analyze(connection)
        return await _verify(folder, manifest, applied, connection, blobs)


def _compare(folder: Path, manifest: Manifest) -> None:
    for name, written in ((DUMP, manifest.dump), (LIST, manifest.list)):
        _same(folder / name, written)
    found = {"files": 0, "bytes": 0, "missing": 0, "damaged": 0}
    for entry in _entries(folder):
        found["missing"] += entry.missing is not None
        found["damaged"] += entry.expected is not None
        if entry.size is not None and entry.sha256 is not None:
            _same(_path(folder, entry), Written(size=entry.size, sha256=entry.sha256))
            found["files"] += 1
            found["bytes"] += entry.size
    if found != {name: getattr(manifest, name) for name in found}:
        raise BackupDamaged(f"{LIST} and the manifest count differently")


def _same(path: Path, written: Written) -> None:
    try:
        found = measure(path)
    except OSError:
        raise BackupDamaged(f"{path} is missing or can't be read") from None
    if found != written:
        raise BackupDamaged(f"{path} is not what was written")


def _entries(folder: Path) -> Iterator[Entry]:
    with (folder / LIST).open(encoding="utf-8") as lines:
        yield from map(entry_of, lines)


def _path(folder: Path, entry: Entry) -> Path:
    """Where an entry's file is, which may not be outside of the backup whatever the list says."""
    root = (folder / FILES).resolve()
    path = (root / entry.bucket / entry.key).resolve()
    if not path.is_relative_to(root):
        raise BackupDamaged(f"{LIST} has a name that leads out of the backup")
    return path


async def _check_store(folder: Path, blobs: BlobStore) -> None:
    """Nothing but what an earlier try of the same restore has written may be there, and that whole."""
    for bucket in BUCKETS:
        try:
            async for info in blobs.list(bucket):
                ours = folder / FILES / bucket / info.key
                if not ours.is_file() or await asyncio.to_thread(ours.read_bytes) != await blobs.get(bucket, info.key):
                    raise TargetNotEmpty(f"the object store is not empty: there are other files in {bucket}")
        except BlobNotFound:
            continue  # a bucket that nobody has written to yet
        except InvalidBlobName:
            raise TargetNotEmpty(f"the object store is not empty: there are other files in {bucket}") from None


async def _fill_store(folder: Path, blobs: BlobStore) -> None:
    entries = (entry for entry in _entries(folder) if entry.size is not None)
    while batch := list(islice(entries, COPIES)):
        await asyncio.gather(*(_put(folder, blobs, entry) for entry in batch))


async def _put(folder: Path, blobs: BlobStore, entry: Entry) -> None:
    data = await asyncio.to_thread(_path(folder, entry).read_bytes)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BackupDamaged("a file of the backup was changed while it was restored")
    try:
        await blobs.put(entry.bucket, entry.key, data, content_type_of(entry.key))
    except InvalidBlobName:
        raise BackupDamaged(f"{LIST} has a name that no file of ours has") from None


async def _verify(
    folder: Path, manifest: Manifest, applied: list[str], connection: asyncpg.Connection, blobs: BlobStore
) -> Restored:
    """Every file that a row speaks of is there with its size, or was known to be missing."""
    known = {(e.bucket, e.key): e for e in _entries(folder) if e.missing is not None or e.expected is not None}
    faults: list[Fault] = []
    batch: list[tuple[str, str, int | None]] = []

    async def look(bucket: str, key: str, size: int | None) -> Fault | None:
        entry = known.get((bucket, key))
        if entry is not None and entry.missing is not None:
            return None
        expected = size if entry is None else entry.size
        try:
            found = (await blobs.head(bucket, key)).size
        except (BlobNotFound, InvalidBlobName):
            return Fault(bucket, key, "missing")
        return Fault(bucket, key, "size") if expected not in (None, found) else None

    async def look_at_batch() -> None:
        faults.extend(fault for fault in await asyncio.gather(*(look(*row) for row in batch)) if fault is not None)
        batch.clear()

    async with queries("backup").files_cursor(connection) as rows:
        async for row in rows:
            batch.append((row["bucket"], row["key"], row["size"]))
            if len(batch) == COPIES:
                await look_at_batch()
    await look_at_batch()
    for entry in _entries(folder):
        if entry.bucket == ARCHIVE_BUCKET:
            batch.append((entry.bucket, entry.key, entry.size))
            await look_at_batch()
    return Restored(manifest, applied, manifest.files, manifest.missing, manifest.damaged, faults)
