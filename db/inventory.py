"""What there is: the tables of the database, and the prompts that an operator keeps in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from db.pool import queries


@dataclass(frozen=True)
class Table:
    """A table or view, with `name`, `type`, `nullable` and `generated` of each column."""

    schema: str
    name: str
    kind: str
    row_security: bool
    columns: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PromptRows:
    """The active templates and negative prompts: how many, for what, and a digest that changes with any of them."""

    templates: int
    negatives: int
    use_cases: Sequence[str]
    models: Sequence[str]
    negative_models: Sequence[str]
    digest: str
    at: datetime


class Inventory:
    """Reads for operators, over a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("inventory")

    async def tables(self) -> list[Table]:
        """Every table and view of the schemas that clients may read, by name."""
        return [Table(**dict(row)) async for row in self._sql.tables(self._pool)]

    async def prompts(self) -> PromptRows:
        """The prompts as they are now."""
        return PromptRows(**dict(await self._sql.prompts(self._pool)))
