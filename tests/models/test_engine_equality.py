"""Requests that share forwards make what the stock pipelines of diffusers make alone, but for rounding."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from models.denoising.costs import Costs, shape_of
from models.denoising.preview import Snapshots
from models.engine import Cancelled, Engine, GenerationRequest, Ticket
from models.params import GenerationParams
from models.pipeline import PipelineModel
from models.sdxl import SCHEDULERS, SDXL
from models.wan import SCHEDULERS as WAN_SCHEDULERS
from models.wan import WAN

Make = Callable[..., GenerationRequest]

TOLERANCE = 1e-5  # of the largest value of the latents
DEADLINE = 120
UNMASKED = {"bucket": "b", "key": "k", "strength": 0.4}
MASKED = UNMASKED | {"strength": 0.2, "mask": {"bucket": "b", "key": "m"}}
PROMPTS = ("a cat", "a red fox in the snow, golden light, " * 6, "(a city)1.3 at night", "x")


@dataclass(frozen=True)
class Arrival:
    """A request that joins after so many forwards of the engine, and may be cancelled after so many more."""

    request: GenerationRequest
    after: int = 0
    cancelled_after: int | None = None


@asynccontextmanager
async def batching(model: PipelineModel, slots: int = 8) -> AsyncIterator[Engine]:
    """An engine whose profile says that up to 16 rows are worth a forward, whatever this machine would say."""
    engine = Engine(model, slots=slots)
    engine.start()
    try:
        async with asyncio.timeout(DEADLINE):
            await engine.ready()
            costs = Costs()
            sample = shape_of(model.sample_request().params)
            costs.measured[sample] = costs.seen[sample] = {1: 1.0, 16: 1.0}
            engine.costs[model.model_name] = costs
            yield engine
    finally:
        await asyncio.to_thread(engine.close, DEADLINE)


async def run(engine: Engine, arrivals: list[Arrival]) -> list[Any]:
    """The final latents of each, or None for the cancelled."""
    begun = engine.forwards

    async def one(arrival: Arrival) -> Any:
        await reached(engine, begun + arrival.after)
        snapshots = Snapshots(0)
        ticket: Ticket = engine.submit(replace(arrival.request, snapshots=snapshots))
        if arrival.cancelled_after is not None:
            await reached(engine, engine.forwards + arrival.cancelled_after, ticket)
            ticket.cancel()
        try:
            await ticket.result()
        except Cancelled:
            return None
        last = snapshots.take()
        assert last is not None
        return last.latents

    return await asyncio.gather(*map(one, arrivals))


async def reached(engine: Engine, forwards: int, ticket: Ticket | None = None) -> None:
    # the engine counts on its own thread and tells nobody
    while engine.forwards < forwards and engine.free_slots < engine.slots and not (ticket and ticket.done):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def difference(got: Any, expected: Any) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def params_of(request: GenerationRequest) -> GenerationParams:
    return request.params


def stock_sdxl(model: SDXL, request: GenerationRequest) -> Any:
    """The first image's final latents, by the pipeline of diffusers and nothing else."""
    import diffusers
    import torch

    params = request.params
    kind = diffusers.StableDiffusionXLPipeline
    arguments: dict[str, Any] = {"width": params.width, "height": params.height}
    if request.reference is not None:
        assert params.reference is not None
        kind = diffusers.StableDiffusionXLImg2ImgPipeline
        image = Image.open(io.BytesIO(request.reference)).convert("RGB")
        fitted = ImageOps.fit(image, (params.width, params.height), Image.Resampling.LANCZOS)
        arguments = {"image": fitted, "strength": round(1 - params.reference.strength, 6)}
        if request.mask is not None:
            kind = diffusers.StableDiffusionXLInpaintPipeline
            repainted = ImageOps.fit(Image.open(io.BytesIO(request.mask)), (params.width, params.height))
            repainted = repainted.point(lambda grey: 255 * (grey >= 128))
            arguments |= {"mask_image": repainted, "width": params.width, "height": params.height}
    pipeline = kind(**model._pipeline.components, add_watermarker=False)
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[params.scheduler]).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(params.seed or 0, (params.seed or 0) + params.num_images)
    made = pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt or None,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance_scale,
        num_images_per_prompt=params.num_images,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **arguments,
    )
    return made.images[0]


