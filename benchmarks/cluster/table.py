"""What the laps say: medians of the rounds, and ratios within each round, as tables in Markdown."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.cluster.workload import Lap

BARE, SYSTEM = "bare loop", "whole system"
BAR = 0.9
HEAD = ("", "images/s", "lowest", "highest", "of the bare loop", "time in forwards", "images in a forward")

Laps = Mapping[str, Sequence[Lap]]  # by contender, one of each round


def ratio(laps: Laps, name: str, base: str = BARE) -> float:
    """The median over the rounds of one rate by the other of the same round."""
    return statistics.median(own.rate / other.rate for own, other in zip(laps[name], laps[base], strict=True))


def table(laps: Laps, step_seconds: float | None, not_run: Iterable[str] = ()) -> list[str]:
    """A row for each contender; those in `not_run` are named as such. Forwards are unknown without a step time."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for name, own in laps.items():
        rates = [lap.rate for lap in own]
        forwards = ["", ""]
        if step_seconds is not None:
            busy = statistics.median(lap.busy(step_seconds) for lap in own)
            forwards = [f"{busy:.0%}", f"{statistics.median(lap.images_together for lap in own):.2f}"]
        figures = [f"{value:.2f}" for value in (statistics.median(rates), min(rates), max(rates), ratio(laps, name))]
        lines.append(_line([name, *figures, *forwards]))
    return lines + [_line([name, "not run", *[""] * (len(HEAD) - 2)]) for name in not_run]


def verdict(laps: Laps) -> tuple[bool, str]:
    """Whether the whole system keeps its promise, and the sentence that says so."""
    share = ratio(laps, SYSTEM)
    met = share >= BAR
    return met, f"whole system / bare loop: {share:.2f}, at least {BAR} wanted: {'met' if met else 'MISSED'}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
