"""Masks: which part of a reference image is repainted. White is repainted, black stays; half of white is white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.generation import InvalidInput
from models.media import open_reference

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_STRETCH = 0.01  # by how much of themselves the proportions of mask and reference may differ


@dataclass(frozen=True)
class FittedMask:
    """A mask at the size of a generation: `image` is of mode L and holds 0 and 255 only.

    `repainted` is the share of the pixels that are made anew. The pipelines repaint whole cells of the latents, and
    look at the first pixel of each.
    """

    image: Image
    repainted: float


def open_mask(data: bytes, max_pixels: int, max_bytes: int, reference: tuple[int, int]) -> Image:
    """An uploaded mask as greys, upright, for a reference of that size; transparency is laid on black.

    Takes and refuses what `open_reference` does. Raises `InvalidInput`, also where nothing in it is white and where
    its proportions are not those of the reference.
    """
    mask = open_reference(data, max_pixels, max_bytes, name="mask", canvas="black").convert("L")
    wide, high = mask.width * reference[1], mask.height * reference[0]
    if abs(wide - high) > MAX_STRETCH * max(wide, high):
        sizes = f"{mask.width}x{mask.height} and {reference[0]}x{reference[1]}"
        raise InvalidInput(f"the mask has not the proportions of the reference: {sizes}")
    _, brightest = mask.getextrema()
    if int(brightest) < 128:  # type: ignore[arg-type]
        raise InvalidInput("the mask is empty: nothing in it is white, so nothing would be repainted")
    return mask


def fit_mask(mask: Image, width: int, height: int, cell: int) -> FittedMask:
    """The mask as the reference is fitted: scaled and cut in the middle. `cell` is how many pixels wide and high a cell
    of the latents is. Raises `InvalidInput` where nothing is left to repaint."""
    import numpy as np
    from PIL import Image, ImageOps

    fitted = np.asarray(ImageOps.fit(mask, (width, height), Image.Resampling.LANCZOS)) >= 128
    repainted = float(fitted[::cell, ::cell].mean())
    if not repainted:
        raise InvalidInput("the mask leaves nothing to repaint at the size of the image")
    return FittedMask(Image.fromarray(fitted.astype("uint8") * 255), round(repainted, 6))
