"""Outside providers: the models that they offer, what was asked of them for a job, and what that cost.

A job at a provider waits in a queue of its own and has the states of every other job. What is asked of the provider is
written down before it is asked, and the provider's name for it as soon as that is known. So an attempt that finds a row
without an end goes on with it and does not pay a second time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import queries

PROVIDER_QUEUE = "provider"
REPLICATE = "replicate"  # the name of the one kind of provider that there is an adapter for


@dataclass(frozen=True, kw_only=True)
class ApiProvider:
    """Who is asked. `secret_name` is the name of an environment variable; `output_hosts` may begin with `*.`."""

    id: UUID
    name: str
    base_url: str | None
    auth_scheme: str
    auth_header_name: str
    secret_name: str | None
    is_active: bool
    output_hosts: Sequence[str]
    nsfw_allowed: bool

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From a row of `api_providers` as JSON."""
        names = [name for name in cls.__dataclass_fields__ if name != "id"]
        return cls(id=UUID(row["id"]), **{name: row[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class ApiModel:
    """What is asked for: one version of a model. `capabilities` and `pricing` are read in `deployments.provider.inputs`
    and `deployments.provider.claims`."""

    id: UUID
    provider: ApiProvider
    model_key: str
    version: str | None
    modality: str
    model_family: str | None
    is_active: bool
    input_defaults: Mapping[str, Any]
    capabilities: Mapping[str, Any]
    pricing: Mapping[str, Any]

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """From a row of `model` and its like."""
        model = row["model"]
        names = [name for name in cls.__dataclass_fields__ if name not in ("id", "provider")]
        return cls(
            id=UUID(model["id"]),
            provider=ApiProvider.from_row(row["provider"]),
            **{name: model[name] for name in names},
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was asked of a provider. Without a `prediction_id` nobody has heard yet whether it was taken."""

    id: UUID
    job_id: UUID | None
    attempt: int
    provider_id: UUID
    model_id: UUID | None
    version: str
    input_hash: str
    prediction_id: str | None
    status: str
    requested_at: datetime

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """From a row of `open_prediction` and its like."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What is told of a prediction at its end. Times in milliseconds; None for what is not known."""

    response_status: int | None = None
    response_time_ms: int | None = None  # None: since it was asked
    cost_usd: float | None = None
    error_message: str | None = None
    request_payload: Mapping[str, Any] | None = None  # without prompts and files
    provider_metadata: Mapping[str, Any] = field(default_factory=dict)


class Providers:
    """The statements, over a pool that acts as the owner or as the replicas' role."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("providers")

    async def offered(self, family: str, modality: str, task: str, provider: str = REPLICATE) -> ApiModel | None:
        """The model that takes a family's task (`t2i`, `i2i`, `t2v`, `i2v`), when an admin has turned one on."""
        row = await self._sql.offered(self._pool, provider=provider, family=family, modality=modality, task=task)
        return None if row is None else ApiModel.from_row(row)

    async def model(self, model_id: UUID) -> ApiModel | None:
        """A model, turned on or not."""
        row = await self._sql.model(self._pool, model_id=model_id)
        return None if row is None else ApiModel.from_row(row)

    async def model_of(self, job_id: UUID) -> ApiModel | None:
        """The model that a job was accepted for; None where it has been deleted since."""
        row = await self._sql.model_of(self._pool, job_id=job_id)
        return None if row is None else ApiModel.from_row(row)

    async def open_prediction(self, job_id: UUID) -> Prediction | None:
        """What was asked for a job and has not ended."""
        row = await self._sql.open_prediction(self._pool, job_id=job_id)
        return None if row is None else Prediction.from_row(row)

    async def ask(
        self, job_id: UUID, attempt: int, worker: UUID, model: ApiModel, version: str, input_hash: str
    ) -> Prediction | None:
        """Say that a provider is about to be asked. None: the job is no longer this worker's."""
        row = await self._sql.ask(
            self._pool,
            job_id=job_id,
            attempt=attempt,
            worker=worker,
            provider_id=model.provider.id,
            model_id=model.id,
            version=version,
            input_hash=input_hash,
        )
        return None if row is None else Prediction.from_row(row)

    async def name(self, prediction: Prediction, prediction_id: str, status: str) -> str | None:
        """Keep the provider's name for what was asked. The answer is the name that stands: another one where somebody
        was before us, None where the name belongs to another job."""
        try:
            name: str | None = await self._sql.name_prediction(
                self._pool, id=prediction.id, prediction_id=prediction_id, status=status
            )
        except asyncpg.UniqueViolationError:  # at this very moment
            return None
        return name

    async def note(self, prediction: Prediction, status: str) -> None:
        """Keep how a prediction stands at the provider."""
        await self._sql.note_status(self._pool, id=prediction.id, status=status)

    async def end(self, prediction: Prediction, status: str, usage: Usage) -> bool:
        """Nothing more is expected of a prediction. False where that was said before; then nothing is logged."""
        return await self._sql.end_prediction(self._pool, id=prediction.id, status=status, **vars(usage)) is not None

    async def names_known(self, provider_id: UUID, prediction_ids: Sequence[str]) -> set[str]:
        """Of these names, those that belong to a job already."""
        rows = self._sql.names_known(self._pool, provider_id=provider_id, prediction_ids=list(prediction_ids))
        return {row["prediction_id"] async for row in rows}

    async def strays(self, page_size: int = 20) -> list[tuple[Prediction, ApiProvider]]:
        """What was asked for jobs that have ended or are gone, and may still be running and be paid for."""
        rows = self._sql.strays(self._pool, page_size=page_size)
        return [(Prediction.from_row(row), ApiProvider.from_row(row["provider"])) async for row in rows]

    async def job_of(self, prediction_id: str, provider: str = REPLICATE) -> UUID | None:
        """The job that a prediction is made for."""
        job_id: UUID | None = await self._sql.job_of(self._pool, provider=provider, prediction_id=prediction_id)
        return job_id

    async def latest_prediction(self, job_id: UUID) -> str | None:
        """The provider's name for what was last asked for a job."""
        name: str | None = await self._sql.latest_prediction(self._pool, job_id=job_id)
        return name
