import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from PIL import Image

from models.denoising.guidance import guidance_interval

STEPS = 8
INTERVALS = [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.3, 0.7), (0.0, 1.0)]


class Watched:
    """In the place of a denoiser: counts rows, and outside the interval gives guidance nothing to do, by returning the
    conditional half for both. A guided run through it is what an interval must equal."""

    def __init__(self, module: Any, interval: tuple[float, float] | None = None, of: int = STEPS) -> None:
        self.module, self.interval, self.of = module, interval, of
        self.rows: list[int] = []
        self.context, self.step, self.last = "", 0, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        self.context = name
        yield

    def _reset_stateful_cache(self) -> None:
        return

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs["hidden_states"]
        output = self.module(*args, **kwargs)[0]
        if self.context == "uncond":
            self.rows[-1] += len(latents)
            return (self.last if self._off(self.step - 1) else output,)
        self.rows.append(len(latents))
        if self.interval is not None and self.context == "" and self._off(self.step):
            output = torch.cat([output.chunk(2)[1]] * 2)
        self.step, self.last = self.step + 1, output
        return (output,)

    def _off(self, step: int) -> bool:
        return self.interval is not None and not self.interval[0] * self.of <= step + 1e-6 < self.interval[1] * self.of


@pytest.fixture(scope="module")
def images(tiny_sdxl: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def videos(tiny_wan: Path) -> Any:
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments_for(kind: str, images: Any, videos: Any) -> tuple[Any, str, dict[str, Any]]:
    """A pipeline, the name of its denoiser, and the arguments of a guided call that ends with latents."""
    common = {"guidance_scale": 6.0, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    if kind == "wan":
        embeds, negative = videos.encode_prompt("waves", "static", max_sequence_length=32)
        size = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": STEPS}
        return videos, "transformer", common | size | {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    embeds, negative, pooled, negative_pooled = images.encode_prompt("a cat", negative_prompt="blurry")
    common |= {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "num_images_per_prompt": 2,
        "num_inference_steps": STEPS,
    }
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    if kind == "text":
        return images, "unet", common | {"width": 64, "height": 64}
    if kind == "image":
        pipeline = StableDiffusionXLImg2ImgPipeline(**images.components)
        common |= {"image": picture, "strength": 1.0}
    else:
        pipeline = StableDiffusionXLInpaintPipeline(**images.components)
        mask = Image.fromarray(np.tile(np.uint8([0] * 32 + [255] * 32), (64, 1)))
        common |= {"image": picture, "mask_image": mask, "strength": 1.0, "width": 64, "height": 64}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, "unet", common


def run(
    pipeline: Any, name: str, denoiser: Watched, arguments: dict[str, Any], interval: tuple[float, float] | None = None
) -> Any:
    arguments["generator"].manual_seed(3)
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(pipeline.scheduler)
    setattr(own, name, denoiser)
    with torch.no_grad():
        return own(**arguments if interval is None else guidance_interval(own, arguments, *interval))[0]


@pytest.mark.parametrize("kind", ["text", "image", "inpaint", "wan"])
@pytest.mark.parametrize(("start", "stop"), INTERVALS)
def test_interval_equals_a_guided_run_whose_guidance_does_nothing_outside(
    kind: str, start: float, stop: float, images: Any, videos: Any
) -> None:
    pipeline, name, arguments = arguments_for(kind, images, videos)
    expected = run(pipeline, name, Watched(getattr(pipeline, name), (start, stop)), arguments)
    denoiser = Watched(getattr(pipeline, name))
    made = run(pipeline, name, denoiser, arguments, (start, stop))
    assert float((made - expected).abs().max() / expected.abs().max()) < 1e-5
    on = [start * STEPS <= step + 1e-6 < stop * STEPS for step in range(STEPS)]
    images_each = 1 if kind == "wan" else 2
    assert denoiser.rows == [images_each * (2 if guided else 1) for guided in on]


def test_interval_changes_the_picture(images: Any, videos: Any) -> None:
    pipeline, name, arguments = arguments_for("text", images, videos)
    whole = run(pipeline, name, Watched(pipeline.unet), arguments)
    part = run(pipeline, name, Watched(pipeline.unet), arguments, (0, 0.5))
    assert float((part - whole).abs().max() / whole.abs().max()) > 1e-3


def test_interval_still_calls_the_callback_that_was_there(images: Any, videos: Any) -> None:
    pipeline, name, arguments = arguments_for("text", images, videos)
    seen: list[tuple[int, list[str]]] = []

    def watch(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, list(tensors)))
        return tensors

    arguments["callback_on_step_end"] = watch
    run(pipeline, name, Watched(pipeline.unet), arguments, (0.25, 0.5))
    assert seen == [(index, ["latents"]) for index in range(STEPS)]


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0, 1.1)])
def test_interval_refuses_bounds_that_hold_no_steps(start: float, stop: float, images: Any) -> None:
    with pytest.raises(ValueError, match="start < stop"):
        guidance_interval(images, {"guidance_scale": 6.0}, start, stop)


def test_interval_refuses_a_call_without_guidance_or_without_its_negative_half(images: Any, videos: Any) -> None:
    with pytest.raises(ValueError, match="above 1"):
        guidance_interval(images, {"guidance_scale": 1.0}, 0, 0.5)
    with pytest.raises(ValueError, match="negative prompt"):
        guidance_interval(images, {"guidance_scale": 6.0}, 0.5, 1)
    with pytest.raises(ValueError, match="negative prompt"):
        guidance_interval(videos, {"guidance_scale": 6.0}, 0, 0.5)
