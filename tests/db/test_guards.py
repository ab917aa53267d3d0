"""Rules that hold for all tables, views and functions at once, and for all columns of a job."""

import json
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.jobs import Jobs
from tests.db.test_queue import new_job
from tests.db.test_security import acting

pytestmark = pytest.mark.asyncio(loop_scope="module")

OF_OURS = "n.nspname IN ('public', 'ourvidz', 'lora')"
OWNERS_VIEWS = {  # that show users what the owner sees, and why that is right
    "lora.rank_sizes": "constants",
    "public.published_items": "its own conditions show what is published, of everybody's library",
}
DEFINERS = {  # functions that act as the owner and that users may call, and what keeps them harmless
    "has_role": "tells one bit",
    "get_user_role_priority": "tells one number",
    "get_safe_profile_view": "tells what anybody may know",
    "log_user_activity": "writes in the caller's own name, as a client's word",
    "is_adult": "asks about the caller",
    "may_edit": "asks about the caller",
    "may_view": "asks about the caller",
    "standing": "counts for the caller's own jobs",
    "moderation_mode": "tells one setting",
    "published_item": "tells of what is published",
}

UNTOLD = {  # tables that users write and whose changes the log does not tell, and why that is right
    "public.conversations": "nobody but their owner writes them",
    "public.messages": "nobody but the owner of the conversation writes them",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def people(shared_database: Any) -> dict[str, UUID]:
    users = {role: await shared_database.user(role, role) for role in ("basic_user", "moderator", "admin")}
    await Jobs(shared_database.pool).accept(new_job(users["basic_user"]))
    return users


async def test_every_table_has_row_level_security(shared_database: Any) -> None:
    rows = await shared_database.pool.fetch(
        f"""SELECT n.nspname || '.' || c.relname AS name, c.relrowsecurity FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {OF_OURS} AND c.relkind IN ('r', 'p')"""  # noqa: S608
    )
    assert len(rows) > 50
    assert [row["name"] for row in rows if not row["relrowsecurity"]] == []


async def test_every_view_shows_what_its_reader_may_see(shared_database: Any) -> None:
    rows = await shared_database.pool.fetch(
        f"""SELECT n.nspname || '.' || c.relname AS name, c.reloptions,
                   has_table_privilege('authenticated', c.oid, 'SELECT') AS read,
                   has_table_privilege('anon', c.oid, 'SELECT') AS read_by_anybody FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {OF_OURS} AND c.relkind IN ('v', 'm')"""  # noqa: S608
    )
    assert len(rows) > 20
    owners = {row["name"]: row["read"] for row in rows if "security_invoker=true" not in (row["reloptions"] or [])}
    assert {name for name, read in owners.items() if read} == set(OWNERS_VIEWS)
    assert [row["name"] for row in rows if row["read_by_anybody"]] == []


async def test_the_log_tells_of_every_table_that_is_written_directly(shared_database: Any) -> None:
    rows = await shared_database.pool.fetch(
        f"""SELECT n.nspname || '.' || c.relname AS name,
                   EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'audited') AS told
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE {OF_OURS} AND c.relkind IN ('r', 'p')
              AND (has_any_column_privilege('authenticated', c.oid, 'INSERT, UPDATE')
                   OR has_table_privilege('authenticated', c.oid, 'DELETE'))"""  # noqa: S608
    )
    assert len(rows) > 20
    assert {row["name"] for row in rows if not row["told"]} == set(UNTOLD)


async def test_users_call_few_functions_that_act_as_the_owner(shared_database: Any) -> None:
    rows = await shared_database.pool.fetch(
        f"""SELECT p.proname, r.rolname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            CROSS JOIN (VALUES ('authenticated'), ('anon')) r (rolname)
            WHERE {OF_OURS} AND p.prosecdef AND p.prorettype <> 'trigger'::regtype
              AND has_function_privilege(r.rolname, p.oid, 'EXECUTE')"""  # noqa: S608
    )
    assert {row["proname"] for row in rows if row["rolname"] == "authenticated"} == set(DEFINERS)
    assert {row["proname"] for row in rows if row["rolname"] == "anon"} <= set(DEFINERS)


@pytest.mark.parametrize("role", ["authenticated", "anon", "service_role"])
async def test_no_column_of_a_job_is_written_by_a_user(
    shared_database: Any, people: dict[str, UUID], role: str
) -> None:
    """Status, metadata, moderation, billing, results: by no way that a user's token opens."""
    pool = shared_database.pool
    rows = await pool.fetch(
        "SELECT attname, attgenerated <> '' AS made FROM pg_attribute "
        "WHERE attrelid = 'jobs'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    assert {"status", "metadata", "moderation_status", "user_id"} <= {row["attname"] for row in rows}
    for user in people.values():
        for column in [row["attname"] for row in rows if not row["made"]]:
            async with acting(pool, role, user) as connection:
                for statement in (
                    f"UPDATE jobs SET {column} = {column}",  # noqa: S608
                    f"UPDATE jobs SET {column} = DEFAULT",  # noqa: S608
                    f"INSERT INTO jobs ({column}) VALUES (DEFAULT)",  # noqa: S608
                    f"INSERT INTO jobs ({column}) VALUES (DEFAULT) ON CONFLICT (id) DO UPDATE SET {column} = NULL",  # noqa: S608
                ):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        async with connection.transaction():
                            await connection.execute(statement)


@pytest.mark.parametrize("claims", [{"role": "admin"}, {"app_metadata": {"role": "admin"}}, {"user_role": "admin"}])
async def test_claims_give_no_role_of_ours(
    shared_database: Any, people: dict[str, UUID], claims: dict[str, Any]
) -> None:
    async with acting(shared_database.pool, "authenticated", people["basic_user"]) as connection:
        said = json.dumps({"sub": str(people["basic_user"])} | claims)
        await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", said)
        assert await connection.fetchval("SELECT ourvidz.reads_all()") is False
        assert await connection.fetchval("SELECT ourvidz.administers()") is False
        assert await connection.fetch("SELECT FROM system_config") == []


async def test_somebody_without_a_profile_sees_nothing_of_anybody(
    shared_database: Any, people: dict[str, UUID]
) -> None:
    async with acting(shared_database.pool, "authenticated", uuid4()) as connection:
        for table in ("jobs", "profiles", "user_roles", "user_library", "workspace_assets"):
            assert await connection.fetch(f"SELECT FROM {table}") == []
