"""Row-level security: what a user, the staff, nobody, and a replica may see and change, on real roles of Postgres."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.access import Access
from db.jobs import Jobs, Status
from db.pool import as_user, open_pool
from db.queue import Queue, Settlement
from tests.db.test_queue import asset, new_job

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWN = (  # tables of which a user sees the own rows
    "profiles",
    "user_roles",
    "jobs",
    "job_events",
    "workspace_assets",
    "user_library",
    "usage_logs",
    "api_keys",
    "callback_outbox",
    "job_queue",
    "callback_endpoints",
    "user_activity_log",
    "reference_uploads",
)
HIDDEN = (  # tables that no user sees at all
    "ourvidz.open_jobs",
    "ourvidz.user_quotas",
    "queues",
    "fair_shares",
    "idempotency_keys",
    "workers",
    "cost_profiles",
    "run_times",
    "callback_attempts",
    "schema_migrations",
    "archives",
    "erasures",
    "imported_jobs",
    "message_keys",
    "job_destinations",
    "job_destinations",
    "ourvidz.open_jobs",
    "ourvidz.user_quotas",
    "ourvidz.provider_predictions",
    "ourvidz.prompt_version",
)
FIXED_PATH = re.compile(r"search_path=(\"\"|.*\bpg_temp)")  # or none, where every name is whole
OWNER_COLUMN = {"profiles": "id"}
# the columns that a user may read, where not all of them are
COLUMNS = {
    "api_keys": "id, user_id, name, prefix, created_at, last_used_at, expires_at, revoked_at",
    "callback_outbox": "id, job_id, user_id, seq, event_type, url, state, attempts, last_status, last_error",
    "job_queue": "job_id, user_id, queue, class, tag, state, run_at, attempt, failures, cancel, phase, step, steps, "
    "preview_step, preview_steps, started_at, claimed_at",
}


@dataclass
class People:
    """Two users with rows in every table of theirs, and staff."""

    database: Any
    alice: UUID
    bob: UUID
    moderator: UUID
    admin: UUID


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def people(shared_database: Any) -> People:
    database, pool = shared_database, shared_database.pool
    access, jobs, queue = Access(pool), Jobs(pool), Queue(pool)
    ids = {
        name: await access.ensure_user(name, role)
        for name, role in (
            ("alice", "basic_user"),
            ("bob", "basic_user"),
            ("mod", "moderator"),
            ("root", "admin"),
        )
    }
    for name in ("alice", "bob"):
        user = ids[name]
        await access.create_key(user, "laptop")
        done = new_job(user)
        await jobs.accept(done, idempotency_key="k", body=b"1")
        await queue.claim("sdxl", uuid4(), 1)
        finish = Settlement(job_id=done.id, attempt=1, status=Status.COMPLETED, assets=[asset(done.id, 1)])
        assert await queue.settle([finish])
        await jobs.accept(new_job(user))
        await pool.execute(
            """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
                                         model_used) VALUES ($1, 'image', 'x/y.png', 1, 'image/png', 'p', 'm')""",
            user,
        )
        await pool.execute(
            "INSERT INTO callback_endpoints (user_id, url, events) VALUES ($1, 'https://example.com/', '{failed}')",
            user,
        )
        await pool.execute("INSERT INTO user_activity_log (user_id, action) VALUES ($1, 'looked')", user)
        await pool.execute(
            """INSERT INTO reference_uploads (id, user_id, storage_path, mime_type, file_size_bytes, width, height,
                                               sha256)
               VALUES (gen_random_uuid(), $1::uuid, $1::uuid::text, 'image/png', 1, 1, 1, sha256('x'))""",
            user,
        )
    await pool.execute("INSERT INTO callback_attempts (callback_id, attempt) SELECT id, 1 FROM callback_outbox")
    return People(database, ids["alice"], ids["bob"], ids["mod"], ids["root"])


@asynccontextmanager
async def acting(pool: asyncpg.Pool, role: str, user: UUID | None = None) -> AsyncIterator[Any]:
    """A transaction under a role, which may write as far as the role may, and is rolled back."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            if user is not None:
                claims = json.dumps({"sub": str(user), "role": role})
                await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
            await connection.execute(f"SET LOCAL ROLE {role}")
            yield connection
        finally:
            await transaction.rollback()


