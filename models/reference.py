"""References: stored images that a generation starts from, and the masks that say which part of them is repainted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MIN_STRENGTH = 0.1
MAX_STRENGTH = 1.0

ReferenceKind = Literal["style", "composition", "character"]


class StoredImage(BaseModel):
    """Where the bytes of an image lie in the object store."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bucket: str = Field(min_length=1, max_length=100)
    key: str = Field(min_length=1, max_length=1024)


class Reference(StoredImage):
    """A stored image that the generation starts from.

    `strength` is how much of it is kept: the share of noise put on it is 1 - strength. `kind` is what the
    caller wants kept; it is recorded, and every kind runs as image-to-image. With a `mask` only what is white
    there is made anew, at that strength.
    """

    strength: float = Field(default=0.5, ge=MIN_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)
    kind: ReferenceKind | None = None
    mask: StoredImage | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its files."""
        return (self.key,) if self.mask is None else (self.key, self.mask.key)
