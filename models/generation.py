"""A generation: what a model is asked, what it gives back, how it reports meanwhile, and how it can fail.

What can go wrong, with the `code` that clients see::

    GenerationError
    ├── Cancelled           cancelled           the caller, or a closing engine, stopped it at a step boundary
    ├── InvalidInput        invalid_input       this request can't be run by this model; trying again is useless
    │   └── ReferenceTypeUnavailable  reference_type_unavailable  it has not loaded what such a reference needs
    ├── OutOfMemory         oom                 the device had not enough memory; its caches were given back
    │   └── OutOfMemoryPredicted  oom_predicted it would not have: by the measured need of its shape, it was not tried
    ├── ModelLoadFailed     model_load_failed   weights missing or unreadable, or the model does not fit
    ├── GenerationFailed    generation_failed   anything else that the pipeline raised
    └── DeviceBroken        device_broken       the accelerator's context is lost; only a new process helps
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from models.denoising.costs import Costs
from models.denoising.denoiser import Call
from models.denoising.lanes import LaneName
from models.denoising.preview import Snapshots
from models.denoising.resumption import States
from models.guiding.reference import ReferenceKind
from models.params import GenerationParams

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

T = TypeVar("T")

Phase = Literal["waiting", "encode", "denoise", "decode", "encode_media", "done"]


class GenerationError(Exception):
    """A generation ended without a result. `message` never holds a prompt; `retryable` says if it may work later."""

    code: ClassVar[str]
    retryable: ClassVar[bool]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Cancelled(GenerationError):
    code = "cancelled"
    retryable = False


class InvalidInput(GenerationError):
    code = "invalid_input"
    retryable = False


class ReferenceTypeUnavailable(InvalidInput):
    code = "reference_type_unavailable"


class OutOfMemory(GenerationError):
    code = "oom"
    retryable = True


class OutOfMemoryPredicted(OutOfMemory):
    code = "oom_predicted"


class ModelLoadFailed(GenerationError):
    code = "model_load_failed"
    retryable = True


class GenerationFailed(GenerationError):
    code = "generation_failed"
    retryable = True


class DeviceBroken(GenerationError):
    code = "device_broken"
    retryable = True


@dataclass(frozen=True)
class GenerationRequest:
    """One job as the model sees it. `reference` holds the encoded bytes of `params.reference`, if there is one,
    `mask` those of its mask, and `guides` those of the other references by their kinds.

    `batch_size` is how many of its images may be made at a time; None: all of them. `snapshots` gets copies of the
    latents, where previews are wanted. `priority` 0 is interactive, larger ones give way to it; `deadline` is on the
    clock of `time.monotonic`. `model` names the model that runs it, where an engine has several. `states` gets what
    another run could go on from; `resume` is what this one does go on from.
    """

    job_id: str
    params: GenerationParams
    reference: bytes | None = None
    batch_size: int | None = None
    snapshots: Snapshots | None = None
    priority: int = 0
    deadline: float | None = None
    model: str | None = None
    states: States | None = None
    resume: bytes | None = None
    mask: bytes | None = None
    guides: Mapping[ReferenceKind, bytes] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """All encoded images, by the kind of the reference or as "mask"."""
        named = {"image": self.reference, "mask": self.mask}
        return {name: data for name, data in named.items() if data is not None} | {**self.guides}


@dataclass(frozen=True)
class Generation:
    """What a model made: `images`, or `frames` of a video (F, H, W, 3; uint8) at `fps` frames a second.

    `seeds` holds the seed of each image (one for a video). `settings` says what was really used, fall-backs
    included. `timings_ms` has the wall time of "encode", "denoise", "decode" and "total", measured.
    """

    images: list[Image] | None
    frames: np.ndarray[Any, np.dtype[np.uint8]] | None
    fps: int | None
    seeds: list[int]
    settings: dict[str, Any]
    timings_ms: dict[str, float]


class Control:
    """How a running generation reports, and how its model gets its work done: as it stands, on the spot and alone.

    `step` and `phase` may raise `Cancelled` when it should stop; so may the others, while they wait for their turn.
    """

    def step(self, done: int, of: int) -> None:
        return

    def phase(self, name: Phase) -> None:
        return

    def forward(self, call: Call) -> Any:
        """The outputs of a denoiser call."""
        return call.run()

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T:
        """The result of work that is no denoising. It must call nothing of this control."""
        return work()


class Model(Protocol):
    """A family's pipeline around loaded weights. All calls come from one thread."""

    loaded: bool
    model_name: str
    revision: str | None
    device: str

    def load(self) -> None:
        """Raises `ModelLoadFailed`."""

    def warm_up(self) -> None: ...

    def measure(self, folder: Path | None) -> Costs:
        """What its forwards cost on this device: read from the folder, or measured and kept there."""

    def forward_rows(self, request: GenerationRequest) -> int:
        """The rows of one forward of the request alone."""

    def session(self) -> contextlib.AbstractContextManager[Any]:
        """What must be in force on the engine's thread while generations run."""

    def generate(self, request: GenerationRequest, control: Control) -> Generation:
        """Raises a `GenerationError`; any other exception counts as `GenerationFailed`.

        May be called again before it has returned, from another greenlet.
        """


_DEVICE_FAULTS: Mapping[str, type[GenerationError]] = {
    "out of memory": OutOfMemory,
    "CUBLAS_STATUS_ALLOC_FAILED": OutOfMemory,
    "DefaultCPUAllocator": OutOfMemory,
    "CUDA error": DeviceBroken,
    "device-side assert": DeviceBroken,
    "CUDNN_STATUS_EXECUTION_FAILED": DeviceBroken,
    "CUBLAS_STATUS_EXECUTION_FAILED": DeviceBroken,
}


def as_generation_error(error: BaseException) -> GenerationError:
    """What an exception of a library means here.

    Only texts of torch's own errors are kept; any other exception is named by type and place, because its text
    might repeat a prompt.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory(_first_line(error) or "not enough memory")
    if isinstance(error, RuntimeError):
        for sign, kind in _DEVICE_FAULTS.items():
            if sign in str(error):
                return kind(_first_line(error))
        if isinstance(error, torch.AcceleratorError):  # of a runtime that words it otherwise
            return DeviceBroken(_first_line(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return GenerationFailed(f"{type(error).__name__}{place}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def release_device_memory() -> None:
    """Gives cached blocks back to the device after a failure."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
