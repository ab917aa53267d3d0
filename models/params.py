"""The canonical request: what a caller gave, and the complete parameters that a job runs with.

`GivenParams` holds what the caller said and nothing else; `resolve_params` fills in the defaults of the
job type's family and checks the whole. A parameter is honoured or refused: one that the family can't honour
is an error that names it, and a value that had to be changed is reported as an `Adjustment`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from models.catalog import (
    FAMILIES,
    MAX_FPS,
    MAX_GUIDANCE,
    MAX_SHIFT,
    MAX_STEPS,
    FamilyDefaults,
    Format,
    JobType,
)
from models.fields import MAX_PROMPT_CHARACTERS as MAX_PROMPT_CHARACTERS
from models.fields import FieldError as FieldError
from models.fields import InvalidParams as InvalidParams
from models.fields import clean_prompt as clean_prompt
from models.fields import cleaned, field_error
from models.guiding.reference import FRAMES, WithDistinctReferences, WithReferences
from models.guiding.reference import Methods as Methods
from models.guiding.reference import Reference as Reference
from models.guiding.steering import FAMILY_METHODS, check_references, steps_beside
from models.lora.loras import LoraUse, lora_errors
from models.prompting.emphasis import CompelWeights

MAX_SEED = 2**63 - 1

ContentMode = Literal["sfw", "nsfw"]


class GivenParams(WithReferences):
    """What the caller gave, by canonical name; None means "not said". Making one raises `InvalidParams`.

    Types are strict (no numbers in strings, no booleans as numbers); ranges are `resolve_params`' business.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    num_images: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    scheduler: str | None = None
    shift: float | None = None
    compel_enabled: bool | None = None
    compel_weights: CompelWeights | None = None
    content_mode: ContentMode | None = None
    previews: bool | None = None
    reproducible: bool | None = None
    loras: Annotated[tuple[LoraUse, ...], Field(strict=False)] | None = None  # JSON has lists, not tuples

    @model_validator(mode="wrap")
    @classmethod
    def _say_invalid_params(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise InvalidParams([field_error(dict(detail)) for detail in error.errors()]) from None


class GenerationParams(WithDistinctReferences):
    """Everything a pipeline needs to know, complete and checked; what a job's row keeps.

    Sizes in pixels, `frames` 1 for images, `fps` None for images, `shift` None where the family has none.
    `seed` None is drawn by whoever accepts the job. Image i of several uses seed + i. `previews` changes no pixel.
    `guidance_interval` is the part of the steps with guidance, None for what the profile says or all of them.
    `reproducible` keeps the job's forwards to itself, so that its pixels do not depend on what else is running.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT_CHARACTERS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    num_images: int = Field(ge=1)
    width: int = Field(ge=16)
    height: int = Field(ge=16)
    frames: int = Field(ge=1)
    fps: int | None = Field(default=None, ge=1, le=MAX_FPS)
    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    guidance_interval: tuple[float, float] | None = None
    scheduler: str
    shift: float | None = Field(default=None, gt=0, le=MAX_SHIFT, allow_inf_nan=False)
    compel_enabled: bool = False
    compel_weights: CompelWeights | None = None
    content_mode: ContentMode = "sfw"
    previews: bool = False
    reproducible: bool = False
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True)
class Adjustment:
    """A value that could not be used as given; `reason` says why `used` took its place."""

    field: str
    given: int | float
    used: int | float
    reason: str


@dataclass(frozen=True)
class Resolved:
    """Complete parameters, and every given value that was changed on the way."""

    params: GenerationParams
    adjustments: tuple[Adjustment, ...] = ()


def resolve_params(
    job_type: JobType,
    given: GivenParams,
    defaults: FamilyDefaults,
    loras: Collection[str] = (),
    methods: Methods | None = None,
) -> Resolved:
    """Fills defaults, checks every range and returns what will be run.

    `loras` are the names that the model has, `methods` the references that it takes (`ModelSpec.reference_methods`);
    None for those that any model of the family takes.

    Raises `InvalidParams` with all errors found. Video lengths go to the nearest 4n+1 (a tie goes down, so
    83 gives 81), before the range is checked; that is the only value that is changed, but for the steps
    of a reference so strong that no step would be left to run.
    """
    return _Resolution(job_type, given, defaults, loras, methods).run()


def nearest_length(frames: int) -> int:
    """The nearest 4n+1 number of frames; ties go down."""
    below = (frames - 1) // 4 * 4 + 1
    return below if frames - below <= 2 else below + 4


class _Resolution:
    """One pass over the fields, collecting errors and adjustments."""

    def __init__(
        self,
        job_type: JobType,
        given: GivenParams,
        defaults: FamilyDefaults,
        loras: Collection[str],
        methods: Methods | None,
    ) -> None:
        self.job_type = job_type
        self.given = given
        self.defaults = defaults
        self.loras = loras
        is_video = job_type.format is not Format.IMAGE
        if methods is None:
            methods = FAMILY_METHODS if FAMILIES[job_type.family].takes_reference else {}
        self.references, self.errors = check_references(given.references, methods, job_type.name, is_video=is_video)
        self.adjustments: list[Adjustment] = []

    def run(self) -> Resolved:
        given, defaults, quality = self.given, self.defaults, self.job_type.quality
        width, height = self._size()
        frames, fps = self._length()
        steps = self._ranged("steps", given.steps, defaults.steps.of(quality), 1, MAX_STEPS)
        guidance = self._ranged("guidance_scale", given.guidance_scale, defaults.guidance.of(quality), 0, MAX_GUIDANCE)
        fields = {
            "prompt": self._prompt(),
            "negative_prompt": self._negative_prompt(guidance),
            "seed": None if given.seed is None else self._ranged("seed", given.seed, 0, 0, MAX_SEED),
            "num_images": self._num_images(),
            "width": width,
            "height": height,
            "frames": frames,
            "fps": fps,
            "steps": self._steps_with_reference(int(steps)),
            "guidance_scale": float(guidance),
            "guidance_interval": self._guidance_interval(guidance),
            "scheduler": self._scheduler(),
            "shift": self._shift(),
            "references": self.references,
            "compel_enabled": self._compel(),
            "compel_weights": given.compel_weights,
            "content_mode": given.content_mode or "sfw",
            "previews": bool(given.previews),
            "reproducible": bool(given.reproducible),
            "loras": self._loras(),
        }
        if self.errors:
            raise InvalidParams(self.errors)
        return Resolved(GenerationParams.model_validate(fields), tuple(self.adjustments))

    def _error(self, field: str, code: str, message: str) -> None:
        self.errors.append(FieldError(field, message, code))

    def _ranged(
        self, field: str, value: int | float | None, default: int | float, low: float, high: float
    ) -> int | float:
        if value is None:
            return default
        # Written so that NaN fails as well.
        if not low <= value <= high:
            self._error(field, "range", f"must be between {low:g} and {high}")
            return default
        return value

    def _text(self, field: str, text: str) -> str:
        try:
            return cleaned(field, text)
        except InvalidParams as error:
            self.errors += error.errors
            return ""

    def _prompt(self) -> str:
        errors_before = len(self.errors)
        prompt = self._text("prompt", self.given.prompt or "")
        # A generation from a reference may go without words (an exact copy has none).
        if not prompt and len(self.errors) == errors_before and not self.references:
            self._error("prompt", "missing", "is required")
        return prompt

    def _negative_prompt(self, guidance: float) -> str:
        negative = self._text("negative_prompt", self.given.negative_prompt or "")
        # The pipelines leave out the negative branch at or below 1.
        if negative and guidance <= 1:
            self._error("negative_prompt", "conflict", "has no effect unless guidance_scale is above 1")
        return negative

    def _guidance_interval(self, guidance: float) -> tuple[float, float] | None:
        interval = self.given.guidance_interval
        if interval is None:
            return None
        if not 0 <= interval[0] < interval[1] <= 1:  # written so that NaN fails as well
            self._error("guidance_interval", "range", "must be a start and a later end between 0 and 1")
        elif guidance <= 1:
            self._error("guidance_interval", "conflict", "has no effect unless guidance_scale is above 1")
        return interval

    def _num_images(self) -> int:
        counts = self.defaults.image_counts
        count = self.given.num_images
        if count is None:
            return 1
        if count not in counts:
            allowed = " or ".join(map(str, counts))
            self._error("num_images", "choice", f"must be {allowed} for {self.job_type.name}")
        return count

    def _size(self) -> tuple[int, int]:
        given, sizes = self.given, self.defaults.sizes
        width, height = given.width, given.height
        if width is None and height is None:
            return self.defaults.size
        if width is None or height is None:
            self._error("width" if width is None else "height", "missing", "width and height go together")
            return self.defaults.size
        if (width, height) not in sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in sizes)
            self._error("width", "choice", f"width x height must be one of {allowed}")
        return (width, height)

    def _length(self) -> tuple[int, int | None]:
        given, defaults = self.given, self.defaults
        if self.job_type.format is Format.IMAGE:
            if given.frames not in (None, 1):
                self._error("frames", "unsupported", f"{self.job_type.name} makes images of one frame")
            if given.fps is not None:
                self._error("fps", "unsupported", f"{self.job_type.name} makes images, which have no frame rate")
            return 1, None
        if defaults.frames is None or defaults.frames_min is None or defaults.frames_max is None:
            self._error("frames", "unsupported", "this installation's model makes no video")
            return 1, None
        fps = int(self._ranged("fps", given.fps, defaults.fps or 1, 1, MAX_FPS))
        if given.frames is None:
            return defaults.frames, fps
        frames = nearest_length(given.frames)
        if not defaults.frames_min <= frames <= defaults.frames_max:
            self._error("frames", "range", f"must be {defaults.frames_min} to {defaults.frames_max} (4n+1)")
        elif frames != given.frames:
            reason = "video lengths are 4n+1; the nearest one is used"
            self.adjustments.append(Adjustment("frames", given.frames, frames, reason))
        return frames, fps

    def _steps_with_reference(self, steps: int) -> int:
        place = next((place for place, one in enumerate(self.references) if one.kind == "image"), None)
        if place is None:
            return steps
        needed = steps_beside(self.references[place], steps, MAX_STEPS)
        if needed is None:
            self._error(f"references.{place}.strength", "range", "leaves nothing to generate; 0.99 is the most")
            return steps
        if needed != steps:
            reason = "the fewest steps of which one is left to run at this reference strength"
            self.adjustments.append(Adjustment("steps", steps, needed, reason))
        return needed

    def _scheduler(self) -> str:
        scheduler = self.given.scheduler
        if scheduler is None:
            return self.defaults.scheduler
        if scheduler not in self.defaults.schedulers:
            allowed = ", ".join(self.defaults.schedulers)
            self._error("scheduler", "choice", f"must be one of {allowed}")
        return scheduler

    def _shift(self) -> float | None:
        if self.defaults.shift is None:
            if self.given.shift is not None:
                self._error("shift", "unsupported", f"{self.job_type.name} has no timestep shift")
            return None
        return float(self._ranged("shift", self.given.shift, self.defaults.shift, 0.1, MAX_SHIFT))

    def _loras(self) -> tuple[LoraUse, ...]:
        uses = self.given.loras or ()
        self.errors += lora_errors(uses, self.loras, self.job_type.name)
        if uses and any(one.kind in FRAMES for one in self.references):
            self._error("loras", "conflict", "are for the text-to-video checkpoint; frames run another one")
        return uses

    def _compel(self) -> bool:
        wanted = bool(self.given.compel_enabled)
        if wanted and not FAMILIES[self.job_type.family].takes_compel:
            self._error("compel_enabled", "unsupported", f"{self.job_type.name} knows no prompt weights")
        if self.given.compel_weights is not None and not wanted:
            self._error("compel_weights", "conflict", "needs compel_enabled")
        return wanted
