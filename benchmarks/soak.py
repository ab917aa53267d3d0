"""`python -m benchmarks.soak`: the cluster under steady load for a while. Ends with 1 where something that must stay
flat grew, a replica was replaced, or a promise was broken.

The laptop profile, on ports and in a state folder of its own. Jobs of all kinds come at a fixed rate; some are
cancelled, some are watched over their event streams, all call back. What is held for open work (the queue, the live
part of the outbox, fair shares, memory, file descriptors) must be flat; what is history grows with each job, by design,
and is shown per job.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx2

from benchmarks.chaos.checks import TERMINAL, violations
from benchmarks.chaos.cluster import ROOT, Cluster, NotReady, until
from benchmarks.chaos.load import Load
from benchmarks.chaos.overlay import copy_code
from benchmarks.chaos.receiver import Receiver
from benchmarks.chaos.record import BUCKET, open_things, read_record
from benchmarks.chaos.rows import Rows
from benchmarks.meter import HISTORY, Meter, Sample, bound_of, flat, floors, second_half, slope_per_hour

NAME = "soak"
MINUTES, EVERY_SECONDS, PER_SECOND = 30.0, 30.0, 3.0
WATCHERS = 2
JUDGED_SECONDS = 480.0  # of a second half; a slope over less says nothing about an hour
QUIET_SECONDS = 120.0
SHOWN = 12


class Watchers:
    """Follow single jobs over their event streams, one after the other, each from its acceptance to its end."""

    def __init__(self, cluster: Cluster, load: Load) -> None:
        self._cluster, self._load = cluster, load
        self._stopped = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._watch, daemon=True) for _ in range(WATCHERS)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Return when the streams that are open have ended."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        headers = {"Authorization": f"Bearer {self._cluster.key()}"}
        with httpx2.Client(base_url=self._cluster.api, headers=headers, timeout=60) as client:
            while not self._stopped.wait(0.2):
                newest = max(self._load.accepted, default=None)
                if newest is not None:
                    self.outcomes[self._follow(client, self._load.accepted[newest])] += 1

    def _follow(self, client: httpx2.Client, job_id: str) -> str:
        status = "nothing"
        try:
            with client.stream("GET", f"/v1/events/jobs/{job_id}") as answer:
                if answer.status_code != 200:
                    return f"refused with {answer.status_code}"
                event = ""
                for line in answer.iter_lines():
                    if line.startswith("event:"):
                        event = line.removeprefix("event:").strip()
                    elif line.startswith("data:") and event == "job":
                        status = json.loads(line.removeprefix("data:"))["status"]
        except httpx2.HTTPError as error:
            return f"broken by {type(error).__name__}"
        return "to the end" if status in TERMINAL else f"ended at {status}"


def show(samples: Sequence[Sample]) -> list[str]:
    """Print the table; returns what is not flat."""
    half = second_half(samples)
    times, seconds = [sample.at for sample in half], half[-1].at - half[0].at
    print(f"\nsecond half: {len(half)} samples over {seconds / 60:.1f} min")
    grown: list[str] = []
    lines: list[tuple[str, ...]] = [("", "at its start", "at its end", "slope per hour", "bound", "verdict")]
    for name in half[0].values:
        if name.startswith("history ") or not all(name in sample.values for sample in half):
            continue
        at, series, bound = times, [sample.values[name] for sample in half], bound_of(name)
        if name.startswith("memory "):
            at, series = floors(at, series)
        slope = slope_per_hour(at, series)
        unit, unit_name = (
            (bound.unit, bound.unit_name) if bound else (1024 * 1024, "MiB") if "memory" in name else (1, "")
        )
        fine = bound is None or flat(bound, slope, seconds)
        if not fine:
            grown.append(f"{name} grows by {slope / unit:.1f} {unit_name} an hour")
        cells = (f"{value / unit:.1f} {unit_name}".strip() for value in (series[0], series[-1], slope))
        limit = f"{bound.per_hour / unit:.0f} {unit_name}".strip() if bound else "-"
        lines.append((name, *cells, limit, "shown" if bound is None else "flat" if fine else "GROWS"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    ended = half[-1].values["ended"] - half[0].values["ended"]
    print(f"\n{ended / max(seconds, 1):.2f} jobs/s; what is kept of each job, in bytes with its indexes:")
    for name in HISTORY:
        size = half[-1].values[f"history {name}"] - half[0].values[f"history {name}"]
        print(f"  {name}: {size / max(ended, 1):.0f}")
    return grown


def replaced(samples: Sequence[Sample]) -> list[str]:
    """The deployments whose processes were not the same all the time."""
    names = samples[0].pids
    return [f"{name} was replaced" for name in names if len({sample.pids[name] for sample in samples}) > 1]


def soak(cluster: Cluster, receiver: Receiver, rows: Rows, asked: argparse.Namespace) -> list[str]:
    """Load, measure, and look at what is left; returns what is wrong."""
    load = Load(cluster, f"{receiver.origin}/{NAME}", NAME, sys.maxsize, asked.seed, asked.per_second)
    watchers, meter, samples = Watchers(cluster, load), Meter(cluster, rows), []
    load.start()
    watchers.start()
    started = time.monotonic()
    try:
        for number in range(int(asked.minutes * 60 / asked.every) + 1):
            time.sleep(max(0.0, started + number * asked.every - time.monotonic()))
            sample = meter.sample()
            samples.append(sample)
            told = {name: round(sample.values[name]) for name in ("ended", "open", "callbacks", "job_queue")}
            memory = sum(size for name, size in sample.values.items() if name.startswith("memory "))
            print(json.dumps({"at": round(sample.at), **told, "memory_mib": round(memory / 2**20)}), flush=True)
    finally:
        load.stop()
        watchers.finish()
    wrong = load.refused + show(samples) + replaced(samples)
    print(f"event streams: {dict(watchers.outcomes)}; other answers than yes: {dict(load.answers)}")
    wrong += [f"an event stream {outcome}: {n}" for outcome, n in watchers.outcomes.items() if outcome != "to the end"]
    if not watchers.outcomes:
        wrong.append("no event stream was followed")
    if not until(lambda: open_things(rows, NAME) == 0, QUIET_SECONDS, every=0.5):
        wrong.append(f"not quiet {QUIET_SECONDS:.0f} s after the last job")
    record = read_record(rows, cluster.blobs / BUCKET, NAME, receiver.kept())
    print(f"{len(load.accepted)} jobs accepted: {dict(Counter(job['status'] for job in record.jobs.values()))}")
    return wrong + violations(record, load.accepted, receiver_fails=False)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--per-second", type=float, default=PER_SECOND, help=f"jobs; else {PER_SECOND:.0f}")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, help="seconds between samples; else 30")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.minutes * 60 < 6 * asked.every:
        parser.error("too short for six samples")
    folder = Path(tempfile.mkdtemp(prefix="ovzsoak"))
    folder.chmod(0o755)  # as root, Postgres runs as another user, who must be able to pass
    receiver = Receiver()
    cluster = Cluster(folder, receiver.origin, copy_code(ROOT, folder / "code"))
    rows, wrong = cluster.rows(), []
    try:
        cluster.start()
        receiver.trust(cluster.callback_secret())
        wrong = soak(cluster, receiver, rows, asked)
    except NotReady as error:
        wrong.append(str(error))
    finally:
        rows.close()
        cluster.stop()
        receiver.close()
    for line in wrong[:SHOWN]:
        print(f"WRONG {line}")
    if asked.minutes * 30 < JUDGED_SECONDS:
        print(f"a run of less than {JUDGED_SECONDS / 30:.0f} minutes is a trial: its slopes per hour say little")
    print("flat" if not wrong else f"not flat, or not sound: {len(wrong)} findings")
    if wrong:
        print(f"kept: {folder}, and Ray's logs")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        cluster.forget_logs()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
