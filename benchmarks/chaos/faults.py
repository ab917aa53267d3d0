"""What is done to the cluster. Each fault strikes at random points of the flow of jobs, from its seed, and is over in
bounded time."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.chaos.cluster import kill, until
from benchmarks.chaos.receiver import Conduct
from benchmarks.chaos.scene import Scene
from benchmarks.chaos.suspension import pause_replica

SECOND_NODE = "second"


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `receiver_fails` allows dead callbacks, by the rules of the outbox."""

    name: str
    about: str
    strike: Callable[[Scene], None]
    receiver_fails: bool = False


def kill_actor(title: str, times: int, scene: Scene) -> None:
    """SIGKILL one of the processes of that title, again and again; the next one only when another is there."""
    for _ in scene.spread(1 if scene.short else times):
        if not until(lambda: bool(scene.cluster.actors(title)), 60):
            raise TimeoutError(f"no process of {title} came back")
        victim = scene.busy(title) or scene.random.choice(scene.cluster.actors(title))
        scene.struck(f"SIGKILL {title} {victim.pid}")
        kill([victim])


def restart_postgres(scene: Scene) -> None:
    """What `pg_ctl restart -m immediate` does: SIGQUIT to the postmaster, and a start as soon as it is gone."""
    for _ in scene.spread(1 if scene.short else 4):
        postmaster = scene.cluster.postmaster()
        assert postmaster is not None
        scene.struck(f"SIGQUIT postmaster {postmaster.pid}")
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(30)
        scene.pause(0, 2)
        scene.cluster.start_postgres()


def kill_postgres(scene: Scene) -> None:
    """SIGKILL to the postmaster. Nobody starts it again but the cluster itself."""
    for _ in scene.spread(1 if scene.short else 3):
        postmaster = scene.cluster.postmaster()
        assert postmaster is not None
        scene.struck(f"SIGKILL postmaster {postmaster.pid}")
        kill([postmaster])
        if not until(lambda: scene.cluster.postmaster() is not None, 60):
            scene.struck("nothing started Postgres again within 60 s: started by hand")
            scene.cluster.start_postgres()
            raise TimeoutError("nothing started Postgres again within 60 s")


def refuse_writes(scene: Scene) -> None:
    """The object store's folder is away, with a file where it was: once for less time than a replica tries to store,
    once for longer than an attempt lives."""
    blobs, away = scene.cluster.blobs, scene.cluster.blobs.with_name("blobs.away")
    spans = [(4.0, 5.0)] if scene.short else [(2.0, 4.0), (18.0, 22.0)]
    for span, _ in zip(spans, scene.spread(len(spans)), strict=True):
        blobs.rename(away)
        blobs.write_text("not a folder")
        scene.struck("object store away")
        try:
            scene.pause(*span)
        finally:
            blobs.unlink()
            away.rename(blobs)
            scene.struck("object store back")


def misbehave(conduct: Conduct, scene: Scene) -> None:
    """The receiver of callbacks answers differently for some seconds."""
    for _ in scene.spread(1 if scene.short else 4):
        scene.receiver.behave(conduct)
        scene.struck(f"receiver {conduct}")
        try:
            scene.pause(4, 8)
        finally:
            scene.receiver.behave(Conduct.GOOD)
            scene.struck("receiver good")


def redeploy(scene: Scene) -> None:
    """Deploy with a changed setting: every replica is replaced, and the old ones drain."""
    for _ in scene.spread(1 if scene.short else 2):
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
    for _ in scene.spread(1):
        scene.struck("SIGKILL everything")
        scene.cluster.kill_everything()
        scene.cluster.start()
        scene.struck("started again")


def _replaced(scene: Scene, before: set[int]) -> bool:
    now = {process.pid for process in scene.cluster.actors("sdxl")}
    return bool(now) and not now & before


FAULTS = (
    Fault("none", "nothing is done: the load alone", lambda scene: scene.pause(0, 1)),
    Fault("kill-replica", "SIGKILL of an SDXL replica that runs a job", partial(kill_actor, "sdxl", 5)),
    Fault("kill-enhancer", "SIGKILL of the language model's replica", partial(kill_actor, "qwen", 4)),
    Fault("kill-api", "SIGKILL of the API's replica", partial(kill_actor, "api", 4)),
    Fault("kill-proxy", "SIGKILL of Serve's HTTP proxy", partial(kill_actor, "ProxyActor", 2)),
    Fault("kill-callbacks", "SIGKILL of the callback deliverer", partial(kill_actor, "callbacks", 5)),
    Fault("kill-upkeep", "SIGKILL of upkeep", partial(kill_actor, "upkeep", 5)),
    Fault("kill-controller", "SIGKILL of the Serve controller", partial(kill_actor, "ServeController", 3)),
    Fault("kill-raylet", "SIGKILL of the raylet of a second node", kill_second_node),
    Fault(
        "pause-replica",
        "SIGSTOP in the middle of a job until another replica has it or has ended it, then SIGCONT",
        pause_replica,
    ),
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
