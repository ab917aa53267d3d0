"""What backends that answer many at a time have in common: who may join the batch, who waits, what is known already.

`sequences` answers are written at a time, and only as many as have room for all they may ever need: `cache_tokens`
counts prompt and new tokens together, so an answer that has begun never has to make room for another. Who waits does so
in `models.writing.waiting`. What waits is bounded as well: beyond `QUEUE_FACTOR` times the cache a backend is busy for
chat.
Jobs are never refused; how many there are is decided by whoever claims them.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from models.generation import (
    Cancelled,
    DeviceBroken,
    GenerationError,
    InvalidInput,
    ModelLoadFailed,
    as_generation_error,
)
from models.writing.completions import CompletionCache, completion_key
from models.writing.detokenizing import TextStream
from models.writing.language import Answer, Completion, FinishReason, LanguageModelBusy, Message, Priority, Sampling
from models.writing.waiting import WaitingLine

if TYPE_CHECKING:
    from models.profile import ModelSpec

log = structlog.get_logger()

QUEUE_FACTOR = 4
COMPLETION_CACHE_BYTES = 8 * 1024 * 1024
_FIRST_RETRY_SECONDS = 5.0  # until an answer has been timed
_SMOOTHING = 0.2  # of the time that an answer takes


@dataclass(eq=False)
class Request:
    """One answer as the backend sees it. `written` are the new tokens so far; `tokens` is the room it may need."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    priority: Priority
    answer: Answer
    stream: TextStream
    key: bytes
    tokens: int
    written: list[int] = field(default_factory=list)
    resumed: int = 0  # how many of these the engine was given with the prompt
    begun: float | None = None  # on the clock of time.perf_counter


