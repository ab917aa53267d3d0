"""Functions and triggers of the specification's tables."""

import asyncio
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.migrate import migrate
from tests.conftest import with_database

LIBRARY = """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
                                       model_used, collection_id)
             VALUES ($1, 'image', $2, 1, 'image/png', 'p', 'm', $3) RETURNING id"""


async def collection(database: Any, user: UUID) -> UUID:
    made = "INSERT INTO user_collections (user_id, name) VALUES ($1, 'a') RETURNING id"
    key: UUID = await database.pool.fetchval(made, user)
    return key


async def counts(database: Any) -> list[int]:
    rows = await database.pool.fetch("SELECT asset_count FROM user_collections ORDER BY asset_count")
    return [row["asset_count"] for row in rows]


async def test_a_collection_counts_what_comes_moves_and_goes(database: Any) -> None:
    user = await database.user()
    first, second = await collection(database, user), await collection(database, user)
    one, two = [await database.pool.fetchval(LIBRARY, user, f"{n}.png", first) for n in range(2)]
    assert await counts(database) == [0, 2]
    await database.pool.execute("UPDATE user_library SET collection_id = $1 WHERE id = $2", second, one)
    assert await counts(database) == [1, 1]
    await database.pool.execute("DELETE FROM user_library WHERE id = $1", two)
    assert await counts(database) == [0, 1]
    await database.pool.execute("DELETE FROM user_collections WHERE id = $1", second)
    assert await database.pool.fetchval("SELECT collection_id FROM user_library WHERE id = $1", one) is None


async def test_a_collection_misses_nothing_that_comes_at_the_same_time(database: Any) -> None:
    user = await database.user()
    key = await collection(database, user)
    await asyncio.gather(*(database.pool.execute(LIBRARY, user, f"{n}.png", key) for n in range(20)))
    assert await counts(database) == [20]


@pytest.mark.parametrize(("days", "adult"), [(0, True), (1, False), (-365, True)])
async def test_a_birth_date_decides_the_age_gate(database: Any, days: int, adult: bool) -> None:
    user, pool = await database.user(), database.pool
    eighteen = await pool.fetchval("SELECT (current_date - interval '18 years')::date")
    await pool.execute("UPDATE profiles SET birth_date = $1 WHERE id = $2", eighteen + timedelta(days=days), user)
    row = await pool.fetchrow("SELECT age_verified, age_verification_date FROM profiles WHERE id = $1", user)
    assert (row["age_verified"], row["age_verification_date"] is not None) == (adult, adult)


async def test_an_admins_word_stays_without_a_birth_date(database: Any) -> None:
    user, pool = await database.user(), database.pool
    await pool.execute("UPDATE profiles SET age_verified = true WHERE id = $1", user)
    await pool.execute("UPDATE profiles SET username = 'al' WHERE id = $1", user)
    assert await pool.fetchval("SELECT age_verified FROM profiles WHERE id = $1", user)


async def test_the_highest_role_has_priority(database: Any) -> None:
    user, pool = await database.user("mod", "moderator"), database.pool
    assert await pool.fetchval("SELECT get_user_role_priority($1)", user) == 80
    await pool.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'guest')", user)
    assert await pool.fetchval("SELECT get_user_role_priority($1)", user) == 80
    assert await pool.fetchval("SELECT get_user_role_priority($1)", uuid4()) == 0


async def test_a_safe_profile_tells_nothing_personal(database: Any) -> None:
    user = await database.user()
    told = await database.pool.fetchval("SELECT get_safe_profile_view($1)", user)
    assert set(told) == {"id", "username", "created_at"}


async def test_small_functions_answer(database: Any) -> None:
    row = await database.pool.fetchrow(
        """SELECT is_url_expired(now() - interval '1 s'), is_url_expired(now() + interval '1 h'), is_url_expired(NULL),
                  check_valid_tasks('{t2i,i2v}'), check_valid_tasks('{t2i,magic}'), verify_user_age(NULL),
                  verify_user_age('1850-01-01')"""
    )
    assert tuple(row) == (True, False, True, True, False, False, False)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("INSERT INTO scenes (description) VALUES ('neither')", asyncpg.CheckViolationError),
        ("INSERT INTO scenes (description, name, scene_number) VALUES ('x', 'a', 1)", asyncpg.CheckViolationError),
        ("UPDATE api_models SET tasks = '{magic}'", asyncpg.CheckViolationError),
        ("UPDATE api_models SET default_for_tasks = '{t2v}'", asyncpg.CheckViolationError),
        ("INSERT INTO enhanced_model_config (model_type, config_name, inference_steps, guidance_scale, is_active)"
         " VALUES ('SDXL', 'a', 1, 1, true), ('SDXL', 'b', 1, 1, true)", asyncpg.UniqueViolationError),
    ],
)  # fmt: skip
async def test_rows_that_can_not_be_so_are_refused(database: Any, statement: str, error: type[Exception]) -> None:
    await database.pool.execute(
        """WITH p AS (INSERT INTO api_providers (name, display_name) VALUES ('p', 'P') RETURNING id)
           INSERT INTO api_models (provider_id, model_key, display_name, modality, tasks)
           SELECT id, 'm', 'M', 'image', '{t2i}' FROM p"""
    )
    with pytest.raises(error):
        await database.pool.execute(statement)


