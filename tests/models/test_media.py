import ctypes
import io
import platform
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from models.engine import InvalidInput
from models.media import (
    MANIFEST_KEY,
    UnreadableMedia,
    describe_mp4,
    encode_mp4,
    encode_png,
    open_reference,
    probe,
    read_manifest,
    read_xmp,
    thumbnail,
)
from models.origin.manifest import xmp

PIXELS, BYTES = 1_000_000, 1_000_000


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    values = np.arange(width * height * 3) % 251
    return Image.fromarray(values.reshape(height, width, 3).astype("uint8"))


def moving_bar(count: int = 17, width: int = 64, height: int = 96) -> np.ndarray:
    frames = np.full((count, height, width, 3), 40, dtype="uint8")
    for number, frame in enumerate(frames):
        frame[:, 2 * number : 2 * number + 8] = (200, 60, 30)
    return frames


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def atoms(data: bytes) -> list[str]:
    """The names of an MP4's top-level boxes in file order."""
    names, at = [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode("ascii"))
        at += size if size != 1 else struct.unpack_from(">Q", data, at + 8)[0]
    assert at == len(data)
    return names


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that promises a picture of that size and holds none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_png_keeps_pixels_and_text() -> None:
    image = gradient()
    data = encode_png(image, {"parameters": "seed 7", "title": "猫 é"})
    with Image.open(io.BytesIO(data)) as read:
        assert read.tobytes() == image.tobytes()
        assert read.text == {"parameters": "seed 7", "title": "猫 é"}


def test_probe_of_a_png_is_what_was_encoded() -> None:
    data = encode_png(gradient(), {})
    facts = probe(data)
    assert (facts.mime_type, facts.codec, facts.width, facts.height) == ("image/png", "png", 96, 64)
    assert (facts.frames, facts.fps, facts.duration_seconds) == (None, None, None)
    assert facts.size_bytes == len(data)


@pytest.mark.parametrize(("count", "fps"), [(17, 16), (1, 16), (33, 24)])
def test_mp4_has_exactly_the_frames_and_rate_that_were_encoded(count: int, fps: int) -> None:
    data = encode_mp4(moving_bar(count), fps)
    facts = probe(data)
    assert (facts.mime_type, facts.codec) == ("video/mp4", "h264")
    assert (facts.width, facts.height, facts.frames, facts.fps) == (64, 96, count, fps)
    assert facts.duration_seconds == pytest.approx(count / fps, abs=0.002)
    assert facts.size_bytes == len(data)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fills memory by an option of glibc")
def test_the_same_frames_make_the_same_mp4_whatever_the_memory_held() -> None:
    frames = np.random.default_rng(3).integers(0, 255, (17, 40, 24, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    fill = partial(ctypes.CDLL("libc.so.6").mallopt, -6)  # M_PERTURB: each byte of memory that is taken or given back
    try:
        made = {encode_mp4(frames, 16) for value in (1, 85, 170, 255) if fill(value)}
    finally:
        fill(0)
    assert len(made) == 1


def test_mp4_index_comes_before_the_pictures() -> None:
    names = atoms(encode_mp4(moving_bar(), 16))
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


def test_mp4_shows_the_colours_that_went_in() -> None:
    import av

    frames = moving_bar()
    with av.open(io.BytesIO(encode_mp4(frames, 16))) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        decoded = np.stack(
            [
                frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
                for frame in container.decode(video=0)
            ]
        )
    assert decoded.shape == frames.shape
    for colour in ((40, 40, 40), (200, 60, 30)):
        inside = (frames == colour).all(axis=3)
        assert np.abs(decoded[inside].astype(int).mean(axis=0) - colour).max() < 8


def test_png_carries_manifest_and_xmp_in_chunks_of_utf8() -> None:
    data = encode_png(gradient(), {MANIFEST_KEY: '{"title": "猫"}'}, xmp())
    assert (read_manifest(data), read_xmp(data)) == ('{"title": "猫"}', xmp())
    for key in (MANIFEST_KEY, "XML:com.adobe.xmp"):
        # keyword, no compression, no language, no translated keyword
        assert b"iTXt" + key.encode() + b"\0\0\0\0\0" in data
    with Image.open(io.BytesIO(data)) as read:
        assert read.tobytes() == gradient().tobytes()


def test_mp4_carries_manifest_and_xmp_and_stays_the_same_video() -> None:
    plain = encode_mp4(moving_bar(), 16)
    data = describe_mp4(plain, {MANIFEST_KEY: '{"title": "猫"}', "Software": "ourvidz-serve"}, xmp())
    assert (read_manifest(data), read_xmp(data)) == ('{"title": "猫"}', xmp())
    before, after = probe(plain), probe(data)
    assert after.size_bytes > before.size_bytes
    assert {**vars(after), "size_bytes": 0} == {**vars(before), "size_bytes": 0}
    names = atoms(data)
    assert names.index("moov") < names.index("mdat") < names.index("uuid") == len(names) - 1


def test_mp4_keeps_its_colours_while_it_is_described() -> None:
    import av

    told = []
    for data in (encode_mp4(moving_bar(), 16), describe_mp4(encode_mp4(moving_bar(), 16), {}, None)):
        with av.open(io.BytesIO(data)) as container:
            context = container.streams.video[0].codec_context
            told.append((context.color_primaries, context.color_trc, context.colorspace, context.color_range))
    assert told[0] == told[1] == (1, 1, 1, 1)


@pytest.mark.parametrize("data", [encode_png(gradient(), {}), encode_mp4(moving_bar(), 16)])
def test_a_file_without_a_manifest_has_none(data: bytes) -> None:
    assert (read_manifest(data), read_xmp(data)) == (None, None)


@pytest.mark.parametrize("data", [b"", b"not a file", encoded(gradient(), "JPEG"), b"\0\0\0\x18ftypisom"])
def test_metadata_of_what_is_neither_png_nor_mp4_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableMedia):
        read_manifest(data)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((5, 63, 64, 3), "uint8"),
        np.zeros((0, 64, 64, 3), "uint8"),
        np.zeros((5, 64, 64), "uint8"),
        np.zeros((5, 64, 64, 3), "float32"),
    ],
)
def test_mp4_refuses_what_it_cannot_hold(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"even|frames must be"):
        encode_mp4(frames, 16)


