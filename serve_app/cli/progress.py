"""Watching jobs: a bar for each on a terminal, one line a change elsewhere. All of it on stderr."""

from types import TracebackType
from typing import Self
from uuid import UUID

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from serve_app.api.wire import Job
from serve_app.cli.terminal import clean, errors, say, seconds
from serve_app.client import TERMINAL, short_id

QUARTERS = 4  # without a terminal, steps are told this often


class Watching:
    """Shows the states of jobs as they come; call it with each. A context manager."""

    def __init__(self) -> None:
        console = errors()
        self._bars: Progress | None = None
        self._tasks: dict[UUID, TaskID] = {}
        self._told: dict[UUID, tuple[object, ...]] = {}
        if console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, job: Job) -> None:
        """Show a state of a job."""
        if self._bars is not None:
            self._draw(self._bars, job)
        else:
            self._tell(job)

    def _draw(self, bars: Progress, job: Job) -> None:
        if job.id not in self._tasks:
            self._tasks[job.id] = bars.add_task(name_of(job), total=None, state="")
        task = self._tasks[job.id]
        if job.status == "completed":
            bars.update(task, total=1, completed=1, state=state_of(job))
        elif job.progress is not None and job.progress.step is not None and job.progress.steps:
            bars.update(task, total=job.progress.steps, completed=job.progress.step, state=state_of(job))
        else:
            bars.update(task, state=state_of(job))
        if job.status in TERMINAL:
            bars.stop_task(task)

    def _tell(self, job: Job) -> None:
        at = job.progress
        quarter = QUARTERS * at.step // at.steps if at is not None and at.step is not None and at.steps else None
        seen = (job.status, job.stage, job.attempt, job.position, job.cancelling, at and at.phase, quarter)
        if self._told.get(job.id) != seen:
            self._told[job.id] = seen
            say(f"{name_of(job)}: {state_of(job)}")


def name_of(job: Job) -> str:
    """A job in a few characters."""
    return f"{job.job_type} {short_id(job.id)}"


def state_of(job: Job) -> str:
    """Where a job stands, in a few words."""
    if job.status == "queued":
        waits = "" if not job.position else f", {job.position} ahead"
        eta = "" if job.eta_seconds is None else f", about {seconds(job.eta_seconds)}"
        again = f", failed {job.failures} of {job.max_attempts} times" if job.failures else ""
        return f"queued for {job.stage}{waits}{eta}{again}"
    if job.status == "processing":
        if job.cancelling:
            return "cancelling"
        if job.progress is None:
            return f"running: {job.stage}"
        step, steps = job.progress.step, job.progress.steps
        at = "" if step is None else f" {step}" + (f"/{steps}" if steps else "")
        return f"running: {job.progress.phase}{at}"
    if job.status == "completed":
        count = f"{len(job.assets)} file{'' if len(job.assets) == 1 else 's'}"
        took = "" if job.generation_seconds is None else f" in {seconds(job.generation_seconds)}"
        return f"completed{took}, {count}"
    if job.error is None:
        return job.status
    return clean(f"{job.status}: {job.error.code}" + (f" ({job.error.message})" if job.error.message else ""))
