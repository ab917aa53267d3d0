"""The other servers: each a process group of its own on a port of loopback, called as its manual says."""

import base64
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks.chaos.cluster import ROOT, free_port, kill, until
from benchmarks.cluster.workload import GUIDANCE, SIZE, Lap, Tally, Work, drive

READY_SECONDS = 90.0
PNG = b"\x89PNG\r\n\x1a\n"


class PeerFailed(RuntimeError):
    """A server did not come up, or answered with anything but a PNG."""


@dataclass(frozen=True)
class Kind:
    """How a server is started and asked."""

    name: str
    module: str
    command: Callable[[int], list[str]]
    path: str
    ready: str
    body: Callable[[dict[str, Any]], Any]
    picture: Callable[[httpx2.Response], bytes]


def _bentoml_command(port: int) -> list[str]:
    service = "benchmarks.cluster.bentoml_server:Pictures"
    return ["-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port), "--working-dir", str(ROOT)]


KINDS = (
    Kind(
        name="LitServe",
        module="litserve",
        command=lambda port: ["-m", "benchmarks.cluster.litserve_server", str(port)],
        path="/predict",
        ready="/health",
        body=lambda work: work,
        picture=lambda answer: answer.content,
    ),
    Kind(
        name="BentoML",
        module="bentoml",
        command=_bentoml_command,
        path="/generate",
        ready="/readyz",
        body=lambda work: {"requests": [work]},
        picture=lambda answer: base64.b64decode(answer.json()[0]),
    ),
)


class Peer:
    """One other server, run by the Python of the environment that has it."""

    def __init__(
        self, kind: Kind, python: Path, folder: Path, checkpoint: Path, step_seconds: float, batch: int
    ) -> None:
        self.kind, self._folder = kind, folder
        self._python, self._port = python, free_port()
        self._tally = folder / f"{kind.module}.tally"
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=120)
        self._environment = dict(os.environ) | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENCHMARK_CHECKPOINT": str(checkpoint),
            "BENCHMARK_STEP_SECONDS": str(step_seconds),
            "BENCHMARK_TALLY": str(self._tally),
            "BENCHMARK_SIZE": str(SIZE),
            "BENCHMARK_GUIDANCE": str(GUIDANCE),
            "BENCHMARK_BATCH": str(batch),
        }

    def version(self) -> str:
        """Of the server's package."""
        code = f"import importlib.metadata as m; print(m.version({self.kind.module!r}))"
        done = subprocess.run([self._python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    def start(self) -> None:
        """Until it answers. Raises `PeerFailed`."""
        path = self._folder / f"{self.kind.module}.log"
        with path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._python), *self.kind.command(self._port)],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not until(self._ready, READY_SECONDS):
            raise PeerFailed(f"{self.kind.name} did not start: {path.read_text(errors='replace')[-1500:]}")

    def _ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return self._http.get(self.kind.ready, timeout=2).status_code == 200
        return False

    def _family(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True)]

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """It stands still for the time of the block, so that it costs the others nothing."""
        family = self._family()
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.resume()

    def close(self) -> None:
        """End it with all that it started."""
        self._http.close()
        kill(self._family())
        if self._process is not None:
            self._process.wait(10)

    def run(self, works: Sequence[Work]) -> Lap:
        """From the first request to the last answer. Raises `PeerFailed`."""
        tally = Tally(self._tally)
        return tally.lap(len(works), drive(works, self._one))

    def _one(self, work: Work) -> None:
        told = {"prompt": work.prompt, "seed": work.number, "steps": work.steps}
        answer = self._http.post(self.kind.path, json=self.kind.body(told))
        if answer.status_code != 200 or not self.kind.picture(answer).startswith(PNG):
            raise PeerFailed(f"{self.kind.name}: {answer.status_code} {answer.text[:200]}")
