"""What one generation does as it runs: it measures its phases, reports its steps, and leaves latents and states."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

from models.denoising.denoiser import Call, blank_output
from models.denoising.lanes import LaneName
from models.denoising.resumption import DenoisingState, Resumption, StateUnusable
from models.generation import Control, GenerationRequest, Phase
from models.guiding.image_prompts import ImagePrompt
from models.lora.rows import AdapterSet

T = TypeVar("T")


class Stopwatch:
    """Measures the phases of one generation while it reports them to the caller's `Control`, and its latents to
    `snapshots`. `inline` keeps everything on the calling thread."""

    def __init__(self, control: Control, request: GenerationRequest, inline: bool = False) -> None:
        self._control = control
        self._snapshots = request.snapshots
        self._states = request.states
        self._inline = inline
        self.identity = ""
        self.name = uuid4().hex  # of this run: a job may be run again here
        self.adapters: AdapterSet = ()
        self.prompts: tuple[ImagePrompt, ...] = ()  # of the batch that is about to begin
        self.facts: dict[str, Any] = {}  # for the settings of the result
        self._resumed: DenoisingState | None = None
        self._resumption: Resumption | None = None
        self._phase: str | None = None
        self._batch, self._batches = 0, 1
        self._started = self._phase_started = time.perf_counter()
        self._timings_ms: dict[str, float] = {}

    def read_state(self, data: bytes | None) -> None:
        """What the run goes on from. A state that can't be used is told in the result, and the run starts over."""
        if data is None:
            return
        try:
            self._resumed = DenoisingState.from_bytes(data, self.identity)
            self.facts = {"resumed_from_step": self._resumed.step, "resume_refused": None}
        except StateUnusable as error:
            self.facts = {"resumed_from_step": None, "resume_refused": str(error)}

    def resumable(self, scheduler: Any, generators: list[Any]) -> None:
        """The batch that begins leaves states, and goes on from one where it is that one's."""
        if self.identity and (self._states is not None or self._resumed is not None):
            self._resumption = Resumption(self.identity, self._batch, self._states, self._resumed)
            self._resumption.attach(scheduler, generators)

    def forward(self, call: Call) -> Any:
        if self._resumption is not None and self._resumption.passing:
            return blank_output(call)
        return self._control.forward(call)

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T:
        # parts that move between host and card can't be used by two threads; files are none
        return work() if self._inline and lane != "files" else self._control.aside(work, lane)

    def phase(self, name: Phase) -> None:
        self._close_phase()
        self._phase = name
        self._control.phase(name)

    def batch(self, number: int, of: int) -> None:
        """The denoising of a batch begins, the first being 0: steps are counted through all of them."""
        self._batch, self._batches = number, of
        self.phase("denoise")

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The `callback_on_step_end` of every diffusers pipeline; the decode begins after the last step."""
        done, of = index + 1, pipeline.num_timesteps
        through, all_steps = self._batch * of + done, self._batches * of
        self._control.step(through, all_steps)
        if self._snapshots is not None and not (self._resumption is not None and self._resumption.passing):
            self._snapshots.offer(tensors["latents"], through, all_steps)
        if done == of:
            self.phase("decode")
        return tensors

    def stop(self) -> dict[str, float]:
        """Wall time in milliseconds of each phase and of the whole."""
        self._close_phase()
        total = (time.perf_counter() - self._started) * 1000
        return {**self._timings_ms, "total": round(total, 3)}

    def _close_phase(self) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            before = self._timings_ms.get(self._phase, 0.0)
            self._timings_ms[self._phase] = round(before + (now - self._phase_started) * 1000, 3)
        self._phase, self._phase_started = None, now
