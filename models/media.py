"""Files: pictures to PNG, frames to MP4, what they say of themselves, thumbnails, safe reading of references, and what
a file really holds.

`probe` decodes the bytes it is given; nothing in its answer is taken from what was asked for.
"""

from __future__ import annotations

import io
import struct
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.generation import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Frames = np.ndarray[Any, np.dtype[np.uint8]]

THUMBNAIL_EDGE = 256
THUMBNAIL_QUALITY = 85
# x264's constant rate factor: 18 is commonly held to look like the source, 23 is its default.
VIDEO_CRF = 18
_REFERENCE_FORMATS = ("PNG", "JPEG", "WEBP")
MANIFEST_KEY = "ourvidz.manifest"  # of a PNG's text chunk, and of an entry in an MP4's metadata
_XMP_KEY = "XML:com.adobe.xmp"  # of a PNG's iTXt chunk; XMP specification part 3, 1.1.5
_XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # of an MP4's `uuid` box; the same, 1.1.2
_ITU709 = 1  # the value of BT.709 in H.264's tables of primaries, transfer and matrix


class UnreadableMedia(Exception):
    """The bytes are no picture or video that can be decoded."""

    code = "unreadable_media"


@dataclass(frozen=True)
class MediaFacts:
    """What decoding a file showed. `frames`, `fps` and `duration_seconds` are None for pictures."""

    mime_type: str
    codec: str
    width: int
    height: int
    frames: int | None
    fps: float | None
    duration_seconds: float | None
    size_bytes: int


