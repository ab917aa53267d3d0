"""The engine: one thread that owns one model and runs generations on it, with progress, cancellation and isolation.

Whoever submits gets a `Ticket`. The engine thread is the only one that touches the model; tickets may be used
from any thread and awaited from asyncio. A failed generation fails its ticket and nothing else, unless it
broke the device: then the engine says so in `broken`, fails what it holds and ends. The errors are those of
`models.generation`, given out here as well.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import structlog

from models.generation import (
    Cancelled,
    Control,
    DeviceBroken,
    Generation,
    GenerationError,
    GenerationFailed,
    GenerationRequest,
    InvalidInput,
    Model,
    ModelLoadFailed,
    OutOfMemory,
    Phase,
    as_generation_error,
    release_device_memory,
)

__all__ = [
    "Cancelled",
    "Control",
    "DeviceBroken",
    "Engine",
    "Generation",
    "GenerationError",
    "GenerationFailed",
    "GenerationRequest",
    "InvalidInput",
    "Model",
    "ModelLoadFailed",
    "OutOfMemory",
    "Phase",
    "Progress",
    "Ticket",
    "as_generation_error",
    "release_device_memory",
]

log = structlog.get_logger()


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
    """One submitted generation. `cancel` takes effect at once while it waits, then at the next step or phase."""

    def __init__(self, request: GenerationRequest, engine: Engine) -> None:
        self.request = request
        self._engine = engine
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
        self._engine._drop(self)

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
        self.broken: str | None = None  # why it can serve no more, once that is so
        self.activity = 0  # written by the engine thread only
        self.closing = False
        self._fault: type[GenerationError] = Cancelled
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
        ticket = Ticket(request, self)
        with self._changed:
            if self.broken is None and not self.closing:
                self._waiting.append(ticket)
                self._changed.notify_all()
                return ticket
        ticket._future.set_exception(self._ended())
        return ticket

    def _drop(self, ticket: Ticket) -> None:
        """Ends a cancelled ticket that has not been started."""
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket._future.set_exception(Cancelled("cancelled before it started"))

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
            self._fault, self.broken = type(failure), failure.message
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
        try:
            return self.model.generate(ticket.request, _TicketControl(ticket, self))
        except BaseException as error:  # the thread must outlive anything, or its tickets never end
            failure = error if isinstance(error, GenerationError) else as_generation_error(error)
            failure.__cause__ = None
            # the frames of the traceback hold the tensors of the generation
            traceback.clear_frames(error.__traceback__)
        failure.__traceback__ = None
        if isinstance(failure, DeviceBroken):
            self._fault, self.broken = DeviceBroken, failure.message
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
        return self._fault(self.broken or "the engine was closed")
