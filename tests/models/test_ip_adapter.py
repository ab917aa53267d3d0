"""Style and character references: what the stock pipeline makes with its adapters and scales, also in company."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from models.denoising.lanes import adopt
from models.denoising.preview import Snapshots
from models.engine import Engine, GenerationRequest, InvalidInput
from models.generation import ReferenceTypeUnavailable
from models.guiding.image_prompts import ImagePrompt
from models.lora.loras import LoraSource, LoraUse
from models.profile import ModelSpec
from models.samples.tiny import ensure_tiny
from models.samples.tiny_guides import CHARACTER_FILE, STYLE_FILE
from models.sdxl import SCHEDULERS, SDXL
from tests.models.lora_making import make_lora
from tests.models.test_engine_equality import TOLERANCE, Arrival, batching, difference, run

Make = Callable[..., GenerationRequest]
FILES = {"style": STYLE_FILE, "character": CHARACTER_FILE}


@pytest.fixture(scope="session")
def face() -> bytes:
    """Another picture, not square."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((80, 48)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def prompted(image_request: Make, of_kind: Any, picture: bytes, face: bytes) -> Make:
    """A request with references of the named kinds and strengths."""

    def make(style: float | None = None, character: float | None = None, **changes: Any) -> GenerationRequest:
        strengths = {"style": style, "character": character}
        given = {kind: strength for kind, strength in strengths.items() if strength is not None}
        references = [of_kind(kind, strength=strength) for kind, strength in given.items()]
        if (start := changes.pop("start", None)) is not None:
            references.append(of_kind("image", strength=start))
        files = {"style": picture, "character": face}
        guides = {kind: files[kind] for kind in given}
        return image_request(picture if start is not None else None, references=references, guides=guides, **changes)

    return make


class Stock:
    """The pipelines of diffusers with the adapters of a request and no others, by name of their kinds."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[Any, Any] = {}

    def latents(self, request: GenerationRequest, **changes: Any) -> Any:
        """The first image's final latents."""
        import diffusers

        params = request.params
        kinds = tuple(kind for kind in FILES if kind in request.guides)
        pipeline = self._pipeline(request.reference is not None, kinds)
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[params.scheduler]).from_config(pipeline.scheduler.config)
        arguments: dict[str, Any] = {"width": params.width, "height": params.height}
        if request.reference is not None:
            assert params.reference is not None
            image = Image.open(io.BytesIO(request.reference)).convert("RGB")
            fitted = ImageOps.fit(image, (params.width, params.height), Image.Resampling.LANCZOS)
            arguments = {"image": fitted, "strength": round(1 - params.reference.strength, 6)}
        if kinds:
            pipeline.set_ip_adapter_scale([params.of_kind(kind).strength for kind in kinds])  # type: ignore[arg-type,union-attr]
            images = [Image.open(io.BytesIO(request.guides[kind])).convert("RGB") for kind in kinds]  # type: ignore[index]
            arguments["ip_adapter_image"] = images
        assert params.seed is not None
        seeds = [params.seed + number for number in range(params.num_images)]
        return pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt or None,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            num_images_per_prompt=params.num_images,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **arguments | changes,
        ).images[:1]

    def _pipeline(self, started: bool, kinds: tuple[str, ...]) -> Any:
        import diffusers

        if (started, kinds) not in self._loaded:
            kind = diffusers.StableDiffusionXLImg2ImgPipeline if started else diffusers.StableDiffusionXLPipeline
            pipeline = kind.from_pretrained(ensure_tiny("sdxl", self._root), add_watermarker=False)
            pipeline.set_progress_bar_config(disable=True)
            if kinds:
                pipeline.load_ip_adapter(
                    str(ensure_tiny("sdxl", self._root, "ip_adapter")),
                    subfolder="sdxl_models",
                    weight_name=[FILES[kind] for kind in kinds],
                    image_encoder_folder="models/image_encoder",
                )
            self._loaded[started, kinds] = pipeline
        return self._loaded[started, kinds]


