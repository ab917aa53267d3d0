"""The root's Serve config, deployed by Ray's own commands: each on a cluster of its own, with its own state."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from deployments.settings import Settings
from serve_app.bootstrap import ensure_admin_key
from tests.conftest import state_folder
from tests.e2e.conftest import TERMINAL, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
READY_SECONDS = 240.0


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder; what ran in it is stopped afterwards."""
    with state_folder() as folder:
        yield folder / "state"


def config(folder: Path, port: int) -> Path:
    """The root's config, as it is but for the port."""
    values = yaml.safe_load(Path("serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@contextmanager
def process(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of its own process group, ended by SIGINT (what Ctrl-C sends), then by SIGKILL."""
    with log.open("wb") as out:
        running = subprocess.Popen(arguments, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            yield running
        finally:
            running.send_signal(signal.SIGINT if "run" in arguments else signal.SIGTERM)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait(10)


def until(condition: Callable[[], Any], log: Path) -> Any:
    """What `condition` gives once it is truthy."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-4000:])


def ready(api: str) -> bool:
    try:
        return httpx2.get(f"{api}/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def answers_a_job(api: str, state: Path, log: Path) -> None:
    key = asyncio.run(ensure_admin_key(Settings(state_dir=state)))
    with httpx2.Client(base_url=api, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        accepted = client.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "a bridge", "steps": 2})
        assert accepted.status_code == 202, accepted.text
        url = f"/v1/jobs/{accepted.json()['id']}"
        job = until(lambda: (j := client.get(url).json())["status"] in TERMINAL and j, log)
    assert job["status"] == "completed", job["error"]
    assert len(job["assets"]) == 1


def environment(state: Path, port: int, **more: str) -> dict[str, str]:
    own = {"OURVIDZ_STATE_DIR": str(state), "OURVIDZ_PUBLIC_URL": f"http://127.0.0.1:{port}"}
    own["PATH"] = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, **own, "RAY_USAGE_STATS_ENABLED": "0", **more}


def test_serve_run_of_the_config_answers_a_job(tmp_path: Path, state: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    api = f"http://127.0.0.1:{port}"
    command = [str(BIN / "serve"), "run", str(config(tmp_path, port))]
    with process(command, environment(state, port, RAY_ADDRESS="local"), log) as running:
        until(lambda: ready(api) or running.poll() is not None, log)
        assert running.poll() is None, log.read_text()[-4000:]
        answers_a_job(api, state, log)


def test_serve_deploy_on_a_running_cluster_answers_a_job_and_is_healthy(tmp_path: Path, state: Path) -> None:
    port, gcs, dashboard, log = free_port(), free_port(), free_port(), tmp_path / "log"
    api, address = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    own = environment(state, port)
    head = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    head += [f"--ray-client-server-port={free_port()}", "--object-store-memory=200000000"]

    # Ray 2.60 guards a new cluster with a token by default; a client of it must say that it brings one
    client = own | {"RAY_AUTH_MODE": "token"}

    def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "serve"), *arguments, "--address", address]
        return subprocess.run(command, env=client, capture_output=True, text=True, timeout=120, check=False)

    with process(head, own, log) as running:
        until(lambda: serve("status").returncode == 0 or running.poll() is not None, log)
        deployed = serve("deploy", str(config(tmp_path, port)))
        assert deployed.returncode == 0, deployed.stderr
        until(lambda: ready(api), log)
        answers_a_job(api, state, log)
        status = yaml.safe_load(serve("status").stdout)
        assert {a["status"] for a in status["applications"].values()} == {"RUNNING"}
        deployments = [d for a in status["applications"].values() for d in a["deployments"].values()]
        assert {d["status"] for d in deployments} == {"HEALTHY"}
        assert len(deployments) == 8
