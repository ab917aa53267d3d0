"""Tickets: what whoever submits a generation holds of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from models.generation import Generation, GenerationError, GenerationRequest, Phase


@dataclass(frozen=True)
class Progress:
    """Where a generation is: `step` of `of` denoise steps; `activity` grows with every step and phase, and while the
    engine gives others the turn.

    `phase_started_monotonic` is on the clock of `time.monotonic`.
    """

    phase: Phase
    step: int
    of: int
    activity: int
    phase_started_monotonic: float

    @property
    def denoised(self) -> bool:
        """Whether all steps are done, and what is left goes on beside those of others."""
        return self.phase == "done" or (self.phase == "decode" and self.step >= self.of)


class Ticket:
    """One submitted generation. `cancel` takes effect at once while it waits, then at the next step."""

    def __init__(self, request: GenerationRequest, on_cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self.job_id = request.job_id
        self.submitted = time.monotonic()
        self._on_cancel = on_cancel
        self._progress = Progress("waiting", 0, request.params.steps, 0, time.monotonic())
        self._cancelled = threading.Event()
        self._future: Future[Generation] = Future()
        self._denoised: Future[None] = Future()
        for future in (self._future, self._denoised):
            future.set_running_or_notify_cancel()  # from here on only the engine can end it

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
        self._on_cancel(self)

    async def result(self) -> Generation:
        """The finished generation. Raises its `GenerationError`. Giving up waiting does not cancel it."""
        return await asyncio.shield(asyncio.wrap_future(self._future))

    async def denoised(self) -> None:
        """Returns when all steps are done, or when the generation has ended without."""
        await asyncio.shield(asyncio.wrap_future(self._denoised))

    def advance(self, **changes: Any) -> None:
        """For the engine: the generation is alive, and this is where it is."""
        self._progress = replace(self._progress, activity=self._progress.activity + 1, **changes)
        if self._progress.denoised and not self._denoised.done():
            self._denoised.set_result(None)

    def end(self, outcome: Generation | GenerationError) -> None:
        """For the engine, once."""
        self.advance(phase="done", phase_started_monotonic=time.monotonic())
        if isinstance(outcome, GenerationError):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)


def admissible(waiting: Sequence[Ticket], denoising: Sequence[Ticket], slots: int) -> list[Ticket]:
    """Of the waiting, those that have a slot now, interactive ones (of priority 0) first.

    Only interactive ones count against an interactive one where there are several slots: the others give way to it, and
    keep their latents meanwhile. Interactive ones of another model do not count against a background one, whose slot is
    its own model's.
    """
    taken: list[Ticket] = []
    # sorted is stable: of the same priority the first come is the first served
    for ticket in sorted(waiting, key=lambda ticket: ticket.request.priority):
        rivals = [*denoising, *taken]
        if ticket.request.priority == 0 and slots > 1:
            rivals = [rival for rival in rivals if rival.request.priority == 0]
        elif ticket.request.priority > 0:
            own = ticket.request.model
            rivals = [rival for rival in rivals if rival.request.priority > 0 or rival.request.model == own]
        if len(rivals) < slots:
            taken.append(ticket)
    return taken
