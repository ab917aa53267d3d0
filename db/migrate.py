"""Migrations: plain SQL files, applied once, in order, under a lock.

Forward only. A file that was applied must not change afterwards: its checksum is kept and compared. Each file runs
in a transaction of its own together with its record, so a failed one leaves nothing.
"""

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files

import asyncpg

from db.pool import queries

LOCK = 0x6F757276_69647A31  # one advisory lock of the project: "ourvidz1"
_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


class MigrationError(RuntimeError):
    """The database and the migration files disagree, or a file failed. The database is as it was before it."""

    code = "migration"


@dataclass(frozen=True)
class Migration:
    """One file. `checksum` is the SHA-256 of its text."""

    number: int
    name: str
    sql: str
    checksum: str


def migrations() -> list[Migration]:
    """The files of this version, in order. Raises `MigrationError` when numbers repeat or leave a gap."""
    found = []
    for entry in files("db").joinpath("migrations").iterdir():
        match = _NAME.fullmatch(entry.name)
        if match is None:
            raise MigrationError(f"not a migration file name: {entry.name}")
        sql = entry.read_text(encoding="utf-8")
        found.append(Migration(int(match[1]), entry.name, sql, hashlib.sha256(sql.encode()).hexdigest()))
    found.sort(key=lambda migration: migration.number)
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise MigrationError("migration numbers must run from 0001 without a gap")
    return found


async def migrate(connection: asyncpg.Connection) -> list[str]:
    """Apply what is missing; return the names of the files applied now. Waits while another process migrates."""
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
    try:
        return await _migrate(connection)
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationError(f"the database user lacks a right: {error}") from error
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)


async def _migrate(connection: asyncpg.Connection) -> list[str]:
    await connection.execute(
        """CREATE TABLE IF NOT EXISTS schema_migrations (
             number int PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
             applied_at timestamptz NOT NULL DEFAULT now())"""
    )
    # the owner is not bound by it; roles that may read a whole schema by default, as on Supabase, are
    await connection.execute("ALTER TABLE schema_migrations ENABLE ROW LEVEL SECURITY")
    applied = await _applied(connection)
    unknown = sorted(set(applied) - {migration.number for migration in migrations()})
    if unknown:
        raise MigrationError(f"the database has migrations that this version does not know: {unknown}")
    fresh = []
    for migration in migrations():
        if migration.number in applied:
            if applied[migration.number] != migration.checksum:
                raise MigrationError(f"{migration.name} was changed after it had been applied")
            continue
        async with connection.transaction(), _own_grants(connection):
            await connection.execute("SET LOCAL lock_timeout = '10s'")
            try:
                await connection.execute(migration.sql)
            except asyncpg.PostgresError as error:
                raise MigrationError(f"{migration.name}: {error}") from error
            await connection.execute(
                "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.checksum,
            )
        fresh.append(migration.name)
    return fresh


@asynccontextmanager
async def _own_grants(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Inside a transaction: what a migration makes has the rights that the migration names, and not what the database
    grants users by default. On Supabase that is everything, and row-level security knows no columns."""
    defaults = [row async for row in queries("rights").default_grants(connection)]
    for row in defaults:
        await connection.execute(row["withhold"])
    yield
    for row in defaults:
        await connection.execute(row["restore"])


async def pending(connection: asyncpg.Connection) -> list[str]:
    """The names of the files that are not applied yet. Changes nothing."""
    known = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
    applied = await _applied(connection) if known else {}
    return [migration.name for migration in migrations() if migration.number not in applied]


async def _applied(connection: asyncpg.Connection) -> dict[int, str]:
    rows = await connection.fetch("SELECT number, checksum FROM schema_migrations")
    return {row["number"]: row["checksum"] for row in rows}
