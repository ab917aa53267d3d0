"""Lanes: threads beside the denoising one, for what need not hold it up (text encoding, decoding, conversions).

On a card each lane has a stream of its own, so that its kernels overlap with the denoising ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

LaneName = Literal["text", "pixels"]


class Lane:
    """One thread that does work in the order given. `done` is called from that thread with the result or the error."""

    def __init__(self, name: str, device: str) -> None:
        self._on_card = device == "cuda"
        self._stream: Any = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    def put(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Call from the denoising thread: what it has queued on the card so far comes before the work."""
        ready = None
        if self._on_card:
            import torch

            ready = torch.cuda.Event()
            ready.record()
        self._executor.submit(self._do, work, ready, done)

    def close(self) -> None:
        """Lets the work in progress end; drops what has not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], Any], ready: Any, done: Callable[[Any, BaseException | None], None]) -> None:
        import torch

        try:
            with torch.no_grad():  # the grad mode is the thread's own
                result = work() if ready is None else self._on_stream(work, ready)
        except BaseException as error:
            done(None, error)
        else:
            done(result, None)

    def _on_stream(self, work: Callable[[], Any], ready: Any) -> Any:
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            result = work()
            self._stream.synchronize()
        return result


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


class Pace:
    """Keeps the denoising thread at most one forward ahead of the card.

    Further ahead, a cancel or a more urgent request would wait for all that is queued. On the CPU nothing is.
    """

    def __init__(self, device: str) -> None:
        self._on_card = device == "cuda"
        self._before: Any = None

    def keep(self) -> None:
        """Call after each forward; returns when the one before it has ended."""
        if not self._on_card:
            return
        import torch

        event = torch.cuda.Event(blocking=True)
        event.record()
        if self._before is not None:
            self._before.synchronize()
        self._before = event
