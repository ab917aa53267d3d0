"""The whole system: a cluster as `ourvidz serve` starts it, one SDXL replica, callers over HTTP, callbacks that are
verified, and a look at each file."""

from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import httpx2

from benchmarks.chaos import cluster as chaos
from benchmarks.chaos.overlay import copy_code, replace_text
from benchmarks.chaos.record import BUCKET
from benchmarks.cluster.workload import GUIDANCE, Lap, Tally, Work, drive
from serve_app.receiver import Receiver

CALLBACK_SECONDS = 60.0
LOADED = "        super().load()\n        self._references.complete(self._pipeline, self.device)\n"
FIXED = """        from models.fixed_step import fix_step_time

        fix_step_time(self._pipeline.unet, {seconds!r}, Path({tally!r}))
"""


class WorkLost(RuntimeError):
    """A job was not accepted, not called back in time, or its file is not there."""


class System:
    """One cluster in a folder of its own; None as `step_seconds` runs the code as it is."""

    def __init__(self, folder: Path, step_seconds: float | None) -> None:
        self._folder, self._tally = folder, folder / "system.tally"
        code = copy_code(chaos.ROOT, folder / "code")
        if step_seconds is not None:
            fix_steps(code, step_seconds, self._tally)
        self._receiver = Receiver()
        self._cluster = one_replica(chaos.Cluster(folder, self._receiver.origin, code))
        self._http: httpx2.Client | None = None

    def start(self) -> None:
        """Until everything serves. Raises `NotReady`."""
        self._cluster.start()
        self._receiver.trust(self._cluster.callback_secret())
        headers = {"Authorization": f"Bearer {self._cluster.key()}"}
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
        self._http = httpx2.Client(base_url=self._cluster.api, headers=headers, timeout=30, limits=limits)

    def close(self) -> None:
        """Stop the cluster, and delete what Ray left of it."""
        if self._http is not None:
            self._http.close()
        self._cluster.stop()
        self._cluster.forget_logs()
        self._receiver.close()

    def run(self, works: Sequence[Work]) -> Lap:
        """From the first submission to the last callback. Raises `WorkLost`."""
        tally = Tally(self._tally)
        return tally.lap(len(works), drive(works, self._one))

    def _one(self, work: Work) -> None:
        assert self._http is not None  # started
        body = {
            "job_type": "sdxl_image_fast",
            "prompt": work.prompt,
            "seed": work.number,
            "num_images": 1,
            "steps": work.steps,
            "guidance_scale": GUIDANCE,
            "callback_url": self._receiver.origin,
        }
        answer = self._http.post("/v1/jobs", json=body)
        if answer.status_code != 202:
            raise WorkLost(f"{answer.status_code} {answer.text[:200]}")
        job_id = UUID(answer.json()["id"])
        if not self._receiver.wait_for(job_id, "job.completed", CALLBACK_SECONDS):
            raise WorkLost(f"no callback of {job_id} within {CALLBACK_SECONDS:.0f} s")
        if not any((self._cluster.blobs / BUCKET).glob(f"*/{job_id}/*/0.png")):
            raise WorkLost(f"no file of {job_id}")


def fix_steps(code: Path, seconds: float, tally: Path) -> None:
    """Give the copied code a denoiser of a fixed step time. Raises `MutationMisses`."""
    stub = Path(__file__).with_name("fixed_step.py")
    (code / "models" / "fixed_step.py").write_text(stub.read_text(encoding="utf-8"), encoding="utf-8")
    replace_text(code / "models" / "sdxl.py", [(LOADED, LOADED + FIXED.format(seconds=seconds, tally=str(tally)))])


def one_replica(cluster: chaos.Cluster) -> chaos.Cluster:
    """The same with one replica of each model, and the settings that everybody has but for the profile."""
    for deployment in cluster.config["applications"][0]["deployments"]:
        if "num_replicas" in deployment:
            deployment["num_replicas"] = 1
    for name in chaos.SETTINGS.keys() - {"PROFILE"}:
        del cluster.environment[f"OURVIDZ_{name}"]
    return cluster
