import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.generation import InvalidInput
from models.guiding.masks import fit_mask, open_mask

PIXELS, BYTES = 1_000_000, 1_000_000
SQUARE = (64, 64)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def half_white(mode: str = "L", size: tuple[int, int] = SQUARE) -> Image.Image:
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("RGB", "JPEG"), ("P", "PNG"), ("RGB", "WEBP")])
def test_white_half_is_repainted(mode: str, kind: str) -> None:
    mask = fit_mask(open_mask(encoded(half_white(mode), kind), PIXELS, BYTES, SQUARE), 128, 128, 8)
    values = np.asarray(mask.image)
    assert mask.repainted == 0.5
    assert set(np.unique(values)) == {0, 255}
    assert values[:, :60].all()
    assert not values[:, 68:].any()


def test_transparent_part_is_kept() -> None:
    strokes = Image.new("RGBA", SQUARE, (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 64, 32))
    mask = fit_mask(open_mask(encoded(strokes), PIXELS, BYTES, SQUARE), 64, 64, 8)
    assert mask.repainted == 0.5
    assert not np.asarray(mask.image)[32:].any()


@pytest.mark.parametrize(("grey", "repainted"), [(128, True), (127, False)])
def test_half_of_white_is_white(grey: int, repainted: bool) -> None:
    data = encoded(Image.new("L", SQUARE, grey))
    if repainted:
        assert fit_mask(open_mask(data, PIXELS, BYTES, SQUARE), 64, 64, 8).repainted == 1
    else:
        with pytest.raises(InvalidInput, match="empty"):
            open_mask(data, PIXELS, BYTES, SQUARE)


def test_mask_is_cut_as_its_reference_is() -> None:
    """Of a wide one, both sides: what is white there only is not repainted."""
    wide = Image.new("L", (128, 64), 0)
    wide.paste(255, (0, 0, 40, 64))
    mask = open_mask(encoded(wide), PIXELS, BYTES, (256, 128))
    assert fit_mask(mask, 64, 64, 8).repainted == pytest.approx(1 / 8)
    sides = Image.new("L", (128, 64), 0)
    sides.paste(255, (0, 0, 30, 64))
    with pytest.raises(InvalidInput, match="leaves nothing"):
        fit_mask(open_mask(encoded(sides), PIXELS, BYTES, (256, 128)), 64, 64, 8)


def test_share_is_of_the_cells_that_are_repainted() -> None:
    line = Image.new("L", SQUARE, 0)
    line.paste(255, (0, 8, 64, 10))  # two pixels high, over the first pixels of a row of cells
    assert fit_mask(line, 64, 64, 8).repainted == 1 / 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", "the mask is no readable"),
        (encoded(half_white(), "GIF"), "the mask is no readable"),
        (encoded(half_white(), "TIFF"), "the mask is no readable"),
        (encoded(half_white("RGB"))[:60], "the mask is no readable"),
        (encoded(half_white(), save_all=True, append_images=[Image.new("L", SQUARE)]), "the mask is animated"),
        (encoded(Image.fromarray(np.full((64, 64), 40_000, np.uint16))), "8 bits"),
        (encoded(half_white(size=(64, 60))), "proportions"),
        (encoded(half_white(size=(1100, 1100))), "pixels"),
        (encoded(Image.new("L", SQUARE, 0)), "empty"),
    ],
)
def test_mask_that_can_not_be_used_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        open_mask(data, PIXELS, BYTES, SQUARE)


def test_mask_of_another_size_and_the_same_proportions_is_taken() -> None:
    assert open_mask(encoded(half_white(size=(100, 67))), PIXELS, BYTES, (1500, 1000)).size == (100, 67)
