"""Runs: requests that are being generated, each in a greenlet of its own on the engine's thread.

The code of a pipeline is written as if it had the model for itself. In a greenlet it can be stopped at every denoiser
call (parked) while the engine runs others, and goes on where it was when the engine has its result.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from greenlet import greenlet

from models.denoising.costs import Costs, Shape, shape_of
from models.denoising.denoiser import Call
from models.denoising.lanes import LaneName
from models.denoising.order import Work
from models.denoising.tickets import Ticket
from models.generation import (
    Cancelled,
    Control,
    Generation,
    GenerationError,
    Model,
    Phase,
    as_generation_error,
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Aside:
    """Work for a lane that a run waits for."""

    work: Callable[[], Any]
    lane: LaneName


class Run(Control):
    """One request in the engine: its `Control`, and the place where it is parked.

    `call` is the denoiser call that it waits with, None while a lane works for it. All methods belong to the engine's
    thread. `outcome` is set at the end.
    """

    def __init__(self, ticket: Ticket, model: Model, costs: Costs, on_report: Callable[[], bool]) -> None:
        """`on_report` counts a sign of life, and says whether the engine goes on."""
        self.ticket, self.model, self.costs = ticket, model, costs
        self.call: Call | None = None
        self.outcome: Generation | GenerationError | None = None
        self.compute_seconds = 0.0  # this request's share of the forwards that it was in
        self._on_report = on_report
        self._idle_since = time.monotonic()
        self._forwards = 0
        self._greenlet = greenlet(self._generate)

    def go_on(self, value: Any = None, error: BaseException | None = None) -> Call | Aside | None:
        """Let it run until it parks again, or ends (None): with what it has waited for, or with an error instead."""
        self.call = None
        self._idle_since = time.monotonic()
        parked: Any = self._greenlet.throw(error) if error is not None else self._greenlet.switch(value)
        if self._greenlet.dead:
            if self.outcome is None:  # thrown into before it began
                self.outcome = as_generation_error(error) if error is not None else Cancelled("it never began")
                if isinstance(error, GenerationError):
                    self.outcome = error
            return None
        if isinstance(parked, Call):
            self.call = parked
            self._forwards += 1
        return parked  # type: ignore[no-any-return]

    def work(self, now: float) -> Work:
        """What the order needs to know of the parked call."""
        call, request, progress = self.call, self.ticket.request, self.ticket.progress
        assert call is not None
        return Work(
            key=(call.key, request.params.width, request.params.height, request.params.frames),
            rows=call.rows,
            remaining=max(0, progress.of - progress.step) * self._step_seconds(),
            waited=now - self.ticket.submitted,
            idle=now - self._idle_since,
            priority=request.priority,
            deadline=None if request.deadline is None else request.deadline - now,
        )

    def _step_seconds(self) -> float:
        return self.costs.step_seconds(self.ticket.request.params) or 0.0

    @property
    def shape(self) -> Shape:
        """What the parked call costs as."""
        shape = shape_of(self.ticket.request.params)
        return shape._replace(part=self.call.part) if self.call is not None and self.call.part else shape

    def step(self, done: int, of: int) -> None:
        self._report(step=done, of=of)

    def phase(self, name: Phase) -> None:
        self._report(phase=name, phase_started_monotonic=time.monotonic())

    def forward(self, call: Call) -> Any:
        return self._park(call)

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T:
        result: T = self._park(Aside(work, lane))
        return result

    def _park(self, reason: Call | Aside) -> Any:
        engine = self._greenlet.parent
        assert engine is not None
        return engine.switch(reason)

    def _report(self, **changes: Any) -> None:
        self.ticket.advance(**changes)
        goes_on = self._on_report()
        if self.ticket.cancelled or not goes_on:
            raise Cancelled("cancelled at a step boundary")

    def _generate(self, _: Any) -> None:
        try:
            self.outcome = self.model.generate(self.ticket.request, self)
        except BaseException as error:  # the engine must outlive anything, or its tickets never end
            failure = error if isinstance(error, GenerationError) else as_generation_error(error)
            failure.__cause__ = None
            # the frames of the traceback hold the tensors of the generation
            traceback.clear_frames(error.__traceback__)
            failure.__traceback__ = None
            self.outcome = failure
