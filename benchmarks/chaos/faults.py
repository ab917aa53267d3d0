"""What is done to the cluster. Each fault strikes at random times from its seed, and is over in bounded time."""

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import psutil

from benchmarks.chaos.cluster import LEASE_SECONDS, Cluster, kill, stopped, until
from benchmarks.chaos.receiver import Conduct, Receiver

SECOND_NODE = "second"
RUNNERS = """SELECT DISTINCT w.pid FROM job_queue q JOIN workers w ON w.id = q.worker
             WHERE q.state = 'running' AND q.queue = $1"""


@dataclass
class Scene:
    """What a fault may touch. `strikes` keeps what it did, for the reader of a failure."""

    cluster: Cluster
    receiver: Receiver
    random: random.Random
    short: bool
    started: float = field(default_factory=time.monotonic)
    strikes: list[str] = field(default_factory=list)

    def pause(self, low: float, high: float) -> None:
        """Let the load run for a random while."""
        threading.Event().wait(self.random.uniform(low, high))

    def struck(self, what: str) -> None:
        """Note what was done, and when."""
        self.strikes.append(f"{time.monotonic() - self.started:.1f}s {what}")


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `receiver_fails` allows dead callbacks, by the rules of the outbox."""

    name: str
    about: str
    strike: Callable[[Scene], None]
    receiver_fails: bool = False


def kill_actor(title: str, times: int, scene: Scene) -> None:
    """SIGKILL one of the processes of that title, again and again; the next one only when another is there."""
    for _ in range(1 if scene.short else times):
        scene.pause(1, 5)
        if not until(lambda: bool(scene.cluster.actors(title)), 60):
            raise TimeoutError(f"no process of {title} came back")
        victim = _busy(scene, title) or scene.random.choice(scene.cluster.actors(title))
        scene.struck(f"SIGKILL {title} {victim.pid}")
        kill([victim])


def pause_replica(scene: Scene) -> None:
    """SIGSTOP a replica that runs a job, until its lease is lost and another has the job; then SIGCONT."""
    for _ in range(2 if scene.short else 3):
        scene.pause(0.5, 3)
        victim = _wait_busy(scene, "sdxl")
        with stopped(victim):
            scene.struck(f"SIGSTOP {victim.pid}")
            scene.pause(LEASE_SECONDS + 2, LEASE_SECONDS + 5)
        scene.struck(f"SIGCONT {victim.pid}")


def restart_postgres(scene: Scene) -> None:
    """What `pg_ctl restart -m immediate` does: SIGQUIT to the postmaster, and a start as soon as it is gone."""
    for _ in range(1 if scene.short else 3):
        scene.pause(2, 6)
        postmaster = scene.cluster.postmaster()
        assert postmaster is not None
        scene.struck(f"SIGQUIT postmaster {postmaster.pid}")
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(30)
        scene.pause(0, 2)
        scene.cluster.start_postgres()


def kill_postgres(scene: Scene) -> None:
    """SIGKILL to the postmaster. Nobody starts it again but the cluster itself."""
    for _ in range(1 if scene.short else 2):
        scene.pause(2, 6)
        postmaster = scene.cluster.postmaster()
        assert postmaster is not None
        scene.struck(f"SIGKILL postmaster {postmaster.pid}")
        kill([postmaster])
        if not until(lambda: scene.cluster.postmaster() is not None, 60):
            scene.struck("nothing started Postgres again within 60 s: started by hand")
            scene.cluster.start_postgres()
            raise TimeoutError("nothing started Postgres again within 60 s")


def refuse_writes(scene: Scene) -> None:
    """The object store's folder is away, with a file where it was."""
    scene.pause(2, 4)
    blobs, away = scene.cluster.blobs, scene.cluster.blobs.with_name("blobs.away")
    blobs.rename(away)
    blobs.write_text("not a folder")
    scene.struck("object store away")
    try:
        scene.pause(4, 5) if scene.short else scene.pause(18, 22)
    finally:
        blobs.unlink()
        away.rename(blobs)
        scene.struck("object store back")


def misbehave(conduct: Conduct, scene: Scene) -> None:
    """The receiver of callbacks answers differently for some seconds."""
    for _ in range(1 if scene.short else 2):
        scene.pause(1, 3)
        scene.receiver.behave(conduct)
        scene.struck(f"receiver {conduct}")
        try:
            scene.pause(4, 8)
        finally:
            scene.receiver.behave(Conduct.GOOD)
            scene.struck("receiver good")


def redeploy(scene: Scene) -> None:
    """Deploy with a changed setting: every replica is replaced, and the old ones drain."""
    for _ in range(1 if scene.short else 2):
        scene.pause(2, 5)
        before = {process.pid for process in scene.cluster.actors("sdxl")}
        scene.cluster.redeploy()
        scene.struck("redeploy")
        if not until(partial(_replaced, scene, before), 120):
            raise TimeoutError("the replicas were not replaced within 120 s")


