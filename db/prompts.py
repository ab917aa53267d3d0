"""Prompt templates and negative prompts as rows that an operator may edit, seeded from the product's own.

They are kept in memory under the version that the database counts up with every edit. Each look-up asks for the
version, which is one row, and reads the rows anew when it has changed: so an edit is in force with the next look-up of
every process, and there is nothing to tell them.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar
from uuid import UUID

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


@dataclass(frozen=True)
class ModelChoice:
    """What a row of `api_models` says of the model that a prompt is for."""

    model_key: str
    model_family: str | None
    modality: str
    is_active: bool


@dataclass(frozen=True)
class PresetChoice:
    """What a row of `enhancement_presets` says of how to enhance."""

    preset_name: str
    enable_qwen: bool
    enable_compel: bool
    compel_weights: Mapping[str, float] | None
    qwen_settings: Mapping[str, Any] | None


@dataclass(frozen=True)
class CacheStats:
    """What the cache of one process has done. `version` is that of the last look-up, None before the first."""

    hits: int
    misses: int
    evictions: int
    entries: int
    capacity: int
    version: int | None


CAPACITY = 32

Row = TypeVar("Row")


class Prompts:
    """The rows of `prompt_templates` and `negative_prompts`, with up to `capacity` lists of them kept."""

    def __init__(self, pool: asyncpg.Pool, capacity: int = CAPACITY) -> None:
        self._pool = pool
        self._sql = queries("prompts")
        self._capacity = capacity
        self._kept: OrderedDict[str, tuple[Any, ...]] = OrderedDict()
        self._version: int | None = None
        self._hits = self._misses = self._evictions = 0

    async def seed(self, templates: list[TemplateRow], negatives: list[NegativeRow]) -> None:
        """Add what is missing, by name. An operator's edit of a seeded row stays."""
        async with self._pool.acquire() as connection, connection.transaction():
            for template in templates:
                await self._sql.seed_template(connection, **asdict(template))
            for negative in negatives:
                await self._sql.seed_negative(connection, **asdict(negative))

    async def templates(self, use_case: str = "enhancement") -> list[TemplateRow]:
        """The active templates of a use case."""
        return (await self.look_up(use_case))[0]

    async def look_up(self, use_case: str = "enhancement") -> tuple[list[TemplateRow], bool]:
        """The active templates of a use case, and whether they were in memory."""

        async def read() -> list[TemplateRow]:
            return [TemplateRow(**dict(row)) async for row in self._sql.list_templates(self._pool, use_case=use_case)]

        return await self._look_up(f"templates {use_case}", read)

    async def negatives(self) -> list[NegativeRow]:
        """The active negative prompts, highest priority first."""

        async def read() -> list[NegativeRow]:
            return [NegativeRow(**dict(row)) async for row in self._sql.list_negatives(self._pool)]

        return (await self._look_up("negatives", read))[0]

    async def renew(self) -> int:
        """Make every process read the rows anew, and return the new version. Needs the owner of the tables."""
        version: int = await self._sql.renew_prompts(self._pool)
        self.invalidate()
        return version

    def invalidate(self) -> int:
        """Forget what this process keeps. Returns how many lists these were."""
        forgotten = len(self._kept)
        self._kept.clear()
        return forgotten

    def stats(self) -> CacheStats:
        """What this process's cache has done so far."""
        return CacheStats(self._hits, self._misses, self._evictions, len(self._kept), self._capacity, self._version)

    async def model(self, model_id: UUID) -> ModelChoice | None:
        """A model that prompts are for."""
        row = await self._sql.enhancement_model(self._pool, model_id=model_id)
        return ModelChoice(**dict(row)) if row else None

    async def preset(self, name: str) -> PresetChoice | None:
        """A preset, by its name or its id."""
        try:
            preset_id = UUID(name)
        except ValueError:
            preset_id = None
        row = await self._sql.enhancement_preset(self._pool, name=name, preset_id=preset_id)
        return PresetChoice(**dict(row)) if row else None

    async def _look_up(self, key: str, read: Callable[[], Awaitable[list[Row]]]) -> tuple[list[Row], bool]:
        # the version first: rows that are newer than it are read again, rows that are older can't be
        version: int = await self._sql.prompt_version(self._pool)
        if version != self._version:
            self._kept.clear()
            self._version = version
        if key in self._kept:
            self._hits += 1
            self._kept.move_to_end(key)
            return list(self._kept[key]), True
        self._misses += 1
        rows = await read()
        if version == self._version:  # another look-up may have seen another one meanwhile
            self._kept[key] = tuple(rows)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
                self._evictions += 1
        return rows, False
