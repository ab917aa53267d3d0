import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from models.denoising.preview import Snapshots
from models.engine import Cancelled, GenerationRequest, InvalidInput, ModelLoadFailed
from models.guiding.reference import StoredImage
from models.params import Reference
from models.profile import ModelSpec
from models.samples.tiny import ensure_tiny
from models.sdxl import SCHEDULERS, SDXL

Make = Callable[..., GenerationRequest]


def pixels(images: list[Image.Image] | None) -> list[bytes]:
    assert images is not None
    return [image.tobytes() for image in images]


def stock(folder: Path, request: GenerationRequest, kind: Any = None, **changes: Any) -> list[bytes]:
    """What diffusers itself makes of the same parameters, from a pipeline of its own."""
    import diffusers
    import torch

    params = request.params
    pipeline = (kind or diffusers.StableDiffusionXLPipeline).from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, SCHEDULERS[params.scheduler])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    image_to_image = kind is diffusers.StableDiffusionXLImg2ImgPipeline
    size = {} if image_to_image else {"width": params.width, "height": params.height}
    assert params.seed is not None
    arguments = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt or None,
        "num_inference_steps": params.steps,
        "guidance_scale": params.guidance_scale,
        "num_images_per_prompt": params.num_images,
        "generator": [torch.Generator().manual_seed(params.seed + i) for i in range(params.num_images)],
    }
    return pixels(pipeline(**arguments | size | changes).images)


@pytest.fixture(scope="module")
def repainter(sdxl_spec: ModelSpec, tiny_root: Path) -> SDXL:
    """A checkpoint whose UNet takes mask and masked image beside the latents."""
    model = SDXL(sdxl_spec, ensure_tiny("sdxl", tiny_root, "inpaint"))
    model.load()
    return model


def reference_image() -> tuple[bytes, Image.Image]:
    rows = np.linspace(0, 255, 100 * 80 * 3).reshape(80, 100, 3)
    image = Image.fromarray(rows.astype("uint8"))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), image


def test_same_seed_gives_the_same_pixels_again(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    first = sdxl.generate(image_request(), recorder())
    other = sdxl.generate(image_request(seed=12, steps=6, scheduler="dpm++"), recorder())
    again = sdxl.generate(image_request(), recorder())
    assert pixels(first.images) == pixels(again.images)
    assert pixels(first.images) != pixels(other.images)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_pixels_are_those_of_the_stock_pipeline(
    sdxl: SDXL, tiny_sdxl: Path, image_request: Make, recorder: Any, scheduler: str
) -> None:
    request = image_request(scheduler=scheduler, num_images=3)
    made = sdxl.generate(request, recorder())
    assert pixels(made.images) == stock(tiny_sdxl, request)
    assert made.settings["scheduler_class"] == SCHEDULERS[scheduler]


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 1.0, "negative_prompt": ""}, {"negative_prompt": ""}, {"width": 96, "height": 64}]
)
def test_pixels_are_stock_without_guidance_or_negative_or_square(
    sdxl: SDXL, tiny_sdxl: Path, image_request: Make, recorder: Any, changes: dict[str, Any]
) -> None:
    request = image_request(**changes)
    made = sdxl.generate(request, recorder())
    assert pixels(made.images) == stock(tiny_sdxl, request)
    assert made.images is not None
    assert made.images[0].size == (request.params.width, request.params.height)


