"""The engine: one thread that owns the models of a replica and schedules their denoise steps.

Requests join, give way, are cancelled and leave at step boundaries. Each runs the stock pipeline of diffusers in a
greenlet (`models.denoising.runs`); its denoiser calls are parked, and those that share a shape are run as one forward
(`forwards`), in the order of `order` and by the measured costs of `costs`. Text encoding and decoding happen on other
threads meanwhile (`lanes`).

Whoever submits gets a `Ticket`, which may be used from any thread and awaited from asyncio. A failed generation fails
its ticket and nothing else, unless it broke the device: then the engine says so in `broken`, fails what it holds and
ends. The errors are those of `models.generation`, given out here as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from models.denoising.costs import Costs, Shape, shape_of
from models.denoising.denoiser import Call
from models.denoising.forwards import Forwards
from models.denoising.lanes import Lanes, adopt, timed
from models.denoising.measuring import room_bytes
from models.denoising.runs import Aside, Run
from models.denoising.tickets import Progress, Ticket, admissible
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
    OutOfMemoryPredicted,
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
    "OutOfMemoryPredicted",
    "Phase",
    "Progress",
    "Ticket",
    "as_generation_error",
    "release_device_memory",
]

log = structlog.get_logger()

UNWINDINGS = 10


class Engine:
    """Runs the tickets of its models, up to `slots` of them at a time, step by step.

    Whoever feeds it claims work for `free_slots`. More may be submitted; they wait inside, in the order of arrival.
    Interactive requests share their slots with one another only, for background ones that hold all of them give way
    and keep their latents meanwhile; a single slot belongs to whoever has it.
    `costs` are the profiles by model name; they are kept in `costs_folder`, if one is given. With `overlap` encoding
    and decoding go on beside the steps; without it they come between them. None lets the device decide: on a CPU whose
    cores all work for each step, two threads would only be in each other's way.
    """

    def __init__(
        self, *models: Model, slots: int = 1, costs_folder: Path | None = None, overlap: bool | None = None
    ) -> None:
        self.models = {model.model_name: model for model in models}
        self.model = models[0]
        self.slots = slots
        self.broken: str | None = None  # why it can serve no more, once that is so
        self.activity = 0  # written by the engine thread only
        self.closing = False
        self.costs: dict[str, Costs] = {}
        self._costs_folder = costs_folder
        self._fault: type[GenerationError] = Cancelled
        self._waiting: deque[Ticket] = deque()
        self._runs: list[Run] = []
        self._returned: deque[tuple[Run, Any, BaseException | None, float]] = deque()
        self._lanes = Lanes(overlap)
        self._forwards = Forwards()
        self._changed = threading.Condition()
        self._ready: Future[None] = Future()
        self._ready.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the engine can still finish anything: its thread runs and the device works."""
        return self._thread.is_alive() and self.broken is None and not self._lanes.hung

    @property
    def forwards(self) -> int:
        """The forwards that were run so far."""
        return self._forwards.count

    @property
    def rows(self) -> int:
        """The rows that they had together."""
        return self._forwards.rows

    @property
    def free_slots(self) -> int:
        with self._changed:
            return max(0, self.slots - len(self._waiting) - self._denoising())

    def shapes(self, model_name: str) -> dict[Shape, int | None]:
        """The shapes of what one of its models runs or is about to, as more of these share its forwards; each with the
        most rows of a step that the free memory has room for, or None where that is not known."""
        with self._changed:
            requests = [run.ticket.request for run in self._runs if not run.ticket.progress.denoised]
            requests += [ticket.request for ticket in self._waiting]
        shapes = {shape_of(r.params) for r in requests if (r.model or self.model.model_name) == model_name}
        costs, free = self.costs[model_name], self._forwards.free_bytes(self.models[model_name].device)
        return {shape: costs.most_rows(shape, free) for shape in shapes}

    def start(self) -> None:
        """Starts the engine thread, which loads and warms the models; await `ready` for the outcome."""
        self._thread.start()

    async def ready(self) -> None:
        """Returns when the models are loaded and warm. Raises `ModelLoadFailed` or `DeviceBroken`."""
        await asyncio.shield(asyncio.wrap_future(self._ready))

    def submit(self, request: GenerationRequest) -> Ticket:
        """Never raises: on an engine that is closed or broken the ticket fails at once."""
        ticket = Ticket(request, self._drop)
        with self._changed:
            if self.broken is None and not self.closing:
                self._waiting.append(ticket)
                self._changed.notify_all()
                return ticket
        ticket.end(self._ended())
        return ticket

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Ends the engine: what runs stops at its next step, waiting requests are cancelled.

        Blocks until the thread has ended, or for the timeout (a forward can't be interrupted).
        """
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _drop(self, ticket: Ticket) -> None:
        """Ends a cancelled ticket that has not been started; wakes the thread for one that has."""
        with self._changed:
            if ticket not in self._waiting:
                self._changed.notify_all()
                return
            self._waiting.remove(ticket)
        ticket.end(Cancelled("cancelled before it started"))

    def _run(self) -> None:
        if self._load():
            import torch

            with contextlib.ExitStack() as session:
                # for the whole life of the thread: the grad mode is the thread's, and greenlets that each set and
                # restored it would restore it for one another
                session.enter_context(torch.no_grad())
                for model in self.models.values():
                    session.enter_context(model.session())
                try:
                    while self._turn():
                        pass
                except BaseException as error:  # a fault of ours, or of the device outside of a pipeline
                    self._fail(error)
        for run in list(self._runs):
            try:
                for _ in range(UNWINDINGS):  # a pipeline may park again while it unwinds
                    if self._go_on(run, error=self._ended()) is None:
                        break
            except BaseException as error:
                self._fail(error)
            if not run.ticket.done:
                run.ticket.end(self._ended())
        self._lanes.close()
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for ticket in left:
            ticket.end(self._ended())

    def _fail(self, error: BaseException) -> None:
        """Nothing can be relied on any more: say so, so that the process is replaced."""
        log.error("engine_failed", error=type(error).__name__)
        with self._changed:
            self._fault, self.broken = DeviceBroken, self.broken or f"the engine failed: {type(error).__name__}"

    def _load(self) -> bool:
        for model in self.models.values():
            started = time.monotonic()
            try:
                model.load()
                self._reported()
                model.warm_up()
                self._reported()
                self.costs[model.model_name] = model.measure(self._costs_folder)
                self._reported()
                for name, costs in self.costs.items():  # each model that comes leaves less for all
                    costs.room_bytes = room_bytes(self.models[name].device)
            except Exception as error:
                failure = error if isinstance(error, GenerationError) else as_generation_error(error)
                if isinstance(failure, GenerationFailed | OutOfMemory | InvalidInput):
                    failure = ModelLoadFailed(f"{model.model_name}: {failure.message}")
                self._fault, self.broken = type(failure), failure.message
                log.error("model_load_failed", model=model.model_name, code=failure.code, reason=failure.message)
                self._ready.set_exception(failure)
                return False
            seconds = round(time.monotonic() - started, 3)
            log.info("model_ready", model=model.model_name, device=model.device, seconds=seconds)
        self._ready.set_result(None)
        return True

    def _reported(self) -> bool:
        """A sign of life; False when everything should stop."""
        self.activity += 1
        return not self.closing

    def _turn(self) -> bool:
        """One round: take in what has come, let it run up to its next call, and do one forward. False: the end."""
        with self._changed:
            self._changed.wait_for(self._has_something_to_do)
            if self.closing or self.broken:
                return False
            starting = self._take_in()
            returned = list(self._returned)
            self._returned.clear()
        for ticket in starting:
            self._begin(ticket)
        for run, result, error, seconds in returned:
            run.compute_seconds += seconds
            if run in self._runs:  # or it was cancelled meanwhile
                self._go_on(run, adopt(result), error)
        for run in [run for run in self._runs if run.ticket.cancelled]:
            self._go_on(run, error=Cancelled("cancelled at a step boundary"))
        parked = [run for run in self._runs if run.call is not None]
        if parked and not self.broken:
            self._reported()
            for run, output, error in self._forwards.step(parked):
                self._go_on(run, output, error)
        return self.broken is None

    def _has_something_to_do(self) -> bool:
        return bool(
            self.closing
            or self.broken
            or self._returned
            or self._admissible()
            or any(run.call is not None or run.ticket.cancelled for run in self._runs)
        )

    def _denoising(self) -> int:
        """The slots that are taken: one that only waits for its decoding has left its own."""
        return sum(not run.ticket.progress.denoised for run in self._runs)

    def _take_in(self) -> list[Ticket]:
        taken = self._admissible()
        for ticket in taken:
            self._waiting.remove(ticket)
        return taken

    def _admissible(self) -> list[Ticket]:
        denoising = [run.ticket for run in self._runs if not run.ticket.progress.denoised]
        return admissible(list(self._waiting), denoising, self.slots)

    def _begin(self, ticket: Ticket) -> None:
        model = self.models.get(ticket.request.model or self.model.model_name)
        if model is None:
            ticket.end(InvalidInput("this engine has no such model"))
            return
        costs, request = self.costs[model.model_name], ticket.request
        rows = model.forward_rows(request)
        if not costs.has_room(request.params, rows):
            needed, room = costs.forward_bytes(request.params, rows) or 0, costs.room_bytes or 0
            message = f"a step needs {needed / 2**30:.1f} GiB beside the weights, and there are {room / 2**30:.1f}"
            ticket.end(OutOfMemoryPredicted(message))
            return
        run = Run(ticket, model, costs, self._reported)
        self._runs.append(run)
        self._go_on(run)

    def _go_on(self, run: Run, value: Any = None, error: BaseException | None = None) -> Call | Aside | None:
        parked = run.go_on(value, error)
        # files are waited for in their lane in any case: a download would hold up everybody
        while isinstance(parked, Aside) and parked.lane != "files" and not self._lanes.overlap(run.model.device):
            result, failure, seconds = timed(parked.work)
            run.compute_seconds += seconds
            parked = run.go_on(result, failure)
        if isinstance(parked, Aside):
            lane = self._lanes.lane(run.model.model_name, parked.lane, run.model.device)
            lane.put(parked.work, partial(self._return, run))
        elif parked is None:
            self._end(run)
        return parked

    def _return(self, run: Run, result: Any, error: BaseException | None, seconds: float) -> None:
        with self._changed:
            self._returned.append((run, result, error, seconds))
            self._changed.notify_all()

    def _end(self, run: Run) -> None:
        self._forwards.settle()
        outcome, run.outcome = run.outcome, None
        if isinstance(outcome, Generation) and run.compute_seconds:
            timings = outcome.timings_ms | {"compute": round(run.compute_seconds * 1000, 3)}
            outcome = replace(outcome, timings_ms=timings)
        with self._changed:
            self._runs.remove(run)
        if isinstance(outcome, GenerationError):
            if isinstance(outcome, DeviceBroken):
                self._fault, self.broken = DeviceBroken, outcome.message
            elif not isinstance(outcome, Cancelled | InvalidInput):
                release_device_memory()
            log.info("generation_ended", job_id=run.ticket.job_id, code=outcome.code, reason=outcome.message)
        assert outcome is not None  # set by the greenlet's last act
        run.ticket.end(outcome)

    def _ended(self) -> GenerationError:
        return self._fault(self.broken or "the engine was closed")
