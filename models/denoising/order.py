"""The order of denoise steps: which requests share the next forward. No torch and no threads in it.

Between shapes, which can't share a forward, a deficit round robin divides the time, with a shape that has just come
first (M. Shreedhar, G. Varghese, "Efficient fair queuing using deficit round robin", 1996; the new-before-old rule
is RFC 8290's), as long as new ones together have had no more of it than those that were there. Within a shape the
least remaining work goes first, which gives the least mean latency, and waiting counts against it, so that long
requests are not put off for ever. A request whose deadline needs it goes before, and its shape before others, but not
before one that has had no step for a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

QUANTUM_SECONDS = 0.2  # of one shape's turn; a longer step saves up for it
AGEING = 0.2  # seconds of remaining work that a second of waiting makes up for
PATIENCE_SECONDS = 60.0  # without a step, after which a request gets one whatever else there is
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
        self._new: set[Hashable] = set()  # those in their first turn
        self._credit = quantum_seconds  # of time that new ones may have before old ones; at most one quantum either way

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

        def turn(key: Hashable, before: int | None = None) -> _Turn:
            candidates = [(index, works[index]) for index in by_key[key]]
            return _turn(candidates, cap(key), partial(seconds, key), self._quantum, before)

        turns = {key: turn(key) for key in by_key}
        pressing = _pressing(works, eligible, turns)
        if pressing is not None:
            key = works[pressing].key
            turns[key] = turn(key, pressing)
        else:
            key = self._next(turns)
        cost = turns[key].cost
        self._deficits[key] = max(0.0, self._deficits[key] - cost)
        credit = self._credit + (-cost if key in self._new else cost)
        self._credit = min(self._quantum, max(-self._quantum, credit))
        return turns[key].chosen

    def _next(self, turns: Mapping[Hashable, _Turn]) -> Hashable:
        """The shape whose turn it is in the round."""
        while True:
            key = next(iter(self._deficits))
            if self._deficits[key] >= turns[key].cost or len(self._deficits) == 1:
                return key
            # its turn is over: a share of time for each of its requests, to be used in the rounds to come
            self._deficits[key] = self._deficits.pop(key) + turns[key].share
            self._new.discard(key)

    def _keep(self, by_key: dict[Hashable, list[int]]) -> None:
        """Forget the shapes that nobody wants now, and put new ones first, or last where new ones have had their part:
        a stream of them, each with a first turn of its own, would keep the old ones waiting for ever."""
        new = {key: self._quantum * len(indices) for key, indices in by_key.items() if key not in self._deficits}
        old = {key: left for key, left in self._deficits.items() if key in by_key}
        if not old:
            self._credit = self._quantum
        self._deficits = new | old if self._credit > 0 else old | new
        self._new = {key for key in self._new if key in old} | set(new)


@dataclass(frozen=True)
class _Turn:
    """What a shape would run now, the seconds that count for it, and the seconds that a round brings the shape."""

    chosen: list[int]
    cost: float
    share: float


def _turn(
    candidates: Sequence[tuple[int, Work]],
    cap: int,
    seconds: Callable[[int], float],
    quantum: float,
    before: int | None = None,
) -> _Turn:
    """`before` is the index of the one that goes first in its shape, None for the most pressing."""
    chosen = _fill(candidates, cap, before)
    rows = {index: work.rows for index, work in candidates}
    share = quantum * len(candidates)
    cost = seconds(sum(rows[index] for index in chosen))
    # bounded, or one wrong measurement would keep a shape waiting for as long as it says
    return _Turn(chosen, min(cost, MOST_TURNS * share) if math.isfinite(cost) else 0.0, share)


def _pressing(works: Sequence[Work], eligible: Sequence[int], turns: Mapping[Hashable, _Turn]) -> int | None:
    """The index of the nearest urgent deadline, whose shape goes before the round, or of who has waited for too long
    where there are such deadlines; None where there are none, for the round keeps nobody waiting."""
    urgent = []
    for index in eligible:
        # one forward of another shape may come in between, and can't be interrupted
        between = max((turn.cost for key, turn in turns.items() if key != works[index].key), default=0.0)
        if _urgent(works[index], between):
            urgent.append(index)
    if not urgent:
        return None
    idlest = max(eligible, key=lambda index: works[index].idle)
    if works[idlest].idle >= PATIENCE_SECONDS:
        return idlest
    return min(urgent, key=lambda index: works[index].deadline or 0.0)


def _eligible(works: Sequence[Work]) -> list[int]:
    """Those of the most urgent class, and those of others that have given way for long enough."""
    first = min((work.priority for work in works), default=0)
    return [i for i, work in enumerate(works) if work.priority == first or work.idle >= PATIENCE_SECONDS]


def _fill(candidates: Sequence[tuple[int, Work]], cap: int, before: int | None = None) -> list[int]:
    """As many as have room, the most pressing first, but for the one of index `before`; at least one."""
    chosen: list[int] = []
    rows = 0
    for index, work in sorted(candidates, key=lambda candidate: (candidate[0] != before, _rank(candidate[1]))):
        if not chosen or rows + work.rows <= cap:
            chosen.append(index)
            rows += work.rows
    return chosen


def _rank(work: Work) -> tuple[float, ...]:
    if work.idle >= PATIENCE_SECONDS:
        return (0, -work.idle)
    if work.deadline is not None and _urgent(work):
        return (1, work.deadline)
    return (2, work.remaining - AGEING * work.waited)


def _urgent(work: Work, between: float = 0.0) -> bool:
    """Whether the deadline needs it now; one that can't be reached any more needs nothing. `between` in seconds may be
    lost before its next step."""
    return work.deadline is not None and work.remaining <= work.deadline < URGENCY * work.remaining + between
