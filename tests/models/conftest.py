"""Real tiny checkpoints and loaded models, made once for the session."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.engine import Control, GenerationRequest, Phase
from models.params import GenerationParams
from models.profile import ModelSpec, load_profile
from models.samples.tiny import ensure_tiny
from models.sdxl import SDXL
from models.wan import WAN


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_root: Path) -> Path:
    return ensure_tiny("sdxl", tiny_root)


@pytest.fixture(scope="session")
def tiny_wan(tiny_root: Path) -> Path:
    return ensure_tiny("wan", tiny_root)


@pytest.fixture(scope="session")
def sdxl_spec() -> ModelSpec:
    return next(spec for family, spec in load_profile("laptop").models.items() if family == "sdxl")


@pytest.fixture(scope="session")
def wan_spec() -> ModelSpec:
    return next(spec for family, spec in load_profile("laptop").models.items() if family == "wan")


@pytest.fixture(scope="session")
def sdxl(sdxl_spec: ModelSpec, tiny_sdxl: Path) -> SDXL:
    model = SDXL(sdxl_spec, tiny_sdxl)
    model.load()
    return model


@pytest.fixture(scope="session")
def wan(wan_spec: ModelSpec, tiny_wan: Path) -> WAN:
    model = WAN(wan_spec, tiny_wan)
    model.load()
    return model


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG to start from."""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def mask() -> bytes:
    """A PNG of the picture's size whose left half is to be repainted, but for its first rows."""
    buffer = io.BytesIO()
    image = Image.new("L", (96, 96), 0)
    image.paste(255, (0, 24, 48, 96))
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def two_experts(wan_spec: ModelSpec, tiny_root: Path) -> WAN:
    """WAN 2.2's layout: one transformer for the noisy steps, another one for the rest."""
    model = WAN(wan_spec, ensure_tiny("wan", tiny_root, "two_experts"))
    model.load()
    return model


@pytest.fixture(scope="session")
def expanded(wan_spec: ModelSpec, tiny_root: Path) -> WAN:
    """A checkpoint that gets a timestep for each token, as WAN 2.2's 5B model does."""
    model = WAN(wan_spec, ensure_tiny("wan", tiny_root, "expanded_timesteps"))
    model.load()
    return model


def of(kind: str, **changes: Any) -> dict[str, Any]:
    """A reference of that kind, as parameters."""
    return {"bucket": "b", "key": f"{kind}.png", "kind": kind} | changes


@pytest.fixture(scope="session")
def of_kind() -> Callable[..., dict[str, Any]]:
    return of


@pytest.fixture
def image_request() -> Callable[..., GenerationRequest]:
    def make(reference_bytes: bytes | None = None, **changes: Any) -> GenerationRequest:
        fields: dict[str, Any] = {
            "prompt": "a cat on a wooden table",
            "negative_prompt": "blurry",
            "seed": 11,
            "num_images": 1,
            "width": 64,
            "height": 64,
            "frames": 1,
            "steps": 4,
            "guidance_scale": 6.0,
            "scheduler": "euler",
        }
        own = {
            name: changes.pop(name) for name in ("model", "priority", "batch_size", "mask", "guides") if name in changes
        }
        return GenerationRequest("job-1", GenerationParams(**fields | changes), reference_bytes, **own)

    return make


@pytest.fixture
def video_request() -> Callable[..., GenerationRequest]:
    def make(**changes: Any) -> GenerationRequest:
        fields: dict[str, Any] = {
            "prompt": "waves at sunset",
            "negative_prompt": "static",
            "seed": 5,
            "num_images": 1,
            "width": 64,
            "height": 96,
            "frames": 17,
            "fps": 16,
            "steps": 3,
            "guidance_scale": 6.5,
            "scheduler": "unipc",
            "shift": 5.0,
        }
        model = changes.pop("model", None)
        return GenerationRequest("job-2", GenerationParams(**fields | changes), model=model)

    return make


class Recorder(Control):
    """A `Control` that keeps what it was told, and may raise an exception at a step."""

    def __init__(self, raise_at_step: int | None = None, error: BaseException | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self.phases: list[str] = []
        self._raise_at_step = raise_at_step
        self._error = error

    def step(self, done: int, of: int) -> None:
        self.steps.append((done, of))
        if done == self._raise_at_step and self._error is not None:
            raise self._error

    def phase(self, name: Phase) -> None:
        self.phases.append(name)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder
