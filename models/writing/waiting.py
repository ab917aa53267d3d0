"""The line before the language model: chat goes first, and no job waits for ever.

A job counts as if it had arrived `JOB_HANDICAP_SECONDS` later than it did. So whoever chats overtakes every job that
has waited for less, and a job is never overtaken by a chat that came later than that. Within a kind the older goes
first. Nobody overtakes the head of the line because he needs less room: a long prompt is not starved by short ones.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from models.writing.language import Priority

JOB_HANDICAP_SECONDS = 30.0

Entry = TypeVar("Entry")


class WaitingLine(Generic[Entry]):
    """Entries in the order in which they are to be served, with the sum of their tokens. Its owner holds a lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, int, Entry]] = []
        self._count = itertools.count()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, entry: Entry, tokens: int, priority: Priority) -> None:
        """Stand in line. `tokens` is the room that the entry will take."""
        due = self._clock() + (JOB_HANDICAP_SECONDS if priority == "job" else 0.0)
        heapq.heappush(self._heap, (due, next(self._count), tokens, entry))
        self.tokens += tokens

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, _, entry in self._heap)

    def head(self) -> tuple[Entry, int] | None:
        """Who is next, and the tokens of it."""
        return (self._heap[0][3], self._heap[0][2]) if self._heap else None

    def pop(self) -> Entry:
        """Take the head."""
        _, _, tokens, entry = heapq.heappop(self._heap)
        self.tokens -= tokens
        return entry

    def remove(self, entry: Entry) -> bool:
        """Leave the line. Says whether it was there."""
        for index, (_, _, tokens, waiting) in enumerate(self._heap):
            if waiting is entry:
                del self._heap[index]
                heapq.heapify(self._heap)
                self.tokens -= tokens
                return True
        return False

    def clear(self) -> list[Entry]:
        """Everybody leaves, in order."""
        left = [entry for _, _, _, entry in sorted(self._heap, key=lambda waiting: waiting[:2])]
        self._heap, self.tokens = [], 0
        return left
