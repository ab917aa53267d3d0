"""What a pool does with connections and values."""

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from db.pool import BECOME, PLANNER, open_pool


@pytest.fixture
async def single(database: Any) -> AsyncIterator[asyncpg.Pool]:
    """A pool of one connection."""
    async with await open_pool(database.url, max_size=1) as pool:
        yield pool


async def test_nothing_that_was_left_open_on_a_connection_comes_back_with_it(single: asyncpg.Pool) -> None:
    async with single.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute(BECOME, json.dumps({"sub": str(uuid4()), "role": "authenticated"}))
    row = await single.fetchrow(
        "SELECT current_user = session_user AS own, current_setting('request.jwt.claims', true) AS claims, "
        "current_setting('plan_cache_mode') AS plans"
    )
    assert (row["own"], row["claims"] or None, row["plans"]) == (True, None, PLANNER["plan_cache_mode"])


@pytest.mark.parametrize("depth", [1, 190, 600])
async def test_json_is_read_however_deep_it_is(single: asyncpg.Pool, depth: int) -> None:
    value = await single.fetchval("SELECT (repeat('[', $1) || '1.5' || repeat(']', $1))::jsonb", depth)
    for _ in range(depth):
        (value,) = value
    assert value == 1.5
