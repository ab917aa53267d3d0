"""A cluster of one machine, in the hands of this process: Postgres, Ray, and the applications of a Serve config.

For a laptop, a demo, tests, and a single server. On a cluster of many nodes `serve deploy` does the deploying, and
nothing here is needed. Stopping drains: replicas finish or hand back their jobs before Ray goes.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import yaml

from db import embedded
from deployments.settings import SECRET_FIELDS, Settings

log = structlog.get_logger()

READY_SECONDS = 600.0
ROOT_CONFIG = Path(__file__).parents[1] / "serve_config.yaml"
LAPTOP_OBJECT_STORE_BYTES = 200_000_000  # nothing large goes through Ray's object store here


class ClusterError(RuntimeError):
    """The cluster did not come up. The message says which part, and what it said."""

    code = "cluster"


@dataclass(frozen=True)
class Addresses:
    """Where the parts of a running cluster are."""

    api: str
    docs: str
    dashboard: str
    logs: Path


class Cluster:
    """Start it once, stop it once. `settings` reach every deployment through the environment of Ray's processes."""

    def __init__(
        self,
        settings: Settings,
        config: Path | None = None,
        *,
        http_port: int | None = None,
        dashboard_port: int | None = None,
    ) -> None:
        self.settings, self._dashboard_port = settings, dashboard_port
        self._config = load_config(config)
        if http_port is not None:
            self._config.setdefault("http_options", {})["port"] = http_port
        self._started_postgres = False

    @property
    def http(self) -> tuple[str, int]:
        """Host and port of the HTTP proxy."""
        options = self._config.get("http_options", {})
        return options.get("host", "127.0.0.1"), int(options.get("port", 8000))

    def start(self, report: Callable[[str], None] = lambda line: None) -> Addresses:
        """Bring everything up and wait until it serves. Raises `ClusterError`; then everything is down again."""
        try:
            return self._start(report)
        except BaseException:
            self.stop()
            raise

    def _start(self, report: Callable[[str], None]) -> Addresses:
        data = self.settings.embedded_postgres
        if data is not None:
            report("starting Postgres")
            self._started_postgres = not embedded.is_running(data)
        self.settings.postgres()
        report("starting Ray")
        dashboard = self._start_ray()
        report("deploying")
        self._deploy(dashboard)
        self._wait(report)
        host, port = self.http
        api = f"http://{host}:{port}"
        import ray

        logs = Path(ray.get_runtime_context().get_session_name())
        return Addresses(api, f"{api}/docs", dashboard, Path("/tmp/ray") / logs / "logs")  # noqa: S108 - Ray's own

    def _start_ray(self) -> str:
        import ray

        options: dict[str, Any] = {"object_store_memory": LAPTOP_OBJECT_STORE_BYTES}
        with environment(self.settings), _own_signal_handlers():
            context = ray.init(
                address="local",
                namespace="serve",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=self._dashboard_port,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
                **(options if self.settings.loaded_profile.laptop else {}),
            )
        return f"http://{context.dashboard_url}"

    def _deploy(self, dashboard: str) -> None:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        ServeSubmissionClient(dashboard).deploy_applications(self._config)

    def _wait(self, report: Callable[[str], None]) -> None:
        from ray import serve

        deadline, said = time.monotonic() + READY_SECONDS, ""
        wanted = {application["name"] for application in self._config["applications"]}
        while time.monotonic() < deadline:
            applications = serve.status().applications
            states = {name: applications[name].status.value for name in wanted & set(applications)}
            for name, state in states.items():
                if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise ClusterError(f"application {name}: {applications[name].message}")
            if len(states) == len(wanted) and set(states.values()) == {"RUNNING"}:
                return
            waiting = sorted(
                name
                for application in applications.values()
                for name, deployment in application.deployments.items()
                if deployment.status.value not in ("HEALTHY",)
            )
            line = f"waiting for {', '.join(waiting) or 'the applications'}"
            if line != said:
                said = line
                report(line)
            time.sleep(0.25)
        raise ClusterError(f"not ready after {READY_SECONDS:.0f} s: {said}")

    def stop(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Drain and take everything down that this cluster brought up. Safe to repeat."""
        import ray

        if ray.is_initialized():
            from ray import serve

            report("draining")
            for application in reversed(self._config["applications"]):
                with contextlib.suppress(Exception):
                    serve.delete(application["name"])
            with contextlib.suppress(Exception):
                serve.shutdown()
            report("stopping Ray")
            ray.shutdown()
        if self._started_postgres and self.settings.embedded_postgres is not None:
            report("stopping Postgres")
            embedded.stop(self.settings.embedded_postgres)
            self._started_postgres = False


def load_config(path: Path | None) -> dict[str, Any]:
    """A Serve config; without a path the one at the root of the checkout."""
    path = path or ROOT_CONFIG
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not config.get("applications"):
        raise ClusterError(f"{path}: a Serve config has a list of applications")
    return config


def config_args(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a Serve config gives to the first of its applications."""
    return dict(config["applications"][0].get("args") or {})


@contextlib.contextmanager
def environment(settings: Settings) -> Iterator[None]:
    """The environment in which Ray's processes start: these settings, secrets included, win over every config."""
    changed = {
        f"OURVIDZ_{name.upper()}": _as_text(value) for name, value in settings.shared().items() if value is not None
    }
    for name in SECRET_FIELDS:
        secret = getattr(settings, name)
        if secret is not None:
            changed[f"OURVIDZ_{name.upper()}"] = secret.get_secret_value()
    changed.setdefault("RAY_USAGE_STATS_ENABLED", os.environ.get("RAY_USAGE_STATS_ENABLED", "0"))
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep this program's handler of SIGTERM: ray.init puts one of its own there, which ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