def encode_png(image: Image, text: Mapping[str, str], xmp: str | None = None) -> bytes:
    """The image as PNG with one text chunk for each entry of `text` (keys: 1 to 79 Latin-1 characters) and an XMP
    packet. Text beyond Latin-1 goes into iTXt, in UTF-8; the manifest always does."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        (chunks.add_itxt if key == MANIFEST_KEY else chunks.add_text)(key, value)
    if xmp is not None:
        chunks.add_itxt(_XMP_KEY, xmp)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def encode_mp4(frames: Frames, fps: int) -> bytes:
    """Frames (F, H, W, 3; uint8 RGB) as H.264 in MP4, yuv420p in BT.709, playable while it downloads.

    Goes through a temporary file, because the index is moved to the front at the end. Raises `ValueError`
    for odd sizes, which 4:2:0 subsampling can't hold, and for an empty video. The same frames make the same pixels.
    """
    import av

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype.name != "uint8" or not len(frames):
        raise ValueError(f"frames must be (F, H, W, 3) of uint8, got {frames.shape} of {frames.dtype}")
    height, width = frames.shape[1:3]
    if width % 2 or height % 2:
        raise ValueError(f"the size of a video must be even, got {width}x{height}")
    with tempfile.TemporaryDirectory(prefix="ourvidz-") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            # Without macroblock tree, whose AVX-512 code (x264 core 165) lets the pixels hang on what the
            # memory held before; and with the flag, without which x264 is free to let its threads race.
            options = {"crf": str(VIDEO_CRF), "mbtree": "0", "flags": "+bitexact"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _ITU709
            context.color_range = 1  # 16 to 235, what players expect of yuv420p
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(
                    format="yuv420p", src_color_range="JPEG", dst_color_range="MPEG", dst_colorspace="ITU709"
                )
                picture.pts = None
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return path.read_bytes()


def describe_mp4(data: bytes, text: Mapping[str, str], xmp: str | None = None) -> bytes:
    """The same MP4 with the entries of `text` in its metadata, under their own names, and an XMP packet in a `uuid` box
    at its end. Pictures are copied as they are, not encoded again; what metadata there was before is replaced."""
    import av

    with tempfile.TemporaryDirectory(prefix="ourvidz-") as folder:
        path = Path(folder) / "video.mp4"
        # without the second flag only the names that iTunes knows are written
        options = {"movflags": "+faststart+use_metadata_tags"}
        with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options=options) as container:
            container.metadata.update(text)
            stream = source.streams.video[0]
            copied = container.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:  # the last one is empty, and only flushes decoders
                    packet.stream = copied
                    container.mux(packet)
        described = path.read_bytes()
    if xmp is not None:
        body = _XMP_BOX + xmp.encode()
        described += struct.pack(">I4s", 8 + len(body), b"uuid") + body
    return described


def read_manifest(data: bytes) -> str | None:
    """The text of the manifest that a PNG or MP4 carries; None where it carries none. Raises `UnreadableMedia`."""
    return _texts(data).get(MANIFEST_KEY)


def read_xmp(data: bytes) -> str | None:
    """The XMP packet of a PNG or MP4. Raises `UnreadableMedia`."""
    return _texts(data).get("xmp" if data[4:8] == b"ftyp" else _XMP_KEY)


def _texts(data: bytes) -> dict[str, str]:
    import av
    from PIL import Image

    try:
        if data[4:8] == b"ftyp":
            with av.open(io.BytesIO(data), options={"export_xmp": "1"}) as container:
                return dict(container.metadata)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            return {key: value for key, value in getattr(image, "text", {}).items() if isinstance(value, str)}
    except (av.FFmpegError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableMedia(f"no readable picture or video ({type(error).__name__})") from error


def thumbnail(picture: Image | Frames) -> bytes:
    """A WebP whose longest edge is at most 256 pixels; of a video (F, H, W, 3) its middle frame."""
    from PIL import Image

    if not isinstance(picture, Image.Image):
        frame = picture[len(picture) // 2] if picture.ndim == 4 else picture
        picture = Image.fromarray(frame)
    small = picture.copy()
    small.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()


def probe(data: bytes) -> MediaFacts:
    """What the bytes hold, by decoding all of them. Raises `UnreadableMedia`."""
    return _probe_video(data) if data[4:8] == b"ftyp" else _probe_image(data)


def _probe_image(data: bytes) -> MediaFacts:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind = image.format or ""
            return MediaFacts(
                mime_type=Image.MIME[kind],
                codec=kind.lower(),
                width=image.width,
                height=image.height,
                frames=None,
                fps=None,
                duration_seconds=None,
                size_bytes=len(data),
            )
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError) as error:
        raise UnreadableMedia(f"no readable picture ({type(error).__name__})") from error


def _probe_video(data: bytes) -> MediaFacts:
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            rate, base = stream.average_rate, stream.time_base
            if not frames or not rate or stream.duration is None or base is None:
                raise UnreadableMedia("a video without frames or without a time base")
            if frames != stream.frames:
                raise UnreadableMedia(f"the index names {stream.frames} frames, {frames} can be decoded")
            return MediaFacts(
                mime_type="video/mp4",
                codec=stream.codec_context.name,
                width=stream.width,
                height=stream.height,
                frames=frames,
                fps=float(rate),
                duration_seconds=float(stream.duration * base),
                size_bytes=len(data),
            )
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UnreadableMedia(f"no readable video ({type(error).__name__})") from error


def open_reference(
    data: bytes, max_pixels: int, max_bytes: int, *, name: str = "reference", canvas: str = "white"
) -> Image:
    """An uploaded picture as RGB, upright and without metadata; transparency is laid on the colour of the canvas.

    PNG, JPEG and WebP of one frame only; sizes are checked before anything is decoded. Raises `InvalidInput`, whose
    message speaks of the picture by `name`.
    """
    from PIL import Image, ImageOps

    if len(data) > max_bytes:
        raise InvalidInput(f"the {name} is larger than {max_bytes} bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of many pixels by its own limit; ours is checked below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=_REFERENCE_FORMATS)
        with opened as image:
            if image.width * image.height > max_pixels:
                raise InvalidInput(f"the {name} has more than {max_pixels} pixels")
            # a phone's JPEG may carry more pictures (MPO): previews and depth, no animation
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise InvalidInput(f"the {name} is animated; one still picture is needed")
            if image.mode.startswith(("I", "F")):  # turned into 8 bits, all but the darkest would be white
                raise InvalidInput(f"the {name} has more than 8 bits a sample")
            image.load()
            upright = ImageOps.exif_transpose(image)
            has_alpha = "A" in upright.getbands() or "transparency" in upright.info
            picture = Image.new("RGB", upright.size, canvas)
            if has_alpha:
                picture.paste(upright.convert("RGB"), mask=upright.convert("RGBA").getchannel("A"))
            else:
                picture.paste(upright.convert("RGB"))
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"the {name} is no readable PNG, JPEG or WebP ({type(error).__name__})") from error
