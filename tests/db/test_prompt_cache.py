"""Rows of prompts are kept in memory, and an edit is in force with the next look-up of every process."""

import asyncio
import json
import sys
from typing import Any
from uuid import uuid4

import pytest

from db.pool import open_pool
from db.prompts import Prompts
from deployments.prompting import negative_rows, template_rows

EDIT = "UPDATE prompt_templates SET system_prompt = 'edited' WHERE template_name = 'SDXL_FAST'"


@pytest.fixture
async def prompts(database: Any) -> Prompts:
    seeded = Prompts(database.pool)
    await seeded.seed(template_rows(), negative_rows())
    return seeded


async def system_prompts(prompts: Prompts) -> set[str]:
    return {row.system_prompt for row in await prompts.templates() if row.template_name == "SDXL_FAST"}


async def test_rows_are_read_once_and_kept(prompts: Prompts) -> None:
    first, again = await prompts.look_up(), await prompts.look_up()
    assert (first[1], again[1]) == (False, True)
    assert first[0] == again[0]
    await prompts.negatives()
    stats = prompts.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.evictions) == (1, 2, 2, 0)


@pytest.mark.parametrize(
    "edit",
    [
        EDIT,
        "DELETE FROM prompt_templates WHERE template_name = 'SDXL_FAST'",
        "UPDATE prompt_templates SET is_active = false WHERE template_name = 'SDXL_FAST'",
        "TRUNCATE prompt_templates",
    ],
)
async def test_an_edit_is_in_force_with_the_next_look_up_of_every_pool(
    prompts: Prompts, database: Any, edit: str
) -> None:
    other = Prompts(database.worker_pool)
    for one in (prompts, other):
        await one.templates()
        assert (await one.look_up())[1]
        assert "edited" not in await system_prompts(one)
    await database.pool.execute(edit)
    expected = {"edited"} if edit == EDIT else set()
    assert await system_prompts(prompts) == await system_prompts(other) == expected


async def test_an_edit_of_negatives_is_in_force_too(prompts: Prompts, database: Any) -> None:
    other = Prompts(database.worker_pool)
    await other.negatives()
    await database.pool.execute("UPDATE negative_prompts SET negative_prompt = 'fog'")
    assert {row.negative_prompt for row in await other.negatives()} == {"fog"}


async def test_an_edit_that_is_rolled_back_changes_nothing(prompts: Prompts, database: Any) -> None:
    await prompts.templates()
    async with database.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(EDIT)
        # not committed: neither the edit nor its number is to be seen
        assert (await prompts.look_up())[1]
        await transaction.rollback()
    assert "edited" not in await system_prompts(prompts)


OTHER_PROCESS = """
import asyncio, json, sys
from db.pool import open_pool
from db.prompts import Prompts

async def main():
    pool = await open_pool(sys.argv[1], name="another process")
    prompts = Prompts(pool)
    for line in sys.stdin:
        found = {row.system_prompt for row in await prompts.templates() if row.template_name == "SDXL_FAST"}
        print(json.dumps([sorted(found), prompts.stats().hits]), flush=True)
    await pool.close()

asyncio.run(main())
"""


async def test_another_process_uses_the_edit_at_once(prompts: Prompts, database: Any) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        OTHER_PROCESS,
        database.url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def ask() -> tuple[list[str], int]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"look\n")
        await process.stdin.drain()
        found, hits = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        return found, hits

    try:
        assert "edited" not in (await ask())[0]
        assert (await ask())[1] == 1
        await database.pool.execute(EDIT)
        assert await ask() == (["edited"], 1)
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 60)


async def test_the_cache_is_bounded(database: Any) -> None:
    small = Prompts(database.pool, capacity=2)
    for use_case in ("a", "b", "a", "c", "a", "b"):
        await small.templates(use_case)
    # b went for c, c for b; a was used most lately each time
    stats = small.stats()
    assert (stats.entries, stats.capacity, stats.hits, stats.misses, stats.evictions) == (2, 2, 2, 4, 2)


async def test_renewing_makes_every_process_read_anew(prompts: Prompts, database: Any) -> None:
    other = Prompts(database.worker_pool)
    await prompts.templates()
    await other.templates()
    before = prompts.stats().version
    assert before is not None
    assert await prompts.renew() > before
    assert prompts.stats().entries == 0
    assert [(await one.look_up())[1] for one in (prompts, other)] == [False, False]


async def test_what_is_forgotten_is_read_anew(prompts: Prompts) -> None:
    await prompts.templates()
    assert (prompts.invalidate(), prompts.invalidate()) == (1, 0)
    assert (await prompts.look_up())[1] is False


async def test_an_admins_edit_counts_without_a_right_to_the_number(prompts: Prompts, database: Any) -> None:
    other = Prompts(database.worker_pool)
    await other.templates()
    admin = await database.pool.fetchval("INSERT INTO profiles (username) VALUES ('root') RETURNING id")
    await database.pool.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin')", admin)
    async with database.pool.acquire() as connection, connection.transaction():
        claims = json.dumps({"sub": str(admin), "role": "authenticated"})
        await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
        await connection.execute("SET LOCAL ROLE authenticated")
        await connection.execute(EDIT)
    assert await system_prompts(other) == {"edited"}


async def test_presets_and_models_are_found_by_name_and_id(prompts: Prompts, database: Any) -> None:
    preset_id = await database.pool.fetchval(
        """INSERT INTO ourvidz.enhancement_presets (preset_name, enable_qwen, enable_compel, auto_enhancement)
           VALUES ('Mine', true, false, true) RETURNING id"""
    )
    assert await prompts.preset("Mine") == await prompts.preset(str(preset_id)) is not None
    assert await prompts.preset("Nobody's") is None
    assert await prompts.preset(str(uuid4())) is None
    assert await prompts.model(uuid4()) is None


async def test_the_version_is_no_users_business(database: Any) -> None:
    pool = await open_pool(database.url, role="authenticated", max_size=1, name="a user")
    try:
        with pytest.raises(Exception, match="permission denied"):
            await pool.fetchval("SELECT version FROM ourvidz.prompt_version")
    finally:
        await pool.close()