@pytest.mark.parametrize("size", [(1024, 512), (300, 1000), (100, 60)])
def test_thumbnail_fits_256_and_never_grows(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(thumbnail(gradient(*size)))) as small:
        assert small.format == "WEBP"
        assert max(small.size) == min(256, max(size))
        assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.02)


def test_thumbnail_of_a_video_is_its_middle_frame() -> None:
    frames = np.zeros((5, 32, 32, 3), "uint8")
    frames[2] = (250, 10, 10)
    with Image.open(io.BytesIO(thumbnail(frames))) as small:
        red, green, _ = np.asarray(small.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert red > 200
    assert green < 60


def test_thumbnail_leaves_its_picture_alone() -> None:
    image = gradient(600, 400)
    thumbnail(image)
    assert image.size == (600, 400)


@pytest.mark.parametrize("data", [b"", b"not a file", png_header_only(64, 64), b"\0\0\0\x18ftypisom\0\0\0\0isomavc1"])
def test_probe_refuses_what_does_not_decode(data: bytes) -> None:
    with pytest.raises(UnreadableMedia):
        probe(data)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_probe_refuses_a_video_that_was_cut(kept: float) -> None:
    data = encode_mp4(moving_bar(33), 16)
    with pytest.raises(UnreadableMedia):
        probe(data[: int(len(data) * kept)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_reference_opens_in_each_accepted_format(kind: str) -> None:
    image = open_reference(encoded(gradient(), kind), PIXELS, BYTES)
    assert (image.mode, image.size) == ("RGB", (96, 64))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_reference_of_another_format_is_refused(kind: str) -> None:
    with pytest.raises(InvalidInput, match="PNG, JPEG or WebP"):
        open_reference(encoded(gradient(), kind), PIXELS, BYTES)


@pytest.mark.parametrize("edge", [2_000, 12_000, 60_000])
def test_reference_with_a_huge_header_is_refused_before_it_is_decoded(edge: int) -> None:
    with pytest.raises(InvalidInput):
        open_reference(png_header_only(edge, edge), PIXELS, BYTES)


def test_reference_of_too_many_bytes_is_refused() -> None:
    data = encoded(gradient(), "PNG")
    with pytest.raises(InvalidInput, match="larger"):
        open_reference(data, PIXELS, len(data) - 1)
    assert open_reference(data, PIXELS, len(data)).size == (96, 64)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_reference_that_is_animated_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidInput, match="animated"):
        open_reference(data, PIXELS, BYTES)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", encoded(gradient(), "PNG")[:200]])
def test_reference_that_is_broken_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        open_reference(data, PIXELS, BYTES)


def test_reference_is_turned_upright_and_loses_its_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    exif[0x010F] = "maker"
    image = open_reference(encoded(gradient(96, 64), "JPEG", exif=exif), PIXELS, BYTES)
    assert image.size == (64, 96)
    assert not image.getexif()
    assert not image.info


def test_reference_lays_transparency_on_white() -> None:
    image = open_reference(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), PIXELS, BYTES)
    assert image.getpixel((4, 4)) == (255, 255, 255)
