"""Lanes: threads beside the denoising one, for what need not hold it up (text encoding, decoding, conversions).

On a card each lane has a stream of its own, so that its kernels overlap with the denoising ones.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

T = TypeVar("T")
LaneName = Literal["text", "pixels", "files"]
HUNG_SECONDS = 900.0  # longer than a job that decodes keeps its lease without a sign of life
Done = Callable[[Any, BaseException | None, float], None]


class Lane:
    """One thread that does work in the order given.

    `done` is called from that thread with the result or the error, and the seconds that it took.
    """

    def __init__(self, name: str, device: str) -> None:
        self._on_card = device == "cuda"
        self._stream: Any = None
        self._given: SimpleQueue[tuple[Callable[[], Any], Any, Done] | None] = SimpleQueue()
        self._since: float | None = None
        # a daemon: a decode that never returns must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """For how long it has been at what it is doing; 0 while it waits for work."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def put(self, work: Callable[[], Any], done: Done) -> None:
        """Call from the denoising thread: what it has queued on the card so far comes before the work."""
        ready = None
        if self._on_card:
            import torch

            ready = torch.cuda.Event()
            ready.record()
        self._given.put((work, ready, done))

    def close(self) -> None:
        """It ends after the work in its hands."""
        self._given.put(None)

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            self._since = time.monotonic()
            self._do(*given)
            self._since = None
            del given  # or the last result lives until the next work

    def _do(self, work: Callable[[], Any], ready: Any, done: Done) -> None:
        import torch

        with torch.no_grad():  # the grad mode is the thread's own
            done(*timed(work if ready is None else partial(self._on_stream, work, ready)))

    def _on_stream(self, work: Callable[[], Any], ready: Any) -> Any:
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            result = work()
            self._stream.synchronize()
        return result


class Lanes:
    """The lanes of an engine, made when they are first wanted."""

    def __init__(self, overlap: bool | None) -> None:
        self._overlap = overlap
        self._lanes: dict[tuple[str, LaneName], Lane] = {}

    def overlap(self, device: str) -> bool:
        """Whether work beside the steps gains anything; on a CPU whose cores all work for each step, it does not."""
        if self._overlap is not None:
            return self._overlap
        import torch

        return device == "cuda" or torch.get_num_threads() < (os.cpu_count() or 1)

    def lane(self, model: str, name: LaneName, device: str) -> Lane:
        if (model, name) not in self._lanes:
            self._lanes[model, name] = Lane(f"{model} {name}", device)
        return self._lanes[model, name]

    @property
    def hung(self) -> bool:
        """Whether one is at one piece of work for longer than any takes: it will not come back. Files may be long in
        coming, and have a time-out of their own."""
        lanes = [lane for (_, name), lane in list(self._lanes.items()) if name != "files"]
        return any(lane.busy_seconds > HUNG_SECONDS for lane in lanes)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()


def timed(work: Callable[[], Any]) -> tuple[Any, BaseException | None, float]:
    """The result of work or its error, and the seconds that it took."""
    started = time.perf_counter()
    try:
        return work(), None, time.perf_counter() - started
    except BaseException as error:
        return None, error, time.perf_counter() - started


def adopt(result: Any) -> Any:
    """Take over a lane's result on the denoising thread: the allocator must not reuse its memory while we read it."""
    for tensor in _tensors(result):
        if tensor.is_cuda:
            import torch

            tensor.record_stream(torch.cuda.current_stream())
    return result


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "record_stream"):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    else:  # encoded prompts and images, and what a VAE's encoder says
        for name in ("arguments", "encoded", "tokens", "latent_dist", "parameters"):
            inner = getattr(value, name, None)
            if inner is not None and not callable(inner):
                yield from _tensors(inner)


class Pace:
    """Keeps the denoising thread at most one forward ahead of the device, and tells how long each took there.

    Further ahead, a cancel or a more urgent request would wait for all that is queued. On the CPU nothing is. There is
    one for a device, whatever models share it.
    """

    def __init__(self, device: str) -> None:
        self._on_card = device == "cuda"
        self._before: tuple[Any, Any, Callable[[float], None]] | None = None

    def run(self, forward: Callable[[], T], took: Callable[[float], None]) -> T:
        """The result of a forward, which a card may not have computed yet; returns when the one before it has ended.
        `took` is called with its seconds: now, or, on a card, when the next one has begun or at `settle`."""
        if not self._on_card:
            started = time.perf_counter()
            result = forward()
            took(time.perf_counter() - started)
            return result
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True, blocking=True)
        begin.record()  # reached by the card when it has done what was queued before
        result = forward()
        end.record()
        self.settle()
        self._before = begin, end, took
        return result

    def settle(self) -> None:
        """Wait for the last forward, if nobody has yet."""
        before, self._before = self._before, None
        if before is not None:
            begin, end, took = before
            end.synchronize()
            took(begin.elapsed_time(end) / 1000)