@pytest.fixture(scope="module")
def stock(tiny_root: Path) -> Stock:
    return Stock(tiny_root)


async def alone(engine: Engine, request: GenerationRequest) -> Any:
    [latents] = await run(engine, [Arrival(request)])
    return latents


async def test_alone_each_is_bitwise_stock(sdxl: SDXL, prompted: Make, stock: Stock) -> None:
    unguided = {"guidance_scale": 1.0, "negative_prompt": ""}
    async with batching(sdxl) as engine:
        for request in (
            prompted(style=0.6),
            prompted(character=0.9, num_images=3, scheduler="dpm++"),
            prompted(style=0.3, character=1.0, **unguided),
            prompted(style=0.4, character=0.7, start=0.4, steps=8),
            prompted(style=1.0, width=64, height=96, scheduler="euler_a"),
        ):
            got, expected = await alone(engine, request), stock.latents(request)
            assert (got == expected).all()
            assert difference(got, stock.latents(replace(request, guides={}))) > 100 * TOLERANCE


async def test_together_each_is_stock_but_for_rounding(sdxl: SDXL, prompted: Make, stock: Stock) -> None:
    """With and without adapters, of other scales, lengths, guidance and steps, that join and leave."""
    arrivals = [
        Arrival(prompted(style=0.6, steps=9, num_images=2)),
        Arrival(prompted(steps=8, seed=3)),
        Arrival(prompted(style=0.2, steps=9, seed=4, prompt="a red fox in the snow, golden light, " * 6), after=1),
        Arrival(prompted(character=0.8, style=0.9, steps=6, seed=5, scheduler="dpm++"), after=2),
        Arrival(prompted(character=0.5, steps=7, seed=6, guidance_scale=1.0, negative_prompt=""), after=2),
        Arrival(prompted(style=0.7, start=0.2, steps=9, seed=7), after=3),
        Arrival(prompted(style=0.7, steps=20, seed=8), cancelled_after=4),
    ]
    async with batching(sdxl) as engine:
        got = await run(engine, arrivals)
        assert engine.rows > 2 * engine.forwards
    for arrival, latents in zip(arrivals[:-1], got, strict=False):
        assert difference(latents, stock.latents(arrival.request)) <= TOLERANCE


async def test_plain_request_is_bitwise_stock_before_and_after(sdxl: SDXL, prompted: Make, stock: Stock) -> None:
    async with batching(sdxl) as engine:
        for _ in range(2):
            assert (await alone(engine, prompted(seed=9)) == stock.latents(prompted(seed=9))).all()
            await alone(engine, prompted(style=0.6))


