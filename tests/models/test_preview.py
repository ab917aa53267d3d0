"""Previews from latents: what is copied and when, what the projection makes of it, and that no pixel changes by it."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import models.engine
from models.denoising.preview import PreviewFailed, Snapshot, Snapshots, preview_size, projections, render, to_rgb
from models.engine import Engine, GenerationRequest
from models.sdxl import SCHEDULERS, SDXL
from models.wan import WAN

Make = Callable[..., GenerationRequest]


class Taking:
    """Snapshots that come at every step, all of them kept."""

    def __init__(self) -> None:
        self.snapshots = Snapshots(0)
        self.taken: list[Snapshot] = []

    def __call__(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, snapshots=self.snapshots)


class Control(models.engine.Control):
    """Takes what the step before has left."""

    def __init__(self, taking: Taking) -> None:
        self._taking = taking

    def step(self, done: int, of: int) -> None:
        self.phase("denoise")

    def phase(self, name: str) -> None:
        if (snapshot := self._taking.snapshots.take()) is not None:
            self._taking.taken.append(snapshot)


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_images_with_previews_have_the_same_pixels(
    sdxl: SDXL, image_request: Make, recorder: Any, scheduler: str
) -> None:
    request, taking = image_request(scheduler=scheduler, num_images=3), Taking()
    plain = sdxl.generate(request, recorder()).images
    shown = sdxl.generate(taking(request), Control(taking)).images
    assert plain is not None
    assert shown is not None
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in plain]
    assert taking.taken[-1].step == taking.taken[-1].of
    assert {tuple(snapshot.latents.shape) for snapshot in taking.taken} == {(4, *taking.taken[0].latents.shape[1:])}


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_a_video_with_previews_has_the_same_pixels(
    wan: WAN, video_request: Make, recorder: Any, scheduler: str
) -> None:
    request, taking = video_request(scheduler=scheduler), Taking()
    plain = wan.generate(request, recorder()).frames
    shown = wan.generate(taking(request), Control(taking)).frames
    assert plain is not None
    assert shown is not None
    assert shown.tobytes() == plain.tobytes()
    assert [(snapshot.step, snapshot.of) for snapshot in taking.taken] == [(1, 3), (2, 3), (3, 3)]
    for snapshot in taking.taken:
        assert snapshot.latents.ndim == 3
        image = decoded(render(snapshot, 64, 96))
        assert (image.format, image.size) == ("WEBP", (64, 96))


def test_a_preview_of_sdxl_is_a_picture_that_moves_on(sdxl: SDXL, image_request: Make) -> None:
    taking = Taking()
    sdxl.generate(taking(image_request()), Control(taking))
    pictures = [decoded(render(snapshot, 64, 64)) for snapshot in taking.taken]
    assert [snapshot.step for snapshot in taking.taken] == [1, 2, 3, 4]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == 4


async def test_a_copy_that_fails_costs_no_generation(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    class Broken(Snapshots):
        def offer(self, latents: Any, step: int, of: int) -> None:
            super().offer(None, step, of)

    snapshots, request = Broken(0), image_request()
    plain = sdxl.generate(request, recorder()).images
    engine = Engine(sdxl)
    engine.start()
    await engine.ready()
    try:
        made = await engine.submit(replace(request, snapshots=snapshots)).result()
    finally:
        engine.close()
    assert plain is not None
    assert made.images is not None
    assert made.images[0].tobytes() == plain[0].tobytes()
    with pytest.raises(PreviewFailed, match="TypeError"):
        snapshots.take()
    assert snapshots.take() is None


def test_snapshots_are_copies_of_the_first_picture_and_the_middle_frame() -> None:
    import torch

    latents = torch.arange(2 * 4 * 5 * 2 * 2).float().reshape(2, 4, 5, 2, 2)
    snapshots = Snapshots(0)
    snapshots.offer(latents, 1, 2)
    taken = snapshots.take()
    assert taken is not None
    assert torch.equal(taken.latents, latents[0, :, 2])
    latents.zero_()
    assert taken.latents.abs().sum() > 0
    snapshots.offer(latents[:, :, 0], 2, 2)
    again = snapshots.take()
    assert again is not None
    assert (again.step, tuple(again.latents.shape)) == (2, (4, 2, 2))


def test_snapshots_come_no_closer_than_they_may() -> None:
    import torch

    now = 0.0
    snapshots = Snapshots(1.0, clock=lambda: now)
    taken = []
    for step in range(30):
        now = step / 4
        snapshots.offer(torch.zeros(1, 4, 2, 2), step, 30)
        if (snapshot := snapshots.take()) is not None:
            taken.append(snapshot.step)
    assert taken == list(range(0, 30, 4))


def test_what_nobody_took_gives_way_to_the_next() -> None:
    import torch

    snapshots = Snapshots(0)
    for step in (1, 2, 3):
        snapshots.offer(torch.zeros(1, 4, 2, 2), step, 3)
    taken = snapshots.take()
    assert taken is not None
    assert taken.step == 3
    assert snapshots.take() is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (256, 256)), ((1280, 720), (256, 144)), ((480, 832), (148, 256)), ((64, 96), (64, 96))],
)
def test_a_preview_has_the_shape_of_the_picture(size: tuple[int, int], expected: tuple[int, int]) -> None:
    import torch

    assert preview_size(*size) == expected
    latents = torch.zeros(4, size[1] // 8, size[0] // 8)
    assert decoded(render(Snapshot(latents, 1, 1), *size)).size == expected


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_of_zero_are_the_bias_and_each_channel_adds_its_factors(channels: int) -> None:
    row = projections()[channels]
    gain = 255 / 2 if row.range == 1 else 1
    middle = np.array(row.bias) * gain + (255 / 2 if row.range == 1 else 0)
    nothing = np.zeros((channels, 2, 2), dtype="float32")
    assert np.abs(to_rgb(nothing)[0, 0] - middle).max() <= 0.5
    for channel in range(channels):
        one = nothing.copy()
        one[channel] = 0.2
        expected = (middle + 0.2 * gain * np.array(row.factors[channel])).clip(0, 255)
        assert np.abs(to_rgb(one)[0, 0] - expected).max() <= 0.51


def test_latents_of_an_early_step_are_brought_to_the_scale_of_clean_ones() -> None:
    noise = np.random.default_rng(1).standard_normal((4, 32, 32)).astype("float32")
    loud, clean = to_rgb(noise * 14.6), to_rgb(noise / noise.std())
    assert np.abs(loud.astype(int) - clean.astype(int)).max() <= 1


@pytest.mark.parametrize("latents", [np.zeros((5, 2, 2)), np.full((4, 2, 2), np.nan), np.full((16, 2, 2), np.inf)])
def test_latents_that_no_picture_can_be_made_of_are_refused(latents: Any) -> None:
    with pytest.raises(PreviewFailed):
        to_rgb(latents.astype("float32"))


def test_a_fault_of_rendering_is_a_failed_preview() -> None:
    with pytest.raises(PreviewFailed, match="AttributeError"):
        render(Snapshot(None, 1, 1), 64, 64)


def test_every_projection_has_a_line_for_each_channel() -> None:
    assert {channels: len(row.factors) for channels, row in projections().items()} == {4: 4, 16: 16}
