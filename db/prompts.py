"""Prompt templates and negative prompts as rows that an operator may edit, seeded from the product's own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import asyncpg

from db.pool import queries


@dataclass(frozen=True, kw_only=True)
class TemplateRow:
    """A system prompt for the enhancer. `token_limit` counts the target model's tokens."""

    enhancer_model: str = "qwen_instruct"
    use_case: str
    content_mode: str
    template_name: str
    system_prompt: str
    token_limit: int
    job_type: str | None
    target_model: str | None
    quality: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NegativeRow:
    """A group of terms to keep out of pictures. None fits every family, content mode or generation mode."""

    name: str
    model_type: str | None
    content_mode: str | None
    generation_mode: str | None
    negative_prompt: str
    priority: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    description: str | None = None


class Prompts:
    """The rows of `prompt_templates` and `negative_prompts`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("prompts")

    async def seed(self, templates: list[TemplateRow], negatives: list[NegativeRow]) -> None:
        """Add what is missing, by name. An operator's edit of a seeded row stays."""
        async with self._pool.acquire() as connection, connection.transaction():
            for template in templates:
                await self._sql.seed_template(connection, **asdict(template))
            for negative in negatives:
                await self._sql.seed_negative(connection, **asdict(negative))

    async def templates(self, use_case: str = "enhancement") -> list[TemplateRow]:
        """The active templates of a use case."""
        return [TemplateRow(**dict(row)) async for row in self._sql.list_templates(self._pool, use_case=use_case)]

    async def negatives(self) -> list[NegativeRow]:
        """The active negative prompts, highest priority first."""
        return [NegativeRow(**dict(row)) async for row in self._sql.list_negatives(self._pool)]
