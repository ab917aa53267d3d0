"""A backup: the rows and the files of one point in time, in one folder.

    FOLDER/manifest.json     what the rest must be: versions, hashes, counts. Written last
    FOLDER/database.dump     the whole database, in pg_dump's custom format
    FOLDER/files.jsonl       a line for each file that a row speaks of: its size and hash, or why it is missing
    FOLDER/files/BUCKET/KEY  the files

The point is a snapshot of Postgres: the dump and the list of files are both of it. Files are copied after it, while the
system goes on: a file is never changed once a row speaks of it, so it can only have been deleted since, and then the
list says so. The folder has the ending `.partial` until it is whole; what a killed backup left is no backup.

    BackupError
    ├── BackupDamaged      it is not whole, or not what was written
    ├── BackupTooNew       a newer version of this program made it
    └── TargetNotEmpty     there is something in the database or the store already
"""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import asyncpg
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from db.blobs import BlobNotFound, BlobStore, InvalidBlobName
from db.dumps import dump
from db.migrate import LOCK
from db.pool import CONNECTION_FAULTS, DatabaseUnavailable, queries

log = structlog.get_logger()

FORMAT = 1
MANIFEST, DUMP, LIST, FILES = "manifest.json", "database.dump", "files.jsonl", "files"
ARCHIVE_BUCKET = "archive"
COPIES = 8  # files that are copied at once
CHUNK_BYTES = 2**20

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class BackupError(RuntimeError):
    """The backup can't be made or used. Nothing was changed, unless the message says otherwise."""

    code = "backup"


class BackupDamaged(BackupError):
    """The backup is not whole, or not what was written."""

    code = "backup_damaged"


class BackupTooNew(BackupError):
    """A newer version of this program made the backup."""

    code = "backup_too_new"


class TargetNotEmpty(BackupError):
    """There is something in the database or the object store already, which a restore never overwrites."""

    code = "target_not_empty"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Written(_Part):
    """A file of the backup itself; `size` in bytes."""

    size: Count
    sha256: Hash


class Applied(_Part):
    """A migration that the database had."""

    number: int
    name: str
    checksum: Hash


class Entry(_Part):
    """A file that a row speaks of: `size` in bytes and its hash, or why it is `missing`.

    `expected` is the size that the row says, where that is another one: the store had damaged it before.
    """

    bucket: str
    key: str
    size: Count | None = None
    sha256: Hash | None = None
    expected: Count | None = None
    missing: Literal["deleted", "invalid_name"] | None = None


class Manifest(_Part):
    """What a whole backup is made of. `counts` are rows by table; `missing` and `damaged` count files."""

    format: Literal[1]
    product: str
    taken_at: str
    server_major: int
    pg_dump_major: int
    migrations: list[Applied]
    counts: dict[str, Count]
    dump: Written
    list: Written
    files: Count
    bytes: Count
    missing: Count
    damaged: Count

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a whole backup. Blocking. Raises `BackupDamaged`, `BackupTooNew`."""
        try:
            document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(document, dict) and isinstance(document.get("format"), int) and document["format"] > FORMAT:
                raise BackupTooNew(f"the backup has format {document['format']}, and this version knows {FORMAT}")
            return cls.model_validate(document)
        except FileNotFoundError:
            raise BackupDamaged(f"{folder} is no whole backup: it has no {MANIFEST}") from None
        except ValidationError as error:
            fields = ", ".join(sorted({".".join(map(str, item["loc"])) for item in error.errors()}))
            raise BackupDamaged(f"{MANIFEST} is damaged: {fields}") from None
        except (ValueError, OSError):
            raise BackupDamaged(f"{MANIFEST} can't be read") from None


@dataclass(frozen=True)
class _Point:
    """What the snapshot showed, but for the dump and the list of files, which are on disk."""

    taken_at: datetime
    server_major: int
    pg_dump_major: int
    migrations: list[Applied]
    counts: dict[str, int]
    archives: list[str]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that may take its time. Raises `DatabaseUnavailable`."""
    patient = dict.fromkeys(("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"), "0")
    try:
        connection = await asyncpg.connect(url, timeout=10, server_settings=patient | {"timezone": "UTC"})
    except CONNECTION_FAULTS as error:
        raise DatabaseUnavailable(f"can't connect to Postgres: {type(error).__name__}") from error
    try:
        yield connection
    except CONNECTION_FAULTS as error:
        if connection.is_closed():
            raise DatabaseUnavailable(f"the connection to Postgres was lost: {type(error).__name__}") from error
        raise
    finally:
        await connection.close(timeout=5)


async def back_up(url: str, blobs: BlobStore, folder: Path, product: str) -> Manifest:
    """Write a backup to a folder that must not be there yet. The system may go on meanwhile.

    Raises `BackupError`, `DumpError`, `DatabaseUnavailable`, `StorageUnavailable`; then no backup is left.
    """
    partial = await asyncio.to_thread(_begin, folder)
    try:
        point = await _freeze(url, partial)
        await _want_archives(blobs, partial, point.archives)
        copied = await _copy(blobs, partial)
        manifest = await asyncio.to_thread(_describe, partial, point, copied, product)
        await asyncio.to_thread(_publish, partial, folder, manifest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info("backed_up", files=manifest.files, missing=manifest.missing, bytes=manifest.bytes)
    return manifest


def _begin(folder: Path) -> Path:
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        raise BackupError(f"{folder} is there already; a backup goes to a folder of its own")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)  # prompts and pictures: for the operator alone
    except FileExistsError:
        raise BackupError(f"{partial} is there: another backup runs, or one was killed; then remove it") from None
    except OSError as error:
        raise BackupError(f"{partial} can't be made: {error.strerror}") from None
    (partial / FILES).mkdir()
    return partial


