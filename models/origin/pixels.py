"""Pixels as a file holds them: their hash, which is the same wherever it is decoded, and how far two files differ.

PNG is lossless, and decoding H.264 is exact by its standard; so pictures are taken as RGB and videos as the planes of
yuv420p that the stream itself has, before any conversion that another library might round otherwise.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.media import UnreadableMedia

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Samples = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class PixelDifference:
    """How far apart two files of one shape are: the share of samples that differ, and by how much of 255.

    `shapes` is there where they can't be compared at all; then the rest is None.
    """

    share: float | None
    largest: int | None
    mean: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        if self.shapes is not None:
            before, after = ("x".join(map(str, shape)) for shape in self.shapes)
            return f"shapes {before} and {after}"
        return f"{self.share:.2%} of the samples, by {self.mean:.3g} on average and {self.largest} of 255 at most"


def decode(data: bytes) -> Samples:
    """The samples of a PNG (H, W, 3; RGB) or MP4 (F, 1.5 H, W; planes of yuv420p). Raises `UnreadableMedia`."""
    import av
    import numpy as np
    from PIL import Image

    try:
        if data[4:8] != b"ftyp":
            with Image.open(io.BytesIO(data)) as image:
                return samples_of(image)
        with av.open(io.BytesIO(data)) as container:
            return np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])
    except (av.FFmpegError, OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError) as error:
        raise UnreadableMedia(f"no readable picture or video ({type(error).__name__})") from error


def samples_of(image: Image) -> Samples:
    """The samples of a picture as `decode` finds them in its PNG."""
    import numpy as np

    return np.asarray(image.convert("RGB"))


def pixel_hash(samples: Samples) -> str:
    """SHA-256 in hex over the shape (`128x128x3`), a line feed, and the samples in row-major order."""
    import numpy as np

    digest = hashlib.sha256("x".join(map(str, samples.shape)).encode() + b"\n")
    digest.update(np.ascontiguousarray(samples).data)
    return digest.hexdigest()


def pixel_difference(before: Samples, after: Samples) -> PixelDifference | None:
    """How two files differ; None where their pixels are the same."""
    import numpy as np

    if before.shape != after.shape:
        return PixelDifference(None, None, None, (before.shape, after.shape))
    apart = np.abs(before.astype(np.int16) - after)
    if not apart.any():
        return None
    return PixelDifference(float((apart > 0).mean()), int(apart.max()), float(apart.mean()))
