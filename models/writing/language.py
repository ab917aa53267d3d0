"""What any language model backend offers: messages go in, an answer comes out piece by piece.

`models.qwen` runs transformers in this process, `models.writing.vllm_backend` an engine of its own;
`language_backend` chooses by the profile. A backend works on many answers at a time. Two kinds of callers share it:
chat, where somebody waits, goes before jobs, which are durable and can wait (`models.writing.waiting` says how far).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from models.generation import GenerationError, InvalidInput

if TYPE_CHECKING:
    from models.profile import ModelSpec

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
Priority = Literal["chat", "job"]


class LanguageModelBusy(GenerationError):
    """The language model's queue of tokens is full. Try again after `retry_after_seconds`."""

    code = "model_busy"
    retryable = True

    def __init__(self, message: str, retry_after_seconds: float = 5.0) -> None:  # a default, or it can't be unpickled
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sampling:
    """How words are chosen. `temperature` 0 always takes the likeliest token; the seed means nothing then.

    Raises `InvalidInput` for values out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range = self.max_new_tokens >= 1 and 0 <= self.temperature <= 2 and 0 < self.top_p <= 1
        if not (in_range and 0 <= self.seed < 2**63):
            raise InvalidInput("max_new_tokens >= 1, temperature 0 to 2, top_p above 0 to 1, seed 0 to 2**63-1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Completion:
    """What the model wrote, special tokens and outer white space left out.

    `finish_reason`: "stop" where the model ended its answer, "length" at `max_new_tokens`, "cancelled" where the
    caller stopped it (`text` is then what was written so far). `seconds` is the time in the batch, without waiting.
    `cached`: the same question was answered before, and nothing was computed; the other figures are those of then, but
    for `seconds`, which is 0.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: FinishReason
    cached: bool = False


class Answer:
    """One answer on its way. May be used from any thread, and from asyncio; the pieces joined are the text.

    The end is a `Completion` or a `GenerationError`; a cancelled answer ends at once, with what was written so far.
    """

    def __init__(self, priority: Priority, cancel: Callable[[Answer], None]) -> None:
        self.priority = priority
        self.new_tokens = 0  # so far
        self._cancel = cancel
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._watchers: list[Callable[[], None]] = []
        self._future: Future[Completion] = Future()
        self._future.set_running_or_notify_cancel()  # from here on only the backend can end it

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def text(self) -> str:
        """What is written so far."""
        return "".join(self._pieces)

    def cancel(self) -> None:
        """Stop writing and free the place in the batch. Without effect once it is done."""
        self._cancel(self)

    def pieces(self) -> Iterator[str]:
        """The text as it is written; blocks in between. Raises the answer's `GenerationError`."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: len(self._pieces) > seen or self.done)  # type: ignore[misc]
                new, done = self._pieces[seen:], self.done
            yield from new
            seen += len(new)
            if done:
                self._future.result()
                return

    def wait(self, timeout_seconds: float | None = None) -> Completion:
        """The whole answer; blocks. Raises its `GenerationError`, or `TimeoutError`, which leaves it running."""
        return self._future.result(timeout_seconds)

    async def result(self) -> Completion:
        """The whole answer. Raises its `GenerationError`. Giving up waiting does not cancel it."""
        return await asyncio.shield(asyncio.wrap_future(self._future))

    async def __aiter__(self) -> AsyncIterator[str]:
        """The text as it is written. Raises the answer's `GenerationError`. Giving up reading does not cancel it."""
        loop, news, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._watchers.append(tell)
        try:
            while True:
                news.clear()
                with self._changed:
                    new, done = self._pieces[seen:], self.done
                for piece in new:
                    yield piece
                seen += len(new)
                if done:
                    self._future.result()
                    return
                await news.wait()
        finally:
            with self._changed:
                self._watchers.remove(tell)

    def advance(self, piece: str, new_tokens: int) -> None:
        """For the backend: the next piece, which may be empty, and the count of tokens so far."""
        self.new_tokens = new_tokens
        if piece:
            with self._changed:
                if not self.done:
                    self._pieces.append(piece)
                    self._tell()

    def end(self, outcome: Completion | GenerationError) -> None:
        """For the backend: the end. Only the first one counts."""
        with self._changed:
            if self.done:
                return
            if isinstance(outcome, GenerationError):
                self._future.set_exception(outcome)
            else:
                self.new_tokens = outcome.new_tokens
                self._future.set_result(outcome)
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for watcher in self._watchers:
            watcher()


class LanguageBackend(Protocol):
    """A loaded language model that answers many at a time. All methods may be called from any thread.

    `broken` says why it can serve no more, once that is so: only a new process helps then.
    """

    model_name: str
    revision: str | None
    device: str
    loaded: bool
    broken: str | None

    def load(self) -> None:
        """Loads tokenizer and weights, downloading them if they are not here. Raises `ModelLoadFailed`."""

    def warm_up(self) -> None:
        """An answer of one token, so that the first caller does not pay for lazy initialisation."""

    def submit(self, messages: Sequence[Message], sampling: Sampling, priority: Priority = "chat") -> Answer:
        """Begins an answer. Raises `InvalidInput` for messages that leave no room for it, `LanguageModelBusy` when too
        much waits, and `ModelLoadFailed`, `DeviceBroken` or `Cancelled` where the backend can't work (any more)."""

    def close(self) -> None:
        """Ends what runs and waits, as cancelled, and gives the memory back. Blocks."""


def language_backend(spec: ModelSpec, weights: Path | str) -> LanguageBackend:
    """The backend that the profile asks for, not loaded yet."""
    if spec.backend == "vllm":
        from models.writing.vllm_backend import VllmBackend

        return VllmBackend(spec, weights)
    from models.qwen import Qwen

    return Qwen(spec, weights)
