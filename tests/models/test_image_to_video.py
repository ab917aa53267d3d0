"""Start and end frames: what the stock image-to-video pipeline makes, alone and in company."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models.denoising.costs import shape_name
from models.denoising.embeddings import Embeddings
from models.denoising.lanes import Lanes
from models.denoising.resumption import States
from models.engine import Engine, GenerationRequest, InvalidInput, ModelLoadFailed
from models.generation import ReferenceTypeUnavailable
from models.lora.loras import LoraUse
from models.profile import ModelSpec
from models.samples.tiny import ensure_tiny
from models.wan import SCHEDULERS, WAN
from tests.models.test_engine_equality import TOLERANCE, Arrival, batching, difference, run, stock_wan

Make = Callable[..., GenerationRequest]
VARIANTS = {"never": "image_to_video", "optional": "image_to_video_latents", "required": "first_and_last_frame"}


@pytest.fixture
def framed(video_request: Make, of_kind: Any, picture: bytes, mask: bytes) -> Make:
    """A request with a start frame, and an end frame if it is asked for."""

    def make(end: bool = False, **changes: Any) -> GenerationRequest:
        guides = {"start_frame": picture} | ({"end_frame": mask} if end else {})
        request = video_request(references=[of_kind(kind) for kind in guides], **changes)
        return replace(request, guides=guides)

    return make


def with_end(spec: ModelSpec, end_frame: str) -> ModelSpec:
    assert spec.image_to_video is not None
    entry = spec.image_to_video.model_copy(update={"end_frame": end_frame})
    return spec.model_copy(update={"image_to_video": entry})


@pytest.fixture(scope="module")
def optional(wan_spec: ModelSpec, tiny_wan: Path) -> WAN:
    model = WAN(with_end(wan_spec, "optional"), tiny_wan)
    model.load()
    return model


@pytest.fixture(scope="module")
def required(wan_spec: ModelSpec, tiny_wan: Path) -> WAN:
    model = WAN(with_end(wan_spec, "required"), tiny_wan)
    model.load()
    return model


def stock(root: Path, end_frame: str, request: GenerationRequest) -> Any:
    """The last latents by the pipeline of diffusers from its own checkpoint, encoders and all."""
    from diffusers import WanImageToVideoPipeline

    params = request.params
    folder = ensure_tiny("wan", root, VARIANTS[end_frame])  # type: ignore[arg-type]
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    import diffusers

    kind = getattr(diffusers, SCHEDULERS[params.scheduler])
    if params.scheduler == "euler":
        pipeline.scheduler = kind(num_train_timesteps=1000, shift=params.shift)
    else:
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": params.shift}
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)

    def fitted(name: Any) -> Image.Image:
        image = Image.open(io.BytesIO(request.guides[name])).convert("RGB")
        return ImageOps.fit(image, (params.width, params.height), Image.Resampling.LANCZOS)

    latents = pipeline(
        image=fitted("start_frame"),
        last_image=fitted("end_frame") if "end_frame" in request.guides else None,
        prompt=params.prompt,
        negative_prompt=params.negative_prompt or None,
        width=params.width,
        height=params.height,
        num_frames=params.frames,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator().manual_seed(params.seed or 0),
        output_type="latent",
    ).frames[0]
    return latents[:, latents.shape[1] // 2]


async def same(model: WAN, root: Path, end_frame: str, request: GenerationRequest) -> bool:
    async with batching(model) as engine:
        [got] = await run(engine, [Arrival(request)])
    return bool((got == stock(root, end_frame, request)).all())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
async def test_start_frame_alone_is_bitwise_stock(wan: WAN, tiny_root: Path, framed: Make, scheduler: str) -> None:
    assert await same(wan, tiny_root, "never", framed(scheduler=scheduler))


async def test_end_frame_is_bitwise_stock(optional: WAN, required: WAN, tiny_root: Path, framed: Make) -> None:
    assert await same(optional, tiny_root, "optional", framed())
    assert await same(optional, tiny_root, "optional", framed(end=True))
    assert await same(required, tiny_root, "required", framed(end=True, guidance_scale=1.0, negative_prompt=""))


async def test_together_each_is_stock_but_for_rounding(
    wan: WAN, tiny_root: Path, framed: Make, video_request: Make
) -> None:
    arrivals = [
        Arrival(framed(steps=5)),
        Arrival(framed(steps=4, seed=8, prompt="a dog runs", scheduler="euler"), after=1),
        Arrival(framed(steps=4, seed=9, guidance_scale=1.0, negative_prompt=""), after=2),
        Arrival(framed(steps=12, seed=10), cancelled_after=3),
        Arrival(video_request(steps=5, seed=11)),
    ]
    async with batching(wan) as engine:
        engine._lanes = Lanes(False)  # or one may be done before the next one's frames are encoded
        got = await run(engine, arrivals)
        assert engine.rows > engine.forwards
        assert {shape.part for shape in engine.costs[wan.model_name].seen} >= {"", "start_frame"}
    for arrival, latents in zip(arrivals[:3], got, strict=False):
        assert difference(latents, stock(tiny_root, "never", arrival.request)) <= TOLERANCE
    assert difference(got[-1], stock_wan(wan, arrivals[-1].request)) <= TOLERANCE


async def test_two_frames_of_several_requests_do_not_mix(required: WAN, tiny_root: Path, framed: Make) -> None:
    """Two images of one request are two entries beside one row of latents."""
    arrivals = [Arrival(framed(end=True)), Arrival(framed(end=True, seed=8, prompt="a dog runs"))]
    async with batching(required) as engine:
        engine._lanes = Lanes(False)  # or one may be done before the next one's frames are encoded
        got = await run(engine, arrivals)
        assert engine.rows > engine.forwards
    for arrival, latents in zip(arrivals, got, strict=True):
        assert difference(latents, stock(tiny_root, "required", arrival.request)) <= TOLERANCE


def test_settings_and_shape_name_the_frames(wan: WAN, framed: Make, recorder: Any) -> None:
    request = framed()
    made = wan.generate(request, recorder())
    assert made.settings["pipeline"] == "WanImageToVideoPipeline"
    assert made.settings["image_to_video"] == {"source": "tiny", "revision": None}
    frame = {"width": 96, "height": 96, "resize_policy": "center_crop"}
    assert made.settings["references"] == {"start_frame": frame}
    assert made.frames is not None
    assert made.frames.shape == (17, 96, 64, 3)
    assert shape_name(request.params) == "64x96x17+start_frame"


def test_run_goes_on_from_its_state(wan: WAN, framed: Make, recorder: Any) -> None:
    states, request = States(2), framed(steps=4)
    stopped = recorder(raise_at_step=3, error=InvalidInput("stop"))
    with pytest.raises(InvalidInput):
        wan.generate(replace(request, states=states), stopped)
    left = states.take()
    assert left is not None
    resumed = wan.generate(replace(request, resume=left.to_bytes()), recorder())
    assert resumed.settings["resumed_from_step"] == 2
    whole = wan.generate(request, recorder())
    assert resumed.frames is not None
    assert whole.frames is not None
    assert (resumed.frames == whole.frames).all()


def test_request_that_can_not_be_honoured_is_refused(
    wan: WAN, required: WAN, framed: Make, video_request: Make, of_kind: Any, recorder: Any, picture: bytes
) -> None:
    both = framed(end=True)
    for model, request in (
        (wan, replace(framed(), guides={})),
        (wan, replace(video_request(), guides={"start_frame": picture})),
        (wan, framed(frames=1, fps=None)),
        (required, framed()),
        (wan, replace(both, params=both.params.model_copy(update={"references": both.params.references[1:]}))),
    ):
        with pytest.raises(InvalidInput):
            model.generate(request, recorder())
    with pytest.raises(InvalidInput, match="LoRAs"):
        wan._frames.check(framed(loras=(LoraUse(name="ink"),)))
    with pytest.raises(ReferenceTypeUnavailable, match="end_frame"):
        wan.generate(both, recorder())


@pytest.mark.parametrize(("entry", "said"), [("never", "optional"), ("optional", "required"), ("required", "never")])
def test_profile_that_says_otherwise_of_the_end_frame_does_not_load(
    wan_spec: ModelSpec, tiny_wan: Path, tiny_root: Path, entry: str, said: str
) -> None:
    folder = ensure_tiny("wan", tiny_root, VARIANTS[entry])  # type: ignore[arg-type]
    assert wan_spec.image_to_video is not None
    other = wan_spec.image_to_video.model_copy(update={"source": str(folder), "end_frame": said})
    with pytest.raises(ModelLoadFailed, match="end_frame"):
        WAN(wan_spec.model_copy(update={"image_to_video": other}), tiny_wan).load()


async def test_one_checkpoint_does_both(wan_spec: ModelSpec, tiny_root: Path, framed: Make, recorder: Any) -> None:
    """As WAN 2.2's 5B: with the transformer for text, whose start frame has a timestep of its own."""
    from diffusers import WanImageToVideoPipeline

    folder = ensure_tiny("wan", tiny_root, "expanded_timesteps")
    assert wan_spec.image_to_video is not None
    entry = wan_spec.image_to_video.model_copy(update={"source": str(folder)})
    model = WAN(wan_spec.model_copy(update={"source": str(folder), "image_to_video": entry}), folder)
    engine = Engine(model)
    engine.start()
    await engine.ready()
    made = await engine.submit(framed()).result()
    engine.close()
    assert model._frames.pipeline.transformer is model._pipeline.transformer
    assert isinstance(model._frames.pipeline, WanImageToVideoPipeline)
    assert made.settings["references"].keys() == {"start_frame"}


def test_encoders_of_its_own_share_no_encoded_prompts(
    wan_spec: ModelSpec, tiny_wan: Path, framed: Make, video_request: Make, recorder: Any
) -> None:
    assert wan_spec.image_to_video is not None
    entry = wan_spec.image_to_video.model_copy(update={"own_encoders": True})
    model = WAN(wan_spec.model_copy(update={"image_to_video": entry, "vae_tiling": True}), tiny_wan)
    model.load()
    own = model._frames.pipeline
    assert own.text_encoder is not model._pipeline.text_encoder
    assert own.vae.use_tiling
    with torch.no_grad():
        for weights in own.text_encoder.parameters():
            weights.mul_(1.5)  # as another checkpoint's
    alone = model.generate(framed(), recorder())
    model._embeddings = Embeddings()
    text = model.generate(video_request(), recorder())
    after = model.generate(framed(), recorder())
    model._embeddings = Embeddings()
    assert np.array_equal(alone.frames, after.frames)
    assert np.array_equal(text.frames, model.generate(video_request(), recorder()).frames)
    assert model._embeddings.misses == 1
