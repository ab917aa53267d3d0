"""Commands that hold a cluster: up, serve, demo and down."""

import logging
import queue
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml

from db import embedded
from db.access import Access
from db.workers import Workers
from deployments.settings import Settings
from serve_app.bootstrap import admin_key_file, ensure_admin_key
from serve_app.cli.calls import AsJson, Url, calling, database, load_settings, run
from serve_app.cli.progress import Watching
from serve_app.cli.terminal import FAILED, INTERRUPTED, USAGE, Stop, say, seconds, show_facts, show_json, show_table
from serve_app.client import Client
from serve_app.cluster import Addresses, Cluster, ClusterError, config_args, load_config
from serve_app.demo import DemoReport, run_demo
from serve_app.endpoint import Endpoint
from serve_app.machine_checks import port_problem
from serve_app.receiver import Receiver

OTHER_CLUSTER_SECONDS = 10.0  # replicas report every few seconds; older reports are of a cluster that was killed

Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the API; else the Serve config's (8000).")]


def up(port: Port = None, as_json: AsJson = False) -> None:
    """Start a cluster on this machine and serve until Ctrl-C: Postgres, Ray, every model of the profile.

    Prints where the API, its documentation and the dashboard are, and the admin key that commands on this machine
    use by themselves.
    """
    settings = load_settings()
    with _running(settings, None, port) as addresses:
        key = run(ensure_admin_key(settings))
        _announce(addresses, as_json, {"key": key})
        _until_asked()


