"""The cluster under test: `ourvidz serve` as a process of its own, whose parts can be found and ended by their pid."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml

from benchmarks.chaos.rows import Rows
from db import embedded

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
APPLICATIONS = ("ourvidz", "ourvidz-events")
READY_SECONDS = 180.0
LEASE_SECONDS = 6.0
GRACE_SECONDS = 25.0  # of files that nothing speaks of
SWEEP_SECONDS = 5.0
SCHEDULE = (0, 0.5, 1, 2, 3, 4, 5, 6)  # of callbacks
SETTINGS = {
    "PROFILE": "laptop",
    "LEASE_SECONDS": LEASE_SECONDS,
    "RENEW_SECONDS": 1,
    "UPKEEP_SECONDS": 0.5,
    "DRAIN_SECONDS": 5,
    "SWEEP_SECONDS": SWEEP_SECONDS,
    "ORPHAN_GRACE_SECONDS": GRACE_SECONDS,
    "CALLBACK_SCHEDULE": ",".join(map(str, SCHEDULE)),
}


class NotReady(RuntimeError):
    """The cluster did not come up, or did not come back, in time."""


class Cluster:
    """One cluster on one state folder. Everything that it started is found among the descendants of its process."""

    def __init__(self, folder: Path, allowed_origin: str, code: Path = ROOT) -> None:
        """`code` is where the packages are imported from."""
        self.state, self._folder, self._code = folder / "state", folder, code
        self.port, self._dashboard = free_port(), ""
        self._process: subprocess.Popen[bytes] | None = None
        self._second: subprocess.Popen[bytes] | None = None
        self._deployed = 0
        self._sessions: set[Path] = set()
        self.config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        self.config["http_options"]["port"] = self.port
        for deployment in self.config["applications"][0]["deployments"]:
            if deployment["name"] in ("sdxl", "wan"):  # a fixed number, so that a fault alone decides who runs what
                deployment.pop("autoscaling_config", None)
                deployment["num_replicas"] = 2 if deployment["name"] == "sdxl" else 1
        inherited = {n: v for n, v in os.environ.items() if not n.startswith("OURVIDZ_") and n != "DATABASE_URL"}
        own = {f"OURVIDZ_{name}": str(value) for name, value in SETTINGS.items()}
        self.environment = (
            inherited
            | own
            | {
                "OURVIDZ_STATE_DIR": str(self.state),
                "OURVIDZ_PUBLIC_URL": self.api,
                "OURVIDZ_EGRESS_ALLOW": allowed_origin,
                "PYTHONPATH": str(code),
            }
        )

    @property
    def api(self) -> str:
        """Where the API is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        """The data folder of Postgres."""
        return self.state / "postgres"

    @property
    def blobs(self) -> Path:
        """The folder of the object store."""
        return self.state / "blobs"

    def key(self) -> str:
        """The admin's API key."""
        return (self.state / "admin-key").read_text().strip()

    def callback_secret(self) -> str:
        """What the admin's callbacks are signed with."""
        headers = {"Authorization": f"Bearer {self.key()}"}
        answer = httpx2.get(f"{self.api}/v1/callbacks/secret", headers=headers, timeout=30)
        return str(answer.raise_for_status().json()["secret"])

    def start(self) -> None:
        """Start everything and wait until it serves; tries again where the last cluster still counts as alive."""
        end = time.monotonic() + READY_SECONDS
        path = self._folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        while True:
            out, log = self._folder / "announced.json", self._folder / "cluster.log"
            with out.open("wb") as stdout, log.open("ab") as stderr:
                command = [sys.executable, "-c", "from serve_app.cli import main; main()", "serve", str(path), "--json"]
                self._process = subprocess.Popen(
                    command, cwd=self._code, env=self.environment, stdout=stdout, stderr=stderr, start_new_session=True
                )
            while self._process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(ValueError):
                    announced, _ = json.JSONDecoder().raw_decode(out.read_text())  # Ray may print below it
                    self._dashboard = announced["dashboard"]
                    self._sessions.add(Path(announced["logs"]).parent)
                    return self.wait_ready(end - time.monotonic())
                time.sleep(0.2)
            if time.monotonic() > end:
                raise NotReady(f"the cluster did not start: {log.read_text()[-2000:]}")
            time.sleep(1)

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Until every model has a live replica. Raises `NotReady`."""

        def ready() -> bool:
            with contextlib.suppress(httpx2.HTTPError):
                return httpx2.get(f"{self.api}/readyz", timeout=5).status_code == 200
            return False

        if not until(ready, seconds):
            raise NotReady(f"not ready again within {seconds:.0f} s")

    def stop(self) -> None:
        """Drain and stop; what does not stop is killed."""
        self.end_second_node()
        if self._process is not None and self._process.poll() is None:
            family = self.processes()
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(90)
            except subprocess.TimeoutExpired:
                kill(family)
        embedded.stop(self.data)

    def forget_logs(self) -> None:
        """Delete what Ray left of the sessions of this cluster."""
        for session in self._sessions:
            shutil.rmtree(session, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """The process that holds the cluster, and all that come from it. Postgres is not among them."""
        found: list[psutil.Process] = []
        for process in (self._process, self._second):
            if process is not None and process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    top = psutil.Process(process.pid)
                    found += [top, *top.children(recursive=True)]
        return found

    def actors(self, title: str) -> list[psutil.Process]:
        """The processes of a Serve deployment (`sdxl`, `api`, …), or of an actor class (`ServeController`)."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):
                name = process.cmdline()[0].removeprefix("ray::")
                if name.startswith((title, *(f"ServeReplica:{application}:{title}" for application in APPLICATIONS))):
                    found.append(process)
        return found

    def postmaster(self) -> psutil.Process | None:
        """The process of Postgres, if it runs."""
        if not embedded.is_running(self.data):
            return None
        return psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))

    def start_postgres(self) -> str:
        """Start Postgres where it is down, as an operator's supervisor would; returns its URL."""
        end = time.monotonic() + 60
        while True:
            try:
                return embedded.ensure_running(self.data)
            except embedded.EmbeddedPostgresError:  # its old processes are not gone yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.3)

    def rows(self) -> Rows:
        """A reader of the database, for one thread; close it."""
        return Rows(self.data)

    def kill_everything(self) -> None:
        """SIGKILL to all of the cluster and to Postgres."""
        family = self.processes()
        postmaster = self.postmaster()
        if postmaster is not None:
            family += [postmaster, *postmaster.children(recursive=True)]
        kill(family)
        if self._process is not None:
            self._process.wait(10)

    def redeploy(self, **options: dict[str, Any]) -> None:
        """Deploy the config again with a setting changed, so that every replica is replaced; `options` are actor
        options by deployment. Returns when Serve has taken it, before it is done."""
        self._deployed += 1
        config = json.loads(json.dumps(self.config))
        for application in config["applications"]:
            application["args"] = application.get("args", {}) | {"event_retention_days": 30 + self._deployed % 2}
            for deployment in application["deployments"]:
                if deployment["name"] in options:
                    deployment["ray_actor_options"] = options[deployment["name"]]
        path = self._folder / "redeployed.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(BIN / "serve"), "deploy", "--address", self._dashboard, str(path)]
        subprocess.run(
            command, cwd=self._code, env=self._ray_environment(), capture_output=True, timeout=60, check=True
        )

    def _ray_environment(self) -> dict[str, str]:
        """For Ray's own commands, which else do not know that the cluster wants a token."""
        return {"RAY_AUTH_MODE": "token"} | self.environment

    def start_second_node(self, resource: str) -> None:
        """A second raylet on this machine, with a resource of that name. Raises `NotReady`."""
        (raylet,) = [p for p in self.processes() if p.name() == "raylet"]
        (address,) = [a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--gcs-address=")]
        command = [str(BIN / "ray"), "start", f"--address={address}", "--num-cpus=1"]
        command += ["--object-store-memory=100000000", f"--resources={json.dumps({resource: 1})}", "--block"]
        with (self._folder / "second.log").open("ab") as log:
            self._second = subprocess.Popen(
                command, cwd=self._code, env=self._ray_environment(), stdout=log, stderr=log, start_new_session=True
            )
        if not until(lambda: self.second_raylet() is not None, 30):
            raise NotReady("the second node did not start")

    def second_raylet(self) -> psutil.Process | None:
        """The raylet of the second node, if it runs."""
        if self._second is None or self._second.poll() is not None:
            return None
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._second.pid).children(recursive=True):
                if process.name() == "raylet":
                    return process
        return None

    def end_second_node(self) -> None:
        """End the second node with everything on it."""
        if self._second is None or self._second.poll() is not None:
            return
        top = psutil.Process(self._second.pid)
        kill([top, *top.children(recursive=True)])
        self._second.wait(10)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float, every: float = 0.2) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to these processes, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """A process under SIGSTOP for the time of the block."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            process.resume()
