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
from tests.db.test_security import HIDDEN, OWN, acting

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACTORS = ("owner", "other", "moderator", "admin", "anonymous")
ELSEWHERE = {"conversations", "messages", "message_keys", "reference_uploads"}  # their own tests have their matrix


@dataclass(frozen=True)
class Table:
    """A table, one row of it that alice owns, and what each actor may do with that row.

    In `rights` stand the first letters of select, insert, update and delete, by actor in the order of `ACTORS`. `row`
    is what an insert gives, with $alice for the owner and $<table> for the id of that table's row; `change` is the
    column that an update sets.
    """

    name: str
    rights: tuple[str, str, str, str, str]
    row: Mapping[str, Any]
    change: str
    reads: str = "*"
    key: str = "id"


ALL = "siud"
OWNED = (ALL, "", "s", "sud", "")  # read by the staff, written by the owner, kept in order by admins
ADMINS = ("", "", "", ALL, "")
OFFERED = ("s", "s", "s", ALL, "")
PROVIDER = "id, name, display_name, base_url, docs_url, auth_scheme, auth_header_name, rate_limits, is_active"

TABLES = (
    Table("projects", OWNED, {"user_id": "$alice", "original_prompt": "a", "media_type": "image"}, "title"),
    Table("user_collections", OWNED, {"user_id": "$alice", "name": "a"}, "description"),
    Table(
        "characters", OWNED, {"user_id": "$alice", "name": "a", "description": "b", "content_rating": "nsfw"}, "mood"
    ),
    Table("scenes", OWNED, {"project_id": "$projects", "scene_number": 2, "description": "a"}, "setting"),
    Table(
        "character_scenes",
        (ALL, "", "s", ALL, ""),
        {"character_id": "$characters", "scene_prompt": "a"},
        "scene_name",
    ),
    Table("api_providers", OFFERED, {"name": "p2", "display_name": "P"}, "display_name", PROVIDER),
    Table(
        "api_models",
        OFFERED,
        {"provider_id": "$api_providers", "model_key": "m2", "display_name": "M", "modality": "image"},
        "display_name",
    ),
    Table(
        "enhancement_presets",
        ADMINS,
        {"preset_name": "two", "enable_qwen": True, "enable_compel": True, "auto_enhancement": True},
        "preset_description",
    ),
    Table("compel_configs", ADMINS, {"config_name": "a", "weights": {"quality": 1.3}}, "config_name"),
    Table(
        "enhanced_model_config",
        ADMINS,
        {"model_type": "SDXL", "config_name": "two", "inference_steps": 25, "guidance_scale": 7.5},
        "resolution",
    ),
    Table(
        "prompt_ab_tests",
        ADMINS,
        {"test_name": "a", "test_series": "b", "baseline_config": {}, "enhanced_config": {}},
        "test_name",
    ),
    Table(
        "model_test_results",
        ADMINS,
        {"model_type": "SDXL", "prompt_text": "a", "test_series": "b", "test_tier": "artistic"},
        "notes",
    ),
    Table(
        "admin_development_progress",
        ADMINS,
        {"feature_name": "a", "feature_category": "b", "status": "blocked", "priority": "P1"},
        "notes",
    ),
    Table(
        "prompt_templates",
        ADMINS,
        {"enhancer_model": "q", "use_case": "u", "template_name": "t2", "system_prompt": "s", "token_limit": 9},
        "comment",
    ),
    Table("negative_prompts", ADMINS, {"name": "two", "negative_prompt": "blur"}, "description"),
    Table(
        "lora.user_roles",
        ("s", "", "", ALL, ""),
        {"user_id": "$spare", "email": "a@example.com", "role": "viewer"},
        "email",
    ),
    Table("lora.app_settings", ("s", "", "", ALL, ""), {"setting_key": "two", "setting_value": "x"}, "setting_value"),
    Table(
        "lora.user_generations", (ALL, "", "", "sud", ""), {"user_id": "$alice", "prompt_used": "a"}, "user_feedback"
    ),
    Table(
        "lora.trait_detection_accuracy",
        (ALL, "", "", ALL, ""),
        {"generation_id": "$lora.user_generations", "trait_type": "hat"},
        "user_corrected_value",
    ),
    # alice is a viewer of the registry, so she reads what hangs on nobody
    Table("lora.training_runs", ("s", "", "", ALL, ""), {"run_name": "two", "base_model": "sdxl"}, "notes"),
    Table(
        "lora.epoch_results",
        ("s", "", "", ALL, ""),
        {"training_run_id": "$lora.training_runs", "epoch_number": 2},
        "notes",
    ),
    Table("lora.caption_versions", ("s", "", "", ALL, ""), {"version_name": "v2"}, "description"),
    Table(
        "lora.caption_versions_detailed",
        ("s", "", "", ALL, ""),
        {"caption_version_id": "$lora.caption_versions", "image_name": "b.png", "new_caption": "b"},
        "change_reason",
    ),
    Table(
        "lora.caption_reviews",
        ("s", "", "", ALL, ""),
        {"caption_version": "v2", "image_name": "a.png", "caption": "a"},
        "notes",
    ),
    Table("lora.test_prompts", ("s", "", "", ALL, ""), {"prompt_text": "two"}, "expected"),
    Table(
        "lora.prompt_test_results",
        ("s", "", "", ALL, ""),
        {"epoch_result_id": "$lora.epoch_results", "test_prompt_id": "$lora.test_prompts"},
        "notes",
    ),
    Table("lora.unmatched_test_outputs", ("s", "", "", ALL, ""), {"output_path": "two.png"}, "reason"),
)
BELOW = {  # what views stand before, and what only the machinery writes
    "ourvidz.enhancement_presets",
    "ourvidz.compel_configs",
    "ourvidz.prompt_ab_tests",
    "ourvidz.config_changes",
    "ourvidz.past_days",
    "system_config",
}
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


