"""Migrations on a real Postgres, and that what they made agrees with what Python believes."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, get_args
from uuid import uuid4

import asyncpg
import pytest

from db import migrate as migrating
from db.access import ROLES
from db.jobs import QueueState, Stage, Status
from db.migrate import MigrationError, migrate, migrations, pending
from db.queue import CancelReason
from models.catalog import JOB_TYPES
from models.params import ContentMode
from tests.conftest import with_database


@pytest.fixture
async def empty(postgres_url: str) -> AsyncIterator[str]:
    """The URL of a database with nothing in it."""
    name = f"empty_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{name}"')
    try:
        yield with_database(postgres_url, name)
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


@pytest.fixture
async def connection(empty: str) -> AsyncIterator[asyncpg.Connection]:
    opened = await asyncpg.connect(empty)
    yield opened
    await opened.close()


def test_files_are_numbered_without_a_gap() -> None:
    files = migrations()
    assert [migration.number for migration in files] == list(range(1, len(files) + 1))
    assert len({migration.checksum for migration in files}) == len(files)


async def test_migrate_applies_everything_once(connection: asyncpg.Connection) -> None:
    names = [migration.name for migration in migrations()]
    assert await pending(connection) == names
    assert await migrate(connection) == names
    tables = await connection.fetch("SELECT schemaname, tablename FROM pg_tables WHERE schemaname = 'public'")
    assert await migrate(connection) == []
    assert await pending(connection) == []
    assert await connection.fetch("SELECT schemaname, tablename FROM pg_tables WHERE schemaname = 'public'") == tables
    assert await connection.fetchval("SELECT count(*) FROM schema_migrations") == len(names)


async def test_a_changed_file_is_refused(connection: asyncpg.Connection) -> None:
    await migrate(connection)
    await connection.execute("UPDATE schema_migrations SET checksum = 'another' WHERE number = 2")
    with pytest.raises(MigrationError, match=r"0002_jobs\.sql was changed"):
        await migrate(connection)


async def test_a_database_of_a_newer_version_is_refused_and_not_touched(connection: asyncpg.Connection) -> None:
    await migrate(connection)
    await connection.execute("INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', 'x', now())")
    with pytest.raises(MigrationError, match="9999"):
        await migrate(connection)


async def test_a_newer_database_gets_none_of_our_files(connection: asyncpg.Connection) -> None:
    await migrate(connection)
    last = len(migrations())
    await connection.execute("DELETE FROM schema_migrations WHERE number = $1", last)
    await connection.execute("INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', 'x', now())")
    with pytest.raises(MigrationError, match="9999"):
        await migrate(connection)
    assert await connection.fetchval("SELECT count(*) FROM schema_migrations WHERE number = $1", last) == 0


async def test_a_file_that_fails_leaves_nothing_and_can_be_repeated(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = migrations()
    broken = replace(files[1], sql="CREATE TABLE half (id int); SELECT 1 / 0;")
    with monkeypatch.context() as patch:
        patch.setattr(migrating, "migrations", lambda: [files[0], broken, *files[2:]])
        with pytest.raises(MigrationError, match=r"0002_jobs\.sql"):
            await migrate(connection)
    assert await connection.fetchval("SELECT to_regclass('half')") is None
    assert await migrate(connection) == [migration.name for migration in files[1:]]


async def test_two_at_once_apply_each_file_once(empty: str) -> None:
    connections = [await asyncpg.connect(empty) for _ in range(4)]
    applied = await asyncio.gather(*(migrate(connection) for connection in connections))
    assert sorted(applied, key=len) == [[], [], [], [migration.name for migration in migrations()]]
    for connection in connections:
        await connection.close()


async def test_a_migration_waits_for_another_one(empty: str) -> None:
    first, second, watcher = [await asyncpg.connect(empty) for _ in range(3)]
    await first.execute("SELECT pg_advisory_lock($1)", migrating.LOCK)
    waiting = asyncio.create_task(migrate(second))
    async with asyncio.timeout(30):
        while not await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            pass
    assert not waiting.done()
    await first.close()  # as a process that dies lets go of its lock
    assert len(await waiting) == len(migrations())
    for connection in (second, watcher):
        await connection.close()


async def test_a_failed_migration_lets_go_of_the_lock(connection: asyncpg.Connection) -> None:
    await migrate(connection)
    await connection.execute("UPDATE schema_migrations SET checksum = 'another'")
    with pytest.raises(MigrationError):
        await migrate(connection)
    assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


# ---------------------------------------------------------------------------------- Python and SQL say the same


async def test_every_table_is_under_row_level_security(database: Any) -> None:
    rows = await database.pool.fetch(
        """SELECT c.relname, c.relrowsecurity FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg_toast%'
             AND c.relkind IN ('r', 'p')"""
    )
    assert len(rows) > 15
    assert [row["relname"] for row in rows if not row["relrowsecurity"]] == []


async def test_no_table_is_open_to_the_anonymous_role(database: Any) -> None:
    rows = await database.pool.fetch(
        """SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname IN ('public', 'ourvidz') AND c.relkind IN ('r', 'p', 'v', 'm')
             AND (has_any_column_privilege('anon', c.oid, 'SELECT, INSERT, UPDATE')
                  OR has_table_privilege('anon', c.oid, 'DELETE, TRUNCATE'))"""
    )
    assert rows == []


async def checked(pool: asyncpg.Pool, table: str, column: str) -> set[str]:
    """The values that a column's own CHECK names."""
    definitions = await pool.fetch(
        """SELECT pg_get_constraintdef(c.oid) AS said FROM pg_constraint c
           JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
           WHERE c.conrelid = $1::regclass AND c.contype = 'c' AND a.attname = $2 AND cardinality(c.conkey) = 1""",
        table,
        column,
    )
    (said,) = [row["said"] for row in definitions]
    return set(re.findall(r"'([^']*)'::text", said))


async def enumerated(pool: asyncpg.Pool, name: str) -> list[str]:
    rows = await pool.fetch("SELECT enumlabel FROM pg_enum WHERE enumtypid = $1::regtype ORDER BY enumsortorder", name)
    return [label for (label,) in rows]


async def test_enumerations_are_the_same_in_python_and_sql(database: Any) -> None:
    pool = database.pool
    assert await checked(pool, "jobs", "status") == set(Status)
    assert await checked(pool, "jobs", "stage") == set(Stage)
    assert await checked(pool, "jobs", "content_mode") == set(get_args(ContentMode))
    assert await checked(pool, "job_queue", "cancel") == set(CancelReason)
    assert await enumerated(pool, "queue_state") == list(QueueState)
    assert await enumerated(pool, "app_role") == list(ROLES)


async def test_job_types_are_those_of_the_catalog(database: Any) -> None:
    pool = database.pool
    assert await checked(pool, "jobs", "job_type") == set(JOB_TYPES)
    assert await checked(pool, "jobs", "format") == {kind.format.value for kind in JOB_TYPES.values()}
    assert await checked(pool, "jobs", "quality") == {kind.quality.value for kind in JOB_TYPES.values()}
    assert await checked(pool, "jobs", "model_type") >= {kind.family.value for kind in JOB_TYPES.values()}


async def test_callbacks_tell_every_status_but_queued(database: Any) -> None:
    events = await checked(database.pool, "callback_outbox", "event_type")
    assert events == {f"job.{status}" for status in Status if status is not Status.QUEUED}