def test_batch_counts_its_seeds_up(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    batch = sdxl.generate(image_request(seed=0, num_images=3), recorder())
    assert batch.seeds == [0, 1, 2]
    assert batch.settings["seeds"] == [0, 1, 2]
    assert len(set(pixels(batch.images))) == 3


def test_seeds_wrap_at_the_end_of_their_range(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    assert sdxl.generate(image_request(seed=2**63 - 1, num_images=3), recorder()).seeds == [2**63 - 1, 0, 1]


def test_images_of_a_batch_have_the_noise_of_their_own_seed(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    batch = sdxl.generate(image_request(seed=40, num_images=3), recorder())
    alone = sdxl.generate(image_request(seed=42), recorder())
    assert batch.images is not None
    assert alone.images is not None
    difference = np.asarray(batch.images[2]).astype(int) - np.asarray(alone.images[0]).astype(int)
    assert np.abs(difference).max() <= 1  # another batch size rounds differently


def test_progress_counts_the_steps_and_names_the_phases(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    control = recorder()
    made = sdxl.generate(image_request(steps=5), control)
    assert control.steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert control.phases == ["encode", "denoise", "decode"]
    assert set(made.timings_ms) == {"encode", "denoise", "decode", "total"}
    assert made.settings["denoise_steps"] == 5


def test_cancel_stops_at_the_next_step_and_leaves_the_model_as_it_was(
    sdxl: SDXL, image_request: Make, recorder: Any
) -> None:
    before = sdxl.generate(image_request(), recorder())
    control = recorder(raise_at_step=2, error=Cancelled("now"))
    with pytest.raises(Cancelled):
        sdxl.generate(image_request(steps=50), control)
    assert [done for done, _ in control.steps] == [1, 2]
    assert pixels(sdxl.generate(image_request(), recorder()).images) == pixels(before.images)


@pytest.mark.parametrize(("kept", "noise", "steps_run"), [(0.5, 0.5, 5), (0.8, 0.2, 2), (0.25, 0.75, 7)])
def test_reference_gives_what_stock_image_to_image_gives(
    sdxl: SDXL, tiny_sdxl: Path, image_request: Make, recorder: Any, kept: float, noise: float, steps_run: int
) -> None:
    import diffusers

    data, image = reference_image()
    reference = Reference(bucket="reference_images", key="a.png", strength=kept)
    request = image_request(data, reference=reference, steps=10, num_images=3)
    made = sdxl.generate(request, recorder())
    fitted = ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)
    assert pixels(made.images) == stock(
        tiny_sdxl, request, kind=diffusers.StableDiffusionXLImg2ImgPipeline, image=fitted, strength=noise
    )
    assert pixels(made.images) == pixels(sdxl.generate(request, recorder()).images)
    assert made.settings["denoise_steps"] == steps_run
    assert made.settings["references"] == {
        "image": {
            "strength": kept,
            "denoise_strength": noise,
            "width": 100,
            "height": 80,
            "resize_policy": "center_crop",
        }
    }


def test_stronger_reference_stays_nearer_to_it(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    data, _ = reference_image()

    def steps_run(kept: float) -> int:
        reference = Reference(bucket="b", key="k", strength=kept)
        made = sdxl.generate(image_request(data, reference=reference, steps=10), recorder())
        return int(made.settings["denoise_steps"])

    assert steps_run(0.9) < steps_run(0.3)


@pytest.mark.parametrize(
    ("reference_bytes", "changes"),
    [
        (b"no picture", {"reference": Reference(bucket="b", key="k", strength=0.5)}),
        (None, {"reference": Reference(bucket="b", key="k", strength=0.5)}),
        (b"bytes without parameters", {}),
        (None, {"scheduler": "ddpm"}),
        (None, {"frames": 17}),
        (None, {"seed": None}),
    ],
)
def test_request_that_cannot_be_honoured_is_refused(
    sdxl: SDXL, image_request: Make, recorder: Any, reference_bytes: bytes | None, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput):
        sdxl.generate(image_request(reference_bytes, **changes), recorder())


def test_reference_too_strong_for_the_steps_is_refused(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    data, _ = reference_image()
    reference = Reference(bucket="b", key="k", strength=0.95)
    with pytest.raises(InvalidInput, match="none of the steps"):
        sdxl.generate(image_request(data, reference=reference, steps=10), recorder())


def test_prompt_beyond_the_window_is_reported(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    made = sdxl.generate(image_request(prompt="cat " * 80), recorder())
    assert (made.settings["prompt_tokens_cut"], made.settings["negative_tokens_cut"]) == (80 + 2 - 77, 0)


def test_negative_prompt_beyond_the_window_is_reported(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    long = "cat " * 90
    made = sdxl.generate(image_request(negative_prompt=long), recorder())
    assert (made.settings["prompt_tokens_cut"], made.settings["negative_tokens_cut"]) == (0, 90 + 2 - 77)
    weighted = sdxl.generate(image_request(negative_prompt=long, compel_enabled=True), recorder())
    assert (weighted.settings["compel_success"], weighted.settings["negative_tokens_cut"]) == (True, 0)


def test_settings_say_what_was_used(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    settings = sdxl.generate(image_request(), recorder()).settings
    expected = {"model": "tiny-sdxl", "steps": 4, "guidance_scale": 6.0, "width": 64, "seed": 11, "device": "cpu"}
    assert expected.items() <= settings.items()
    assert settings["negative_prompt_used"] is True
    assert settings["compel_enabled"] is False
    assert settings["compel_success"] is None
    assert "cat" not in str(settings)


def test_models_are_in_evaluation_mode(sdxl: SDXL) -> None:
    parts = [part for part in sdxl._pipeline.components.values() if hasattr(part, "training")]
    assert parts
    assert not any(part.training for part in parts)


def test_load_of_a_missing_checkpoint_says_so(sdxl_spec: ModelSpec, tmp_path: Path) -> None:
    model = SDXL(sdxl_spec, tmp_path / "nowhere")
    with pytest.raises(ModelLoadFailed, match="tiny-sdxl"):
        model.load()
    assert not model.loaded


def test_load_on_an_absent_card_says_so(sdxl_spec: ModelSpec, tiny_sdxl: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    model = SDXL(sdxl_spec.model_copy(update={"device": "cuda"}), tiny_sdxl)
    with pytest.raises(ModelLoadFailed, match="CUDA"):
        model.load()


# --- inpainting ---------------------------------------------------------------------------------------------


def masked(**changes: Any) -> Reference:
    return Reference(bucket="b", key="k", mask=StoredImage(bucket="b", key="m"), **changes)


def halves(data: bytes) -> bytes:
    """A mask of the picture's size with the left half white."""
    image = Image.new("L", Image.open(io.BytesIO(data)).size, 0)
    image.paste(255, (0, 0, image.width // 2, image.height))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_mask_gives_what_stock_inpainting_gives(
    sdxl: SDXL, tiny_sdxl: Path, image_request: Make, recorder: Any
) -> None:
    import diffusers

    data, image = reference_image()
    request = image_request(data, mask=halves(data), reference=masked(strength=0.25), steps=10, num_images=3)
    made = sdxl.generate(request, recorder())
    repainted = Image.new("L", (64, 64), 0)
    repainted.paste(255, (0, 0, 32, 64))
    expected = stock(
        tiny_sdxl,
        request,
        kind=diffusers.StableDiffusionXLInpaintPipeline,
        image=ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS),
        mask_image=repainted,
        strength=0.75,
    )
    assert pixels(made.images) == expected
    assert made.settings["pipeline"] == "StableDiffusionXLInpaintPipeline"
    assert made.settings["denoise_steps"] == 7
    assert made.settings["references"] == {
        "image": {
            "strength": 0.25,
            "denoise_strength": 0.75,
            "width": 100,
            "height": 80,
            "resize_policy": "center_crop",
            "mask": {"width": 100, "height": 80, "repainted": 0.5},
        }
    }


def test_mask_keeps_what_is_black(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    """Other words change the white half of the latents and nothing of the black one."""
    data, _ = reference_image()
    latents = []
    for prompt in ("a cat", "a red fox in the snow"):
        snapshots = Snapshots(0)
        request = image_request(data, mask=halves(data), reference=masked(strength=0.1), prompt=prompt, steps=5)
        sdxl.generate(replace(request, snapshots=snapshots), recorder())
        last = snapshots.take()
        assert last is not None
        latents.append(last.latents)
    assert (latents[0][..., 4:] == latents[1][..., 4:]).all()
    assert (latents[0][..., :4] != latents[1][..., :4]).any()


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_checkpoint_of_nine_channels_repaints(
    repainter: SDXL, tiny_root: Path, image_request: Make, recorder: Any, guidance: float
) -> None:
    import diffusers

    data, image = reference_image()
    changes: dict[str, Any] = {} if guidance > 1 else {"negative_prompt": ""}
    request = image_request(
        data, mask=halves(data), reference=masked(strength=0.1), guidance_scale=guidance, steps=5, **changes
    )
    repainted = Image.new("L", (64, 64), 0)
    repainted.paste(255, (0, 0, 32, 64))
    expected = stock(
        ensure_tiny("sdxl", tiny_root, "inpaint"),
        request,
        kind=diffusers.StableDiffusionXLInpaintPipeline,
        image=ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS),
        mask_image=repainted,
        strength=0.9,
    )
    assert pixels(repainter.generate(request, recorder()).images) == expected


def test_checkpoint_of_nine_channels_does_nothing_else(repainter: SDXL, image_request: Make, recorder: Any) -> None:
    data, _ = reference_image()
    unmasked = Reference(bucket="b", key="k", strength=0.5)
    for request in (image_request(), image_request(data, reference=unmasked)):
        with pytest.raises(InvalidInput, match="only repaints"):
            repainter.generate(request, recorder())


def test_checkpoint_of_nine_channels_warms_up_and_is_measured(repainter: SDXL) -> None:
    repainter.warm_up()
    assert repainter.measure(None).measured


@pytest.mark.parametrize(
    ("reference_bytes", "mask", "reference"),
    [
        (reference_image()[0], None, masked()),
        (reference_image()[0], halves(reference_image()[0]), Reference(bucket="b", key="k")),
        (None, halves(reference_image()[0]), None),
        (reference_image()[0], b"no picture", masked()),
    ],
)
def test_mask_that_cannot_be_honoured_is_refused(
    sdxl: SDXL, image_request: Make, recorder: Any, reference_bytes: bytes, mask: bytes | None, reference: Any
) -> None:
    with pytest.raises(InvalidInput, match="mask"):
        sdxl.generate(image_request(reference_bytes, mask=mask, reference=reference), recorder())


def test_guidance_interval_holds_while_a_mask_is_repainted(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    data, _ = reference_image()
    whole = image_request(data, mask=halves(data), reference=masked(strength=0.1), steps=10)
    part = replace(whole, params=whole.params.model_copy(update={"guidance_interval": (0.3, 0.8)}))
    rows: list[int] = []

    class Counting(recorder):  # type: ignore[misc]
        def forward(self, call: Any) -> Any:
            rows.append(call.rows)
            return super().forward(call)

    made = sdxl.generate(part, Counting())
    assert rows == [1, 1, 1, 2, 2, 2, 2, 2, 1]
    assert pixels(made.images) != pixels(sdxl.generate(whole, recorder()).images)