# the second row of a kind is what an insert tries; these differ where a table allows no second one
FIRST = {
    "scenes": {"scene_number": 1},
    "api_providers": {"name": "p1"},
    "api_models": {"model_key": "m1"},
    "enhancement_presets": {"preset_name": "one"},
    "compel_configs": {"weights": {"quality": 1.1}},
    "enhanced_model_config": {"config_name": "one", "is_active": True},
    "prompt_templates": {"template_name": "t1"},
    "negative_prompts": {"name": "one"},
    "lora.user_roles": {"user_id": "$alice"},
    "lora.app_settings": {"setting_key": "one"},
    "lora.training_runs": {"run_name": "one"},
    "lora.epoch_results": {"epoch_number": 1},
    "lora.caption_versions": {"version_name": "v1"},
    "lora.caption_versions_detailed": {"image_name": "a.png"},
    "lora.caption_reviews": {"caption_version": "v1"},
    "lora.test_prompts": {"prompt_text": "one"},
    "lora.unmatched_test_outputs": {"output_path": "one.png"},
    "model_test_results": {"original_prompt": "a", "enhanced_prompt": "a b"},
}
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
        values = made.given({**table.row, **FIRST.get(table.name, {})})
        statement = f"{insertion(table, values)} RETURNING {table.key}"
        made.ids[table.name] = await database.pool.fetchval(statement, *values.values())
    await database.pool.execute(DONE, uuid4(), people["owner"])
    return made


async def attempt(world: World, table: Table, actor: str, action: str) -> bool:
    """Whether the action had an effect. It is taken back."""
    role = "anon" if actor == "anonymous" else "authenticated"
    key = world.ids[table.name]
    where = f"WHERE {table.key} = $1"
    async with acting(world.pool, role, world.people.get(actor)) as connection:
        try:
            if action == "i":
                values = world.given(table.row)
                return bool(await connection.execute(insertion(table, values), *values.values()) == "INSERT 0 1")
            if action == "u":
                change = f"UPDATE {table.name} SET {table.change} = 'changed' {where}"  # noqa: S608
                return bool(await connection.execute(change, key) == "UPDATE 1")
            if action == "d":
                return bool(await connection.execute(f"DELETE FROM {table.name} {where}", key) == "DELETE 1")  # noqa: S608
            found = await connection.fetch(f"SELECT {table.reads} FROM {table.name} {where}", key)  # noqa: S608
            return bool(found)
        except asyncpg.InsufficientPrivilegeError:
            return False


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
async def test_each_actor_may_do_what_is_right_and_no_more(world: World, table: Table, actor: str) -> None:
    allowed = {action for action in ALL if await attempt(world, table, actor, action)}
    assert allowed == set(table.rights[ACTORS.index(actor)])


async def test_every_table_has_its_matrix(world: World) -> None:
    rows = await world.pool.fetch(
        """SELECT CASE n.nspname WHEN 'public' THEN '' ELSE n.nspname || '.' END || c.relname AS name
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname IN ('public', 'ourvidz', 'lora') AND c.relkind IN ('r', 'p')"""
    )
    known = {table.name for table in TABLES} | set(OWN) | set(HIDDEN) | BELOW | ELSEWHERE
    assert {row["name"] for row in rows} - known == set()


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


async def test_statistics_of_the_system_are_for_admins(world: World) -> None:
    async with as_user(world.pool, world.people["admin"]) as connection:
        stats = await connection.fetchval("SELECT get_system_stats(7)")
    assert (stats["total_jobs"], stats["completed_jobs"], stats["total_users"]) == (1, 1, 5)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with as_user(world.pool, world.people["moderator"]) as connection:
            await connection.fetchval("SELECT get_system_stats(7)")
