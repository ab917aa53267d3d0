"""The mix of jobs: mostly small ones, and every heavy kind among them."""

import random
from collections import Counter
from typing import Any

from benchmarks.chaos.mix import LARGE, shape_of


def shapes(jobs: int, seed: int = 1) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [shape_of(number, chance) for number in range(jobs)]


def test_five_hundred_jobs_hold_every_kind_and_few_heavy_ones() -> None:
    kinds = Counter((shape["job_type"], shape.get("width"), shape.get("enhance", False)) for shape in shapes(500))
    assert kinds[("sdxl_image_high", 1024, False)] == 3
    assert kinds[("sdxl_image_high", None, True)] == 25
    assert kinds[("video_fast", None, False)] == 13
    assert kinds[("video7b_fast_enhanced", None, False)] == 6
    assert {"sdxl_image_fast", "image_fast"} < {job_type for job_type, _, _ in kinds}


def test_a_run_of_a_few_jobs_holds_a_large_one() -> None:
    assert any(shape.get("width") == LARGE["width"] for shape in shapes(15))


def test_the_mix_is_that_of_its_seed() -> None:
    assert shapes(50, seed=3) == shapes(50, seed=3) != shapes(50, seed=4)


def test_every_shape_says_its_steps() -> None:
    assert all(1 <= shape["steps"] <= 6 for shape in shapes(500))