async def _freeze(url: str, partial: Path) -> _Point:
    """Dump the database and note the files that it speaks of, both at one point."""
    sql = queries("backup")
    async with connected(url) as connection:
        await sql.hold_migrations(connection, lock=LOCK)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            taken_at = datetime.now(UTC)
            snapshot = await sql.export_snapshot(connection)
            migrations = [Applied(**dict(row)) async for row in sql.applied_migrations(connection)]
            counts = {row["name"]: row["rows"] async for row in sql.counts(connection)}
            known = await sql.has_archives(connection)
            archives = [row["name"] async for row in sql.verified_archives(connection)] if known else []
            major = connection.get_server_version().major
            program = await dump(url, snapshot, partial / DUMP, major)
            with (partial / "wanted").open("w", encoding="utf-8") as wanted:
                async with sql.files_cursor(connection) as rows:
                    async for row in rows:
                        wanted.write(json.dumps(list(row)) + "\n")
                if await sql.has_uploads(connection):
                    async for row in sql.uploads(connection):
                        wanted.write(json.dumps(list(row)) + "\n")
                if await sql.has_avatars(connection):
                    async for row in sql.avatars(connection):
                        wanted.write(json.dumps(list(row)) + "\n")
    return _Point(taken_at, major, program.major, migrations, counts, archives)


async def _want_archives(blobs: BlobStore, partial: Path, names: list[str]) -> None:
    """Want the files of archives too, which have only the folder's name in their row."""
    with (partial / "wanted").open("a", encoding="utf-8") as wanted:
        for name in names:
            wanted.write(json.dumps([ARCHIVE_BUCKET, f"{name}/{MANIFEST}", None]) + "\n")  # each has one
            async for info in blobs.list(ARCHIVE_BUCKET, name):
                wanted.write(json.dumps([ARCHIVE_BUCKET, info.key, info.size]) + "\n")


@dataclass
class _Copied:
    files: int = 0
    bytes: int = 0
    missing: int = 0
    damaged: int = 0


async def _copy(blobs: BlobStore, partial: Path) -> _Copied:
    """Copy what the list wants, some at a time, and write down what came of each."""
    done = _Copied()
    with (partial / "wanted").open(encoding="utf-8") as wanted, (partial / LIST).open("w", encoding="utf-8") as listed:
        while lines := [line for _, line in zip(range(COPIES), wanted, strict=False)]:
            rows = {(bucket, key): size for bucket, key, size in map(json.loads, lines)}
            fresh = [row for row in rows if not (partial / FILES / row[0] / row[1]).exists()]
            entries = await asyncio.gather(*(_copy_one(blobs, partial, *row, rows[row]) for row in fresh))
            for entry in entries:
                listed.write(entry.model_dump_json(exclude_none=True) + "\n")
                done.missing += entry.missing is not None
                done.damaged += entry.expected is not None
                done.files += entry.size is not None
                done.bytes += entry.size or 0
    (partial / "wanted").unlink()
    return done


async def _copy_one(blobs: BlobStore, partial: Path, bucket: str, key: str, expected: int | None) -> Entry:
    digest, size = hashlib.sha256(), 0
    target = partial / FILES / bucket / key
    try:
        chunks = blobs.stream(bucket, key)
        first = await anext(chunks, b"")  # nothing is made on disk for a file that is not there, or a name that is none
        await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
        with target.open("xb") as file:
            chunk = first
            while chunk:
                await asyncio.to_thread(file.write, chunk)
                digest.update(chunk)
                size += len(chunk)
                chunk = await anext(chunks, b"")
    except BlobNotFound:
        target.unlink(missing_ok=True)
        return Entry(bucket=bucket, key=key, missing="deleted")
    except InvalidBlobName:
        return Entry(bucket=bucket, key=key, missing="invalid_name")
    other = expected if expected not in (None, size) else None
    return Entry(bucket=bucket, key=key, size=size, sha256=digest.hexdigest(), expected=other)


def _describe(partial: Path, point: _Point, copied: _Copied, product: str) -> Manifest:
    return Manifest(
        format=1,
        product=product,
        taken_at=point.taken_at.isoformat(timespec="seconds"),
        server_major=point.server_major,
        pg_dump_major=point.pg_dump_major,
        migrations=point.migrations,
        counts=point.counts,
        dump=measure(partial / DUMP),
        list=measure(partial / LIST),
        **vars(copied),
    )


def _publish(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Make the backup one: all bytes on disk, then the manifest, then the name."""
    os.sync()
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder)
    _sync_folders((folder, folder.parent))


def _sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def measure(path: Path) -> Written:
    """Size and hash of a file. Blocking. Raises `OSError`."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Written(size=size, sha256=digest.hexdigest())


def entry_of(line: str) -> Entry:
    """The entry of a line of the list. Raises `BackupDamaged`."""
    try:
        document: Any = json.loads(line)
        return Entry.model_validate(document)
    except ValueError:
        raise BackupDamaged(f"{LIST} has a line that is no entry") from None
