"""The modes of `queue-job`: what a body with one picture in it asks for, and what each mode sets where it says nothing.

- ``copy``: the picture once more, nearly as it is, without words and without guidance
- ``modify``: the picture with a stated change
- ``text``: everything else. A picture of another kind, such as a style, only steers it

Strength is how much of the picture stays, and 1 less the noise (`denoise_strength`) that is put on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from models.guiding.reference import MAX_STRENGTH, MIN_STRENGTH
from models.prompting.composition import MODIFY_TEMPLATE, compose_modification

# what the row's `template_name` says of prompts that no template of the language model made
AS_GIVEN = "original_prompt"
COPIED = "exact_copy_skip_enhance"
DESCRIBED = "original_from_metadata"
UNDESCRIBED = "manual_compose_fallback"

MOST_STARTED_FROM = 0.99  # of a picture that a generation starts from: with less noise no step of 100 is run


class Mode(StrEnum):
    """What the picture is for."""

    COPY = "copy"
    MODIFY = "modify"
    TEXT = "text"


@dataclass(frozen=True)
class Preset:
    """What a mode sets where the caller says nothing. A copy's guidance is set whatever the caller says."""

    strength: float
    guidance_scale: float
    steps: int


PRESETS = MappingProxyType({Mode.COPY: Preset(0.95, 1.0, 15), Mode.MODIFY: Preset(0.80, 6.0, 20)})
"""The modes that start from the picture. The noise is 0.05 and 0.20."""


@dataclass(frozen=True)
class Wish:
    """What a body says of its mode. `described` is the prompt that the picture was made from, if it is known."""

    prompt: str = ""
    described: str = ""
    copy: bool = False
    modify: bool = False

    @property
    def starts_from_picture(self) -> bool:
        """Whether it says by itself that the picture is to be copied or changed."""
        return self.copy or self.modify or bool(self.described)

    def mode(self) -> Mode:
        """The mode of a body with a picture to start from."""
        if self.copy and not self.prompt and not self.described:
            return Mode.COPY
        return Mode.MODIFY if self.modify or self.described or self.prompt else Mode.TEXT


@dataclass(frozen=True)
class Wording:
    """The prompt that runs: `enhanced` if it is not the caller's own, and `template`, which says where it comes from.

    `enhance` is for the language model: None says nothing, and the job types that always enhance do.
    """

    enhanced: str | None = None
    template: str | None = None
    enhance: bool | None = None


def changed(wish: Wish, *, skip: bool) -> Wording:
    """The wording of `modify`: put together from the change and what the picture was made from, without a model."""
    if wish.prompt and not skip:
        text = compose_modification(wish.described, wish.prompt)
        return Wording(text, MODIFY_TEMPLATE if wish.described else UNDESCRIBED)
    if wish.described and not wish.prompt:
        return Wording(wish.described, DESCRIBED)
    return Wording(template=AS_GIVEN)


def worded(given: str | None, *, skip: bool, wanted: bool, always: bool) -> Wording:
    """The wording of `text`: the caller's own enhanced prompt, or the language model's where it is wanted (or the job
    type always has it), or the prompt as it is."""
    enhance = False if skip else True if wanted else None
    if given or enhance or (always and not skip):
        return Wording(given, None, enhance)
    return Wording(None, AS_GIVEN, enhance)


def nearest_strength(asked: float, *, starts: bool) -> tuple[float, str]:
    """The strength that a picture can have, and what to say where it is another. `starts`: the generation starts from
    the picture, and something must be left to generate."""
    if asked < MIN_STRENGTH:
        return MIN_STRENGTH, f"at least {MIN_STRENGTH:g} of a picture stays"
    most = MOST_STARTED_FROM if starts else MAX_STRENGTH
    return min(asked, most), f"at most {most:g} of a picture stays, so that something is left to generate"


def nearest_count(asked: int, counts: tuple[int, ...]) -> int:
    """The fewest images that are enough, or the most there can be."""
    return next((count for count in sorted(counts) if count >= asked), max(counts))


VIDEO_MODES: Mapping[tuple[bool, bool, bool], str] = MappingProxyType(
    {
        (False, False, False): "none",
        (True, False, False): "single",
        (False, True, False): "start",
        (False, False, True): "end",
        (False, True, True): "both",
        (True, False, True): "both",
    }
)
"""`video_reference_mode` by whether there is a single picture, a start and an end. A single one is the start."""
