"""Who may do what with the rows of the specification's tables: owner, other, moderator, admin and nobody.

Each of select, insert, update and delete is tried on real roles of Postgres, against one table of what is right."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.pool import as_user
from tests.db.rights import ACTORS, ALL, FIRST, TABLES, Table
from tests.db.test_security import HIDDEN, OWN, acting

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN_VIEWS = (
    "model_performance_logs",
    "job_enhancement_analysis",
    "enhancement_effectiveness",
    "live_prompt_metrics",
    "live_job_tracking",
    "user_enhancement_adoption",
    "enhanced_prompt_tests",
    "prompt_test_results",
    "config_change_history",
    "model_config_history",
    "api_usage_aggregates",
)


@dataclass
class World:
    """A database with one row in each table."""

    pool: asyncpg.Pool
    people: dict[str, UUID]
    ids: dict[str, Any]

    def given(self, row: Mapping[str, Any]) -> dict[str, Any]:
        known = {"$alice": self.people["owner"], "$spare": self.people["spare"]}
        known |= {f"${table}": key for table, key in self.ids.items()}
        return {column: known.get(value, value) if isinstance(value, str) else value for column, value in row.items()}


DONE = """INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, status, stage, original_prompt, params,
                             completed_at)
          VALUES ($1, $2, 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'completed', 'generate', 'p', '{}', now())"""


def insertion(table: Table, values: Mapping[str, Any]) -> str:
    places = ", ".join(f"${number}" for number in range(1, len(values) + 1))
    return f"INSERT INTO {table.name} ({', '.join(values)}) VALUES ({places})"  # noqa: S608


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(shared_database: Any) -> World:
    database = shared_database
    people = {
        "owner": await database.user("alice"),
        "other": await database.user("bob"),
        "moderator": await database.user("mod", "moderator"),
        "admin": await database.user("root", "admin"),
        "spare": await database.user("carol"),
    }
    made = World(database.pool, people, {})
    for table in TABLES:
        if table.there is not None:
            made.ids[table.name] = table.there
            continue
        values = made.given({**table.row, **FIRST.get(table.name, {})})
        statement = f"{insertion(table, values)} RETURNING {table.key}"
        made.ids[table.name] = await database.pool.fetchval(statement, *values.values())
    await database.pool.execute(DONE, uuid4(), people["owner"])
    return made


async def act(connection: Any, world: World, table: Table, action: str) -> bool:
    """Whether the action had an effect."""
    key = world.ids[table.name]
    where = f"WHERE {table.key} = $1"
    if action == "i":
        values = world.given(table.row)
        return bool(await connection.execute(insertion(table, values), *values.values()) == "INSERT 0 1")
    if action == "u":
        change = f"UPDATE {table.name} SET {table.change} = '{table.to}' {where}"  # noqa: S608
        return bool(await connection.execute(change, key) == "UPDATE 1")
    if action == "d":
        return bool(await connection.execute(f"DELETE FROM {table.name} {where}", key) == "DELETE 1")  # noqa: S608
    return bool(await connection.fetch(f"SELECT {table.reads} FROM {table.name} {where}", key))  # noqa: S608


async def attempt(world: World, table: Table, actor: str, action: str) -> bool:
    """Whether the action has an effect for that actor. It is taken back."""
    role = "anon" if actor == "anonymous" else "authenticated"
    async with acting(world.pool, role, world.people.get(actor)) as connection:
        try:
            return await act(connection, world, table, action)
        except asyncpg.InsufficientPrivilegeError:
            return False


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
async def test_each_actor_may_do_what_is_right_and_no_more(world: World, table: Table, actor: str) -> None:
    allowed = {action for action in ALL if await attempt(world, table, actor, action)}
    assert allowed == set(table.rights[ACTORS.index(actor)])


async def test_every_table_has_its_matrix_and_no_other_has(world: World) -> None:
    rows = await world.pool.fetch(
        """SELECT CASE n.nspname WHEN 'public' THEN '' ELSE n.nspname || '.' END || c.relname AS name
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname IN ('public', 'ourvidz', 'lora') AND c.relkind IN ('r', 'p')"""
    )
    views = {"enhancement_presets", "compel_configs", "prompt_ab_tests"}  # which are written like tables
    matrix = [table.name for table in TABLES]
    assert len(matrix) == len(set(matrix))
    assert set(matrix) & (set(OWN) | set(HIDDEN)) == set()
    assert set(OWN) & set(HIDDEN) == set()
    assert (set(matrix) | set(OWN) | set(HIDDEN)) - views == {row["name"] for row in rows}


@pytest.mark.parametrize("view", ADMIN_VIEWS)
async def test_analytics_are_for_admins(world: World, view: str) -> None:
    for actor in ("owner", "other", "moderator"):
        async with as_user(world.pool, world.people[actor]) as connection:
            assert await connection.fetch(f"SELECT * FROM {view}") == []  # noqa: S608
    async with as_user(world.pool, world.people["admin"]) as connection:
        assert await connection.fetch(f"SELECT * FROM {view}")  # noqa: S608
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with acting(world.pool, "anon") as connection:
            await connection.fetch(f"SELECT * FROM {view}")  # noqa: S608


async def test_the_settings_row_is_changed_by_admins_only_and_never_deleted(world: World) -> None:
    change, remove = "UPDATE system_config SET config = '{\"a\": 1}'", "DELETE FROM system_config"
    async with acting(world.pool, "authenticated", world.people["admin"]) as connection:
        assert await connection.execute(change) == "UPDATE 1"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(remove)
    async with acting(world.pool, "authenticated", world.people["moderator"]) as connection:
        assert await connection.execute(change) == "UPDATE 0"


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("characters", "user_id", "bob"),
        ("characters", "likes_count", "9"),
        ("projects", "user_id", "bob"),
        ("user_collections", "asset_count", "9"),
        ("character_scenes", "character_id", "x"),
        ("scenes", "project_id", "x"),
        ("lora.epoch_results", "checkpoint_path", "/etc/passwd"),
        ("lora.epoch_results", "production_ready", "true"),
        ("lora.training_runs", "is_production", "true"),
    ],
)
async def test_columns_of_the_machinery_are_not_written_even_by_admins(
    world: World, table: str, column: str, value: str
) -> None:
    for actor in ("owner", "admin"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with acting(world.pool, "authenticated", world.people[actor]) as connection:
                await connection.execute(f"UPDATE {table} SET {column} = {column}")  # noqa: S608


async def test_the_name_of_a_providers_secret_is_told_to_nobody(world: World) -> None:
    for actor in ("owner", "admin"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with acting(world.pool, "authenticated", world.people[actor]) as connection:
                await connection.fetch("SELECT secret_name FROM api_providers")


async def test_what_is_turned_off_is_seen_by_admins_only(world: World) -> None:
    await world.pool.execute("INSERT INTO api_providers (name, display_name, is_active) VALUES ('off', 'Off', false)")
    try:
        seen = {}
        for actor in ("owner", "admin"):
            async with as_user(world.pool, world.people[actor]) as connection:
                seen[actor] = {row["name"] for row in await connection.fetch("SELECT name FROM api_providers")}
        assert seen == {"owner": {"p1"}, "admin": {"p1", "off"}}
    finally:
        await world.pool.execute("DELETE FROM api_providers WHERE name = 'off'")


@pytest.mark.parametrize(
    ("public", "rating", "adult", "seen"),
    [(False, "sfw", True, False), (True, "sfw", False, True), (True, "nsfw", False, False), (True, "nsfw", True, True)],
)
async def test_a_public_character_is_seen_by_whom_it_is_for(
    world: World, public: bool, rating: str, adult: bool, seen: bool
) -> None:
    async with world.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            change = "UPDATE characters SET is_public = $1, content_rating = $2"
            await connection.execute(change, public, rating)
            bob = world.people["other"]
            await connection.execute("UPDATE profiles SET age_verified = $1 WHERE id = $2", adult, bob)
            await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", json.dumps({"sub": str(bob)}))
            await connection.execute("SET LOCAL ROLE authenticated")
            assert bool(await connection.fetch("SELECT id FROM characters")) is seen
        finally:
            await transaction.rollback()


async def test_the_registry_opens_to_everybody_when_its_settings_say_so(world: World) -> None:
    other = world.people["other"]
    for key, statement in (
        ("public_viewing_enabled", "SELECT * FROM lora.training_runs"),
        ("public_editing_enabled", "UPDATE lora.training_runs SET notes = 'x' RETURNING id"),
    ):
        async with world.pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            change = "UPDATE lora.app_settings SET setting_value = 'true' WHERE setting_key = $1"
            await connection.execute(change, key)
            claims = json.dumps({"sub": str(other)})
            await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
            await connection.execute("SET LOCAL ROLE authenticated")
            assert len(await connection.fetch(statement)) == 1
            await transaction.rollback()


# ------------------------------------------------------------------------------------------------------- the audit


async def test_what_an_admin_changes_is_in_the_log_without_what_it_holds(world: World) -> None:
    admin = world.people["admin"]
    async with acting(world.pool, "authenticated", admin) as connection:
        await connection.execute("UPDATE prompt_templates SET system_prompt = 'hidden words'")
        row = await connection.fetchrow("SELECT * FROM user_activity_log WHERE action = 'prompt_templates.update'")
    assert row["user_id"] == admin
    assert row["resource_id"] == str(world.ids["prompt_templates"])
    assert row["metadata"] == {"columns": ["system_prompt"]}


WRITTEN = [table for table in TABLES if set(table.rights[ACTORS.index("admin")]) - {"s"}]


@pytest.mark.parametrize("table", WRITTEN, ids=lambda table: table.name)
async def test_an_admins_change_is_told_and_an_owners_own_is_not(world: World, table: Table) -> None:
    name, key = table.name.removeprefix("ourvidz."), str(world.ids[table.name])
    log = "SELECT user_id, action, resource_type, resource_id FROM user_activity_log"
    for action, verb in (("i", "insert"), ("u", "update"), ("d", "delete")):
        if action in table.rights[ACTORS.index("owner")]:
            async with acting(world.pool, "authenticated", world.people["owner"]) as connection:
                assert await act(connection, world, table, action)
                assert await connection.fetch(log) == [], "nor what goes along with it"
        if action in table.rights[ACTORS.index("admin")]:
            async with acting(world.pool, "authenticated", world.people["admin"]) as connection:
                assert await act(connection, world, table, action)
                (row,) = [row for row in await connection.fetch(log) if row["action"] == f"{name}.{verb}"]
            assert (row["user_id"], row["resource_type"]) == (world.people["admin"], name)
            assert action == "i" or row["resource_id"] == key


async def test_an_admins_own_is_the_admins(world: World) -> None:
    admin = world.people["admin"]
    async with acting(world.pool, "authenticated", admin) as connection:
        add = "INSERT INTO characters (user_id, name, description) VALUES ($1, 'a', 'b') RETURNING id"
        character = await connection.fetchval(add, admin)
        scene = "INSERT INTO character_scenes (character_id, scene_prompt) VALUES ($1, 'a')"
        await connection.execute(scene, character)
        await connection.execute("DELETE FROM characters WHERE id = $1", character)
        assert await connection.fetch("SELECT FROM user_activity_log") == []
        await connection.fetchval(add, None)
        assert await connection.fetchval("SELECT action FROM user_activity_log") == "characters.insert"


async def test_seeding_is_nobodys_act(world: World) -> None:
    assert await world.pool.fetchval("SELECT count(*) FROM user_activity_log") == 0


async def test_one_logs_in_the_own_name_only(world: World) -> None:
    log = "SELECT log_user_activity($1, 'looked')"
    async with acting(world.pool, "authenticated", world.people["owner"]) as connection:
        assert await connection.fetchval(log, world.people["owner"])
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval(log, world.people["other"])
    async with acting(world.pool, "authenticated", world.people["admin"]) as connection:
        assert await connection.fetchval(log, world.people["other"])


async def test_what_a_client_logs_is_told_as_a_clients_word_and_is_bounded(world: World) -> None:
    log = "SELECT log_user_activity($1, $2, $3, $4, $5, NULL, $6)"
    most = ("a" * 100, "t" * 100, "r" * 200, {"text": "x" * 16370}, "u" * 1000)
    for actor in ("owner", "admin"):
        who = world.people[actor]
        async with acting(world.pool, "authenticated", who) as connection:
            for action in ("config.changed", "request.eraseUser", "client.looked"):
                entry = await connection.fetchval(log, who, action, None, None, None, None)
                stored = await connection.fetchval("SELECT action FROM user_activity_log WHERE id = $1", entry)
                assert stored == f"client.{action}"
            assert await connection.fetchval(log, who, *most)
            too_much = ("a" * 101, "t" * 101, "r" * 201, {"text": "x" * 16400}, "u" * 1001)
            for place, value in [*enumerate(too_much), (0, "")]:
                with pytest.raises(asyncpg.CheckViolationError):
                    async with connection.transaction():
                        await connection.fetchval(log, who, *most[:place], value, *most[place + 1 :])
    async with acting(world.pool, "authenticated") as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval(log, None, *most)


async def test_statistics_of_the_system_are_for_admins(world: World) -> None:
    async with as_user(world.pool, world.people["admin"]) as connection:
        stats = await connection.fetchval("SELECT get_system_stats(7)")
    assert (stats["total_jobs"], stats["completed_jobs"], stats["total_users"]) == (1, 1, 5)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with as_user(world.pool, world.people["moderator"]) as connection:
            await connection.fetchval("SELECT get_system_stats(7)")
