"""The catalog: which job types exist, which family of models runs each, and with what defaults and limits.

The facts stand in `configs/job_types.yaml`; this module gives them types and checks them. A profile may
override a family's `FamilyDefaults` (sizes, steps, frames), never the job types.

Errors of a request that is refused before anything is stored or run::

    RequestRefused
    ├── UnknownJobType      unknown_job_type
    ├── InvalidParams       invalid_params      (models.params)
    └── ContentRejected     content_…           (models.policy)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_FPS = 60
MAX_SHIFT = 20.0


class RequestRefused(Exception):
    """The request can't be accepted as it stands. `code` is stable; the message never repeats a prompt."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses have constructors of their own, and refusals travel between processes.
        return _as_it_was, (type(self), self.message, self.__dict__)


def _as_it_was(kind: type[RequestRefused], message: str, fields: dict[str, Any]) -> RequestRefused:
    refusal = kind.__new__(kind, message)
    refusal.__dict__.update(fields)
    return refusal


class UnknownJobType(RequestRefused):
    """The job type is none of the catalog's."""

    def __init__(self) -> None:
        super().__init__("unknown_job_type", f"Invalid job_type. Must be one of: {', '.join(JOB_TYPES)}")


class Family(StrEnum):
    """A family of models that share one pipeline class."""

    SDXL = "sdxl"
    WAN = "wan"
    RV51 = "rv51"
    QWEN = "qwen"


class Format(StrEnum):
    """What a job makes: PNG images, or one MP4 video."""

    IMAGE = "image"
    VIDEO = "video"


class Quality(StrEnum):
    """The preset of steps and guidance."""

    FAST = "fast"
    HIGH = "high"


class StepsByQuality(BaseModel):
    """Denoise steps of each quality preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fast: int = Field(ge=1, le=MAX_STEPS)
    high: int = Field(ge=1, le=MAX_STEPS)

    def of(self, quality: Quality) -> int:
        return self.fast if quality is Quality.FAST else self.high


class GuidanceByQuality(BaseModel):
    """Classifier-free guidance scale of each quality preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fast: float = Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    high: float = Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)

    def of(self, quality: Quality) -> float:
        return self.fast if quality is Quality.FAST else self.high


# Both VAEs shrink by 8; WAN's transformer pairs latents again, which its sizes in the catalog respect.
Edge = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


class FamilyDefaults(BaseModel):
    """What a family does when the caller says nothing, and what the caller may ask for.

    `sizes` are (width, height) pairs in pixels. `frames`, `frames_min`, `frames_max` and `fps` are None for
    families that make no video; lengths are 4n+1, the form that WAN's temporal VAE can decode. `shift` is the
    timestep shift of flow-matching schedulers, None where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: tuple[tuple[Edge, Edge], ...] = Field(min_length=1)
    width: Edge
    height: Edge
    image_counts: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(min_length=1)
    steps: StepsByQuality
    guidance: GuidanceByQuality
    scheduler: str
    schedulers: tuple[str, ...] = Field(min_length=1)
    frames: int | None = None
    frames_min: int | None = None
    frames_max: int | None = None
    fps: int | None = Field(default=None, ge=1, le=MAX_FPS)
    shift: float | None = Field(default=None, gt=0, le=MAX_SHIFT, allow_inf_nan=False)

    @property
    def size(self) -> tuple[int, int]:
        return (self.width, self.height)

    @property
    def makes_video(self) -> bool:
        return self.frames is not None

    def with_overrides(self, overrides: Mapping[str, Any]) -> FamilyDefaults:
        """These defaults with a profile's changes, checked anew.

        `steps` and `guidance` may name one quality only. Overriding `sizes` without `width` and `height` is
        refused when the old default size is no longer among them. Raises pydantic's `ValidationError`.
        """
        merged = self.model_dump()
        for field, value in overrides.items():
            both_maps = isinstance(value, Mapping) and isinstance(merged.get(field), Mapping)
            merged[field] = {**merged[field], **value} if both_maps else value
        return FamilyDefaults.model_validate(merged)

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.size not in self.sizes:
            raise ValueError(f"the default size {self.width}x{self.height} is not among sizes")
        if self.scheduler not in self.schedulers:
            raise ValueError(f"the default scheduler {self.scheduler} is not among schedulers")
        lengths = (self.frames_min, self.frames, self.frames_max)
        known = [length for length in lengths if length is not None]
        if len(known) not in (0, 3) or (self.fps is None) != (not known):
            raise ValueError("frames, frames_min, frames_max and fps come together")
        if known != sorted(known) or any(length < 1 or length % 4 != 1 for length in known):
            raise ValueError("frames_min <= frames <= frames_max, each of them 4n+1")
        return self


@dataclass(frozen=True)
class FamilyFacts:
    """What can't be configured about a family, and the names older clients know it by.

    `token_limit` counts content tokens of a prompt, the tokenizer's special tokens not included.
    """

    family: Family
    legacy_queue: str
    legacy_variant: str
    token_limit: int
    takes_reference: bool
    takes_compel: bool


@dataclass(frozen=True)
class JobType:
    """One accepted value of `job_type`.

    `name` is what the caller wrote and the row keeps; `behaves_as` is the job type whose rules it follows
    (`wan_video_fast` behaves as `video_fast`). `enhanced` job types always go through the prompt enhancer.
    `credits` is the price of one job, `initial_seconds` the expected time until measured times are known.
    """

    name: str
    behaves_as: str
    family: Family
    format: Format
    quality: Quality
    enhanced: bool
    credits: int
    initial_seconds: float


def _read_catalog() -> tuple[dict[Family, FamilyFacts], dict[Family, FamilyDefaults], dict[str, JobType]]:
    raw = yaml.safe_load((files("configs") / "job_types.yaml").read_text(encoding="utf-8"))
    facts: dict[Family, FamilyFacts] = {}
    defaults: dict[Family, FamilyDefaults] = {}
    for name, entry in raw["families"].items():
        family = Family(name)
        defaults[family] = FamilyDefaults.model_validate(entry.pop("defaults"))
        facts[family] = FamilyFacts(family=family, **entry)
    job_types: dict[str, JobType] = {}
    for name, entry in raw["job_types"].items():
        behaves_as = entry.get("alias_of", name)
        origin = raw["job_types"][behaves_as]
        job_types[name] = JobType(
            name=name,
            behaves_as=behaves_as,
            family=Family(origin["family"]),
            format=Format(origin["format"]),
            quality=Quality(origin["quality"]),
            enhanced=origin.get("enhanced", False),
            credits=origin["credits"],
            initial_seconds=float(origin["initial_seconds"]),
        )
    return facts, defaults, job_types


_facts, _defaults, _job_types = _read_catalog()
FAMILIES: Mapping[Family, FamilyFacts] = MappingProxyType(_facts)
"""The families that make media; QWEN writes text and is not among them."""
JOB_TYPES: Mapping[str, JobType] = MappingProxyType(_job_types)


def resolve(name: str) -> JobType:
    """The job type of that exact name. Raises `UnknownJobType`."""
    try:
        return JOB_TYPES[name]
    except KeyError:
        raise UnknownJobType from None


def default_for(family: Family) -> FamilyDefaults:
    """The specification's defaults of a family that makes media. Raises `KeyError` for QWEN."""
    return _defaults[family]
