"""Previews: a small picture of what is being denoised, from a copy of the latents and without the VAE.

The engine's thread only leaves a copy in `Snapshots`; whoever shows previews takes it from there and lets `render` make
the picture on another thread. A linear projection of the latents is cheap and blurred, and good enough to see where a
generation goes. Nothing here may cost a job: a copy that fails is told by `take`.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[Any, np.dtype[np.float32]]

LONGEST_EDGE = 256
QUALITY = 75


class PreviewFailed(Exception):
    """A preview could not be made. The generation goes on; the message names the fault and no content."""

    code = "preview_failed"


class Projection(BaseModel):
    """A row of `configs/previews.yaml`: RGB factors of each channel, and the range that they lead to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    channels: int
    range: int = Field(ge=1)
    bias: tuple[float, float, float]
    factors: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Snapshot:
    """The latents of one picture after `step` of `of` steps: a tensor (C, H, W) of its own memory, on any device."""

    latents: Any
    step: int
    of: int


class Snapshots:
    """Where one generation leaves its latents, a copy at most every `seconds`; an untaken one gives way to the next."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._lock = threading.Lock()
        self._due = float("-inf")
        self._left: Snapshot | PreviewFailed | None = None

    def offer(self, latents: Any, step: int, of: int) -> None:
        """If it is time, copy the first picture of a batch (N, C, H, W) or the middle frame of a video (N, C, F, H, W).

        Never raises. On a card the copy is queued behind the step, and nobody waits for it here.
        """
        now = self._clock()
        if now < self._due:
            return
        self._due = now + self._seconds
        left: Snapshot | PreviewFailed
        try:
            picture = latents[0]
            if picture.ndim == 4:
                picture = picture[:, picture.shape[1] // 2]
            left = Snapshot(picture.detach().clone(), step, of)
        except Exception as error:
            left = PreviewFailed(f"copy: {type(error).__name__}")
        with self._lock:
            self._left = left

    def take(self) -> Snapshot | None:
        """What was left since the last call; None for nothing. Raises `PreviewFailed`."""
        with self._lock:
            left, self._left = self._left, None
        if isinstance(left, PreviewFailed):
            raise left
        return left


def preview_size(width: int, height: int) -> tuple[int, int]:
    """The size of the preview of a picture, in pixels: the same shape, at most 256 at the longest edge."""
    scale = min(1.0, LONGEST_EDGE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def render(snapshot: Snapshot, width: int, height: int) -> bytes:
    """The preview of a picture of this size as WebP. Blocking; raises `PreviewFailed`."""
    from PIL import Image

    try:
        small = Image.fromarray(to_rgb(snapshot.latents.float().cpu().numpy()))
        buffer = io.BytesIO()
        small.resize(preview_size(width, height), Image.Resampling.BICUBIC).save(buffer, format="WEBP", quality=QUALITY)
    except PreviewFailed:
        raise
    except Exception as error:
        raise PreviewFailed(f"render: {type(error).__name__}") from error
    return buffer.getvalue()


def to_rgb(latents: Values) -> Any:
    """Latents (C, H, W) as (H, W, 3) of uint8. Raises `PreviewFailed` for a channel count that no projection is for."""
    import numpy as np

    projection = projections().get(len(latents))
    if projection is None:
        raise PreviewFailed(f"no projection of {len(latents)} channels")
    if not np.isfinite(latents).all():
        raise PreviewFailed("the latents are not finite")
    # schedulers that add noise without shrinking the signal give early latents many times the scale of clean ones,
    # which is 1; without this they would only be black and white
    latents = latents / max(1.0, float(latents.std()))
    rgb = np.einsum("chw,cr->hwr", latents, np.array(projection.factors)) + np.array(projection.bias)
    if projection.range == 1:
        rgb = (rgb + 1) * 127.5
    return rgb.clip(0, 255).round().astype("uint8")


@cache
def projections() -> Mapping[int, Projection]:
    """The projections by their number of channels."""
    rows = yaml.safe_load(files("configs").joinpath("previews.yaml").read_text(encoding="utf-8"))
    return {row.channels: row for row in map(Projection.model_validate, rows)}
