import io

import numpy as np
import pytest
from PIL import Image

from models.media import UnreadableMedia, describe_mp4, encode_mp4, encode_png
from models.origin.pixels import decode, pixel_difference, pixel_hash, samples_of


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape).astype("uint8")


def test_a_picture_has_the_same_hash_before_and_after_png() -> None:
    image = Image.fromarray(noise(24, 40, 3))
    assert pixel_hash(samples_of(image)) == pixel_hash(decode(encode_png(image, {"Software": "x"})))


def test_metadata_does_not_change_the_hash_of_a_video() -> None:
    data = encode_mp4(noise(5, 32, 48, 3), 16)
    described = describe_mp4(data, {"Software": "x"}, "<x/>")
    assert decode(data).shape == (5, 48, 48)
    assert pixel_hash(decode(data)) == pixel_hash(decode(described))
    assert data != described


def test_the_hash_knows_the_shape() -> None:
    assert pixel_hash(np.zeros((2, 6, 3), "uint8")) != pixel_hash(np.zeros((3, 4, 3), "uint8"))


def test_the_hash_is_of_the_samples_and_not_of_how_they_lie_in_memory() -> None:
    samples = noise(8, 8, 3)
    assert pixel_hash(samples[:, ::-1]) == pixel_hash(samples[:, ::-1].copy()) != pixel_hash(samples)


def test_no_difference_is_none() -> None:
    assert pixel_difference(noise(4, 4, 3), noise(4, 4, 3)) is None


def test_a_difference_is_measured() -> None:
    before = np.full((10, 10, 1), 250, "uint8")
    after = before.copy()
    after[0, :5] = 0
    found = pixel_difference(before, after)
    assert found is not None
    assert (found.share, found.largest, found.mean, found.shapes) == (0.05, 250, 12.5, None)
    assert str(found) == "5.00% of the samples, by 12.5 on average and 250 of 255 at most"
    assert pixel_difference(after, before) == found, "no number wraps around"


def test_shapes_that_differ_are_named() -> None:
    found = pixel_difference(noise(4, 4, 3), noise(4, 8, 3))
    assert found is not None
    assert (found.share, str(found)) == (None, "shapes 4x4x3 and 4x8x3")


@pytest.mark.parametrize("data", [b"", b"nothing", b"\0\0\0\x18ftypisom\0\0\0\0isomavc1"])
def test_what_does_not_decode_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableMedia):
        decode(data)


def test_other_kinds_of_picture_are_read_as_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), 9).save(buffer, "PNG")
    assert decode(buffer.getvalue()).tolist() == np.full((2, 3, 3), 9).tolist()
