"""Measuring what a model's forwards cost, with real tiny models."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.denoising.acceleration import Acceleration
from models.denoising.costs import Costs, Shape, shape_of
from models.denoising.measuring import identity_of, measured
from models.engine import Engine, ModelLoadFailed
from models.profile import ModelSpec
from models.sdxl import SDXL
from models.wan import WAN

DEADLINE = 60


def test_real_models_are_measured_once(sdxl: SDXL, wan: WAN, tmp_path: Path) -> None:
    for model in (sdxl, wan):
        costs = measured(model, tmp_path)
        shape = shape_of(model.sample_request().params)
        assert all(seconds > 0 for seconds in costs.measured[shape].values())
        assert costs.decoding is not None
        assert costs.decoding.seconds_per_pixel > 0
        assert measured(model, tmp_path).measured == costs.measured  # to the last digit: it was read
        assert identity_of(model)["model"] == model.model_name


def test_pictures_of_a_video_model_have_a_cap_of_their_own(wan: WAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video's forward is no faster in company, and a picture's is."""

    def curve(costs: Costs, shape: Shape, forward: Any, budget_seconds: float) -> None:
        forward(1)
        costs.measured[shape] = {1: 0.1, 2: 0.1, 4: 0.1} if shape.frames == 1 else {1: 0.5, 2: 1.0}

    monkeypatch.setattr(Costs, "measure", curve)
    costs = measured(wan, None)
    video = shape_of(wan.sample_request().params)
    assert (costs.cap(video), costs.cap(video._replace(frames=1))) == (1, 4)


class Sessions(SDXL):
    """Notes what is in force while it runs forwards, which fail from `most` rows on."""

    def __init__(self, spec: ModelSpec, weights: Path, most: int = 100) -> None:
        super().__init__(spec, weights)
        self.most, self.inside = most, False
        self.forwards: set[tuple[bool, bool]] = set()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        yield
        self.inside = before

    def measure(self, folder: Path | None) -> Costs:
        handle = self._pipeline.unet.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            return super().measure(folder)
        finally:
            handle.remove()

    def _before(self, module: Any, args: Any, arguments: dict[str, Any]) -> None:
        import torch

        self.forwards.add((self.inside, torch.is_grad_enabled()))
        if len(arguments["sample"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_measured_is_what_is_in_force_while_jobs_run(sdxl_spec: ModelSpec, tiny_sdxl: Path) -> None:
    model = Sessions(sdxl_spec, tiny_sdxl)
    model.load()
    model.measure(None)
    assert model.forwards == {(True, False)}


async def test_want_of_memory_while_measuring_ends_the_curve_and_not_the_model(
    sdxl_spec: ModelSpec, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.denoising.measuring._seconds", measured_seconds)
    for most, rows in ((4, [1, 2, 4]), (0, None)):
        model = Sessions(sdxl_spec, tiny_sdxl, most)
        engine = Engine(model)
        engine.start()
        try:
            async with asyncio.timeout(DEADLINE):
                if rows is None:  # not even one row has room
                    with pytest.raises(ModelLoadFailed):
                        await engine.ready()
                else:
                    await engine.ready()
                    costs = engine.costs[model.model_name]
                    assert list(costs.measured[shape_of(model.sample_request().params)]) == rows
        finally:
            await asyncio.to_thread(engine.close, DEADLINE)


def measured_seconds(call: Any, rows: int, device: str) -> float:
    """Real forwards, which all take as long, so that more rows are tried until there is no room for them."""
    from models.denoising.denoiser import run_together

    run_together([call] * rows)
    return 0.01


def test_profile_holds_for_the_switches_that_it_was_measured_with(sdxl_spec: ModelSpec, tiny_sdxl: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return identity_of(SDXL(sdxl_spec.model_copy(update=changes), tiny_sdxl))

    same = identity()
    assert sdxl_spec.defaults is not None
    larger = sdxl_spec.defaults.model_copy(update={"width": 2 * sdxl_spec.defaults.width})
    for changes in (
        {"acceleration": Acceleration(channels_last=True)},
        {"acceleration": Acceleration(guidance_interval=(0.2, 0.8))},
        {"defaults": larger},
        {"single_file": "one.safetensors"},
        {"variant": "fp16"},
        {"vae": "another/vae"},
        {"vae_tiling": True},
        {"vae_slicing": True},
        {"dtype": "bfloat16"},
    ):
        assert identity(**changes) != same, changes
    for changes in ({"slots": 7}, {"state_steps": 5}, {"disk_gib": 3}):
        assert identity(**changes) == same, changes
