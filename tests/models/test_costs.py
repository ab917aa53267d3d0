"""What follows from measured forwards."""

from pathlib import Path

import pytest

from models.denoising.costs import RAISE_AFTER, Costs, Shape, rows_of, shape_of
from models.denoising.measuring import identity_of, measured
from models.engine import Control
from models.params import GenerationParams
from models.sdxl import SDXL
from models.wan import WAN

SMALL, LARGE = Shape(64, 64, 1), Shape(128, 128, 1)


def params(**changes: object) -> GenerationParams:
    fields: dict[str, object] = {
        "prompt": "x",
        "num_images": 1,
        "width": 64,
        "height": 64,
        "frames": 1,
        "steps": 10,
        "guidance_scale": 5.0,
        "scheduler": "euler",
    }
    return GenerationParams.model_validate(fields | changes)


def profile(curve: dict[int, float], shape: Shape = SMALL) -> Costs:
    costs = Costs()
    costs.measure(shape, lambda rows: curve[rows], budget_seconds=1000)
    return costs


def test_cap_is_the_smallest_batch_near_the_best_throughput() -> None:
    assert profile({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 3.1}).cap(SMALL) == 8
    assert profile({1: 1.0, 2: 1.97, 4: 3.9, 8: 7.8, 16: 15.6}).cap(SMALL) == 1


def test_measuring_ends_where_more_rows_bring_nothing_and_when_the_budget_is_used_up() -> None:
    assert profile({1: 1.0, 2: 1.2, 4: 2.4}).measured[SMALL] == {1: 1.0, 2: 1.2, 4: 2.4}
    costs = Costs()
    costs.measure(SMALL, lambda rows: 1.0, budget_seconds=7)
    assert list(costs.measured[SMALL]) == [1, 2]


def test_larger_shape_has_a_smaller_cap() -> None:
    costs = profile({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 3.1})
    assert (costs.cap(LARGE), costs.cap(Shape(32, 64, 1))) == (2, 8)


def test_seconds_lie_between_what_was_seen() -> None:
    costs = profile({1: 1.0, 2: 1.5, 4: 2.0, 8: 5.0})
    assert costs.seconds(SMALL, 3) == pytest.approx(1.75)
    assert costs.seconds(SMALL, 16) == pytest.approx(10.0)
    assert costs.seconds(LARGE, 1) == pytest.approx(4.0)


def test_forwards_are_learnt_from() -> None:
    costs = profile({1: 1.0, 2: 2.0})
    for _ in range(100):
        costs.observe(SMALL, 1, 3.0)
        costs.observe(LARGE, 1, 5.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(3.0, rel=0.01)
    assert costs.seconds(LARGE, 1) == pytest.approx(5.0)
    assert costs.measured[SMALL][1] == 1.0


def test_nothing_is_assumed_without_a_measurement() -> None:
    costs = Costs()
    assert costs.seconds(SMALL, 1) is None
    assert costs.job_seconds(params()) is None
    assert costs.forward_bytes(params(), 1) is None
    assert costs.cap(SMALL) == 1


def test_want_of_memory_lowers_the_cap() -> None:
    costs = profile({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 3.1})
    costs.lower_cap(SMALL, 8)
    assert (costs.cap(SMALL), costs.cap(LARGE)) == (4, 2)
    costs.lower_cap(SMALL, 1)
    assert costs.cap(SMALL) == 1


def test_a_lowered_cap_rises_while_there_is_room() -> None:
    costs = profile({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 3.1})
    costs.lower_cap(SMALL, 4)
    for _ in range(RAISE_AFTER - 1):
        costs.observe(SMALL, 2, 1.1)
        costs.observe(SMALL, 1, 1.0)  # smaller ones say nothing of the room
    assert costs.cap(SMALL) == 2
    costs.observe(SMALL, 2, 1.1)
    assert costs.cap(SMALL) == 3
    for _ in range(20 * RAISE_AFTER):
        costs.observe(SMALL, costs.cap(SMALL), 1.6)
    assert costs.cap(SMALL) == 8  # as measured


def test_job_takes_its_steps_and_its_decoding() -> None:
    costs = profile({1: 1.0, 2: 1.5, 4: 2.0, 8: 5.0})
    costs.decoded(SMALL, 1, 4.0)
    assert rows_of(params(num_images=2)) == 4
    assert rows_of(params(guidance_scale=1.0)) == 1
    assert costs.job_seconds(params()) == pytest.approx(10 * 1.5 + 4)
    assert costs.job_seconds(params(num_images=2, steps=3)) == pytest.approx(3 * 2.0 + 8)


def test_room_bounds_the_cap_and_what_is_tried() -> None:
    costs = profile({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 3.1})
    costs.bytes_per_row_pixel = 10.0
    assert costs.has_room(params(), 12)  # nothing is known of the device
    costs.room_bytes = 4 * 10 * SMALL.volume
    assert costs.cap(SMALL) == 4
    assert costs.forward_bytes(params(), 4) == costs.room_bytes
    assert costs.has_room(params(), 4)
    assert not costs.has_room(params(), 5)
    assert not costs.has_room(params(width=128, height=128), 2)


def test_profile_is_read_by_the_same_model_and_nobody_else(tmp_path: Path) -> None:
    costs = profile({1: 1.0, 2: 2.0})
    costs.decoded(SMALL, 1, 4.0)
    costs.bytes_per_row_pixel = 12.5
    path = tmp_path / "deep" / "profile.json"
    costs.save(path, {"device": "a"})
    read = Costs.read(path, {"device": "a"})
    assert read is not None
    assert (read.measured, read.bytes_per_row_pixel) == (costs.measured, 12.5)
    assert read.job_seconds(params()) == costs.job_seconds(params())
    assert Costs.read(path, {"device": "b"}) is None
    empty = '{"format": 1, "identity": {"device": "a"}, "measured": [[64, 64, 1, %s]], "seconds_per_pixel": null}'
    wrong = [empty % curve for curve in ("[]", "[[1, 0.0]]", "[[1, -1]]", "[[1, NaN]]")]
    for text in ("", "[]", "{}", '{"format": 1, "identity": {"device": "a"}}', *wrong):
        path.write_text(text)
        assert Costs.read(path, {"device": "a"}) is None


def test_real_models_are_measured_once(sdxl: SDXL, wan: WAN, tmp_path: Path) -> None:
    for model in (sdxl, wan):
        costs = measured(model, tmp_path)
        shape = shape_of(model.sample_request().params)
        assert all(seconds > 0 for seconds in costs.measured[shape].values())
        assert costs.decoding is not None
        assert costs.decoding.seconds_per_pixel > 0
        assert measured(model, tmp_path).measured == costs.measured  # to the last digit: it was read
        assert identity_of(model)["model"] == model.model_name


def test_sample_request_runs(sdxl: SDXL, wan: WAN) -> None:
    for model in (sdxl, wan):
        made = model.generate(model.sample_request(), Control())
        assert made.images is not None or made.frames is not None
