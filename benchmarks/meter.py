"""What a soak measures and when a series of it counts as flat."""

import contextlib
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import psutil

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.rows import Rows

MIB = 1024 * 1024
STRETCHES = 6
DEPLOYMENTS = ("api", "events", "qwen", "sdxl", "wan", "provider", "callbacks", "upkeep")
RAY = ("ServeController", "ProxyActor")
HISTORY = ("jobs", "job_events", "callback_outbox", "callback_attempts", "workspace_assets", "usage_logs",
           "idempotency_keys")  # fmt: skip
LIVE = {
    "job_queue": "pg_total_relation_size('job_queue')",
    # rows of ended callbacks stay; what is due or under way is in these two partial indexes alone
    "outbox, live part": "pg_relation_size('callback_outbox_due') + pg_relation_size('callback_outbox_sending')",
    "fair_shares": "pg_total_relation_size('fair_shares')",
}
SIZES = "SELECT " + ", ".join(
    [f'({sql})::float8 AS "{name}"' for name, sql in LIVE.items()]
    + [f"pg_total_relation_size('{name}')::float8 AS \"history {name}\"" for name in HISTORY]
)
COUNTS = """
  SELECT (SELECT count(*) FROM jobs WHERE completed_at IS NOT NULL)::float8 AS ended,
         (SELECT count(*) FROM job_queue)::float8 AS open,
         (SELECT count(*) FROM callback_outbox WHERE state IN ('due', 'sending'))::float8 AS callbacks,
         (SELECT count(*) FROM pg_stat_activity WHERE datname = 'ourvidz')::float8 AS connections"""
DEAD = """SELECT relname, n_dead_tup::float8 AS dead FROM pg_stat_user_tables
          WHERE relname IN ('job_queue', 'fair_shares', 'callback_outbox', 'jobs')"""


@dataclass(frozen=True)
class Bound:
    """What counts as flat: less than `per_hour`, or growth over the whole half within `grain`, the step in which such a
    thing grows. `unit` is what the figures are divided by for the table."""

    per_hour: float
    grain: float
    unit: float
    unit_name: str


BYTES = Bound(1 * MIB, 0.125 * MIB, 1024, "KiB")
MEMORY = Bound(32 * MIB, 4 * MIB, MIB, "MiB")
NUMBER = Bound(12, 2, 1, "")


@dataclass(frozen=True)
class Sample:
    """Everything that was measured at one moment; `at` in seconds since the first."""

    at: float
    values: Mapping[str, float]
    pids: Mapping[str, frozenset[int]] = field(default_factory=dict)


def bound_of(name: str) -> Bound | None:
    """How a series is judged; None for what is only shown."""
    if name in LIVE:
        return BYTES
    if name.startswith("memory "):
        return None if name == "memory ray" else MEMORY
    return NUMBER if name.startswith(("files ", "connections")) else None


def slope_per_hour(times: Sequence[float], values: Sequence[float]) -> float:
    """The least-squares slope of a series whose times are in seconds."""
    return statistics.linear_regression(times, values).slope * 3600


def floors(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The least value of each of six stretches, with its time. For memory: a large job takes hundreds of MiB for some
    seconds, which would drown a leak; a leak lifts the floor as well."""
    stretches = min(STRETCHES, len(values))
    cuts = [len(values) * n // stretches for n in range(stretches + 1)]
    lowest = [min(range(a, b), key=values.__getitem__) for a, b in pairwise(cuts)]
    return [times[n] for n in lowest], [values[n] for n in lowest]


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the second half of the time: the first half is warm-up."""
    middle = (samples[0].at + samples[-1].at) / 2
    return [sample for sample in samples if sample.at >= middle]


def flat(bound: Bound, slope: float, seconds: float) -> bool:
    """Whether a slope per hour, seen over so many seconds, is within the bound."""
    return slope < bound.per_hour or slope * seconds / 3600 <= bound.grain


class Meter:
    """Takes samples of a cluster."""

    def __init__(self, cluster: Cluster, rows: Rows) -> None:
        self._cluster, self._rows, self._started = cluster, rows, time.monotonic()

    def sample(self) -> Sample:
        """Measure now."""
        at = time.monotonic() - self._started
        values: dict[str, float] = {}
        for sql in (SIZES, COUNTS):
            values |= dict(self._rows.fetch(sql)[0])
        values |= {f"dead rows {row['relname']}": row["dead"] for row in self._rows.fetch(DEAD)}
        pids: dict[str, frozenset[int]] = {}
        for title in (*DEPLOYMENTS, *RAY):
            actors = self._cluster.actors(title)
            pids[title] = frozenset(actor.pid for actor in actors)
            values[f"memory {title}"] = float(_resident(actors))
            values[f"files {title}"] = float(_files(actors))
        known = {pid for found in pids.values() for pid in found}
        values["memory ray"] = float(_resident(p for p in self._cluster.processes() if p.pid not in known))
        postmaster = self._cluster.postmaster()
        if postmaster is not None:  # shared buffers would count once per process
            processes = [postmaster, *postmaster.children(recursive=True)]
            values["memory postgres"] = float(_private(processes))
        return Sample(at, values, pids)


def _resident(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _private(processes: Sequence[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total


def _files(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.num_fds()
    return total