class BatchingBackend(ABC):
    """A `LanguageBackend` but for the engine itself, which a subclass starts, feeds and stops.

    The subclass calls `_wrote`, `_finish` and `_fail` from its own thread. `weights` is a folder or the name of a
    repository; see `models.profile.resolve_weights`.
    """

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        self.spec = spec
        self.weights = weights
        self.model_name = spec.model_name
        self.revision = spec.revision
        self.device: str = spec.device
        self.loaded = False
        self.broken: str | None = None
        self.context = 0  # tokens, of one answer with its prompt
        self.completions = CompletionCache(COMPLETION_CACHE_BYTES)
        self._tokenizer: Any = None
        self._tokenizing = threading.Lock()  # fast tokenizers must not be used by two threads at a time
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._line: WaitingLine[Request] = WaitingLine()
        self._running: dict[str, Request] = {}
        self._suspects: deque[Request] = deque()  # to be tried alone, because one of them broke a batch
        self._alone: Request | None = None  # the latest one that is
        self._paused = False  # nobody may begin, while the engine starts again
        self._closing = False
        self._answer_seconds = _FIRST_RETRY_SECONDS

    @abstractmethod
    def _begin(self, request: Request) -> None:
        """Puts a request, with what it has written already, into the engine's batch."""

    @abstractmethod
    def _abort(self, request: Request) -> None:
        """Takes a request out of it. Nothing may be said of it afterwards."""

    @abstractmethod
    def _end_engine(self) -> None:
        """Ends the engine and its threads. Blocks."""

    # --- from outside ------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """An answer of one token, so that the first caller does not pay for lazy initialisation."""
        self.submit([Message("user", "warm up")], Sampling(max_new_tokens=1)).wait()

    def submit(self, messages: Sequence[Message], sampling: Sampling, priority: Priority = "chat") -> Answer:
        """Begins an answer, or gives the one that is known. See `models.writing.language.LanguageBackend.submit`."""
        self._refuse_if_unable()
        prompt_ids = self._encode(messages)
        tokens = len(prompt_ids) + sampling.max_new_tokens
        limit = min(self.context, self.spec.cache_tokens)
        if tokens > limit:
            raise InvalidInput(
                f"{len(prompt_ids)} + {sampling.max_new_tokens} tokens don't fit: {self.context} is the model's "
                f"context, {self.spec.cache_tokens} the replica's cache"
            )
        answer = Answer(priority, self._cancel)
        key = completion_key(f"{self.weights}@{self.revision}", prompt_ids, sampling)
        known = self.completions.get(key)
        if known is not None:
            answer.advance(known.text, known.new_tokens)
            answer.end(known)
            return answer
        stream, number = TextStream(self._decode), next(self._numbers)
        request = Request(str(number), prompt_ids, sampling, priority, answer, stream, key, tokens)
        with self._lock:
            self._refuse_if_unable()
            if priority == "chat" and self._line.tokens + tokens > QUEUE_FACTOR * self.spec.cache_tokens:
                message = f"{self._line.tokens} tokens wait, and {tokens} more are too many"
                raise LanguageModelBusy(message, retry_after_seconds=round(max(1.0, self._answer_seconds), 1))
            self._line.add(request, tokens, priority)
            self._admit()
        return answer

    def close(self) -> None:
        """Ends what runs and waits, as cancelled, and gives the memory back. Blocks."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._fail_everything(Cancelled("the language model was closed"))
        self._end_engine()
        self.loaded = False

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        with self._lock:
            return len(self._line) + len(self._suspects)

    @property
    def running(self) -> int:
        """How many are being written."""
        with self._lock:
            return len(self._running)

    # --- in between --------------------------------------------------------------------------------------

    def _refuse_if_unable(self) -> None:
        if self.broken is not None:
            raise DeviceBroken(self.broken)
        if self._closing:
            raise Cancelled("the language model was closed")
        if not self.loaded:
            raise ModelLoadFailed(f"{self.model_name} is not loaded")

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt. Control tokens written in a message stay plain text: a prompt can't start a system message."""
        with self._tokenizing:
            encoded = self._tokenizer.apply_chat_template(
                [asdict(message) for message in messages],
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                return_dict=True,
            )
        return [int(token) for token in encoded["input_ids"]]

    def _decode(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _admit(self) -> None:
        """Let those begin for whom there is a place and room, in their order. Suspects go first, each alone."""
        with self._lock:
            while not (self._paused or self._closing or self.broken) and len(self._running) < self.spec.sequences:
                if self._alone is not None and self._alone.id in self._running:
                    return
                if self._suspects:
                    if self._running:
                        return
                    self._alone = self._suspects.popleft()
                    self._start(self._alone)
                    continue
                head = self._line.head()
                if head is None:
                    return
                taken = sum(self._room(request.tokens) for request in self._running.values())
                if taken + self._room(head[1]) > self._room(self.spec.cache_tokens):
                    return
                self._start(self._line.pop())

    def _room(self, tokens: int) -> int:
        """What an answer takes of the engine's cache, in tokens. Engines that hold pages round up."""
        return tokens

    def _start(self, request: Request) -> None:
        self._running[request.id] = request
        request.begun = request.begun or time.perf_counter()
        try:
            self._begin(request)
        except Exception as error:
            self._fail(request, error if isinstance(error, GenerationError) else as_generation_error(error))

    def _wrote(self, request: Request, ids: Sequence[int]) -> None:
        """The engine has written these tokens."""
        request.written += ids
        request.answer.advance(request.stream.push(ids), len(request.written))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """The engine has written the last token of it."""
        with self._lock:
            if self._running.pop(request.id, None) is None:
                return
            completion = self._completion(request, reason)
            self.completions.put(request.key, completion)
            self._answer_seconds += _SMOOTHING * (completion.seconds - self._answer_seconds)
            request.answer.end(completion)
            self._admit()

    def _fail(self, request: Request, failure: GenerationError) -> None:
        """This one ends without an answer."""
        with self._lock:
            self._running.pop(request.id, None)
            request.answer.end(failure)
            log.info("completion_failed", code=failure.code, reason=failure.message)
            self._admit()

    def _fail_everything(self, failure: GenerationError) -> None:
        with self._lock:
            left = [*self._running.values(), *self._suspects, *self._line.clear()]
            for request in self._running.values():
                self._abort(request)
            self._running.clear()
            self._suspects.clear()
        for request in left:
            request.answer.end(failure)

    def _cancel(self, answer: Answer) -> None:
        with self._lock:
            request = next((request for request in self._all() if request.answer is answer), None)
            if request is None:
                return
            if self._running.pop(request.id, None) is not None:
                self._abort(request)
            elif request in self._suspects:
                self._suspects.remove(request)
            else:
                self._line.remove(request)
            answer.end(self._completion(request, "cancelled"))
            self._admit()

    def _all(self) -> list[Request]:
        return [*self._running.values(), *self._suspects, *self._line]

    def _completion(self, request: Request, reason: FinishReason) -> Completion:
        request.answer.advance(request.stream.finish(), len(request.written))
        return Completion(
            text=request.answer.text,
            prompt_tokens=len(request.prompt_ids),
            new_tokens=len(request.written),
            seconds=time.perf_counter() - request.begun if request.begun is not None else 0.0,
            finish_reason=reason,
        )