def kill_second_node(scene: Scene) -> None:
    """The SDXL replicas move to a second node, whose raylet gets SIGKILL; then the node is started again."""
    cluster = scene.cluster
    cluster.start_second_node(SECOND_NODE)
    before = {process.pid for process in cluster.actors("sdxl")}
    cluster.redeploy(sdxl={"num_cpus": 0.1, "resources": {SECOND_NODE: 0.1}})
    try:
        if not until(partial(_replaced, scene, before), 120):
            raise TimeoutError("the replicas did not move to the second node")
        scene.struck("replicas on the second node")
        scene.pause(2, 6)
        raylet = cluster.second_raylet()
        assert raylet is not None
        scene.struck(f"SIGKILL raylet {raylet.pid}")
        kill([raylet])
        scene.pause(2, 5)
        cluster.end_second_node()
        cluster.start_second_node(SECOND_NODE)
        scene.struck("second node started again")
        if not until(lambda: bool(cluster.actors("sdxl")), 120):
            raise TimeoutError("no replica on the second node came back")
        scene.pause(2, 5)
    finally:
        before = {process.pid for process in cluster.actors("sdxl")}
        cluster.redeploy()
        until(partial(_replaced, scene, before), 120)
        cluster.end_second_node()


def kill_everything(scene: Scene) -> None:
    """SIGKILL to every process of the cluster and to Postgres; then the same command starts it again."""
    scene.pause(3, 6)
    scene.struck("SIGKILL everything")
    scene.cluster.kill_everything()
    scene.cluster.start()
    scene.struck("started again")


def _replaced(scene: Scene, before: set[int]) -> bool:
    now = {process.pid for process in scene.cluster.actors("sdxl")}
    return bool(now) and not now & before


def _busy(scene: Scene, queue: str) -> psutil.Process | None:
    """A process of the queue that runs a job now, if the database tells one."""
    with contextlib.suppress(Exception):
        pids = {int(row["pid"]) for row in asyncio.run(scene.cluster.query(RUNNERS, queue))}
        busy = [process for process in scene.cluster.actors(queue) if process.pid in pids]
        return scene.random.choice(busy) if busy else None
    return None


def _wait_busy(scene: Scene, queue: str) -> psutil.Process:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        victim = _busy(scene, queue)
        if victim is not None:
            return victim
        time.sleep(0.02)
    raise TimeoutError(f"no replica of {queue} had a job for 60 s")


FAULTS = (
    Fault("none", "nothing is done: the load alone", lambda scene: scene.pause(3, 5)),
    Fault("kill-replica", "SIGKILL of an SDXL replica that runs a job", partial(kill_actor, "sdxl", 4)),
    Fault("kill-enhancer", "SIGKILL of the language model's replica", partial(kill_actor, "qwen", 3)),
    Fault("kill-api", "SIGKILL of the API's replica", partial(kill_actor, "api", 3)),
    Fault("kill-proxy", "SIGKILL of Serve's HTTP proxy", partial(kill_actor, "ProxyActor", 2)),
    Fault("kill-callbacks", "SIGKILL of the callback deliverer", partial(kill_actor, "callbacks", 3)),
    Fault("kill-upkeep", "SIGKILL of upkeep", partial(kill_actor, "upkeep", 3)),
    Fault("kill-controller", "SIGKILL of the Serve controller", partial(kill_actor, "ServeController", 2)),
    Fault("kill-raylet", "SIGKILL of the raylet of a second node", kill_second_node),
    Fault("pause-replica", "SIGSTOP past the lease, then SIGCONT", pause_replica),
    Fault("postgres-restart", "Postgres restarted in immediate mode", restart_postgres),
    Fault("postgres-kill", "SIGKILL of the postmaster", kill_postgres),
    Fault("store-away", "the object store refuses writes", refuse_writes),
    Fault("receiver-down", "nobody listens for callbacks", partial(misbehave, Conduct.DOWN), True),
    Fault("receiver-slow", "the receiver takes seconds", partial(misbehave, Conduct.SLOW), True),
    Fault("receiver-reset", "the receiver resets connections", partial(misbehave, Conduct.RESETTING), True),
    Fault("receiver-500", "the receiver answers 500", partial(misbehave, Conduct.ERROR), True),
    Fault("receiver-410", "the receiver answers 410", partial(misbehave, Conduct.GONE), True),
    Fault("receiver-301", "the receiver redirects", partial(misbehave, Conduct.MOVED), True),
    Fault("redeploy", "deployed again in mid-load", redeploy),
    Fault("kill-everything", "SIGKILL of everything, then a start", kill_everything),
)
