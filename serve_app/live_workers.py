"""The replicas as older clients know workers: `chat`, `sdxl` and `wan`, each with one queue before it.

Everything is read from Postgres now: who has shown life within the last minute, what waits, and what it will take by
what runs have taken. Nothing is probed, so there is no response time to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from db.queue import Depth
from db.workers import Worker
from models.catalog import FAMILIES, JOB_TYPES, Family
from serve_app.edge import Edge

WorkerType = Literal["chat", "sdxl", "wan"]
WORKER_TYPES: tuple[WorkerType, ...] = get_args(WorkerType)
QUEUES: Mapping[WorkerType, str] = {"chat": "chat_queue", "sdxl": "sdxl_queue", "wan": "wan_queue"}
ENDPOINTS: Mapping[WorkerType, tuple[str, ...]] = {
    "chat": ("/functions/v1/playground-chat", "/functions/v1/enhance-prompt"),
    "sdxl": ("/functions/v1/queue-job",),
    "wan": ("/functions/v1/queue-job",),
}
WAITING = ("ready", "scheduled", "blocked")
BANDS = ((0, "immediate"), (3, "under 1 min"), (10, "1-3 min"), (20, "3-10 min"))
LONGEST = "more than 10 min"


@dataclass(frozen=True)
class LiveWorkers:
    """The replicas of one kind and what is before them. `families` are those of the profile that count as this kind."""

    type: WorkerType
    families: Sequence[Family]
    replicas: Sequence[Worker]
    depth: Sequence[Depth]
    paused: bool  # whether an operator has stopped all claims
    measured: bool  # whether a run of this kind has been measured yet

    @property
    def ready(self) -> list[Worker]:
        """The replicas that take work."""
        return [worker for worker in self.replicas if worker.state == "ready"]

    @property
    def last_seen(self) -> datetime | None:
        """The latest sign of life."""
        return max((worker.seen_at for worker in self.replicas), default=None)

    @property
    def fault(self) -> str | None:
        """Why no work is taken now; None where it is."""
        if not self.families:
            return f"the profile has no {self.type} model"
        if not self.replicas:
            return "no replica has shown life within the last minute"
        if not self.ready:
            states = ", ".join(sorted({worker.state for worker in self.replicas}))
            return f"no replica is ready: {states}"
        return "the queue is paused" if self.paused else None

    @property
    def waiting(self) -> int:
        """The jobs that wait."""
        return sum(row.jobs for row in self.depth if row.state in WAITING)

    @property
    def running(self) -> int:
        """The jobs that run."""
        return sum(row.jobs for row in self.depth if row.state == "running")

    @property
    def band(self) -> str:
        """How long a new job waits, as older clients are told it: by the length of the queue alone."""
        return next((name for most, name in BANDS if self.waiting <= most), LONGEST)

    @property
    def wait_seconds(self) -> float | None:
        """What is predicted to run before a new job, shared by the replicas that are ready. None while nothing has been
        measured, or where nobody would run it."""
        if self.fault is not None or not self.measured:
            return None
        return round(sum(row.cost_seconds for row in self.depth if row.state == "ready") / len(self.ready), 1)

    def job_types(self) -> list[str]:
        """What they can be asked for."""
        return [name for name, job_type in JOB_TYPES.items() if job_type.family in self.families]

    def capabilities(self) -> dict[str, Any]:
        """What there is, without saying on which machine."""
        return {
            "job_types": self.job_types(),
            "models": sorted({worker.model_name for worker in self.ready if worker.model_name}),
            "replicas": len(self.replicas),
            "ready_replicas": len(self.ready),
            "slots": sum(worker.slots for worker in self.ready),
            "running": self.running,
            "waiting": self.waiting,
        }


async def live_workers(edge: Edge) -> dict[WorkerType, LiveWorkers]:
    """All three kinds, as they are now."""
    workers, depth, paused = await edge.workers.list(), await edge.queue.depth(), set(await edge.queue.paused())
    told = {}
    for kind in WORKER_TYPES:
        families = [family for family in edge.settings.loaded_profile.models if _kind(family) == kind]
        names = {family.value for family in families}
        told[kind] = LiveWorkers(
            kind,
            families,
            [worker for worker in workers if worker.queue in names and worker.state != "stopped"],
            [row for row in depth if row.queue in names],
            bool(names) and names <= paused,
            await _measured(edge, families),
        )
    return told


def _kind(family: Family) -> WorkerType:
    if family is Family.QWEN:
        return "chat"
    return "wan" if FAMILIES[family].legacy_queue == QUEUES["wan"] else "sdxl"


async def _measured(edge: Edge, families: Sequence[Family]) -> bool:
    """Whether the costs of jobs are more than the catalog's guess."""
    for name, job_type in JOB_TYPES.items():
        # a prompt's enhancement is costed by a fixed figure, never by runs
        if job_type.family in families and await edge.jobs.run_seconds(name) is not None:
            return True
    return False