def test_guidance_interval_attends_in_both_of_its_parts(sdxl: SDXL, prompted: Make, recorder: Any) -> None:
    rows = []

    class Counting(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            rows.append((call.rows, [len(prompt.tokens) for prompt in call.prompts]))
            return super().forward(call)

    sdxl.generate(prompted(style=0.6, guidance_interval=(0.25, 0.5), num_images=2), Counting())
    assert rows == [(2, [2]), (4, [4]), (2, [2]), (2, [2])]


def test_settings_name_each_reference(sdxl: SDXL, prompted: Make, recorder: Any) -> None:
    made = sdxl.generate(prompted(style=0.6, character=0.5, start=0.25), recorder())
    told = made.settings["references"]
    assert told["style"] == {"strength": 0.6, "width": 96, "height": 96, "adapter": STYLE_FILE}
    assert told["character"] == {"strength": 0.5, "width": 80, "height": 48, "adapter": CHARACTER_FILE}
    assert told["image"]["denoise_strength"] == 0.75


def test_kind_that_is_not_loaded_is_refused(
    sdxl_spec: ModelSpec, tiny_sdxl: Path, prompted: Make, recorder: Any
) -> None:
    assert sdxl_spec.ip_adapter is not None
    only = sdxl_spec.ip_adapter.model_copy(update={"character": None})
    model = SDXL(sdxl_spec.model_copy(update={"ip_adapter": only, "controlnet": None}), tiny_sdxl)
    model.load()
    model.generate(prompted(style=0.6), recorder())
    with pytest.raises(ReferenceTypeUnavailable, match="character"):
        model.generate(prompted(character=0.6), recorder())


def test_reference_without_its_bytes_is_refused(sdxl: SDXL, prompted: Make, recorder: Any, picture: bytes) -> None:
    for request in (
        replace(prompted(style=0.6), guides={}),
        replace(prompted(), guides={"style": picture}),
        replace(prompted(style=0.6), guides={"style": b"no picture"}),
    ):
        with pytest.raises(InvalidInput):
            sdxl.generate(request, recorder())


async def test_lora_and_images_work_together(
    sdxl_spec: ModelSpec, tiny_sdxl: Path, prompted: Make, stock: Stock, tmp_path: Path
) -> None:
    """The LoRA changes the projections between which the images are added; alone and in company as in diffusers."""
    expected = stock._pipeline(False, ("style",))
    file = make_lora(tmp_path / "ink.safetensors", expected, 1)
    loras = {"ink": LoraSource(source=str(file))}
    model = SDXL(sdxl_spec.model_copy(update={"loras": loras, "lora_cache_gib": 0.1}), tiny_sdxl)
    request = prompted(style=0.6, loras=(LoraUse(name="ink", weight=0.8),), steps=6)
    async with batching(model) as engine:
        got = await alone(engine, request)
        beside = await run(engine, [Arrival(request), Arrival(prompted(character=0.5, steps=6, seed=3))])
    expected.load_lora_weights(str(file), adapter_name="ink")
    expected.set_adapters(["ink"], [0.8])
    try:
        latents = stock.latents(request)
    finally:
        expected.unload_lora_weights()
    assert difference(got, latents) <= TOLERANCE
    assert difference(beside[0], latents) <= TOLERANCE
    assert difference(got, stock.latents(request)) > 100 * TOLERANCE  # without the LoRA


def test_picture_is_encoded_once(sdxl: SDXL, prompted: Make, recorder: Any) -> None:
    kept = sdxl._references._encoded
    sdxl.generate(prompted(style=0.6), recorder())
    before = kept.misses
    sdxl.generate(prompted(style=0.9, seed=77), recorder())
    assert kept.misses == before


async def test_state_is_gone_on_from_with_the_same_references_only(
    sdxl: SDXL, prompted: Make, face: bytes, recorder: Any
) -> None:
    from models.denoising.resumption import States

    states, snapshots = States(2), Snapshots(0)
    request = prompted(style=0.6, steps=6)
    stopped = recorder(raise_at_step=5, error=InvalidInput("stop"))
    with pytest.raises(InvalidInput):
        sdxl.generate(replace(request, states=states), stopped)
    left = states.take()
    assert left is not None
    data = left.to_bytes()
    resumed = sdxl.generate(replace(request, resume=data, snapshots=snapshots), recorder())
    assert resumed.settings["resumed_from_step"] == 4
    whole = sdxl.generate(request, recorder())
    assert resumed.images is not None
    assert whole.images is not None
    assert resumed.images[0].tobytes() == whole.images[0].tobytes()
    other = sdxl.generate(replace(request, guides={"style": face}, resume=data), recorder())
    assert other.settings["resumed_from_step"] is None


def test_image_tokens_of_a_lane_are_kept_from_reuse() -> None:
    class OnCard:
        is_cuda = True
        kept = False

        def record_stream(self, stream: Any) -> None:
            self.kept = True

    tokens = OnCard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda: None)
        adopt((ImagePrompt("style", 0.5, tokens),))
    assert tokens.kept