def serve(
    config: Annotated[Path, typer.Argument(help="A Serve config.", exists=True, dir_okay=False)] = Path(
        "serve_config.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Serve a config in production on this machine, until Ctrl-C or SIGTERM, and then drain.

    The environment wins over the config; secrets come from the environment only. On a Ray cluster of several
    machines, use `serve deploy` instead.
    """
    try:
        args = config_args(load_config(config))
    except (ClusterError, yaml.YAMLError) as error:
        raise Stop(f"{config} is no Serve config: {error}", USAGE) from error
    settings = load_settings(args)
    with _running(settings, config, None) as addresses:
        kept = run(_first_admin(settings))
        _announce(addresses, as_json, {"key_file": str(kept)} if kept else {})
        _until_asked()


def demo(
    out: Annotated[Path | None, typer.Option(help="Where the files go; else out/demo-TIME.", file_okay=False)] = None,
    port: Port = None,
    receiver_port: Annotated[int, typer.Option(min=0, max=65535, help="Of the callbacks' receiver; 0: any.")] = 0,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make images and a video through the whole system, and check every file and every callback.

    Starts a cluster for it and stops it again. With --url it uses one that runs, which must allow the receiver:
    OURVIDZ_EGRESS_ALLOW=http://127.0.0.1:PORT with --receiver-port PORT.
    """
    folder = out or Path("out") / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        receiver = Receiver(receiver_port)
    except OSError as error:
        raise Stop(f"no receiver on port {receiver_port}: {error.strerror}", USAGE) from error
    with receiver:
        if url is not None:
            report = run(_demo_at(url, receiver, folder))
        else:
            settings = load_settings()
            allow = (*settings.egress_allow, receiver.origin)
            settings = settings.model_copy(update={"egress_allow": allow})
            with _running(settings, None, port) as addresses:
                report = run(_demo_here(settings, addresses, receiver, folder))
    _show_demo(report, as_json)


def down() -> None:
    """Stop the embedded Postgres of the state folder. Other Postgres servers are left alone."""
    folder = load_settings().embedded_postgres
    if folder is None:
        raise Stop("the settings name a Postgres of your own, which this command does not stop", USAGE)
    say("stopped the embedded Postgres" if embedded.stop(folder) else "the embedded Postgres was not running")


@contextmanager
def _running(settings: Settings, config: Path | None, port: int | None) -> Iterator[Addresses]:
    """A cluster for the time of the block; drained and stopped after it, however it ends."""
    if port is not None and "public_url" not in settings.model_fields_set:
        settings = settings.model_copy(update={"public_url": f"http://127.0.0.1:{port}"})
    cluster = Cluster(settings, config, http_port=port)
    problem = port_problem(cluster.http[1])
    if problem is not None:
        raise Stop(f"port {cluster.http[1]}, where the API should be, is {problem}; choose another with --port", FAILED)
    run(_refuse_second(settings))
    before = signal.signal(signal.SIGTERM, _interrupt)

    def report(line: str) -> None:
        signal.signal(signal.SIGTERM, _interrupt)  # ray.init has put a handler there that ends the process at once
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would tell of each deletion while stopping
        say(line)

    try:
        try:
            addresses = cluster.start(report)
            signal.signal(signal.SIGTERM, _interrupt)
            yield addresses
        finally:
            cluster.stop(say)
    except KeyboardInterrupt as error:
        raise Stop("stopped", INTERRUPTED) from error
    except ClusterError as error:
        raise Stop(str(error), FAILED) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _until_asked() -> None:
    """Wait for Ctrl-C or SIGTERM. Another Ctrl-C during the stopping that follows ends it at once."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be put to from within a signal handler
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: asked.put(number)) for number in signals}
    try:
        say("serving; Ctrl-C stops")
        asked.get()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say("stopping; running jobs finish or are handed back")


async def _refuse_second(settings: Settings) -> None:
    """Two clusters of one state folder would take each other's jobs without knowing of each other."""
    folder = settings.embedded_postgres
    if folder is None or not embedded.is_running(folder):
        return
    async with database(settings) as pool:
        if not await pool.fetchval("SELECT to_regclass('public.workers') IS NOT NULL"):
            return
        alive = await Workers(pool).list(within_seconds=OTHER_CLUSTER_SECONDS)
    if any(worker.state not in ("stopped", "failed") for worker in alive):
        message = f"another cluster runs on {settings.state_dir}; stop it, or set OURVIDZ_STATE_DIR"
        raise Stop(f"{message} (one that was killed is forgotten after {OTHER_CLUSTER_SECONDS:g} s)", FAILED)


async def _first_admin(settings: Settings) -> Path | None:
    """Where the admin key is kept, which is made where this is a laptop or nobody is admin yet."""
    async with database(settings) as pool:
        needed = settings.loaded_profile.laptop or not await Access(pool).has_admin()
    if needed:
        await ensure_admin_key(settings)
    path = admin_key_file(settings)
    return path if path.exists() else None


def _announce(addresses: Addresses, as_json: bool, more: dict[str, str]) -> None:
    facts: dict[str, Any] = {"api": addresses.api, "docs": addresses.docs, "dashboard": addresses.dashboard} | more
    (show_json if as_json else show_facts)(facts | {"logs": str(addresses.logs)})


async def _demo_here(settings: Settings, addresses: Addresses, receiver: Receiver, folder: Path) -> DemoReport:
    async with _demo_key(settings) as key, Client(Endpoint(addresses.api, key)) as client:
        with Watching() as watching:
            return await run_demo(client, receiver, folder, watching)


async def _demo_at(url: str, receiver: Receiver, folder: Path) -> DemoReport:
    async with calling(url) as client:
        with Watching() as watching:
            return await run_demo(client, receiver, folder, watching)


@asynccontextmanager
async def _demo_key(settings: Settings) -> AsyncIterator[str]:
    """A key of an ordinary user, revoked afterwards."""
    async with database(settings) as pool:
        access = Access(pool)
        user = await access.ensure_user("demo")
        key = await access.create_key(user, "demo", datetime.now(UTC) + timedelta(days=1))
        assert key.secret is not None
        try:
            yield key.secret
        finally:
            await access.revoke_key(key.id)


def _show_demo(report: DemoReport, as_json: bool) -> None:
    if as_json:
        jobs = [
            {
                "id": str(went.job.id),
                "job_type": went.job.job_type,
                "status": went.job.status,
                "queue_wait_seconds": went.job.queue_wait_seconds,
                "enhancement_seconds": went.job.enhancement_seconds,
                "generation_seconds": went.job.generation_seconds,
                "files": [str(path) for path in went.files],
                "callbacks": list(went.callbacks),
                "callback_verified": went.callback_verified,
                "problems": list(went.problems),
            }
            for went in report.jobs
        ]
        show_json({"passed": report.passed, "rejected_callbacks": report.rejected, "jobs": jobs})
    else:
        rows = [
            (
                went.job.job_type,
                went.job.status,
                seconds(went.job.queue_wait_seconds),
                seconds(went.job.generation_seconds),
                "verified" if went.callback_verified else "missing",
                " ".join(str(path) for path in went.files),
            )
            for went in report.jobs
        ]
        show_table(("Job", "State", "Waited", "Ran", "Callback", "Files"), rows)
    problems = [f"{went.job.job_type}: {problem}" for went in report.jobs for problem in went.problems]
    problems += [f"{report.rejected} callbacks had a signature that does not hold"] if report.rejected else []
    if problems:
        raise Stop("\n".join(problems), FAILED)
    say("every job completed, every file opens, every callback was verified")