def columns(table: str) -> str:
    return COLUMNS.get(table, "*")


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("table", OWN)
async def test_a_user_sees_the_own_rows_and_no_others(people: People, table: str) -> None:
    owner = OWNER_COLUMN.get(table, "user_id")
    for user in (people.alice, people.bob):
        async with as_user(people.database.pool, user) as connection:
            rows = await connection.fetch(f"SELECT {columns(table)} FROM {table}")  # noqa: S608
        assert rows
        assert {row[owner] for row in rows} == {user}


@pytest.mark.parametrize("table", OWN)
async def test_the_staff_sees_all_rows(people: People, table: str) -> None:
    owner = OWNER_COLUMN.get(table, "user_id")
    for user in (people.moderator, people.admin):
        async with as_user(people.database.pool, user) as connection:
            rows = await connection.fetch(f"SELECT {columns(table)} FROM {table}")  # noqa: S608
        seen = {row[owner] for row in rows}
        if table in ("api_keys", "user_activity_log") and user == people.moderator:
            assert seen == set()  # who has keys, and who did what, is for admins
        else:
            assert {people.alice, people.bob} <= seen


@pytest.mark.parametrize("table", HIDDEN)
async def test_no_user_sees_the_inner_tables(people: People, table: str) -> None:
    for user in (people.alice, people.moderator, people.admin):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with as_user(people.database.pool, user) as connection:
                await connection.fetch(f"SELECT * FROM {table}")  # noqa: S608


@pytest.mark.parametrize(
    ("table", "column"),
    [("api_keys", "key_hash"), ("callback_outbox", "body"), ("callback_outbox", "lease_no"), ("job_queue", "worker")],
)
async def test_no_user_sees_the_columns_of_the_machinery(people: People, table: str, column: str) -> None:
    for user in (people.alice, people.admin):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with as_user(people.database.pool, user) as connection:
                await connection.fetch(f"SELECT {column} FROM {table}")  # noqa: S608


@pytest.mark.parametrize("table", OWN)
async def test_somebody_without_an_identity_sees_no_row(people: People, table: str) -> None:
    async with acting(people.database.pool, "authenticated") as connection:
        assert await connection.fetch(f"SELECT {columns(table)} FROM {table}") == []  # noqa: S608


