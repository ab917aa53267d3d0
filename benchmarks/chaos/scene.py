"""The scene: what a fault may touch, when it strikes, and what it noted."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.load import Load
from benchmarks.chaos.receiver import Receiver
from benchmarks.chaos.rows import Rows

FLOW_SECONDS = 90.0  # for the jobs to flow on to the next strike; then it strikes regardless
FLOW_END = 0.9  # strikes fall into the flow up to this share of the jobs
RUNNERS = """SELECT DISTINCT w.pid FROM job_queue q JOIN workers w ON w.id = q.worker
             WHERE q.state = 'running' AND q.queue = $1"""


@dataclass
class Scene:
    """What a fault may touch. `strikes` keeps what it did, for the reader of a failure."""

    cluster: Cluster
    receiver: Receiver
    load: Load
    rows: Rows
    random: random.Random
    short: bool
    started: float = field(default_factory=time.monotonic)
    strikes: list[str] = field(default_factory=list)

    def spread(self, times: int) -> Iterator[int]:
        """So many moments to strike: each at a random point of its own part of the flow of jobs."""
        for number in range(times):
            self.load.wait_share(FLOW_END * (number + self.random.random()) / times, FLOW_SECONDS)
            yield number

    def pause(self, low: float, high: float) -> None:
        """Let the load run for a random while."""
        threading.Event().wait(self.random.uniform(low, high))

    def struck(self, what: str) -> None:
        """Note what was done, when, and after how many jobs."""
        self.strikes.append(f"{time.monotonic() - self.started:.1f}s #{len(self.load.accepted)} {what}")

    def busy(self, queue: str) -> psutil.Process | None:
        """A process of the queue that runs a job now, if the database tells one."""
        with contextlib.suppress(Exception):
            pids = {int(row["pid"]) for row in self.rows.fetch(RUNNERS, queue)}
            found = [process for process in self.cluster.actors(queue) if process.pid in pids]
            return self.random.choice(found) if found else None
        return None
