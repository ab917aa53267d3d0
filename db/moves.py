"""What goes into the moves of jobs, and what comes out of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from operator import itemgetter
from typing import Any, NamedTuple, Self
from uuid import UUID

import asyncpg

from db.jobs import Status

# what a claim says beside the job, in the order of its fields
_TERMS = itemgetter(
    "attempts",
    "budget_used",
    "max_attempts",
    "batch_size",
    "moved_for_memory",
    "outage_seconds",
    "class",
    "deadline_seconds",
)


class CancelReason(StrEnum):
    """Why a running job is to stop: somebody asked, or its deadline passed."""

    USER = "user"
    DEADLINE = "deadline"


class Claim(NamedTuple):
    """A job in a replica's hands. `attempt` is the fencing token of everything the replica will write.

    Claims and ends come by the thousand: a named tuple is made in a third of the time of a frozen dataclass.
    """

    job: Mapping[str, Any]
    attempt: int
    failures: int
    max_attempts: int
    batch_size: int | None = None  # images at a time, since a larger batch ran out of memory
    moved_for_memory: bool = False  # it ran out of memory even so, and was sent to another replica once
    outage_seconds: float | None = None  # since when the object store has kept it from its end
    klass: int = 1  # 1 is interactive, 0 gives way
    deadline_seconds: float | None = None  # that are left

    @property
    def job_id(self) -> UUID:
        """The job's id."""
        job_id: UUID = self.job["id"]
        return job_id

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The claim from a row of the `claim` statement."""
        return cls(dict(row), *_TERMS(row))


@dataclass(frozen=True)
class Fit:
    """What runs already: jobs of these `shapes`, with no LoRA but `loras`, share its forwards and are taken first,
    within `FIT_WINDOW_SECONDS` of fair share. Each shape with the most rows of it that the free memory has room for, or
    None where that is not known."""

    shapes: Mapping[str, int | None]
    loras: Collection[str] = ()


@dataclass(frozen=True)
class Renewal:
    """What a replica says of one running job when it renews its lease."""

    job_id: UUID
    attempt: int
    phase: str
    step: int | None = None
    steps: int | None = None
    preview: tuple[int, int] | None = None  # the step that the latest preview shows, and of how many


@dataclass(frozen=True, kw_only=True)
class NewAsset:
    """A stored file that the finishing transaction makes known. Sizes are in pixels and bytes, as decoded."""

    id: UUID
    asset_index: int
    asset_type: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int
    height: int
    frames: int | None
    fps: float | None
    duration_seconds: float | None
    seed: int | None
    model_used: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None  # what the file was made from and by
    moderation_status: str = "pending"
    moderation_reason: str | None = None  # a code


class Settlement(NamedTuple):
    """The end of a job. With `attempt` it ends a running job under that attempt only; without, a waiting one."""

    job_id: UUID
    status: Status
    attempt: int | None = None
    worker: UUID | None = None
    generation_time_ms: int | None = None
    # what few ends have, and `details` tells
    expired: bool = False  # only if the lease has run out
    counts: bool = False  # a failure against max_attempts
    error_code: str | None = None
    error_message: str | None = None
    retryable: bool | None = None
    settings: Mapping[str, Any] | None = None
    assets: Sequence[NewAsset] = ()
    callback_assets: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] | None = None
    compute_seconds: float | None = None  # of a replica's time; None: all of it since the claim

    @property
    def details(self) -> dict[str, Any] | None:
        """What few ends have, under the names of the `settle` statement; None where there is nothing of it."""
        if self[_FIRST_DETAIL:] == _NO_DETAILS:
            return None
        told = {
            "expired": self.expired or None,
            "counts": self.counts or None,
            "error_code": self.error_code,
            "error_message": self.error_message,
            "retryable": self.retryable,
            "settings": self.settings,
            "assets": [vars(asset) for asset in self.assets] or None,
            "callback_assets": self.callback_assets or None,
            "facts": self.facts or None,
            "compute_seconds": self.compute_seconds,
        }
        return {name: value for name, value in told.items() if value is not None} or None


_FIRST_DETAIL = Settlement._fields.index("expired")
_NO_DETAILS = tuple(Settlement._field_defaults[name] for name in Settlement._fields[_FIRST_DETAIL:])


@dataclass(frozen=True, kw_only=True)
class Requeue:
    """A running job that goes back to a queue: `kind` is the event that says why."""

    job_id: UUID
    attempt: int
    kind: str = "requeued"
    expired: bool = False
    counts: bool = False
    delay_seconds: float = 0.0
    error_code: str | None = None
    error_message: str | None = None
    queue: str | None = None  # None: the one it came from
    cost: float | None = None
    stage: str | None = None
    enhanced_prompt: str | None = None
    enhancement: Mapping[str, Any] | None = None
    enhancement_strategy: str | None = None
    enhancement_time_ms: int | None = None
    template_name: str | None = None
    expansion: float | None = None
    batch_size: int | None = None  # the most images at a time from now on
    avoid_worker: UUID | None = None  # which is not to take it again before `avoid_seconds` have passed
    avoid_seconds: float | None = None
    outage: bool = False  # the object store was away: counts nothing, and since when is kept


@dataclass(frozen=True)
class Expired:
    """A running job whose replica has not renewed its lease in time."""

    job_id: UUID
    attempt: int
    failures: int
    max_attempts: int
    cancel: str | None
    queue: str
    worker: UUID


@dataclass(frozen=True)
class Overdue:
    """An open job past a deadline."""

    job_id: UUID
    state: str
    attempt: int
    error_code: str


@dataclass(frozen=True)
class Depth:
    """What is open in one queue and state. `cost_seconds` is the predicted work."""

    queue: str
    state: str
    jobs: int
    oldest: datetime
    cost_seconds: float