def stock_wan(model: WAN, request: GenerationRequest) -> Any:
    """The middle frame's final latents, by the pipeline of diffusers and nothing else."""
    import diffusers
    import torch

    params = request.params
    config = {name: model._pipeline.config[name] for name in ("boundary_ratio", "expand_timesteps")}
    pipeline = diffusers.WanPipeline(**model._pipeline.components, **config)
    pipeline.scheduler = model._scheduler(params)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        width=params.width,
        height=params.height,
        num_frames=params.frames,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator().manual_seed(params.seed or 0),
        output_type="latent",
    ).frames[0]
    return latents[:, latents.shape[1] // 2]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_sdxl_alone_is_bitwise_stock(sdxl: SDXL, image_request: Make, scheduler: str) -> None:
    request = image_request(scheduler=scheduler, steps=5)
    async with batching(sdxl) as engine:
        [got] = await run(engine, [Arrival(request)])
    assert (got == stock_sdxl(sdxl, request)).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_inpainting_alone_is_bitwise_stock(
    sdxl: SDXL, image_request: Make, picture: bytes, mask: bytes, scheduler: str
) -> None:
    request = image_request(picture, mask=mask, reference=MASKED, scheduler=scheduler, steps=6, num_images=2)
    async with batching(sdxl) as engine:
        [got] = await run(engine, [Arrival(request)])
    assert (got == stock_sdxl(sdxl, request)).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_inpainting_together_is_stock_but_for_rounding(
    sdxl: SDXL, image_request: Make, picture: bytes, mask: bytes, scheduler: str
) -> None:
    """Beside other masks, plain images and images from images, of mixed steps and guidance, that join later."""
    own = {"scheduler": scheduler, "reference": MASKED}
    arrivals = [
        Arrival(image_request(picture, mask=mask, steps=9, num_images=2, **own)),
        Arrival(image_request(steps=5, scheduler="euler", seed=3)),
        Arrival(image_request(mask, mask=mask, steps=12, seed=5, guidance_scale=9.0, **own), after=2),
        Arrival(image_request(picture, steps=10, seed=6, scheduler="dpm++", reference=UNMASKED), after=1),
        Arrival(image_request(picture, mask=mask, steps=8, guidance_scale=1.0, negative_prompt="", **own), after=3),
    ]
    async with batching(sdxl) as engine:
        got = await run(engine, arrivals)
        assert engine.rows > 2 * engine.forwards
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock_sdxl(sdxl, arrival.request)) <= TOLERANCE


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_sdxl_together_is_stock_but_for_rounding(
    sdxl: SDXL, image_request: Make, picture: bytes, scheduler: str
) -> None:
    """Every scheduler, from text and from an image, with others of mixed steps, guidance and length that join later."""
    own = [
        image_request(scheduler=scheduler, steps=8, prompt=PROMPTS[1], num_images=2),
        image_request(picture, scheduler=scheduler, steps=9, reference=UNMASKED, seed=4),
    ]
    others = [
        image_request(scheduler="euler", steps=4, guidance_scale=1.0, negative_prompt="", seed=3),
        image_request(scheduler="dpm++", steps=11, guidance_scale=9.0, seed=2, prompt=PROMPTS[3]),
    ]
    async with batching(sdxl) as engine:
        arrivals = [Arrival(own[0]), Arrival(others[0]), Arrival(own[1], after=2), Arrival(others[1], after=3)]
        got = await run(engine, arrivals)
        assert engine.rows > 2 * engine.forwards  # they did share forwards
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock_sdxl(sdxl, arrival.request)) <= TOLERANCE


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
async def test_wan_alone_is_bitwise_stock(wan: WAN, video_request: Make, scheduler: str) -> None:
    request = video_request(scheduler=scheduler)
    async with batching(wan) as engine:
        [got] = await run(engine, [Arrival(request)])
    assert (got == stock_wan(wan, request)).all()


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
async def test_wan_together_is_stock_but_for_rounding(wan: WAN, video_request: Make, scheduler: str) -> None:
    arrivals = [
        Arrival(video_request(scheduler=scheduler, steps=5)),
        Arrival(video_request(scheduler=scheduler, steps=3, guidance_scale=1.0, negative_prompt="", seed=8)),
        Arrival(video_request(scheduler="unipc", steps=7, seed=9, prompt="a dog runs"), after=3),
        Arrival(video_request(frames=1, fps=None, scheduler=scheduler, steps=4), after=1),
    ]
    async with batching(wan) as engine:
        got = await run(engine, arrivals)
        assert engine.rows > engine.forwards
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock_wan(wan, arrival.request)) <= TOLERANCE


