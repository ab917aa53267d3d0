"""Forwards: which parked requests run together next, and how a forward that fails finds the one that is guilty."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Sequence
from functools import partial

import structlog

from models.denoising.costs import Costs, Shape
from models.denoising.denoiser import run_together
from models.denoising.lanes import Pace
from models.denoising.measuring import room_bytes
from models.denoising.order import Order
from models.denoising.runs import Run
from models.generation import (
    DeviceBroken,
    GenerationError,
    OutOfMemory,
    as_generation_error,
    release_device_memory,
)

log = structlog.get_logger()

Outcome = tuple[Run, object, GenerationError | None]

LOOK_SECONDS = 1.0  # between two looks at the free memory, which asks the driver


class Forwards:
    """The denoising thread's way through the parked requests, one forward at a time."""

    def __init__(self) -> None:
        self.count = self.rows = 0
        self._order = Order()
        self._paces: dict[str, Pace] = {}
        self._free: dict[str, tuple[float, int | None]] = {}

    def step(self, parked: Sequence[Run]) -> list[Outcome]:
        """Run the next forward: those that were in it, with their outputs or errors."""
        now = time.monotonic()
        works = [run.work(now) for run in parked]
        known: dict[Hashable, tuple[Costs, Shape]] = {
            work.key: (run.costs, run.shape) for run, work in zip(parked, works, strict=True)
        }

        def cap(key: Hashable) -> int:
            costs, shape = known[key]
            return costs.cap(shape)

        def seconds(key: Hashable, rows: int) -> float:
            costs, shape = known[key]
            return costs.seconds(shape, rows) or 0.0

        indices = set(self._order.choose(works, cap, seconds))
        for index, run in enumerate(parked):
            if index not in indices:
                run.ticket.advance()  # it is alive; it has given way
        chosen = [run for index, run in enumerate(parked) if index in indices]
        outcomes = self._run(chosen)
        self._look(chosen[0].model.device)
        return outcomes

    def free_bytes(self, device: str) -> int | None:
        """The memory of a device that was free between two of the last forwards, for whatever runs beside us takes its
        part; None before the first, and for the host. May be asked from any thread."""
        return self._free.get(device, (0.0, None))[1]

    def _look(self, device: str) -> None:
        now = time.monotonic()
        if device not in self._free or now - self._free[device][0] >= LOOK_SECONDS:
            with contextlib.suppress(RuntimeError):  # a card that is lost says so at the next forward
                self._free[device] = now, room_bytes(device)

    def _run(self, runs: Sequence[Run]) -> list[Outcome]:
        """The outputs of the parked calls, run together; where that fails, each alone, so that only the guilty fail."""
        calls = [run.call for run in runs if run.call is not None]
        first = runs[0]
        shape, rows = first.shape, sum(call.rows for call in calls)
        billed = [(run, call.rows) for run, call in zip(runs, calls, strict=True)]
        try:
            outputs: Sequence[object] = self._pace(first).run(
                partial(run_together, calls), partial(self._account, first.costs, shape, billed)
            )
        except BaseException as error:
            failure = as_generation_error(error)
            if isinstance(failure, DeviceBroken) or len(runs) == 1:
                return [(run, None, as_generation_error(error)) for run in runs]
            log.warning("forward_split", requests=len(runs), rows=rows, code=failure.code, reason=failure.message)
        else:
            self.count += 1
            self.rows += rows
            return list(zip(runs, outputs, [None] * len(runs), strict=True))
        # outside of the handler, whose exception holds the memory of the failed forward
        if isinstance(failure, OutOfMemory):
            first.costs.lower_cap(shape, rows)
            release_device_memory()
        return [outcome for run in runs for outcome in self._run([run])]

    def settle(self) -> None:
        """What has run is billed. Call before a run ends; its last forward has been waited for by then."""
        for pace in self._paces.values():
            with contextlib.suppress(RuntimeError):  # a card that is lost says so at the next forward
                pace.settle()

    def _pace(self, run: Run) -> Pace:
        return self._paces.setdefault(run.model.device, Pace(run.model.device))

    def _account(self, costs: Costs, shape: Shape, billed: Sequence[tuple[Run, int]], seconds: float) -> None:
        rows = sum(count for _, count in billed)
        costs.observe(shape, rows, seconds)
        for run, count in billed:
            run.compute_seconds += seconds * count / rows
