"""Answers given before, for questions that are the same to the last token.

The key is everything that decides the answer: the model, its revision, the tokens of the prompt (the template and the
messages are in them), the length, and for sampled words temperature, nucleus and seed. Whether another answer would
have been as good is not our business: nothing that differs is ever a hit.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from models.writing.language import Completion, Sampling

_OVERHEAD_BYTES = 600  # of an entry beside its text: the key, the completion's fields, the slots of the dictionary


def completion_key(model: str, prompt_ids: Sequence[int], sampling: Sampling) -> bytes:
    """What decides an answer, as 32 bytes. `model` names the weights and their revision."""
    chosen = "greedy" if sampling.greedy else f"{sampling.temperature!r} {sampling.top_p!r} {sampling.seed}"
    digest = hashlib.blake2b(f"{model}\0{sampling.max_new_tokens}\0{chosen}\0".encode(), digest_size=32)
    digest.update(array("q", prompt_ids).tobytes())
    return digest.digest()


class CompletionCache:
    """The latest answers, as many as fit into `capacity_bytes`; the least lately used go first. Threads share it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._entries: OrderedDict[bytes, Completion] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Completion | None:
        """The answer, marked as cached, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return replace(found, cached=True, seconds=0.0)

    def put(self, key: bytes, completion: Completion) -> None:
        """Keep a whole answer. One that was cancelled is no answer and is not kept, nor one larger than everything."""
        size = _size(completion)
        if completion.finish_reason == "cancelled" or size > self._capacity:
            return
        with self._lock:
            before = self._entries.pop(key, None)
            self.bytes += size - (_size(before) if before is not None else 0)
            self._entries[key] = completion
            while self.bytes > self._capacity:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= _size(oldest)


def _size(completion: Completion) -> int:
    return _OVERHEAD_BYTES + len(completion.text.encode())