def _requests(make: Make, picture: bytes, mask: bytes) -> st.SearchStrategy[Arrival]:
    @st.composite
    def arrival(draw: st.DrawFn) -> Arrival:
        guidance = draw(st.sampled_from([1.0, 3.0, 7.5]))
        fields: dict[str, Any] = {
            "prompt": draw(st.sampled_from(PROMPTS)),
            "negative_prompt": draw(st.sampled_from(["", "blurry"])) if guidance > 1 else "",
            "seed": draw(st.integers(0, 2**40)),
            "steps": draw(st.integers(2, 9)),
            "guidance_scale": guidance,
            "scheduler": draw(st.sampled_from(sorted(SCHEDULERS))),
            "num_images": draw(st.sampled_from([1, 1, 3])),
        }
        fields["width"], fields["height"] = draw(st.sampled_from([(64, 64), (64, 96), (96, 64)]))
        started_from = None
        if draw(st.booleans()):
            fields["reference"] = {"bucket": "b", "key": "k", "strength": draw(st.sampled_from([0.2, 0.5]))}
            started_from = picture
            if draw(st.booleans()):
                fields["mask"] = mask
                fields["reference"] = MASKED
        cancelled = draw(st.one_of(st.none(), st.none(), st.integers(0, 6)))
        return Arrival(make(started_from, **fields), draw(st.integers(0, 12)), cancelled)

    return arrival()


async def test_sdxl_with_joins_and_leaves_at_random_steps_is_stock(
    sdxl: SDXL, image_request: Make, picture: bytes, mask: bytes
) -> None:
    async with batching(sdxl, slots=6) as engine:
        loop = asyncio.get_running_loop()

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(st.lists(_requests(image_request, picture, mask), min_size=2, max_size=5))
        def holds(arrivals: list[Arrival]) -> None:
            got = asyncio.run_coroutine_threadsafe(run(engine, arrivals), loop).result(DEADLINE)
            for arrival, latents in zip(arrivals, got, strict=True):
                if latents is None:
                    assert arrival.cancelled_after is not None
                else:
                    assert difference(latents, stock_sdxl(sdxl, arrival.request)) <= TOLERANCE
            assert engine.free_slots == engine.slots

        await asyncio.to_thread(holds)


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
async def test_two_experts_alone_are_bitwise_stock(two_experts: WAN, video_request: Make, scheduler: str) -> None:
    request = video_request(scheduler=scheduler, steps=6)
    async with batching(two_experts) as engine:
        [got] = await run(engine, [Arrival(request)])
    assert (got == stock_wan(two_experts, request)).all()


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
async def test_two_experts_together_are_stock_but_for_rounding(
    two_experts: WAN, video_request: Make, scheduler: str
) -> None:
    """Requests that join on both sides of the others' boundary, with steps, guidance and shifts of their own."""
    arrivals = [
        Arrival(video_request(scheduler=scheduler, steps=6)),
        Arrival(video_request(scheduler=scheduler, steps=6, guidance_scale=1.0, negative_prompt="", seed=8)),
        Arrival(video_request(scheduler="euler", steps=8, seed=9, prompt="a dog runs"), after=3),
        Arrival(video_request(scheduler="unipc", steps=5, seed=10, shift=2.0), after=6),
        Arrival(video_request(frames=1, fps=None, scheduler=scheduler, steps=7), after=1),
    ]
    async with batching(two_experts) as engine:
        got = await run(engine, arrivals)
        assert engine.rows > engine.forwards
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock_wan(two_experts, arrival.request)) <= TOLERANCE


