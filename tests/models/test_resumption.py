"""A run that goes on from another's state makes the same latents, bit for bit."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from models.denoising.preview import Snapshots
from models.denoising.resumption import DenoisingState, States, StateUnusable
from models.engine import Cancelled, GenerationRequest
from models.pipeline import PipelineModel
from models.profile import ModelSpec
from models.sdxl import SCHEDULERS, SDXL
from models.wan import SCHEDULERS as WAN_SCHEDULERS
from models.wan import WAN

Make = Callable[..., GenerationRequest]


class Counting:
    """Counts the forwards that are really run."""

    def __init__(self, recorder: Any) -> None:
        class Control(recorder):  # type: ignore[misc]
            forwards = 0

            def forward(self, call: Any) -> Any:
                self.forwards += 1
                return super().forward(call)

        self.kind = Control


def interrupted(model: PipelineModel, request: GenerationRequest, recorder: Any, after: int, every: int) -> bytes:
    """The bytes of the last state that a run has left when it is stopped after a step."""
    states = States(every)
    with pytest.raises(Cancelled):
        model.generate(replace(request, states=states), recorder(raise_at_step=after, error=Cancelled("lost")))
    state = states.take()
    assert state is not None
    assert state.step % every == 0
    return state.to_bytes()


def final(model: PipelineModel, request: GenerationRequest, control: Any) -> tuple[Any, dict[str, Any]]:
    snapshots = Snapshots(0)
    made = model.generate(replace(request, snapshots=snapshots), control)
    last = snapshots.take()
    assert last is not None
    return last.latents, made.settings


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sdxl_resumes_bit_for_bit(sdxl: SDXL, image_request: Make, recorder: Any, scheduler: str) -> None:
    request = image_request(scheduler=scheduler, steps=7, num_images=2)
    expected, _ = final(sdxl, request, recorder())
    state = interrupted(sdxl, request, recorder, after=5, every=2)
    control = Counting(recorder).kind()
    got, settings = final(sdxl, replace(request, resume=state), control)
    assert (got == expected).all()
    assert (settings["resumed_from_step"], settings["resume_refused"]) == (4, None)
    calls = 13 if scheduler == "heun" else 7  # Heun's method calls twice a step but for the last
    assert control.forwards == calls - 4


def test_sdxl_resumes_from_an_image(sdxl: SDXL, image_request: Make, recorder: Any, picture: bytes) -> None:
    reference = {"bucket": "b", "key": "k", "strength": 0.3}
    request = image_request(picture, scheduler="euler_a", steps=8, reference=reference)
    expected, _ = final(sdxl, request, recorder())
    got, settings = final(
        sdxl, replace(request, resume=interrupted(sdxl, request, recorder, after=3, every=1)), recorder()
    )
    assert (got == expected).all()
    assert settings["resumed_from_step"] == 3


@pytest.mark.parametrize("scheduler", ["euler_a", "heun", "dpm++"])
def test_inpainting_resumes(
    sdxl: SDXL, image_request: Make, recorder: Any, picture: bytes, mask: bytes, scheduler: str
) -> None:
    reference = {"bucket": "b", "key": "k", "strength": 0.2, "mask": {"bucket": "b", "key": "m"}}
    request = image_request(picture, mask=mask, scheduler=scheduler, steps=10, num_images=2, reference=reference)
    expected, _ = final(sdxl, request, recorder())
    state = interrupted(sdxl, request, recorder, after=5, every=2)
    control = Counting(recorder).kind()
    got, settings = final(sdxl, replace(request, resume=state), control)
    assert (got == expected).all()
    assert settings["resumed_from_step"] == 4
    assert control.forwards == (2 * 8 - 1 if scheduler == "heun" else 8) - 4


def test_state_of_another_mask_is_not_gone_on_from(
    sdxl: SDXL, image_request: Make, recorder: Any, picture: bytes, mask: bytes
) -> None:
    reference = {"bucket": "b", "key": "k", "strength": 0.2, "mask": {"bucket": "b", "key": "m"}}
    request = image_request(picture, mask=mask, steps=5, reference=reference)
    state = interrupted(sdxl, request, recorder, after=2, every=1)
    buffer = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(mask))).save(buffer, format="PNG")
    _, settings = final(sdxl, replace(request, mask=buffer.getvalue(), resume=state), recorder())
    assert settings["resumed_from_step"] is None


def test_second_batch_resumes_and_the_first_is_made_anew(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    request = replace(image_request(steps=4, num_images=2), batch_size=1)
    expected = sdxl.generate(request, recorder()).images
    state = interrupted(sdxl, request, recorder, after=6, every=2)
    control = Counting(recorder).kind()
    made = sdxl.generate(replace(request, resume=state), control)
    assert expected is not None
    assert made.images is not None
    assert [image.tobytes() for image in made.images] == [image.tobytes() for image in expected]
    assert control.forwards == 4 + 2


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
@pytest.mark.parametrize("after", [2, 5])
def test_two_experts_resume_on_either_side_of_their_boundary(
    two_experts: WAN, video_request: Make, recorder: Any, scheduler: str, after: int
) -> None:
    request = video_request(scheduler=scheduler, steps=8)
    expected, _ = final(two_experts, request, recorder())
    state = interrupted(two_experts, request, recorder, after=after, every=1)
    control = Counting(recorder).kind()
    got, settings = final(two_experts, replace(request, resume=state), control)
    assert (got == expected).all()
    assert settings["resumed_from_step"] == after
    assert control.forwards == 2 * (8 - after)


@pytest.mark.parametrize("scheduler", WAN_SCHEDULERS)
def test_wan_resumes_bit_for_bit(wan: WAN, video_request: Make, recorder: Any, scheduler: str) -> None:
    request = video_request(scheduler=scheduler, steps=6)
    expected, _ = final(wan, request, recorder())
    control = Counting(recorder).kind()
    state = interrupted(wan, request, recorder, after=4, every=2)
    got, settings = final(wan, replace(request, resume=state), control)
    assert (got == expected).all()
    assert settings["resumed_from_step"] == 4
    assert control.forwards == 2 * (6 - 4)  # two branches of guidance


def test_run_that_leaves_states_makes_the_same_pixels(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    plain = sdxl.generate(image_request(), recorder()).images
    states = States(1)
    made = sdxl.generate(replace(image_request(), states=states), recorder())
    assert plain is not None
    assert made.images is not None
    assert made.images[0].tobytes() == plain[0].tobytes()
    assert "resumed_from_step" not in made.settings


@pytest.mark.parametrize("change", [{"seed": 12}, {"steps": 9}, {"prompt": "a dog"}])
def test_state_of_another_request_is_refused_and_told(
    sdxl: SDXL, image_request: Make, recorder: Any, change: dict[str, Any]
) -> None:
    state = interrupted(sdxl, image_request(), recorder, after=2, every=1)
    other = image_request(**change)
    expected, _ = final(sdxl, other, recorder())
    got, settings = final(sdxl, replace(other, resume=state), recorder())
    assert (got == expected).all()
    assert settings["resumed_from_step"] is None
    assert settings["resume_refused"] == "another model, version or job"


def test_state_of_other_weights_at_the_same_place_is_refused(
    sdxl: SDXL, sdxl_spec: ModelSpec, tiny_sdxl: Path, tmp_path: Path, image_request: Make, recorder: Any
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(tiny_sdxl, folder)
    same, other = SDXL(sdxl_spec, folder), SDXL(sdxl_spec, folder)
    same.load()
    path = next(folder.glob("unet/*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    other.load()
    request = image_request()
    request = replace(request, resume=interrupted(sdxl, request, recorder, after=2, every=1))
    _, settings = final(same, request, recorder())
    assert settings["resumed_from_step"] == 2
    _, settings = final(other, request, recorder())
    assert (settings["resumed_from_step"], settings["resume_refused"]) == (None, "another model, version or job")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}", b"\x10\0\0\0\0\0\0\0" + b"x" * 16])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(StateUnusable):
        DenoisingState.from_bytes(data, "x")


@pytest.mark.parametrize(
    "change", [{"step": 0}, {"step": 10**9}, {"batch": -1}, {"generators": ()}, {"scheduler": {"step": 1}}]
)
def test_state_that_no_run_can_have_left_is_refused(
    sdxl: SDXL, image_request: Make, recorder: Any, change: dict[str, Any]
) -> None:
    states = States(1)
    sdxl.generate(replace(image_request(), states=states), recorder())
    state = states.take()
    assert state is not None
    with pytest.raises(StateUnusable):
        replace(state, **change).to_bytes()
    with pytest.raises(StateUnusable, match="finite"):
        replace(state, latents=state.latents * float("nan")).to_bytes()


def test_long_prompt_is_not_written_to_the_log(
    sdxl: SDXL, image_request: Make, recorder: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """diffusers warns of what it cuts off, and quotes it."""
    sdxl.generate(image_request(prompt="a cat " * 90 + "my secret wish"), recorder())
    said = capfd.readouterr()
    assert "secret" not in said.out + said.err


def test_states_hold_no_prompt(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    state = interrupted(sdxl, image_request(prompt="a secret garden"), recorder, after=2, every=1)
    assert b"secret" not in state
