"""Outlines: the edges of a picture as white lines on black, which a ControlNet for composition was trained on.

The detector of J. Canny ("A Computational Approach to Edge Detection", 1986): gradients of a smoothed picture, thinned
to their ridges, of which the strong stay and the weak that lead on from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SMOOTHING_PIXELS = 1.4  # the deviation of the Gaussian
WEAK, STRONG = 100.0, 200.0  # of the gradient, in grey levels by Sobel's kernel; diffusers' examples use these two

REACH_PIXELS = 64  # along a line; without a bound, a picture could be made that takes for ever


def outlines(picture: Image) -> Image:
    """The edges of a picture, RGB and of its size."""
    import numpy as np
    from PIL import Image as Images
    from PIL import ImageFilter

    smooth = np.asarray(picture.convert("L").filter(ImageFilter.GaussianBlur(SMOOTHING_PIXELS)), dtype=np.float32)
    across, down = _sobel(smooth)
    strength = np.abs(across) + np.abs(down)
    ridge = _is_ridge(strength, across, down)
    edges = _grown(ridge & (strength >= STRONG), ridge & (strength >= WEAK))
    return Images.fromarray(edges.astype("uint8") * 255).convert("RGB")


def _sobel(grey: Any) -> tuple[Any, Any]:
    around = _neighbours(grey, "edge")
    left, right = (sum(weight * around[y, x] for y, weight in ((-1, 1), (0, 2), (1, 1))) for x in (-1, 1))
    above, below = (sum(weight * around[y, x] for x, weight in ((-1, 1), (0, 2), (1, 1))) for y in (-1, 1))
    return right - left, below - above


def _is_ridge(strength: Any, across: Any, down: Any) -> Any:
    """Whether no neighbour in the direction of the gradient, to an eighth of a turn, is stronger."""
    import numpy as np

    around = _neighbours(strength, "constant")
    octant = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(strength.shape, dtype=bool)
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        # of two that are equal the first one is the ridge
        ridge |= (octant == number) & (strength > around[-y, -x]) & (strength >= around[y, x])
    return ridge


def _grown(strong: Any, weak: Any) -> Any:
    """The strong ones, and of the weak all that hang together with one, so many pixels far."""
    import numpy as np

    for _ in range(REACH_PIXELS):
        reached = weak & np.logical_or.reduce(list(_neighbours(strong, "constant").values())) | strong
        if (reached == strong).all():
            return strong
        strong = reached
    return strong


def _neighbours(plane: Any, beyond: str) -> dict[tuple[int, int], Any]:
    """The plane moved by one in each direction, so that what lies at (y, x) of a cell is in its place."""
    import numpy as np

    padded = np.pad(plane, 1, mode=beyond)  # type: ignore[call-overload]
    high, wide = plane.shape
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return {(y, x): padded[1 + y : 1 + y + high, 1 + x : 1 + x + wide] for y, x in steps}
