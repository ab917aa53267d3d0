"""The replica that sleeps through the loss of its lease: SIGSTOP in the middle of a job, SIGCONT when it is too late.

What it does then is what the fence is for. Only one thing shows a missing fence: the sleeper finishes while the job
*runs* under the next attempt, since the row that its write would hit goes with the end of that attempt. So the job must
be seconds long, the sleeper must be far in it when it is stopped, and it must wake when the next attempt has just
begun. The other kind of waking, after the end, must leave no trace either.
"""

import time
from dataclasses import dataclass

import psutil

from benchmarks.chaos.cluster import stopped, until
from benchmarks.chaos.scene import Scene

TRIES = 4
WAIT_SECONDS, HOLD_SECONDS = 90.0, 60.0
# far in the job, with something left to do: at least two steps done, or all of them and the decode not yet
FAR = """
  SELECT q.job_id, q.attempt, q.phase, q.step, q.steps, w.pid
  FROM job_queue q JOIN workers w ON w.id = q.worker JOIN jobs j ON j.id = q.job_id
  WHERE q.state = 'running' AND j.metadata ? 'to_hit' AND q.attempt = 1
    AND (q.phase = 'decode' OR q.phase = 'denoise' AND q.step >= 2)"""
JOB = "SELECT status, attempts FROM current_jobs WHERE id = $1"


@dataclass(frozen=True)
class Sleeper:
    """A replica to be stopped, and the attempt that it runs."""

    process: psutil.Process
    job_id: str
    attempt: int
    at: str


def pause_replica(scene: Scene) -> None:
    """Stop a replica in the middle of a job until another one runs that job, or (each second time) has ended it."""
    for number in scene.spread(2 if scene.short else 4):
        for _ in range(TRIES):
            if _outsleep(scene, until_ended=number % 2 == 1):
                break
        else:
            raise TimeoutError(f"no job was caught in the middle in {TRIES} tries")


def _outsleep(scene: Scene, until_ended: bool) -> bool:
    """False: the stop came too late, the job had ended."""
    scene.load.want_large()
    sleeper = _wait_far(scene)

    def overtaken() -> bool:
        (job,) = scene.rows.fetch(JOB, sleeper.job_id)
        ended = job["status"] in ("completed", "failed")
        if job["attempts"] == sleeper.attempt:
            return ended  # under the sleeper's own attempt: it was faster than the signal
        return ended if until_ended else job["status"] == "processing"

    with stopped(sleeper.process):
        scene.struck(f"SIGSTOP {sleeper.process.pid} in {sleeper.at}")
        if not until(overtaken, HOLD_SECONDS, every=0.05):
            raise TimeoutError(f"nobody took the job of a stopped replica within {HOLD_SECONDS:.0f} s")
        (job,) = scene.rows.fetch(JOB, sleeper.job_id)
    scene.struck(f"SIGCONT {sleeper.process.pid}, the job {job['status']} under attempt {job['attempts']}")
    return bool(job["attempts"] > sleeper.attempt)


def _wait_far(scene: Scene) -> Sleeper:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        for row in scene.rows.fetch(FAR):
            for process in scene.cluster.actors("sdxl"):
                if process.pid == row["pid"]:
                    at = f"{row['phase']} {row['step']}/{row['steps']}" if row["step"] else str(row["phase"])
                    return Sleeper(process, str(row["job_id"]), int(row["attempt"]), at)
        time.sleep(0.1)
    raise TimeoutError(f"no large job was far enough within {WAIT_SECONDS:.0f} s")
