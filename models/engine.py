"""The engine: one thread that owns one model and runs generations on it, with progress, cancellation and isolation.

Whoever submits gets a `Ticket`. The engine thread is the only one that touches the model; tickets may be used
from any thread and awaited from asyncio. A failed generation fails its ticket and nothing else, unless it
broke the device: then the engine says so in `broken`, fails what it holds and ends.

What can go wrong, with the `code` that clients see::

    GenerationError
    ├── Cancelled           cancelled           the caller, or a closing engine, stopped it at a step boundary
    ├── InvalidInput        invalid_input       this request can't be run by this model; trying again is useless
    ├── OutOfMemory         oom                 the device had not enough memory; its caches were given back
    ├── ModelLoadFailed     model_load_failed   weights missing or unreadable, or the model does not fit
    ├── GenerationFailed    generation_failed   anything else that the pipeline raised
    └── DeviceBroken        device_broken       the accelerator's context is lost; only a new process helps
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import structlog

from models.params import GenerationParams

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = structlog.get_logger()

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


class OutOfMemory(GenerationError):
    code = "oom"
    retryable = True


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
    """One job as the model sees it. `reference` holds the encoded bytes of `params.reference`, if there is one."""

    job_id: str
    params: GenerationParams
    reference: bytes | None = None


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


class Control(Protocol):
    """How a running generation reports; both calls raise `Cancelled` when it should stop."""

    def step(self, done: int, of: int) -> None: ...

    def phase(self, name: Phase) -> None: ...


class Model(Protocol):
    """A family's pipeline around loaded weights. All calls come from one thread."""

    loaded: bool
    model_name: str
    revision: str | None
    device: str

    def load(self) -> None:
        """Raises `ModelLoadFailed`."""

    def warm_up(self) -> None: ...

    def generate(self, request: GenerationRequest, control: Control) -> Generation:
        """Raises a `GenerationError`; any other exception counts as `GenerationFailed`."""


@dataclass(frozen=True)
class Progress:
    """Where a generation is: `step` of `of` denoise steps; `activity` grows with every step and phase.

    `phase_started_monotonic` is on the clock of `time.monotonic`.
    """

    phase: Phase
    step: int
    of: int
    activity: int
    phase_started_monotonic: float


class Ticket:
    """One submitted generation. `cancel` takes effect at the next step or phase boundary."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.job_id = request.job_id
        self._progress = Progress("waiting", 0, request.params.steps, 0, time.monotonic())
        self._cancelled = threading.Event()
        self._future: Future[Generation] = Future()
        self._future.set_running_or_notify_cancel()  # from here on only the engine can end it

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called; the generation may still have finished before it took effect."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    async def result(self) -> Generation:
        """The finished generation. Raises its `GenerationError`. Giving up waiting does not cancel it."""
        return await asyncio.shield(asyncio.wrap_future(self._future))

    def _advance(self, **changes: Any) -> None:
        self._progress = replace(self._progress, activity=self._progress.activity + 1, **changes)


class _TicketControl:
    """The `Control` of one ticket: progress goes to the ticket and to the engine's own activity count."""

    def __init__(self, ticket: Ticket, engine: Engine) -> None:
        self._ticket = ticket
        self._engine = engine

    def step(self, done: int, of: int) -> None:
        self._report(step=done, of=of)

    def phase(self, name: Phase) -> None:
        self._report(phase=name, phase_started_monotonic=time.monotonic())

    def _report(self, **changes: Any) -> None:
        self._ticket._advance(**changes)
        self._engine.activity += 1
        if self._ticket.cancelled or self._engine.closing:
            raise Cancelled("cancelled at a step boundary")


