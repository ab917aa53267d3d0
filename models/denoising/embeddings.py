"""A cache of encoded prompts: many jobs repeat a negative prompt, a whole prompt, or are retried."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Encoded:
    """What a prompt became: `arguments` of the pipeline (tensors), and `facts` for the job's settings."""

    arguments: dict[str, Any]
    facts: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(value.nbytes for value in self.arguments.values() if hasattr(value, "nbytes"))


class Embeddings:
    """The least recently used go when there is no room. Keeps hashes of what was encoded, not the words."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, parts: Hashable, encode: Callable[[], Encoded]) -> Encoded:
        """What was encoded from these parts before, or is now. The tensors are shared: nobody may write to them."""
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key]
            self.misses += 1
        encoded = encode()
        with self._lock:
            if key not in self._kept and encoded.size_bytes <= self.max_bytes:
                self._kept[key] = encoded
                self.size_bytes += encoded.size_bytes
                while self.size_bytes > self.max_bytes:
                    self.size_bytes -= self._kept.popitem(last=False)[1].size_bytes
        return encoded
