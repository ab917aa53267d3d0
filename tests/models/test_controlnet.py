"""Composition references: what the stock ControlNet pipelines make, alone, in company, and beside other references."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageOps

from models.denoising.costs import shape_name
from models.denoising.denoiser import Call, run_together
from models.denoising.preview import Snapshots
from models.denoising.resumption import States
from models.engine import Generation, GenerationRequest, InvalidInput
from models.guiding.outlines import outlines
from models.samples.tiny import ensure_tiny
from models.samples.tiny_guides import STYLE_FILE
from models.sdxl import SCHEDULERS, SDXL
from tests.models.test_engine_equality import TOLERANCE, Arrival, batching, difference, run

Make = Callable[..., GenerationRequest]
STOCK = {
    (False, False): "StableDiffusionXLControlNetPipeline",
    (True, False): "StableDiffusionXLControlNetImg2ImgPipeline",
    (True, True): "StableDiffusionXLControlNetInpaintPipeline",
}


@pytest.fixture
def composed(image_request: Make, of_kind: Any, picture: bytes, mask: bytes) -> Make:
    """A request that keeps a composition so much; it may start from an image, repaint it, and have a style."""

    def make(strength: float | None, **changes: Any) -> GenerationRequest:
        start, masked, style = (changes.pop(name, None) for name in ("start", "masked", "style"))
        references, guides = [], {}
        for kind, given in (("composition", strength), ("style", style)):
            if given is not None:
                references.append(of_kind(kind, strength=given))
                guides[kind] = picture
        if start is not None:
            own_mask = {"mask": {"bucket": "b", "key": "m"}} if masked else {}
            references.append(of_kind("image", strength=start, **own_mask))
        image = picture if start is not None else None
        return image_request(image, mask=mask if masked else None, references=references, guides=guides, **changes)

    return make


class Stock:
    """The ControlNet pipelines of diffusers. The first image's final latents."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[Any, Any] = {}

    def latents(self, request: GenerationRequest) -> Any:
        import diffusers

        params = request.params
        size = (params.width, params.height)
        pipeline = self._pipeline(request.reference is not None, request.mask is not None, "style" in request.guides)
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[params.scheduler]).from_config(pipeline.scheduler.config)

        def fitted(data: bytes, mode: str = "RGB") -> Image.Image:
            return ImageOps.fit(Image.open(io.BytesIO(data)).convert(mode), size, Image.Resampling.LANCZOS)

        composition = params.of_kind("composition")
        assert composition is not None
        control = outlines(fitted(request.guides["composition"]))
        arguments: dict[str, Any] = {"image": control}
        if request.reference is not None:
            assert params.reference is not None
            arguments = {
                "image": fitted(request.reference),
                "control_image": control,
                "strength": round(1 - params.reference.strength, 6),
            }
        if request.mask is not None:
            arguments["mask_image"] = fitted(request.mask, "L").point(lambda grey: 255 * (grey >= 128))
        if (style := params.of_kind("style")) is not None:
            pipeline.set_ip_adapter_scale(style.strength)
            arguments["ip_adapter_image"] = Image.open(io.BytesIO(request.guides["style"])).convert("RGB")
        assert params.seed is not None
        seeds = [params.seed + number for number in range(params.num_images)]
        return pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt or None,
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            controlnet_conditioning_scale=composition.strength,
            num_images_per_prompt=params.num_images,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **arguments,
        ).images[:1]

    def _pipeline(self, started: bool, masked: bool, styled: bool) -> Any:
        import diffusers

        key = (started, masked, styled)
        if key not in self._loaded:
            net = diffusers.ControlNetModel.from_pretrained(ensure_tiny("sdxl", self._root, "controlnet"))
            pipeline = getattr(diffusers, STOCK[started, masked]).from_pretrained(
                ensure_tiny("sdxl", self._root), controlnet=net, add_watermarker=False
            )
            pipeline.set_progress_bar_config(disable=True)
            if styled:
                pipeline.load_ip_adapter(
                    str(ensure_tiny("sdxl", self._root, "ip_adapter")),
                    subfolder="sdxl_models",
                    weight_name=STYLE_FILE,
                    image_encoder_folder="models/image_encoder",
                )
            self._loaded[key] = pipeline
        return self._loaded[key]


@pytest.fixture(scope="module")
def stock(tiny_root: Path) -> Stock:
    return Stock(tiny_root)


async def test_alone_each_is_bitwise_stock(sdxl: SDXL, composed: Make, stock: Stock) -> None:
    async with batching(sdxl) as engine:
        for request in (
            composed(0.8, num_images=2),
            composed(0.5, guidance_scale=1.0, negative_prompt="", scheduler="dpm++"),
            composed(0.5, start=0.3, steps=8),
            composed(0.6, start=0.2, masked=True, steps=8),
            composed(0.9, style=0.5, width=64, height=96, scheduler="euler_a"),
        ):
            [got] = await run(engine, [Arrival(request)])
            assert (got == stock.latents(request)).all()
            [other] = await run(engine, [Arrival(with_strength(request, 0.1))])
            assert difference(got, other) > 100 * TOLERANCE


def with_strength(request: GenerationRequest, strength: float) -> GenerationRequest:
    changed = tuple(
        one.model_copy(update={"strength": strength}) if one.kind == "composition" else one
        for one in request.params.references
    )
    return replace(request, params=request.params.model_copy(update={"references": changed}))