class Engine:
    """Runs the tickets of one model, one at a time in the order of arrival.

    `slots` is how many requests the engine wants to hold (running and waiting): whoever feeds it claims work
    for `free_slots`. More may be submitted; they wait inside.
    """

    def __init__(self, model: Model, slots: int = 1) -> None:
        self.model = model
        self.slots = slots
        self.broken: str | None = None
        self.activity = 0  # written by the engine thread only
        self.closing = False
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._ready: Future[None] = Future()
        self._ready.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the engine can still finish anything: its thread runs and the device works."""
        return self._thread.is_alive() and self.broken is None

    @property
    def free_slots(self) -> int:
        with self._changed:
            return max(0, self.slots - len(self._waiting) - (self._running is not None))

    def start(self) -> None:
        """Starts the engine thread, which loads and warms the model; await `ready` for the outcome."""
        self._thread.start()

    async def ready(self) -> None:
        """Returns when the model is loaded and warm. Raises `ModelLoadFailed` or `DeviceBroken`."""
        await asyncio.shield(asyncio.wrap_future(self._ready))

    def submit(self, request: GenerationRequest) -> Ticket:
        """Never raises: on an engine that is closed or broken the ticket fails at once."""
        ticket = Ticket(request)
        with self._changed:
            if self.broken is None and not self.closing:
                self._waiting.append(ticket)
                self._changed.notify_all()
                return ticket
        ticket._future.set_exception(self._ended())
        return ticket

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Ends the engine: the running generation stops at its next step, waiting ones are cancelled.

        Blocks until the thread has ended, or for the timeout (a decode can't be interrupted).
        """
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        if not self._load():
            self._fail_waiting()
            return
        while (ticket := self._next()) is not None:
            outcome = self._generate(ticket)
            with self._changed:
                self._running = None
            ticket._advance(phase="done", phase_started_monotonic=time.monotonic())
            if isinstance(outcome, GenerationError):
                ticket._future.set_exception(outcome)
            else:
                ticket._future.set_result(outcome)
            del ticket, outcome  # or the finished pictures live until the next job
        self._fail_waiting()

    def _load(self) -> bool:
        started = time.monotonic()
        try:
            self.model.load()
            self.activity += 1
            self.model.warm_up()
            self.activity += 1
        except Exception as error:
            failure = error if isinstance(error, GenerationError) else as_generation_error(error)
            if isinstance(failure, GenerationFailed | OutOfMemory | InvalidInput):
                failure = ModelLoadFailed(f"{self.model.model_name}: {failure.message}")
            self.broken = failure.message
            log.error("model_load_failed", model=self.model.model_name, code=failure.code, reason=failure.message)
            self._ready.set_exception(failure)
            return False
        log.info(
            "model_ready",
            model=self.model.model_name,
            device=self.model.device,
            seconds=round(time.monotonic() - started, 3),
        )
        self._ready.set_result(None)
        return True

    def _next(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closing or self.broken)
            if self.closing or self.broken:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _generate(self, ticket: Ticket) -> Generation | GenerationError:
        if ticket.cancelled:
            return Cancelled("cancelled before it started")
        try:
            return self.model.generate(ticket.request, _TicketControl(ticket, self))
        except Exception as error:
            failure = error if isinstance(error, GenerationError) else as_generation_error(error)
            failure.__cause__ = None
            # the frames of the traceback hold the tensors of the generation
            traceback.clear_frames(error.__traceback__)
        failure.__traceback__ = None
        if isinstance(failure, DeviceBroken):
            self.broken = failure.message
        elif not isinstance(failure, Cancelled | InvalidInput):
            release_device_memory()
        log.info("generation_ended", job_id=ticket.job_id, code=failure.code, reason=failure.message)
        return failure

    def _fail_waiting(self) -> None:
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for ticket in left:
            ticket._future.set_exception(self._ended())

    def _ended(self) -> GenerationError:
        return Cancelled("the engine was closed") if self.broken is None else DeviceBroken(self.broken)


_DEVICE_FAULTS: Mapping[str, type[GenerationError]] = {
    "out of memory": OutOfMemory,
    "CUBLAS_STATUS_ALLOC_FAILED": OutOfMemory,
    "CUDA error": DeviceBroken,
    "device-side assert": DeviceBroken,
    "CUDNN_STATUS_EXECUTION_FAILED": DeviceBroken,
}


def as_generation_error(error: Exception) -> GenerationError:
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
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return GenerationFailed(f"{type(error).__name__}{place}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def release_device_memory() -> None:
    """Gives cached blocks back to the device after a failure."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
