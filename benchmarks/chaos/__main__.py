"""`python -m benchmarks.chaos`: the fault matrix. Ends with 1 where a promise was broken."""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.checks import violations
from benchmarks.chaos.cluster import GRACE_SECONDS, ROOT, SWEEP_SECONDS, Cluster, NotReady, until
from benchmarks.chaos.faults import FAULTS, Fault
from benchmarks.chaos.load import Load
from benchmarks.chaos.overlay import MUTATIONS, copy_code
from benchmarks.chaos.receiver import Receiver
from benchmarks.chaos.record import BUCKET, Record, open_things, orphans, read_record
from benchmarks.chaos.rows import Rows
from benchmarks.chaos.scene import Scene

JOBS, SHORT_JOBS = 500, 15
SHORT_FAULTS = ("kill-replica", "pause-replica")
QUIET_SECONDS = 300.0
SETTLE_SECONDS = 3.0
SHOWN = 12


@dataclass
class Result:
    """What came of one fault."""

    fault: Fault
    accepted: int = 0
    states: Counter[str] = field(default_factory=Counter)
    requeued: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    callbacks: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    strikes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def count(self, record: Record) -> None:
        """The figures of the table."""
        self.states = Counter(
            f"failed:{job['error_code']}" if job["status"] == "failed" else job["status"]
            for job in record.jobs.values()
        )
        events = [event for rows in record.events.values() for event in rows if event["kind"] == "requeued"]
        self.requeued = Counter(str(event["data"].get("error_code")) for event in events)
        taken = Counter(r.id for received in record.receipts.values() for r in received if r.taken)
        self.repeats = sum(count - 1 for count in taken.values())
        self.callbacks = Counter(row["state"] for rows in record.callbacks.values() for row in rows)
        self.orphans = len(record.orphans())


def run_fault(
    fault: Fault, cluster: Cluster, receiver: Receiver, rows: Rows, jobs: int, seed: int, short: bool
) -> Result:
    """Load and fault together, then quiet, then the look at what is left."""
    result, started, bucket = Result(fault), time.monotonic(), cluster.blobs / BUCKET
    load = Load(cluster, f"{receiver.origin}/{fault.name}", fault.name, jobs, seed)
    scene = Scene(cluster, receiver, load, rows, random.Random(f"{seed} {fault.name}"), short)
    load.start()
    try:
        fault.strike(scene)
    except (TimeoutError, NotReady, subprocess.SubprocessError) as error:
        result.violations.append(f"the cluster did not recover: {error}")
    finally:
        load.finish()
    _wait_quiet(rows, fault)
    until(lambda: not orphans(rows, bucket), SETTLE_SECONDS, every=0.5)  # a loser deletes its files after its row
    record = read_record(rows, bucket, fault.name, receiver.kept())
    result.accepted = len(load.accepted)
    result.answers, result.strikes = load.answers, scene.strikes
    result.violations += load.refused + violations(record, load.accepted, fault.receiver_fails)
    if result.accepted < jobs:
        result.violations.append(f"only {result.accepted} of {jobs} jobs were accepted")
    result.count(record)
    result.seconds = time.monotonic() - started
    return result


def _wait_quiet(rows: Rows, fault: Fault) -> None:
    def quiet() -> bool:
        try:
            return open_things(rows, fault.name) == 0
        except Exception:  # the database may still be on its way back; the checks will say if it is not
            return False

    until(quiet, QUIET_SECONDS, every=0.5)


def _left_orphans(cluster: Cluster, rows: Rows) -> list[str]:
    """Files that nothing speaks of, once the grace time and a sweep have passed."""
    bucket = cluster.blobs / BUCKET
    until(lambda: not orphans(rows, bucket), GRACE_SECONDS + 3 * SWEEP_SECONDS, every=2)
    return [f"orphan past the grace time: {BUCKET}/{key}" for key in sorted(orphans(rows, bucket))]


def _counts(counter: Counter[str]) -> str:
    return " ".join(f"{name}={count}" for name, count in sorted(counter.items())) or "-"


def show(results: list[Result]) -> None:
    """The table, and under it what was done and said."""
    head = ("fault", "accepted", "ended", "requeued (why)", "callbacks", "repeats", "orphans", "violations", "seconds")
    rows = [
        (
            result.fault.name,
            str(result.accepted),
            _counts(result.states),
            _counts(result.requeued),
            _counts(result.callbacks),
            str(result.repeats),
            str(result.orphans),
            str(len(result.violations)),
            f"{result.seconds:.0f}",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    for result in results:
        if result.answers:
            print(f"{result.fault.name}: tried again after {_counts(result.answers)}")
        for line in result.violations[:SHOWN]:
            print(f"{result.fault.name}: VIOLATION {line}")
        if len(result.violations) > SHOWN:
            print(f"{result.fault.name}: and {len(result.violations) - SHOWN} more")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    names = [fault.name for fault in FAULTS]
    parser.add_argument(
        "--jobs", type=int, help=f"at least so many per fault; else {JOBS}, or {SHORT_JOBS} with --short"
    )
    parser.add_argument("--faults", help=f"of {', '.join(names)}; else all but none")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--short", action="store_true", help=f"{' and '.join(SHORT_FAULTS)}, with fewer strikes")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="break the code; the checks must find it")
    parser.add_argument("--keep", action="store_true", help="keep the state folder and the logs")
    asked = parser.parse_args()
    chosen = asked.faults.split(",") if asked.faults else list(SHORT_FAULTS) if asked.short else names[1:]
    unknown = set(chosen) - set(names)
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    jobs = asked.jobs or (SHORT_JOBS if asked.short else JOBS)
    print(
        f"seed {asked.seed}, {jobs} jobs per fault" + (f", mutation {asked.mutation}" if asked.mutation else ""),
        flush=True,
    )

    folder = Path(tempfile.mkdtemp(prefix="ovzchaos"))
    folder.chmod(0o755)  # as root, Postgres runs as another user, who must be able to pass
    receiver = Receiver()
    cluster = Cluster(folder, receiver.origin, copy_code(ROOT, folder / "code", asked.mutation))
    rows = cluster.rows()
    results: list[Result] = []
    broken: list[str] = []
    try:
        cluster.start()
        receiver.trust(cluster.callback_secret())
        for fault in [fault for name in chosen for fault in FAULTS if fault.name == name]:
            result = run_fault(fault, cluster, receiver, rows, jobs, asked.seed, asked.short)
            results.append(result)
            outcome = json.dumps(
                {
                    "fault": fault.name,
                    "jobs": result.accepted,
                    "violations": len(result.violations),
                    "seconds": round(result.seconds),
                    "strikes": result.strikes,
                }
            )
            print(outcome, flush=True)
            cluster.wait_ready()
        broken = _left_orphans(cluster, rows)
    except NotReady as error:
        broken.append(str(error))
    finally:
        rows.close()
        cluster.stop()
        receiver.close()
    show(results)
    for line in broken:
        print(f"VIOLATION {line}")
    failed = bool(broken) or any(result.violations for result in results)
    if asked.keep or failed:
        print(f"kept: {folder}, and Ray's logs")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        cluster.forget_logs()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
