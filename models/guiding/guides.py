"""Guides: the weights beside a checkpoint that let references steer it, as a profile names them.

Every `source` is a Hugging Face repository, a local folder, or "tiny" beside a tiny checkpoint.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.guiding.reference import Method, Methods, ReferenceKind

IMAGE_PROMPTS: tuple[ReferenceKind, ...] = ("style", "character")  # in the order in which a layer adds them


class _Guide(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    revision: str | None = None


class IpAdapter(_Guide):
    """Image prompt adapters (arXiv 2308.06721) with the one image encoder that they share.

    `style` and `character` are file names in the `subfolder`; `image_encoder` is a folder of the source where its name
    has a slash, else of the subfolder.
    """

    subfolder: str = ""
    image_encoder: str = "image_encoder"
    style: str | None = None
    character: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if not self.files:
            raise ValueError("ip_adapter: names no file for style or character")
        return self

    @property
    def files(self) -> dict[ReferenceKind, str]:
        """The file of each kind of reference that has one."""
        named = {"style": self.style, "character": self.character}
        return {kind: file for kind in IMAGE_PROMPTS if (file := named[kind]) is not None}


class ControlNet(_Guide):
    """A ControlNet (arXiv 2302.05543). `reads` says what it was trained on: "edges", which are drawn of the reference
    here, or "picture", the reference as it is (which may be a depth map or a pose)."""

    variant: str | None = None
    reads: Literal["edges", "picture"] = "edges"


class ImageToVideo(_Guide):
    """An image-to-video checkpoint beside the one for text.

    Text encoder and VAE are those of the text checkpoint, as they are in the published ones of WAN, unless
    `own_encoders` says that it brings others. `end_frame` says whether it takes one: "required" for those that were
    trained on first and last frames together. That is checked at load.
    """

    variant: str | None = None
    own_encoders: bool = False
    end_frame: Literal["never", "optional", "required"] = "never"

    @property
    def methods(self) -> Methods:
        method: Method = "first_and_last_frame" if self.end_frame == "required" else "image_to_video"
        kinds: tuple[ReferenceKind, ...] = (
            ("start_frame",) if self.end_frame == "never" else ("start_frame", "end_frame")
        )
        return dict.fromkeys(kinds, method)
