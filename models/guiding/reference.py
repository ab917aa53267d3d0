"""References: stored images that steer a generation, each in its own way, and the masks of those that it starts from.

What a kind means, and how it is run (`Method`):

- ``image``: the generation starts from it; with a mask, only what is white there is made anew (image-to-image)
- ``style``, ``character``: its look, or the person on it, is taken over (an IP-Adapter for each)
- ``composition``: its outlines are kept (ControlNet); a model without one starts from it, as from an ``image``
- ``start_frame``, ``end_frame``: the video's first and last picture (an image-to-video checkpoint)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.prompting.signs import Signs

MIN_STRENGTH = 0.1
MAX_STRENGTH = 1.0

ReferenceKind = Literal["image", "style", "character", "composition", "start_frame", "end_frame"]
Method = Literal["image_to_image", "ip_adapter", "controlnet", "image_to_video", "first_and_last_frame"]
Methods = Mapping[ReferenceKind, Method]
"""How a model runs each kind of reference that it takes; the others it refuses."""

FRAMES: tuple[ReferenceKind, ...] = ("start_frame", "end_frame")


class StoredImage(BaseModel):
    """Where the bytes of an image lie in the object store."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bucket: str = Field(min_length=1, max_length=100)
    key: str = Field(min_length=1, max_length=1024)


class Reference(StoredImage):
    """A stored image that steers the generation.

    `strength` is how much of it is kept: of an image that the generation starts from, the share of noise put on it is
    1 - strength; of others it is the scale of the adapter. Frames are kept as they are, at strength 1. With a `mask`
    only what is white there is made anew. `asked_as` is what the caller called it, where the model runs it as another
    kind. `signs` are those of what it was made from, none of a picture that a user brought.
    """

    strength: float = Field(default=0.5, ge=MIN_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)
    kind: ReferenceKind = "image"
    mask: StoredImage | None = None
    asked_as: Literal["composition"] | None = None
    signs: Signs = Signs()

    @model_validator(mode="before")
    @classmethod
    def _frames_are_whole(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("kind") in FRAMES and "strength" not in raw:
            return {**raw, "strength": MAX_STRENGTH}
        return raw

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its files."""
        return (self.key,) if self.mask is None else (self.key, self.mask.key)


class WithReferences(BaseModel):
    """What has references. Reads the rows of earlier versions, which had one `reference`."""

    references: Annotated[tuple[Reference, ...], Field(strict=False)] = ()  # JSON has lists, not tuples

    @model_validator(mode="before")
    @classmethod
    def _read_single_reference(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "reference" not in raw:
            return raw
        rest = {name: value for name, value in raw.items() if name != "reference"}
        one = raw["reference"]
        if one is None:
            return rest
        if isinstance(one, dict):  # whatever kind it was said to be, the generation started from it
            one = {**one, "kind": "image"}
        return rest | {"references": (one, *(rest.get("references") or ()))}

    @property
    def reference(self) -> Reference | None:
        """The image that the generation starts from."""
        return self.of_kind("image")

    def of_kind(self, kind: ReferenceKind) -> Reference | None:
        return next((reference for reference in self.references if reference.kind == kind), None)


class WithDistinctReferences(WithReferences):
    """What has one reference of each kind at most."""

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> Self:
        kinds = [reference.kind for reference in self.references]
        if len(set(kinds)) < len(kinds):
            raise ValueError("there can be one reference of each kind")
        return self
