"""A running installation without Ray: the real API and event streams on a socket, and, on request, real replicas."""

import asyncio
import contextlib
import io
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount

from db.access import Access
from db.blobs import BlobStore
from db.callbacks import Callbacks
from db.jobs import Status
from db.notify import Notifier
from db.queue import Claim, NewAsset, Queue, Renewal, Settlement
from deployments.callbacks import CallbackSecrets, Deliverer
from deployments.egress import Egress
from deployments.enhancer import Enhancer
from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings
from serve_app.api import problems
from serve_app.app import api, event_streams
from serve_app.bootstrap import prepare
from serve_app.endpoint import Endpoint


@dataclass
class Site:
    """One installation, with a key of an ordinary user."""

    settings: Settings
    database: Any
    api_key: str

    @property
    def url(self) -> str:
        return self.settings.public_url

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.api_key)

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this installation, and nothing of the developer's own."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | {
            "OURVIDZ_URL": self.url,
            "OURVIDZ_API_KEY": self.api_key,
            "OURVIDZ_STATE_DIR": str(self.settings.state_dir),
            "OURVIDZ_DATABASE_URL": self.database.url,
        }

    @property
    def queue(self) -> Queue:
        return Queue(self.database.worker_pool)

    async def claim(self, job_id: UUID | None = None, worker: UUID | None = None) -> Claim:
        """Take that job, or the next one, into a replica's hands, as soon as there is one."""
        while True:
            for claim in await self.queue.claim("sdxl", worker or uuid4(), 1):
                if job_id in (None, claim.job_id):
                    return claim
            await asyncio.sleep(0)

    async def step(self, claim: Claim, worker: UUID, done: int, of: int) -> None:
        """Report a denoise step, as a replica does."""
        await self.queue.renew(worker, [Renewal(claim.job_id, claim.attempt, "denoise", done, of)])
        await self.tell(claim.job_id)

    async def finish(self, claim: Claim, **changes: Any) -> bytes:
        """Complete a job with one picture; returns its bytes."""
        buffer = io.BytesIO()
        Image.new("RGB", (16, 8), "teal").save(buffer, "PNG")
        data = buffer.getvalue()
        key = f"{claim.job['user_id']}/{claim.job_id}/{claim.attempt}/0.png"
        await BlobStore.from_url(self.settings.blobs()).put("workspace-temp", key, data, "image/png")
        values: dict[str, Any] = {
            "id": uuid4(),
            "asset_index": 0,
            "asset_type": "image",
            "key": key,
            "thumbnail_key": None,
            "mime_type": "image/png",
            "file_size_bytes": len(data),
            "width": 16,
            "height": 8,
            "frames": None,
            "fps": None,
            "duration_seconds": None,
            "seed": 1,
            "model_used": "tiny-sdxl",
        }
        done = Settlement(
            job_id=claim.job_id,
            status=Status.COMPLETED,
            attempt=claim.attempt,
            assets=[NewAsset(**(values | changes))],
            generation_time_ms=1500,
        )
        await self._settle(done)
        return data

    async def fail(self, claim: Claim) -> None:
        """End a job as failed."""
        await self._settle(
            Settlement(
                job_id=claim.job_id,
                status=Status.FAILED,
                attempt=claim.attempt,
                error_code="oom",
                error_message="out of memory",
                retryable=False,
            )
        )

    async def _settle(self, settlement: Settlement) -> None:
        assert await self.queue.settle([settlement])
        await self.tell(settlement.job_id)

    async def tell(self, job_id: UUID) -> None:
        """Wake the event streams of a job."""
        notifier = Notifier(self.database.worker_pool)
        notifier.job(job_id)
        await notifier.close()

    async def command(self, *arguments: str, give: str = "", **environment: str) -> tuple[int, str, str]:
        """Run `ourvidz` as a process of its own: exit code, stdout and stderr."""
        return await run_command(*arguments, give=give, environment=self.environment | environment)


async def run_command(*arguments: str, environment: dict[str, str], give: str = "") -> tuple[int, str, str]:
    """Run `ourvidz` as a process of its own: exit code, stdout and stderr."""
    process = await start_command(*arguments, environment=environment)
    out, err = await asyncio.wait_for(process.communicate(give.encode()), 120)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def start_command(*arguments: str, environment: dict[str, str]) -> asyncio.subprocess.Process:
    """Start `ourvidz` with pipes for everything."""
    pipe = asyncio.subprocess.PIPE
    program = str(Path(sys.executable).with_name("ourvidz"))
    return await asyncio.create_subprocess_exec(
        program, *arguments, stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    )


@contextlib.asynccontextmanager
async def running(database: Any, folder: Path, **changes: Any) -> AsyncIterator[Site]:
    """The API on a free port of 127.0.0.1, over a database of the test's own."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        values: dict[str, Any] = {
            "database_url": database.url,
            "state_dir": folder / "state",
            "public_url": f"http://127.0.0.1:{listening.getsockname()[1]}",
        }
        settings = Settings(**(values | changes))
        await prepare(settings)
        access = Access(database.pool)
        key = await access.create_key(await database.user(), "test")
        assert key.secret is not None
        parts = [event_streams(settings), api(settings)]

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with contextlib.AsyncExitStack() as stack:
                for part in parts:
                    await stack.enter_async_context(part.router.lifespan_context(part))
                yield

        routes = [Mount("/v1/events", parts[0]), Mount("/", parts[1])]
        app = Starlette(routes=routes, lifespan=lifespan)
        problems.install(app)  # for paths that neither part gets to see
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            while not server.started:
                assert not serving.done(), "the API did not start"
                await asyncio.sleep(0)
            yield Site(settings, database, key.secret)
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def replicas(site: Site) -> AsyncIterator[None]:
    """Every model of the profile with tiny weights, and the deliverer of callbacks, in this process."""
    settings, stop = site.settings, asyncio.Event()
    media = [Replica(settings, "sdxl", Metrics()), Replica(settings, "wan", Metrics())]
    enhancer = Enhancer(settings, Metrics())
    deliverer = Deliverer(
        Callbacks(site.database.worker_pool),
        Egress(settings.egress_policy()),
        CallbackSecrets(settings.secret("callback_secret")),
    )
    delivering = asyncio.create_task(deliverer.run(stop))
    started: list[Replica | Enhancer] = []
    try:
        for replica in (*media, enhancer):
            await replica.start()
            started.append(replica)
        yield
    finally:
        stop.set()
        await delivering
        for replica in started:
            await replica.stop(5)
