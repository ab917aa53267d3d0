"""The order of denoise steps: which requests share the next forward. No torch and no threads in it.

Between shapes, which can't share a forward, a deficit round robin divides the time, with a shape that has just come
first (M. Shreedhar, G. Varghese, "Efficient fair queuing using deficit round robin", 1996; the new-before-old rule
is RFC 8290's). Within a shape the least remaining work goes first, which gives the least mean latency, and waiting
counts against it, so that long requests are not put off for ever. A request whose deadline needs it goes before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

QUANTUM_SECONDS = 0.2  # of one shape's turn; a longer step saves up for it
AGEING = 0.2  # seconds of remaining work that a second of waiting makes up for
PATIENCE_SECONDS = 60.0  # for which a background request gives way before it gets a step all the same
MOST_TURNS = 20  # that a shape saves up for one step
URGENCY = 2.0  # a deadline nearer than so many times the remaining work is urgent


@dataclass(frozen=True)
class Work:
    """One request that wants a forward of `rows` rows; times in seconds.

    `remaining` until its denoising is done if it runs alone, `waited` since it was submitted, `idle` since its last
    forward, `deadline` from now on, None for none. `priority` 0 is interactive, larger ones are background.
    """

    key: Hashable
    rows: int
    remaining: float
    waited: float
    idle: float = 0.0
    priority: int = 0
    deadline: float | None = None


class Order:
    """Chooses, forward by forward; it remembers how much time each shape has had."""

    def __init__(self, quantum_seconds: float = QUANTUM_SECONDS) -> None:
        self._quantum = quantum_seconds
        self._deficits: dict[Hashable, float] = {}  # in the order of their turns, the first one's being now

    def choose(
        self,
        works: Sequence[Work],
        cap: Callable[[Hashable], int],
        seconds: Callable[[Hashable, int], float],
    ) -> list[int]:
        """The indices of those that run together next; empty only for no works.

        `cap(key)` is the most rows of a forward (a larger request runs alone), `seconds(key, rows)` what it takes.
        """
        eligible = _eligible(works)
        by_key: dict[Hashable, list[int]] = {}
        for index in eligible:
            by_key.setdefault(works[index].key, []).append(index)
        if not by_key:
            return []
        self._keep(by_key)
        while True:
            key = next(iter(self._deficits))
            chosen = _fill([(index, works[index]) for index in by_key[key]], cap(key))
            share = self._quantum * len(by_key[key])
            cost = seconds(key, sum(works[index].rows for index in chosen))
            # bounded, or one wrong measurement would keep a shape waiting for as long as it says
            cost = min(cost, MOST_TURNS * share) if math.isfinite(cost) else 0.0
            if self._deficits[key] >= cost or len(self._deficits) == 1:
                self._deficits[key] = max(0.0, self._deficits[key] - cost)
                return chosen
            # its turn is over: a share of time for each of its requests, to be used in the rounds to come
            self._deficits[key] = self._deficits.pop(key) + share

    def _keep(self, by_key: dict[Hashable, list[int]]) -> None:
        """Forget the shapes that nobody wants now, and put new ones first."""
        new = {key: self._quantum * len(indices) for key, indices in by_key.items() if key not in self._deficits}
        self._deficits = new | {key: left for key, left in self._deficits.items() if key in by_key}


def _eligible(works: Sequence[Work]) -> list[int]:
    """Those of the most urgent class, and those of others that have given way for long enough."""
    first = min((work.priority for work in works), default=0)
    return [i for i, work in enumerate(works) if work.priority == first or work.idle >= PATIENCE_SECONDS]


def _fill(candidates: Sequence[tuple[int, Work]], cap: int) -> list[int]:
    """As many as have room, the most pressing first; at least one."""
    chosen: list[int] = []
    rows = 0
    for index, work in sorted(candidates, key=lambda candidate: _rank(candidate[1])):
        if not chosen or rows + work.rows <= cap:
            chosen.append(index)
            rows += work.rows
    return chosen


def _rank(work: Work) -> tuple[float, ...]:
    if work.idle >= PATIENCE_SECONDS:
        return (0, -work.idle)
    if work.deadline is not None and work.remaining <= work.deadline < URGENCY * work.remaining:
        return (1, work.deadline)
    return (2, work.remaining - AGEING * work.waited)
