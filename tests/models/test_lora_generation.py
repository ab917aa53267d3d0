"""Whole requests with LoRAs, through the engine: pictures of the stock pipeline, together and one by one."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.engine import Engine, GenerationRequest
from models.generation import Control, Generation, GenerationError
from models.lora.files import LoraFile, LoraRegistry
from models.lora.loras import LoraSource
from models.profile import ModelSpec
from models.sdxl import SDXL
from models.wan import WAN
from tests.models.lora_making import make_lora
from tests.models.test_engine_equality import TOLERANCE, Arrival, batching, difference, run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sdxl: SDXL, wan: WAN) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    files = {
        "ink": make_lora(folder / "ink.safetensors", sdxl._pipeline, 1),
        "oil": make_lora(folder / "oil.safetensors", sdxl._pipeline, 2, style="diffusers", rank=6),
        "slow": make_lora(folder / "slow.safetensors", wan._pipeline, 3, parts=("transformer",), style="diffusers"),
        "torn": folder / "torn.safetensors",
    }
    files["torn"].write_bytes(files["ink"].read_bytes()[:-100])
    return files


def with_loras(spec: ModelSpec, files: dict[str, Path], *names: str) -> ModelSpec:
    loras = {name: LoraSource(source=str(files[name])) for name in names}
    return ModelSpec.model_validate(spec.model_dump(exclude_unset=True) | {"loras": loras, "lora_cache_gib": 0.1})


@pytest.fixture(scope="module")
def studio(sdxl_spec: ModelSpec, tiny_sdxl: Path, files: dict[str, Path]) -> SDXL:
    model = SDXL(with_loras(sdxl_spec, files, "ink", "oil", "torn"), tiny_sdxl)
    model.load()
    return model


@pytest.fixture
async def engine(studio: SDXL) -> AsyncIterator[Engine]:
    async with batching(studio) as engine:
        yield engine


def pixels(made: Generation) -> np.ndarray[Any, Any]:
    assert made.images is not None
    return np.stack([np.asarray(image, dtype=np.int16) for image in made.images])


def uses(**weights: float) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in weights.items()]


def test_a_request_gets_the_picture_of_the_stock_pipeline(
    studio: SDXL, tiny_sdxl: Path, files: dict[str, Path], image_request: Callable[..., GenerationRequest]
) -> None:
    from diffusers import StableDiffusionXLPipeline

    stock = StableDiffusionXLPipeline.from_pretrained(str(tiny_sdxl), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(files["ink"]), adapter_name="ink")
    stock.set_adapters(["ink"], [0.8])
    request = image_request(loras=uses(ink=0.8))
    params = request.params
    expected = stock(
        params.prompt,
        negative_prompt=params.negative_prompt,
        width=params.width,
        height=params.height,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(11)],
        output_type="np",
    ).images
    made = studio.generate(request, Control())
    assert np.array_equal(pixels(made), (expected * 255).round().astype(np.int16))
    assert not np.array_equal(pixels(made), pixels(studio.generate(image_request(), Control())))


def test_the_same_prompt_is_encoded_anew_for_other_loras(
    studio: SDXL, image_request: Callable[..., GenerationRequest]
) -> None:
    before = studio._embeddings.misses
    for loras in (uses(ink=0.31), uses(ink=0.32), uses(ink=0.31), []):
        studio.generate(image_request(prompt="the same words", loras=loras, steps=1), Control())
    assert studio._embeddings.misses - before == 3


def test_the_result_records_what_was_used(studio: SDXL, image_request: Callable[..., GenerationRequest]) -> None:
    assert studio.adapters is not None
    made = studio.generate(image_request(loras=uses(oil=-0.5), steps=1), Control())
    digest = studio.adapters._registry.file("oil").sha256
    assert made.settings["loras"] == [{"name": "oil", "weight": -0.5, "sha256": digest}]
    assert studio.generate(image_request(steps=1), Control()).settings["loras"] == []


async def test_requests_with_different_loras_share_forwards_and_equal_each_alone(
    engine: Engine, image_request: Callable[..., GenerationRequest]
) -> None:
    sets = (uses(ink=1.0), [], uses(oil=0.5, ink=-0.5), uses(ink=0.3))
    wanted = [Arrival(image_request(loras=loras, seed=7, steps=6)) for loras in sets]
    alone = [(await run(engine, [one]))[0] for one in wanted]
    forwards = engine.forwards
    together = await run(engine, wanted)
    assert engine.forwards - forwards < 0.6 * forwards
    for one, latents in zip(alone, together, strict=True):
        assert difference(latents, one) < TOLERANCE
    assert all(difference(one, other) > 0.01 for one, other in itertools.combinations(alone, 2))


async def test_requests_with_different_loras_are_kept_apart_where_the_profile_says_so(
    sdxl_spec: ModelSpec, tiny_sdxl: Path, files: dict[str, Path], image_request: Callable[..., GenerationRequest]
) -> None:
    spec = with_loras(sdxl_spec, files, "ink", "oil").model_copy(update={"mix_loras": False})
    async with batching(SDXL(spec, tiny_sdxl)) as engine:
        before = engine.forwards
        await run(engine, [Arrival(image_request(loras=uses(**{name: 1.0}), steps=6)) for name in ("ink", "oil")])
        assert engine.forwards - before == 12


async def test_a_bad_lora_fails_its_own_request_alone(
    engine: Engine, studio: SDXL, image_request: Callable[..., GenerationRequest]
) -> None:
    good, bad = image_request(loras=uses(ink=1.0)), image_request(loras=uses(ink=1.0, torn=1.0))
    expected = pixels(await engine.submit(good).result())
    tickets = [engine.submit(one) for one in (good, bad, good)]
    results = await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)
    assert isinstance(results[1], GenerationError)
    assert (results[1].code, results[1].retryable) == ("lora_invalid", False)
    for made in (results[0], results[2]):
        assert isinstance(made, Generation)
        assert np.abs(pixels(made) - expected).max() <= 1
    assert engine.alive


async def test_every_way_out_of_a_request_gives_its_loras_back(
    engine: Engine, studio: SDXL, image_request: Callable[..., GenerationRequest]
) -> None:
    assert studio.adapters is not None
    cancelled = engine.submit(image_request(loras=uses(ink=1.0), steps=50))
    cancelled.cancel()
    failing = engine.submit(image_request(loras=uses(oil=1.0), frames=5))
    done = engine.submit(image_request(loras=uses(ink=1.0), steps=1))
    results = await asyncio.gather(*(t.result() for t in (cancelled, failing, done)), return_exceptions=True)
    assert [getattr(result, "code", "done") for result in results] == ["cancelled", "invalid_input", "done"]
    assert {loaded.leases for loaded in studio.adapters._loaded.values()} <= {0}


def test_a_video_is_changed_by_its_lora(
    wan_spec: ModelSpec, tiny_wan: Path, files: dict[str, Path], video_request: Callable[..., GenerationRequest]
) -> None:
    model = WAN(with_loras(wan_spec, files, "slow"), tiny_wan)
    model.load()
    with_it = model.generate(video_request(loras=uses(slow=1.0), steps=2), Control())
    without = model.generate(video_request(steps=2), Control())
    assert with_it.frames is not None
    assert without.frames is not None
    assert not np.array_equal(with_it.frames, without.frames)
    assert with_it.settings["loras"][0]["name"] == "slow"


class Slow:
    """A registry whose files come when they are let."""

    def __init__(self, registry: LoraRegistry) -> None:
        self._registry, self.asked, self.let = registry, threading.Event(), threading.Event()

    def names(self) -> Collection[str]:
        return self._registry.names()

    def file(self, name: str) -> LoraFile:
        self.asked.set()
        assert self.let.wait(60)
        return self._registry.file(name)


@pytest.mark.parametrize("overlap", [False, True])
async def test_a_file_that_is_slow_to_come_holds_up_nobody_else(
    studio: SDXL, monkeypatch: pytest.MonkeyPatch, image_request: Callable[..., GenerationRequest], overlap: bool
) -> None:
    registry = Slow(studio.registry)
    engine = Engine(studio, slots=2, overlap=overlap)
    engine.start()
    try:
        await engine.ready()
        monkeypatch.setattr(studio.adapters, "_registry", registry)
        waits = engine.submit(image_request(loras=uses(ink=1.0)))
        assert await asyncio.to_thread(registry.asked.wait, 60)
        assert (await engine.submit(image_request()).result()).images
        assert not waits.done
        registry.let.set()
        assert (await waits.result()).images
    finally:
        registry.let.set()
        await asyncio.to_thread(engine.close)
