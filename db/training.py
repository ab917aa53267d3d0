"""The registry of LoRA trainings: runs and their epochs as trainers report them, and which of them jobs may use.

TrainingError           training           the registry refused it; nothing was changed
└── RefusedRows         training_rows      rows that can't be taken, each with its line and field
"""

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

import asyncpg
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from db.pool import queries

MAX_DEPTH = 64  # of lists and objects inside each other; what writes them as JSON gives up somewhere above
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class TrainingError(RuntimeError):
    """The registry refused what it was given. Nothing was changed."""

    code = "training"


@dataclass(frozen=True)
class BadRow:
    """One thing that is wrong: where the row begins in its file, in which field (empty: the row itself), and what."""

    line: int
    field: str
    message: str


class RefusedRows(TrainingError):
    """Rows that can't be taken. None of the file was."""

    code = "training_rows"

    def __init__(self, bad: Sequence[BadRow]) -> None:
        super().__init__(f"{len(bad)} faults, the first in line {bad[0].line}")
        self.bad = tuple(bad)


@dataclass(frozen=True)
class Unreadable:
    """Stands for something in a file that is no value which can be kept. No row takes it."""

    why: str


def readable(name: object) -> str:
    """A name that came out of a file, as a message may have it: not endless, and of characters that can be written."""
    return str(name)[:100].encode("utf-8", "backslashreplace").decode()


def _fault(value: Any, depth: int = 0) -> str | None:
    """The first thing in a value that would be lost, changed or refused on its way into the database, and where."""
    if isinstance(value, Unreadable):
        return value.why
    if isinstance(value, float) and not math.isfinite(value):
        return f"{json.dumps(value)} is no number"
    if isinstance(value, str) and _UNSTORABLE.search(value):
        return "has a character that can't be stored"
    if isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH}"
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if found := _fault(name, depth) or _fault(part, depth + 1):
                return f"{readable(name)}: {found}" if depth < 4 else found  # far inside, a place is of no use
    return None


Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Score = Annotated[Decimal, Field(ge=0, le=10)]
Verdict = Literal["excellent", "good", "acceptable", "mixed", "poor", "failed"]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        if found := _fault(value):
            raise ValueError(found)
        return value

    def given(self) -> dict[str, Any]:
        """The fields that were given, as JSON: the others keep what they are."""
        return self.model_dump(mode="json", exclude_unset=True)


class TrainingRun(_Row):
    """One training. `network_dim` is the rank; `model_family` the model here that its LoRAs fit, if any."""

    run_name: Text
    base_model: Text
    caption_version: Text | None = None
    model_family: Literal["sdxl", "wan", "rv51"] | None = None
    network_dim: int | None = Field(default=None, gt=0, le=4096)
    network_alpha: Decimal | None = Field(default=None, gt=0, lt=100_000)
    learning_rate: Decimal | None = Field(default=None, gt=0)
    resolution: int | None = Field(default=None, gt=0, le=65_536)
    total_epochs: int | None = Field(default=None, gt=0, le=1_000_000)
    training_config: dict[str, Any] | None = None
    overall_verdict: Verdict | None = None
    quality_score: Score | None = None
    is_production: bool = False
    notes: Text | None = None


class EpochResult(_Row):
    """One epoch of a run. With a `lora_name`, `checkpoint_path` is its file: on the replicas' machines, or inside
    `repository`, a repository of the Hugging Face hub. Sizes are in megabytes."""

    run_name: Text
    epoch_number: int = Field(ge=0, le=1_000_000)
    checkpoint_path: Text | None = None
    checkpoint_file_size_mb: Decimal | None = Field(default=None, gt=0, lt=10**8)
    visual_quality_score: Score | None = None
    style_match_score: Score | None = None
    prompt_adherence_score: Score | None = None
    training_loss: Decimal | None = None
    verdict: Verdict | None = None
    production_ready: bool = False
    recommendation: Text | None = None
    notes: Text | None = None
    quantitative_metrics: dict[str, Any] | None = None
    diagnosed_issues: list[Any] | None = None
    lora_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    repository: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")
    revision: Text | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    trigger_words: list[Text] = []

    @model_validator(mode="after")
    def _named_has_file(self) -> "EpochResult":
        path = self.checkpoint_path or ""
        if self.lora_name is not None and not path.endswith(".safetensors"):
            raise ValueError("a row with lora_name has a checkpoint_path that ends in .safetensors")
        if self.lora_name is not None and self.repository is None and not path.startswith("/"):
            raise ValueError("with lora_name and without repository, checkpoint_path begins with /")
        return self


