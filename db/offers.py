"""What is offered: enhancement presets, providers and models, as rows that an operator may edit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg

from db.pool import queries


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """A choice of enhancement under a name. `qwen_settings` has its time in milliseconds, its target in characters."""

    preset_name: str
    preset_description: str
    enable_qwen: bool
    enable_compel: bool
    auto_enhancement: bool
    compel_weights: Mapping[str, float] | None
    qwen_settings: Mapping[str, Any] | None
    is_recommended: bool


@dataclass(frozen=True, kw_only=True)
class ProviderRow:
    """Who makes things. `secret_name` is the name of an environment variable."""

    name: str
    display_name: str
    base_url: str | None
    docs_url: str | None
    auth_scheme: str
    secret_name: str | None
    is_active: bool
    output_hosts: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of a provider, which it names."""

    provider: str
    model_key: str
    display_name: str
    modality: str
    model_family: str
    endpoint_path: str
    output_format: str
    is_default: bool
    tasks: Sequence[str]
    default_for_tasks: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Offered:
    """The rows of the product."""

    presets: Sequence[PresetRow]
    providers: Sequence[ProviderRow]
    models: Sequence[ModelRow]


class Offers:
    """The rows of `enhancement_presets`, `api_providers` and `api_models`. Needs the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("offers")

    async def seed(self, offered: Offered) -> None:
        """Add what is missing, by name. An operator's edit of a seeded row stays."""
        async with self._pool.acquire() as connection, connection.transaction():
            for preset in offered.presets:
                await self._sql.seed_preset(connection, **asdict(preset))
            for provider in offered.providers:
                await self._sql.seed_provider(connection, **asdict(provider))
            for model in offered.models:
                await self._sql.seed_model(connection, **asdict(model))
