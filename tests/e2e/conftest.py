"""One real Ray cluster for all end-to-end tests: the laptop profile, own ports, own state, short leases."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from standardwebhooks import Webhook

from deployments.settings import Settings
from serve_app.bootstrap import ensure_admin_key
from serve_app.cluster import Addresses, Cluster
from tests.conftest import state_folder

DEADLINE_SECONDS = 120.0
TERMINAL = ("completed", "failed", "cancelled")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Receiver:
    """A receiver of callbacks that keeps what it got, with headers, and answers 204."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with outer.changed:
                    outer.received.append(({k.lower(): v for k, v in self.headers.items()}, body))
                    outer.changed.notify_all()
                self.send_response(204)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def verified(self, job_id: str, secret: str) -> list[dict[str, Any]]:
        """The bodies about a job, in order of arrival, each one checked by the standardwebhooks library."""
        with self.changed:
            kept = list(self.received)
        about = [(headers, body) for headers, body in kept if json.loads(body)["job_id"] == job_id]
        return [Webhook(secret).verify(body, headers) for headers, body in about]

    def wait_for(self, job_id: str, status: str) -> None:
        """Until a callback about a job with that status has come."""
        end = time.monotonic() + DEADLINE_SECONDS

        def came() -> bool:
            bodies = [json.loads(body) for _, body in self.received]
            return any(body["job_id"] == job_id and body["status"] == status for body in bodies)

        with self.changed:
            assert self.changed.wait_for(came, timeout=end - time.monotonic()), f"no {status} callback"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Running:
    """The cluster, its addresses and a client with the admin's key."""

    cluster: Cluster
    settings: Settings
    addresses: Addresses
    client: httpx2.Client
    receiver: Receiver
    key: str = field(repr=False)

    def submit(self, **body: Any) -> dict[str, Any]:
        """Submit a job; it must be accepted."""
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        """The job now."""
        answer = self.client.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def wait(self, job_id: str, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The job once it has ended, or once `until` is true of it."""
        done = until or (lambda job: job["status"] in TERMINAL)
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            job = self.job(job_id)
            if done(job):
                return job
            time.sleep(0.05)
        raise AssertionError(f"waited too long: {self.job(job_id)['status']}")

    def history(self, job_id: str) -> list[dict[str, Any]]:
        """The events of a job, from its stream, which ends with the job."""
        events = []
        with self.client.stream("GET", f"/v1/jobs/{job_id}/events", follow_redirects=True) as stream:
            assert stream.status_code == 200
            kind = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: ") and kind == "event":
                    events.append(json.loads(line[6:]))
        return events

    def files(self) -> set[str]:
        """Every key in the bucket of results."""
        root = self.settings.state_dir / "blobs" / "workspace-temp"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def secret(self) -> str:
        """The secret that callbacks are signed with."""
        return str(self.client.get("/v1/callbacks/secret").json()["secret"])


CLUSTER = ExitStack()


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """A cluster that serves. Stopped at the end of these tests."""
    with CLUSTER:
        folder = CLUSTER.enter_context(state_folder())
        yield CLUSTER.enter_context(contextmanager(run_cluster)(folder))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Idle, a cluster takes processor time as well: it ends with the last test of this folder, not of all."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        CLUSTER.close()


def run_cluster(folder: Path) -> Iterator[Running]:
    """A cluster with its state in a folder, and a receiver of callbacks that it may call."""
    receiver = Receiver()
    port = free_port()
    settings = Settings(
        state_dir=folder / "state",
        public_url=f"http://127.0.0.1:{port}",
        egress_allow=(receiver.origin,),
        callback_schedule=(0, 0.2, 0.5, 1),
        lease_seconds=6,
        renew_seconds=1,
        upkeep_seconds=0.5,
        drain_seconds=5,
    )
    cluster = Cluster(settings, Path("serve_config.yaml"), http_port=port, dashboard_port=free_port())
    addresses = cluster.start()
    try:
        key = asyncio.run(ensure_admin_key(settings))
        headers = {"Authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=addresses.api, headers=headers, timeout=DEADLINE_SECONDS) as client:
            yield Running(cluster, settings, addresses, client, receiver, key)
    finally:
        cluster.stop()
        receiver.close()