@dataclass(frozen=True)
class Numbered:
    """A row, and the line of its file where it begins."""

    line: int
    row: TrainingRun | EpochResult


@dataclass(frozen=True)
class Imported:
    """How many rows were added, changed, and there as they are."""

    added: int
    changed: int
    unchanged: int


@dataclass(frozen=True)
class Finding:
    """One thing that the audit found. `severity` is error or warning."""

    check_code: str
    severity: str
    run_name: str | None
    epoch_number: int | None
    lora_name: str | None
    detail: str


@dataclass(frozen=True)
class ProductionLora:
    """A LoRA that jobs may name, and where its file is."""

    name: str
    model_family: str
    run_name: str
    epoch_number: int
    checkpoint_path: str
    repository: str | None
    revision: str | None
    sha256: str | None
    trigger_words: tuple[str, ...]
    checkpoint_file_size_mb: Decimal | None


class Trainings:
    """The registry. The owner of the tables may do all of it, a replica read what is in production."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("training")

    async def put(self, rows: Sequence[Numbered], *, keep: bool = True) -> Imported:
        """Add the rows or change what they give, in one transaction; with `keep` off it is only tried.

        A row that is there keeps what the given one leaves out. Runs come before epochs, whatever the order. Raises
        `RefusedRows`; then nothing was changed.
        """
        counts = {True: 0, False: 0, None: 0}
        bad: list[BadRow] = []
        async with self._pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                for numbered in sorted(rows, key=lambda one: isinstance(one.row, EpochResult)):
                    try:
                        async with connection.transaction():
                            counts[await self._put(connection, numbered.row)] += 1
                    except _REFUSALS as error:
                        bad.append(BadRow(numbered.line, _field(error), _reason(error)))
                    except LookupError as error:
                        bad.append(BadRow(numbered.line, "run_name", str(error.args[0])))
                if bad:
                    raise RefusedRows(sorted(bad, key=lambda one: one.line))
            except BaseException:
                await transaction.rollback()
                raise
            await (transaction.commit() if keep else transaction.rollback())
        return Imported(added=counts[True], changed=counts[False], unchanged=counts[None])

    async def _put(self, connection: Any, row: TrainingRun | EpochResult) -> bool | None:
        given = row.given()
        if isinstance(row, TrainingRun):
            new: bool | None = await self._sql.put_run(connection, given=given)
            return new
        run_id = await self._sql.run_id(connection, run_name=given.pop("run_name"))
        if run_id is None:
            raise LookupError("there is no such run, here or in the registry")
        new = await self._sql.put_epoch(connection, run_id=run_id, given=given)
        return new

    async def findings(self, offered: Collection[str] = ()) -> list[Finding]:
        """What the audit finds, errors first. `offered` are the LoRAs that the profile has."""
        return [Finding(**dict(row)) async for row in self._sql.findings(self._pool, offered=sorted(offered))]

    async def production_loras(self, family: str) -> list[ProductionLora]:
        """The LoRAs of a model that jobs may name, by name."""
        found = []
        async for row in self._sql.production_loras(self._pool, family=family):
            found.append(ProductionLora(**dict(row) | {"trigger_words": tuple(row["trigger_words"])}))
        return found


_REFUSALS = (  # what a row can bring about: a rule, a value, a name too long for its index
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.ProgramLimitExceededError,
)
_FIELDS = {"epoch_results_lora_name_key": "lora_name"}


def _field(error: asyncpg.PostgresError) -> str:
    name = getattr(error, "constraint_name", None) or ""
    return getattr(error, "column_name", None) or _FIELDS.get(name, "")


def _reason(error: asyncpg.PostgresError) -> str:
    if isinstance(error, asyncpg.UniqueViolationError):
        return "another epoch has that name"
    return f"the database refuses it: {type(error).__name__}"