@pytest.mark.parametrize("table", [*OWN, *HIDDEN])
async def test_the_anonymous_role_sees_nothing(people: People, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with acting(people.database.pool, "anon", people.alice) as connection:
            await connection.fetch(f"SELECT 1 FROM {table}")  # noqa: S608


@pytest.mark.parametrize("claims", ["", "{}", '{"sub": ""}', '{"sub": null}'])
async def test_claims_without_a_user_are_nobody(people: People, claims: str) -> None:
    async with acting(people.database.pool, "authenticated") as connection:
        await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
        assert await connection.fetch("SELECT id FROM jobs") == []


@pytest.mark.parametrize("claims", ["not json", '{"sub": "not a uuid"}', '{"sub": "1 OR 1=1"}'])
async def test_broken_claims_are_an_error_not_everybody(people: People, claims: str) -> None:
    async with acting(people.database.pool, "authenticated") as connection:
        await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
        with pytest.raises(asyncpg.PostgresError):
            await connection.fetch("SELECT id FROM jobs")


# ------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("table", [*OWN, *HIDDEN])
@pytest.mark.parametrize("statement", ["INSERT INTO {} DEFAULT VALUES", "UPDATE {} SET {} = {}", "DELETE FROM {}"])
@pytest.mark.parametrize("role", ["authenticated", "anon"])
async def test_no_user_writes_anything(people: People, table: str, statement: str, role: str) -> None:
    pool = people.database.pool
    first = "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND attidentity = '' LIMIT 1"
    column = await pool.fetchval(first, table)
    written = statement.format(table, column, column)
    for user in (people.alice, people.moderator, people.admin):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with acting(pool, role, user) as connection:
                await connection.execute(written)


async def test_a_read_in_a_users_name_can_not_write_even_as_the_owner(people: People) -> None:
    async with as_user(people.database.pool, people.alice) as connection:
        await connection.execute("RESET ROLE")
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("DELETE FROM usage_logs")


# -------------------------------------------------------------------------------------------------- the functions


async def test_standing_is_told_of_own_jobs_only(people: People) -> None:
    pool = people.database.pool
    await pool.execute("UPDATE job_queue SET tag = CASE user_id WHEN $1 THEN 1 ELSE 2 END", people.alice)
    job = await pool.fetchval("SELECT job_id FROM job_queue WHERE user_id = $1", people.bob)

    async def standing(role: str, user: UUID | None) -> int:
        async with acting(pool, role, user) as connection:
            value: int = await connection.fetchval("SELECT ahead FROM ourvidz.standing($1)", job)
            return value

    assert await standing("authenticated", people.bob) == 1
    assert await standing("authenticated", people.admin) == 1
    # a count of 0 is also the answer about a job that is not there
    assert await standing("authenticated", people.alice) == 0
    assert await standing("authenticated", None) == 0
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await standing("anon", None)


@pytest.mark.parametrize(
    "call",
    [
        "ourvidz.next_tag('sdxl', ourvidz.uid(), 1::smallint, 1::real)",
        "ourvidz.charge('sdxl', ourvidz.uid(), 1::smallint, -9)",
        "ourvidz.erase_some(ourvidz.uid(), 10)",
        "ourvidz.kept_files('user-library', '{x/y.png}')",
    ],
)
async def test_no_user_moves_the_queues_clock(people: People, call: str) -> None:
    async with acting(people.database.pool, "authenticated", people.alice) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(f"SELECT {call}")


async def test_functions_that_run_as_the_owner_fix_their_search_path(people: People) -> None:
    rows = await people.database.pool.fetch(
        """SELECT p.proname, p.proconfig FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
           WHERE p.prosecdef AND n.nspname IN ('public', 'ourvidz', 'lora')"""
    )
    assert {row["proname"] for row in rows} >= {"has_role", "standing", "erase_some", "log_user_activity", "may_edit"}
    assert [row["proname"] for row in rows if not any(FIXED_PATH.fullmatch(s) for s in row["proconfig"] or [])] == []


# ------------------------------------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("table", ["api_keys", "user_roles", "usage_logs", "user_library", "user_activity_log"])
async def test_a_replica_reads_no_keys_roles_or_charges(people: People, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await people.database.worker_pool.fetch(f"SELECT 1 FROM {table}")  # noqa: S608


@pytest.mark.parametrize("column", ["birth_date", "token_balance", "age_verified", "username"])
async def test_a_replica_reads_nothing_personal(people: People, column: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await people.database.worker_pool.fetch(f"SELECT {column} FROM profiles")  # noqa: S608


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO jobs SELECT * FROM jobs",
        "DELETE FROM jobs",
        "INSERT INTO job_queue SELECT * FROM job_queue",
        "DELETE FROM queues",
        "UPDATE profiles SET token_balance = 9",
        "INSERT INTO user_roles (user_id, role) SELECT id, 'admin' FROM profiles",
        "UPDATE prompt_templates SET system_prompt = 'x'",
        "UPDATE system_config SET config = '{}'",
        "UPDATE job_events SET kind = 'completed'",
        "UPDATE workspace_assets SET user_id = user_id",
        "DELETE FROM callback_outbox",
        "INSERT INTO erasures SELECT id FROM profiles",
        "SELECT * FROM archives",
        "TRUNCATE job_queue",
        "DROP TABLE jobs",
        "CREATE TABLE mine (id int)",
        "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY",
    ],
)
async def test_a_replica_moves_jobs_and_nothing_else(people: People, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await people.database.worker_pool.execute(statement)


async def test_a_replica_moves_jobs_of_all_users(people: People) -> None:
    statement = "UPDATE job_queue SET step = 1 RETURNING user_id"
    async with acting(people.database.worker_pool, "ourvidz_worker") as connection:
        assert {row["user_id"] for row in await connection.fetch(statement)} == {people.alice, people.bob}
        assert await connection.fetchval("SELECT count(*) FROM jobs") == 4


# ------------------------------------------------------------------------------------------------------ the pool


@pytest_asyncio.fixture(loop_scope="module")
async def single(people: People) -> AsyncIterator[asyncpg.Pool]:
    """A pool of one connection, so that the next one is the same."""
    async with await open_pool(people.database.url, max_size=1) as pool:
        yield pool


async def identity(pool: asyncpg.Pool) -> tuple[str, Any]:
    row = await pool.fetchrow("SELECT current_user::text, nullif(current_setting('request.jwt.claims', true), '')")
    return tuple(row)


async def test_an_identity_ends_with_its_transaction(people: People, single: asyncpg.Pool) -> None:
    async with as_user(single, people.alice) as connection:
        inside = await connection.fetchrow("SELECT current_user::text, ourvidz.uid()")
        assert tuple(inside) == ("authenticated", people.alice)
    assert await identity(single) == ("postgres", None)
    async with as_user(single, people.bob) as connection:
        assert await connection.fetchval("SELECT ourvidz.uid()") == people.bob


class Trouble(Exception):
    pass


async def test_an_identity_ends_with_an_error(people: People, single: asyncpg.Pool) -> None:
    with pytest.raises(Trouble):
        async with as_user(single, people.alice):
            raise Trouble
    assert await identity(single) == ("postgres", None)
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with as_user(single, people.alice) as connection:
            await connection.execute("SELECT 1 / 0")
    assert await identity(single) == ("postgres", None)


async def test_an_identity_ends_when_its_statement_is_cancelled(people: People, single: asyncpg.Pool) -> None:
    with pytest.raises(TimeoutError):
        async with as_user(single, people.alice) as connection:
            await connection.execute("SELECT pg_sleep(30)", timeout=0.05)
    assert await identity(single) == ("postgres", None)


async def test_who_acts_is_told_anew_whatever_a_session_says(people: People, single: asyncpg.Pool) -> None:
    async with single.acquire() as connection:
        await connection.execute(
            "SELECT set_config('request.jwt.claims', $1, false)", json.dumps({"sub": str(people.bob)})
        )
    async with as_user(single, people.alice) as connection:
        owners = await connection.fetch("SELECT DISTINCT user_id FROM jobs")
    assert [row["user_id"] for row in owners] == [people.alice]


async def test_a_replicas_connection_stays_a_replicas(people: People) -> None:
    async with await open_pool(people.database.url, role="ourvidz_worker", max_size=1) as pool:
        for _ in range(2):
            assert await pool.fetchval("SELECT current_user::text") == "ourvidz_worker"


async def test_temporary_tables_do_not_stand_for_ours(people: People) -> None:
    async with acting(people.database.worker_pool, "ourvidz_worker") as connection:
        await connection.execute("CREATE TEMPORARY TABLE erasures (user_id uuid)")
        await connection.execute("INSERT INTO erasures VALUES ($1)", people.alice)
        assert await connection.fetchval("SELECT ourvidz.erase_some($1, 10)", people.alice) == 0
        assert await connection.fetchval("SELECT count(*) FROM jobs") == 4