async def test_deleting_a_job_keeps_the_scene_that_showed_it(database: Any) -> None:
    user, pool, job = await database.user(), database.pool, uuid4()
    await pool.execute(
        """INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, original_prompt, params)
           VALUES ($1, $2, 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'generate', 'p', '{}')""",
        job,
        user,
    )
    await pool.execute("INSERT INTO character_scenes (scene_prompt, job_id) VALUES ('p', $1)", job)
    await pool.execute("DELETE FROM jobs")
    assert await pool.fetchval("SELECT job_id FROM character_scenes") is None


async def test_a_user_who_goes_takes_the_own_things_along(database: Any) -> None:
    user, pool = await database.user(), database.pool
    await pool.execute("INSERT INTO characters (user_id, name, description) VALUES ($1, 'a', 'b')", user)
    await pool.execute("INSERT INTO projects (user_id, original_prompt, media_type) VALUES ($1, 'a', 'image')", user)
    await collection(database, user)
    await pool.execute("INSERT INTO lora.user_generations (user_id) VALUES ($1)", user)
    await pool.execute("DELETE FROM profiles WHERE id = $1", user)
    left = """SELECT (SELECT count(*) FROM characters) + (SELECT count(*) FROM projects)
                   + (SELECT count(*) FROM user_collections) + (SELECT count(*) FROM lora.user_generations)"""
    assert await pool.fetchval(left) == 0


async def test_signing_up_where_others_keep_the_users_makes_a_profile_and_a_role(postgres_url: str) -> None:
    name = f"supabase_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{name}"')
    connection = await asyncpg.connect(with_database(postgres_url, name))
    try:
        await connection.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (id uuid PRIMARY KEY, email text)")
        await migrate(connection)
        user = uuid4()
        await connection.execute("INSERT INTO auth.users VALUES ($1, 'a@example.com')", user)
        assert await connection.fetchval("SELECT role::text FROM user_roles WHERE user_id = $1", user) == "basic_user"
        assert await connection.fetchval("SELECT username FROM profiles WHERE id = $1", user) is None
    finally:
        await connection.close()
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


async def test_a_days_jobs_are_found_by_their_index(database: Any) -> None:
    plan = await database.pool.fetch(
        "EXPLAIN SELECT * FROM model_performance_logs WHERE date >= current_date - 30"  # as the pool plans: by indexes
    )
    assert any("jobs_day" in row[0] for row in plan)


NAMED = (  # the functions that the specification lists
    "has_role", "get_user_role_priority", "verify_user_age", "get_safe_profile_view", "get_system_stats",
    "log_user_activity", "is_url_expired", "check_valid_tasks", "get_task_for_clip_type", "upsert_usage_aggregate",
    "backfill_usage_aggregates", "cleanup_expired_workspace_assets", "clean_orphaned_jobs",
    "cleanup_old_profile_audit_logs", "create_workspace_session",
)  # fmt: skip


async def test_each_function_of_the_specification_is_there_or_told_to_be_left_out(database: Any) -> None:
    rows = await database.pool.fetch("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    page = (Path(__file__).parents[2] / "docs/reference/schema.md").read_text(encoding="utf-8")
    there, _, left_out = page.partition("## Functions")[2].partition("Left out of")
    told = set(re.findall(r"`([a-z_]+)`", there)) & set(NAMED)
    assert told == {row["proname"] for row in rows} & set(NAMED)
    reasons = re.findall(r"^- (`[^:]+):", left_out, flags=re.MULTILINE)
    assert {name for reason in reasons for name in re.findall(r"`(\w+)`", reason)} == set(NAMED) - told


async def test_the_reference_names_every_table_and_view_and_no_other(database: Any) -> None:
    rows = await database.pool.fetch(
        """SELECT CASE n.nspname WHEN 'public' THEN '' ELSE n.nspname || '.' END || c.relname AS name
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname IN ('public', 'ourvidz', 'lora') AND c.relkind IN ('r', 'p', 'v', 'm')"""
    )
    page = (Path(__file__).parents[2] / "docs/reference/schema.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([a-z0-9_.]+)`", page))
    there = {row["name"] for row in rows}
    assert there - told == set()
    first_cells = re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`([a-z0-9_.]+)`", cell)} - there == set()
