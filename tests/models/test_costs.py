"""What follows from measured forwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.denoising.costs import RAISE_AFTER, Costs, Shape, rows_of, shape_of, steps_of
from models.denoising.measuring import measured
from models.engine import Control, GenerationRequest
from models.params import GenerationParams
from models.sdxl import SDXL
from models.wan import WAN

Make = Callable[..., GenerationRequest]
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


def test_job_is_predicted_by_the_forwards_that_it_makes() -> None:
    costs = profile({1: 1.0, 2: 1.5, 4: 3.0})
    started = {"bucket": "b", "key": "k", "strength": 0.8}
    for changes, seconds in (
        ({"scheduler": "heun"}, 19 * 1.5),
        ({"references": [started]}, 2 * 1.5),
        ({"references": [started], "scheduler": "heun"}, 3 * 1.5),
        ({"references": [started | {"kind": "style"}]}, 10 * 1.5),
        ({"guidance_interval": (0.4, 0.6)}, 2 * 1.5 + 8 * 1.0),
        ({"guidance_interval": (0.4, 0.6), "guidance_scale": 1.0}, 10 * 1.0),
    ):
        assert costs.job_seconds(params(**changes)) == pytest.approx(seconds), changes
    costs.branches_apart = True  # two forwards of one row
    assert costs.job_seconds(params()) == pytest.approx(10 * 2.0)
    costs.guidance_interval = (0.0, 0.5)  # as the profile says
    assert costs.job_seconds(params()) == pytest.approx(5 * 2.0 + 5 * 1.0)
    assert costs.job_seconds(params(guidance_interval=(0.0, 0.1))) == pytest.approx(2.0 + 9 * 1.0)


class Counting(Control):
    """Keeps what was run, and the steps that were said to be made."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.of = 0

    def step(self, done: int, of: int) -> None:
        self.of = of

    def forward(self, call: Any) -> Any:
        self.rows.append(call.rows)
        return super().forward(call)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4, "scheduler": "heun"},
        {"steps": 5, "reference": {"bucket": "b", "key": "k", "strength": 0.5}},
        {"steps": 5, "scheduler": "heun", "reference": {"bucket": "b", "key": "k", "strength": 0.3}},
        {"steps": 5, "scheduler": "heun", "guidance_interval": (0.25, 0.75)},
    ],
)
def test_forwards_are_those_of_the_real_pipelines(
    sdxl: SDXL, image_request: Make, picture: bytes, changes: dict[str, Any]
) -> None:
    request = image_request(picture, **changes) if "reference" in changes else image_request(**changes)
    control = Counting()
    sdxl.generate(request, control)
    assert (len(control.rows), control.of) == (steps_of(request.params),) * 2
    costs = Costs()  # by which a forward takes as many seconds as it has rows
    costs.measure(SMALL, float, budget_seconds=1000)
    assert costs.job_seconds(request.params) == pytest.approx(sum(control.rows))


def test_forwards_are_those_of_the_real_video_pipeline(wan: WAN, video_request: Make) -> None:
    control, request = Counting(), video_request(steps=4, guidance_interval=(0.0, 0.5))
    wan.generate(request, control)
    costs = measured(wan, None)
    assert (costs.branches_apart, len(control.rows)) == (True, 6)
    shape = shape_of(request.params)
    costs.decoding, costs.seen = None, {shape: {1: 1.0, 2: 1.0}}
    assert costs.job_seconds(request.params) == pytest.approx(6.0)


def test_want_of_memory_while_measuring_keeps_what_was_measured_before() -> None:
    def forward(rows: int) -> float:
        if rows > 4:
            raise MemoryError
        return 1.0

    costs = Costs()
    with pytest.raises(MemoryError):
        costs.measure(SMALL, forward, budget_seconds=1000)
    assert costs.measured == costs.seen == {SMALL: {1: 1.0, 2: 1.0, 4: 1.0}}
    assert costs.cap(SMALL) == 4
    costs.observe(SMALL, 1, 0.1)
    assert costs.measured[SMALL][1] == 1.0


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


def test_free_memory_has_room_for_so_many_rows() -> None:
    costs = profile({1: 1.0, 2: 2.0})
    free = 4 * 10 * SMALL.volume + 1
    assert costs.most_rows(SMALL, free) is None  # nothing was measured
    costs.bytes_per_row_pixel = 10.0
    assert costs.most_rows(SMALL, None) is None
    assert costs.most_rows(SMALL, free) == 4
    assert costs.most_rows(SMALL._replace(frames=5), free) == 0
    costs.branches_apart = True  # two forwards make a guided step
    assert costs.most_rows(SMALL, free) == 8


def test_profile_is_read_by_the_same_model_and_nobody_else(tmp_path: Path) -> None:
    costs = profile({1: 1.0, 2: 2.0})
    costs.decoded(SMALL, 1, 4.0)
    costs.bytes_per_row_pixel = 12.5
    costs.guidance_interval, costs.branches_apart = (0.2, 0.8), True
    path = tmp_path / "deep" / "profile.json"
    costs.save(path, {"device": "a"})
    read = Costs.read(path, {"device": "a"})
    assert read is not None
    assert (read.measured, read.bytes_per_row_pixel) == (costs.measured, 12.5)
    assert (read.guidance_interval, read.branches_apart) == ((0.2, 0.8), True)
    assert read.job_seconds(params()) == costs.job_seconds(params())
    assert Costs.read(path, {"device": "b"}) is None
    empty = '{"format": 1, "identity": {"device": "a"}, "measured": [[64, 64, 1, %s]], "seconds_per_pixel": null}'
    wrong = [empty % curve for curve in ("[]", "[[1, 0.0]]", "[[1, -1]]", "[[1, NaN]]")]
    for text in ("", "[]", "{}", '{"format": 1, "identity": {"device": "a"}}', *wrong):
        path.write_text(text)
        assert Costs.read(path, {"device": "a"}) is None


def test_sample_request_runs(sdxl: SDXL, wan: WAN) -> None:
    for model in (sdxl, wan):
        made = model.generate(model.sample_request(), Control())
        assert made.images is not None or made.frames is not None