async def test_joins_at_random_steps_across_the_boundary_of_two_experts_are_stock(
    two_experts: WAN, video_request: Make
) -> None:
    fields = st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**40),
            "steps": st.integers(2, 8),
            "scheduler": st.sampled_from(sorted(WAN_SCHEDULERS)),
            "shift": st.sampled_from([1.0, 3.0, 5.0]),
            "frames": st.sampled_from([5, 5, 9]),
            "guidance_scale": st.sampled_from([3.0, 6.5]),
        }
    )
    cancelled = st.one_of(st.none(), st.none(), st.integers(0, 6))
    arrivals_of = st.builds(
        lambda changes, after, stop: Arrival(video_request(**changes), after, stop),
        fields,
        st.integers(0, 12),
        cancelled,
    )
    together: set[bool] = set()
    async with batching(two_experts, slots=6) as engine:
        loop, step = asyncio.get_running_loop(), engine._forwards.step

        def watched(parked: Any) -> Any:
            together.add(len({id(run.call.module) for run in parked}) == 2)
            return step(parked)

        engine._forwards.step = watched  # type: ignore[method-assign]

        @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(st.lists(arrivals_of, min_size=2, max_size=4))
        def holds(arrivals: list[Arrival]) -> None:
            got = asyncio.run_coroutine_threadsafe(run(engine, arrivals), loop).result(DEADLINE)
            for arrival, latents in zip(arrivals, got, strict=True):
                if latents is None:
                    assert arrival.cancelled_after is not None
                else:
                    assert difference(latents, stock_wan(two_experts, arrival.request)) <= TOLERANCE

        await asyncio.to_thread(holds)
    assert together == {True, False}  # requests did wait for different experts at the same time


async def test_a_timestep_for_each_token_is_shared_and_stock(expanded: WAN, video_request: Make) -> None:
    arrivals = [
        Arrival(video_request(steps=5)),
        Arrival(video_request(steps=4, scheduler="euler", seed=8)),
        Arrival(video_request(steps=6, scheduler="dpm++", seed=9, guidance_scale=1.0, negative_prompt=""), after=2),
    ]
    async with batching(expanded) as engine:
        [alone] = await run(engine, arrivals[:1])
        rows, forwards = engine.rows, engine.forwards
        got = await run(engine, arrivals)
        assert engine.rows - rows > engine.forwards - forwards
    assert (alone == stock_wan(expanded, arrivals[0].request)).all()
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock_wan(expanded, arrival.request)) <= TOLERANCE


async def test_reproducible_request_keeps_its_forwards_to_itself(sdxl: SDXL, image_request: Make) -> None:
    pinned = image_request(reproducible=True, steps=6, num_images=2)
    async with batching(sdxl) as engine:
        [alone] = await run(engine, [Arrival(pinned)])
        crowd = [Arrival(image_request(seed=seed, steps=9)) for seed in range(4)]
        beside = await run(engine, [*crowd, Arrival(pinned, after=2)])
    assert (beside[-1] == alone).all()