async def test_together_each_is_stock_but_for_rounding(sdxl: SDXL, composed: Make, stock: Stock) -> None:
    """Other scales, lengths of text, steps and guidance, beside plain requests, joining and leaving."""
    arrivals = [
        Arrival(composed(0.8, steps=9, num_images=2)),
        Arrival(composed(0.3, steps=8, seed=4), after=1),
        Arrival(composed(0.3, steps=8, seed=5, prompt="a red fox in the snow, golden light, " * 6), after=2),
        Arrival(composed(0.5, steps=6, seed=6, style=0.7, scheduler="dpm++"), after=3),
        Arrival(composed(0.5, steps=7, seed=7, guidance_scale=1.0, negative_prompt=""), after=3),
        Arrival(composed(0.9, steps=20, seed=8), cancelled_after=4),
        Arrival(composed(None, steps=9, seed=9)),
    ]
    async with batching(sdxl) as engine:
        got = await run(engine, arrivals)
        assert engine.rows > 2 * engine.forwards
        [plain] = await run(engine, [Arrival(arrivals[-1].request)])
    for arrival, latents in zip(arrivals[:-2], got, strict=False):
        assert difference(latents, stock.latents(arrival.request)) <= TOLERANCE
    assert difference(got[-1], plain) <= TOLERANCE


async def test_costs_tell_its_forwards_apart(sdxl: SDXL, composed: Make) -> None:
    async with batching(sdxl) as engine:
        await run(engine, [Arrival(composed(0.8)), Arrival(composed(None))])
        parts = {shape.part for shape in engine.costs[sdxl.model_name].seen if shape.width == 64}
    assert parts == {"", "composition", "controlnet"}
    assert shape_name(composed(0.8).params) == "64x64x1+composition"
    assert shape_name(composed(None).params) == "64x64x1"


@pytest.mark.parametrize("changes", [{}, {"start": 0.1}, {"start": 0.1, "masked": True}], ids=["text", "image", "mask"])
@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)], ids=str)
def test_guidance_interval_is_a_guided_run_whose_guidance_does_nothing_outside(
    sdxl: SDXL, composed: Make, recorder: Any, changes: dict[str, Any], interval: tuple[float, float]
) -> None:
    class PositiveOutside(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            output = super().forward(call)
            done, of = self.steps[-1] if self.steps else (0, 1)
            if call.part or interval[0] <= done / of < interval[1]:
                return output
            return (output[0].chunk(2)[1].repeat(2, 1, 1, 1),)

    request = {
        "steps": 9 if changes else 8,
        "num_images": 2,
        "guidance_scale": 20.0,
    } | changes  # of nine, eight are run from an image
    expected = sdxl.generate(composed(0.7, **request), PositiveOutside())
    made = sdxl.generate(composed(0.7, guidance_interval=interval, **request), recorder())
    whole = sdxl.generate(composed(0.7, **request), recorder())
    assert pixels_apart(made, expected) <= 1
    assert pixels_apart(made, whole) > 2


def test_calls_of_different_pipelines_share_a_forward(sdxl: SDXL, composed: Make, recorder: Any) -> None:
    """One of them does not name an argument that is None to the other."""
    calls: list[Call] = []

    class Keeping(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            calls.append(call)
            return super().forward(call)

    for changes in ({}, {"start": 0.1, "masked": True}):
        sdxl.generate(composed(0.5, steps=3, **changes), Keeping())
    for part in ("controlnet", ""):
        first, *_, last = [call for call in calls if call.part == part]
        assert first.key == last.key
        for pair in ([first, last], [last, first]):
            with torch.no_grad():
                together = run_together(pair)
                alone = [call.run() for call in pair]
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[-1], other[-1], atol=1e-4, rtol=1e-4)


def pixels_apart(one: Generation, other: Generation) -> int:
    """The largest difference in a colour."""
    pairs = zip(one.images or (), other.images or (), strict=True)
    return max(high for a, b in pairs for _, high in ImageChops.difference(a, b).getextrema())


@pytest.mark.parametrize("changes", [{}, {"start": 0.1, "steps": 8}, {"start": 0.1, "steps": 8, "masked": True}])
def test_guidance_interval_halves_the_controlnet_as_well(
    sdxl: SDXL, composed: Make, recorder: Any, changes: dict[str, Any]
) -> None:
    rows = []

    class Counting(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            rows.append((call.part, call.rows))
            return super().forward(call)

    sdxl.generate(composed(0.5, guidance_interval=(0.25, 0.5), **changes), Counting())
    assert {part for part, _ in rows} == {"controlnet", ""}
    assert [count for part, count in rows if part] == [count for part, count in rows if not part]
    assert {count for _, count in rows} == {1, 2}


def test_run_goes_on_from_its_state(sdxl: SDXL, composed: Make, recorder: Any) -> None:
    states = States(2)
    request = composed(0.7, style=0.4, steps=6)
    stopped = recorder(raise_at_step=5, error=InvalidInput("stop"))
    with pytest.raises(InvalidInput):
        sdxl.generate(replace(request, states=states), stopped)
    left = states.take()
    assert left is not None
    latents = []
    for resume in (left.to_bytes(), None):
        snapshots = Snapshots(0)
        made = sdxl.generate(replace(request, resume=resume, snapshots=snapshots), recorder())
        assert made.settings.get("resumed_from_step") == (4 if resume else None)
        last = snapshots.take()
        assert last is not None
        latents.append(last.latents)
    assert (latents[0] == latents[1]).all()


def test_settings_say_what_was_read(sdxl: SDXL, composed: Make, recorder: Any) -> None:
    made = sdxl.generate(composed(0.7), recorder())
    assert made.settings["pipeline"] == "StableDiffusionXLControlNetPipeline"
    assert made.settings["references"]["composition"] == {
        "strength": 0.7,
        "width": 96,
        "height": 96,
        "resize_policy": "center_crop",
        "reads": "edges",
    }
