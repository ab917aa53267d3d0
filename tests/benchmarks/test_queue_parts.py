"""The parts of the queue's statements, as the benchmark takes them out: what is left is a statement each time."""

from typing import Any

import aiosql
import pytest

from benchmarks.queue_parts import CUTS, REST, SQL, variants, without


async def test_a_statement_stays_one_with_each_part_gone(database: Any) -> None:
    found = variants(SQL.read_text(encoding="utf-8"))
    assert {name: len(parts) for name, parts in found.items()} == {"claim": 5, "settle": 6}
    async with database.pool.acquire() as connection:
        for statement, parts in found.items():
            assert parts[-1][0] == REST[statement]
            assert len({text for _, text in parts}) == len(parts)
            for _, text in parts:
                await connection.prepare(getattr(aiosql.from_str(text, "asyncpg"), statement).sql)


@pytest.mark.parametrize("statement", REST)
def test_what_is_left_at_last_has_none_of_the_parts(statement: str) -> None:
    left = variants(SQL.read_text(encoding="utf-8"))[statement][-1][1]
    body = left[left.index(f"-- name: {statement}(") :].split("\n-- name:", 1)[0]
    gone = [part for name, _, parts, _ in CUTS if name == statement for part in parts]
    assert gone
    assert not [part for part in gone if f"), {part} AS (" in body]


def test_a_part_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="claim: nothing"):
        without(SQL.read_text(encoding="utf-8"), "claim", ("nothing",), ())
