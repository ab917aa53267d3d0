from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.denoising.acceleration import blank_inputs, denoisers
from models.engine import Cancelled, GenerationRequest, InvalidInput, ModelLoadFailed
from models.params import Reference
from models.profile import ModelSpec
from models.samples.tiny import ensure_tiny
from models.wan import WAN
from tests.models.lora_making import make_lora

Make = Callable[..., GenerationRequest]


def stock(folder: Path, request: GenerationRequest, scheduler: Any = None) -> Any:
    """The frames that diffusers itself makes of the same parameters, from a pipeline of its own."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    params = request.params
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is None:
        scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=params.shift)
    pipeline.scheduler = scheduler
    assert params.seed is not None
    frames = pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        width=params.width,
        height=params.height,
        num_frames=params.frames,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator().manual_seed(params.seed),
        output_type="pil",
    ).frames[0]
    return np.stack([np.asarray(frame) for frame in frames])


def test_frames_are_those_of_the_stock_pipeline(wan: WAN, tiny_wan: Path, video_request: Make, recorder: Any) -> None:
    request = video_request()
    made = wan.generate(request, recorder())
    assert made.images is None
    assert made.frames is not None
    assert made.frames.shape == (17, 96, 64, 3)
    assert np.array_equal(made.frames, stock(tiny_wan, request))
    assert made.fps == 16


def test_frames_are_stock_without_guidance(wan: WAN, tiny_wan: Path, video_request: Make, recorder: Any) -> None:
    request = video_request(guidance_scale=1.0, negative_prompt="")
    made = wan.generate(request, recorder())
    assert made.frames is not None
    assert np.array_equal(made.frames, stock(tiny_wan, request))
    assert made.settings["negative_prompt_used"] is False


def test_negative_prompt_beyond_the_window_is_reported(wan: WAN, video_request: Make, recorder: Any) -> None:
    long = "wave " * 600
    tokens = len(wan._pipeline.tokenizer(long, verbose=False).input_ids)
    request = video_request(negative_prompt=long, frames=1, fps=None, steps=1)
    settings = wan.generate(request, recorder()).settings
    assert (settings["prompt_tokens_cut"], settings["negative_tokens_cut"]) == (0, tokens - 512)
    assert tokens > 512


def test_other_schedulers_follow_the_flow_schedule_of_the_shift(
    wan: WAN, tiny_wan: Path, video_request: Make, recorder: Any
) -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    shift = 3.0
    for name, scheduler in {
        "euler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "dpm++": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
    }.items():
        request = video_request(scheduler=name, shift=shift)
        made = wan.generate(request, recorder())
        assert made.frames is not None
        assert np.array_equal(made.frames, stock(tiny_wan, request, scheduler)), name
        assert made.settings["scheduler_class"] == type(scheduler).__name__


def test_same_seed_gives_the_same_frames_again(wan: WAN, video_request: Make, recorder: Any) -> None:
    first = wan.generate(video_request(), recorder()).frames
    other = wan.generate(video_request(seed=6, shift=2.0), recorder()).frames
    again = wan.generate(video_request(), recorder()).frames
    assert first is not None
    assert other is not None
    assert again is not None
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_image_is_a_run_of_one_frame(wan: WAN, tiny_wan: Path, video_request: Make, recorder: Any) -> None:
    request = video_request(frames=1, fps=None)
    made = wan.generate(request, recorder())
    assert made.frames is None
    assert made.fps is None
    assert made.images is not None
    assert [image.size for image in made.images] == [(64, 96)]
    assert np.array_equal(np.asarray(made.images[0]), stock(tiny_wan, request)[0])


def test_progress_counts_the_steps_and_names_the_phases(wan: WAN, video_request: Make, recorder: Any) -> None:
    control = recorder()
    made = wan.generate(video_request(), control)
    assert control.steps == [(1, 3), (2, 3), (3, 3)]
    assert control.phases == ["encode", "denoise", "decode"]
    assert made.settings["shift"] == 5.0
    assert made.settings["denoise_steps"] == 3


def test_cancel_stops_at_the_next_step_and_leaves_the_model_as_it_was(
    wan: WAN, video_request: Make, recorder: Any
) -> None:
    before = wan.generate(video_request(), recorder()).frames
    control = recorder(raise_at_step=1, error=Cancelled("now"))
    with pytest.raises(Cancelled):
        wan.generate(video_request(steps=40), control)
    assert control.steps == [(1, 40)]
    after = wan.generate(video_request(), recorder()).frames
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": Reference(bucket="b", key="k", strength=0.5)},
        {"num_images": 3},
        {"frames": 16},
        {"width": 72},
        {"scheduler": "heun"},
        {"shift": None},
        {"fps": None},
        {"seed": None},
    ],
)
def test_request_that_cannot_be_honoured_is_refused(
    wan: WAN, video_request: Make, recorder: Any, changes: dict[str, Any]
) -> None:
    control = recorder()
    with pytest.raises(InvalidInput):
        wan.generate(video_request(**changes), control)
    assert control.phases == []


# --- WAN 2.2 ------------------------------------------------------------------------------------------------


def test_two_experts_make_the_frames_of_the_stock_pipeline(
    two_experts: WAN, tiny_root: Path, video_request: Make, recorder: Any
) -> None:
    request = video_request(steps=6)
    made = two_experts.generate(request, recorder())
    assert made.frames is not None
    assert np.array_equal(made.frames, stock(ensure_tiny("wan", tiny_root, "two_experts"), request))
    assert (made.settings["experts"], made.settings["boundary_ratio"]) == (2, 0.875)


def test_one_expert_says_so(wan: WAN, video_request: Make, recorder: Any) -> None:
    settings = wan.generate(video_request(steps=1), recorder()).settings
    assert (settings["experts"], settings["boundary_ratio"]) == (1, None)


def test_experts_change_at_the_boundary(two_experts: WAN, video_request: Make, recorder: Any) -> None:
    """Above 875 of 1000 the one, below the other, by the timesteps that shift and steps lead to."""
    calls: list[tuple[float, Any]] = []

    class Watching(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            calls.append((float(call.arguments["timestep"][0]), call.module))
            return super().forward(call)

    two_experts.generate(video_request(steps=8, guidance_scale=1.0, negative_prompt=""), Watching())
    noisy, rest = two_experts._pipeline.transformer, two_experts._pipeline.transformer_2
    assert [module is noisy for _, module in calls] == [timestep >= 875 for timestep, _ in calls]
    assert {module for _, module in calls} == {noisy, rest}


def test_two_experts_warm_up_and_are_measured(two_experts: WAN) -> None:
    two_experts.warm_up()
    assert two_experts.measure(None).measured


def test_lora_changes_both_experts(
    wan_spec: ModelSpec, tiny_root: Path, video_request: Make, recorder: Any, tmp_path: Path
) -> None:
    folder = ensure_tiny("wan", tiny_root, "two_experts")
    plain = WAN(wan_spec, folder)
    plain.load()
    file = make_lora(tmp_path / "l.safetensors", plain._pipeline, 3, parts=("transformer",), style="diffusers")
    loras = {"red": {"source": str(file)}}
    model = WAN(
        ModelSpec.model_validate(wan_spec.model_dump(exclude_unset=True) | {"loras": loras, "lora_cache_gib": 1}),
        folder,
    )
    model.load()
    changed: dict[int, bool] = {}

    class Watching(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            with_lora = call.run()[0]
            without = replace(call, adapters=()).run()[0]
            changed[id(call.module)] = bool((with_lora != without).any())
            return (with_lora,)

    made = model.generate(video_request(steps=6, loras=[{"name": "red", "weight": 1.0}]), Watching())
    assert changed == {id(model._pipeline.transformer): True, id(model._pipeline.transformer_2): True}
    assert [lora["name"] for lora in made.settings["loras"]] == ["red"]


def test_a_timestep_for_each_token_makes_the_frames_of_the_stock_pipeline(
    expanded: WAN, tiny_root: Path, video_request: Make, recorder: Any
) -> None:
    shapes = set()

    class Watching(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            shapes.add(tuple(call.arguments["timestep"].shape))
            return super().forward(call)

    made = expanded.generate(video_request(), Watching())
    assert made.frames is not None
    assert np.array_equal(made.frames, stock(ensure_tiny("wan", tiny_root, "expanded_timesteps"), video_request()))
    assert shapes == {(1, 5 * 6 * 4)}


@pytest.mark.parametrize("name", ["two_experts", "expanded"])
def test_denoisers_are_warmed_with_what_the_pipeline_gives_them(
    name: str, request: pytest.FixtureRequest, video_request: Make, recorder: Any
) -> None:
    model = request.getfixturevalue(name)
    given: dict[Any, dict[str, tuple[int, ...]]] = {}

    class Watching(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            tensors = {n: tuple(v.shape) for n, v in call.arguments.items() if hasattr(v, "shape")}
            given[call.module] = tensors
            return super().forward(call)

    model.generate(video_request(steps=6), Watching())
    assert list(given) == denoisers(model._pipeline)
    for denoiser, shapes in given.items():
        blank = blank_inputs(model._pipeline, denoiser, 1, 64, 96, 17)
        assert {n: tuple(v.shape) for n, v in blank.items()} == shapes


def test_mask_is_refused(wan: WAN, video_request: Make, recorder: Any) -> None:
    with pytest.raises(InvalidInput, match="reference"):
        wan.generate(replace(video_request(), mask=b"x"), recorder())


def test_two_experts_with_offload_need_one_slot(
    wan_spec: ModelSpec, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    changes = {"device": "cuda", "offload": "model", "slots": 2, "image_to_video": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it is refused before anything goes to the card
    model = WAN(wan_spec.model_copy(update=changes), ensure_tiny("wan", tiny_root, "two_experts"))
    with pytest.raises(ModelLoadFailed, match="two experts needs slots: 1, not 2"):
        model.load()
    assert not model.loaded
    for fits in ({"slots": 1}, {"offload": "none"}):
        other = WAN(model.spec.model_copy(update=fits), model.weights)
        assert other._load_pipeline(torch.float32).transformer_2 is not None
