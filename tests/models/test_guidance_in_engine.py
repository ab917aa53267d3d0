"""Guidance in a part of the steps, as a request and as a profile ask for it."""

from collections.abc import Callable
from typing import Any

import pytest

from models.engine import Control, GenerationRequest
from models.pipeline import PipelineModel
from models.sdxl import SDXL
from models.wan import WAN

Make = Callable[..., GenerationRequest]


class Rows(Control):
    """Keeps how many rows each forward had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, call: Any) -> Any:
        self.rows.append(call.rows)
        return super().forward(call)


@pytest.mark.parametrize("by", ["request", "profile"])
def test_guidance_runs_in_its_part_of_the_steps(sdxl: SDXL, image_request: Make, by: str) -> None:
    interval = (0.25, 0.75)
    request = image_request(steps=4, guidance_interval=interval if by == "request" else None)
    before, control = sdxl.spec, Rows()
    if by == "profile":
        acceleration = before.acceleration.model_copy(update={"guidance_interval": interval})
        sdxl.spec = before.model_copy(update={"acceleration": acceleration})
    try:
        made = sdxl.generate(request, control)
    finally:
        sdxl.spec = before
    assert control.rows == [1, 2, 2, 1]
    assert made.settings["guidance_interval"] == interval


def test_video_has_fewer_forwards(wan: WAN, video_request: Make) -> None:
    control = Rows()
    wan.generate(video_request(steps=4, guidance_interval=(0.0, 0.5)), control)
    assert len(control.rows) == 2 * 2 + 2


def test_unguided_request_has_no_interval(sdxl: SDXL, image_request: Make) -> None:
    model: PipelineModel = sdxl
    made = model.generate(image_request(guidance_scale=1.0, negative_prompt=""), Control())
    assert made.settings["guidance_interval"] is None
