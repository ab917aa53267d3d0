import numpy as np
from PIL import Image

from models.guiding.outlines import outlines


def test_a_square_has_a_thin_outline_and_nothing_else() -> None:
    picture = Image.new("RGB", (64, 48), "black")
    picture.paste("white", (16, 12, 48, 36))
    edges = np.asarray(outlines(picture))
    assert edges.shape == (48, 64, 3)
    lit = edges[..., 0] > 0
    assert (lit[24] > 0).sum() == 2  # one pixel on each side
    assert abs(int(np.flatnonzero(lit[24])[0]) - 16) <= 1
    assert not lit[:8].any()
    assert not lit[16:32, 22:42].any()


def test_a_plain_picture_has_none() -> None:
    assert not np.asarray(outlines(Image.new("RGB", (32, 32), "grey"))).any()


def test_weak_edges_stay_where_they_touch_a_strong_one() -> None:
    plane = np.zeros((64, 64), dtype=np.uint8)
    plane[:, 32:] = np.linspace(255, 70, 64)[:, None]
    alone = np.zeros((64, 64), dtype=np.uint8)
    alone[:, 32:] = 70  # too weak
    assert np.asarray(outlines(Image.fromarray(plane)))[62, 30:34].any()
    assert not np.asarray(outlines(Image.fromarray(alone))).any()
