"""The Serve deployments: thin shells that start, watch and stop the classes which do the work.

Each reads its secrets from its own environment. `shared` is what the application's builder knows (profile, folders,
time limits), so that all deployments of one application agree.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import structlog

from db.blobs import BlobStore
from db.callbacks import Callbacks
from db.destinations import Destinations
from db.erasures import Erasures
from db.library import LibraryRows
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import WORKER_ROLE, open_pool
from db.queue import Queue
from db.retention import Retention
from deployments.callbacks import Deliverer
from deployments.egress import Egress
from deployments.enhancer import Enhancer, EnhanceRequest
from deployments.erasure import Erasure
from deployments.expiry import Expiry
from deployments.hosting import Host
from deployments.logs import configure_logs
from deployments.metrics import Metrics
from deployments.placing import Placing
from deployments.provider.claims import ProviderClaims
from deployments.replica import Replica
from deployments.settings import Settings
from deployments.signatures import CallbackSecrets
from deployments.sweep import Sweep
from deployments.upkeep import Upkeep
from models.catalog import Family
from models.params import ContentMode
from models.writing.language import Message, Sampling

log = structlog.get_logger()

# Serve waits this much longer than our own drain before it kills a replica.
STOP_MARGIN_SECONDS = 20.0


class Unhealthy(RuntimeError):
    """A replica that only a new process can mend. Serve replaces it."""


class MediaReplica:
    """A model family's replica, with the models that it is the host of. It takes its work from Postgres, not from
    calls."""

    async def __init__(self, shared: dict[str, Any], family: str) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logs()
        settings, metrics = Settings.in_deployment(shared), Metrics()
        families = settings.loaded_profile.hosted(Family(family))
        host = Host(settings, families)
        self._replicas = [Replica(settings, hosted, metrics, host) for hosted in families]
        self._host, self._drain_seconds = host, settings.drain_seconds
        for replica in self._replicas:
            await replica.start()

    def check_health(self) -> None:
        """Serve's health check."""
        faults = [fault for replica in self._replicas if (fault := replica.health()) is not None]
        if faults:
            raise Unhealthy(faults[0])

    async def __del__(self) -> None:
        await asyncio.gather(*(replica.stop(self._drain_seconds) for replica in self._replicas))
        await self._host.close()


class EnhancerReplica:
    """The language model's replica: queued jobs, and single prompts by handle."""

    async def __init__(self, shared: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logs()
        self._enhancer = Enhancer(Settings.in_deployment(shared), Metrics())
        await self._enhancer.start()

    async def enhance(self, request: EnhanceRequest) -> Any:
        """One prompt, enhanced now. Raises `ContentRejected`."""
        return await self._enhancer.enhance(request)

    async def chat(
        self, messages: Sequence[Message], sampling: Sampling, content_mode: ContentMode = "sfw"
    ) -> AsyncIterator[Any]:
        """An answer in pieces, and at last its `Completion`. See `Enhancer.chat`."""
        async for part in self._enhancer.chat(messages, sampling, content_mode):
            yield part

    def check_health(self) -> None:
        """Serve's health check."""
        fault = self._enhancer.health()
        if fault is not None:
            raise Unhealthy(fault)

    async def __del__(self) -> None:
        await self._enhancer.stop(self._enhancer.settings.drain_seconds)


class ProviderReplica:
    """Looks after the jobs that outside providers make. It takes its work from Postgres, and loads no model."""

    async def __init__(self, shared: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logs()
        self._claims = ProviderClaims(Settings.in_deployment(shared), Metrics())
        await self._claims.start()

    def check_health(self) -> None:
        """Serve's health check."""
        fault = self._claims.health()
        if fault is not None:
            raise Unhealthy(fault)

    async def __del__(self) -> None:
        await self._claims.stop(0)


class _Duty:
    """A loop in the background with its own connections."""

    async def _open(self, shared: dict[str, Any], name: str) -> None:
        configure_logs()
        self.settings = Settings.in_deployment(shared)
        self.url = await asyncio.to_thread(self.settings.postgres)
        self.pool = await open_pool(self.url, role=WORKER_ROLE, max_size=8, name=name)
        self.stopping = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def check_health(self) -> None:
        """Serve's health check: the loop must live."""
        if self.task is None or self.task.done():
            raise Unhealthy("the loop has ended")

    async def _close(self) -> None:
        self.stopping.set()
        if self.task is not None:
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(self.task, STOP_MARGIN_SECONDS)
        await self.pool.close()


class CallbackDeliverer(_Duty):
    """Sends what the outbox holds."""

    async def __init__(self, shared: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._open(shared, "ourvidz callbacks")
        settings = self.settings
        self._deliverer = Deliverer(
            Callbacks(self.pool),
            Egress(settings.egress_policy()),
            CallbackSecrets(settings.secret("callback_secret")),
            concurrency=settings.callback_concurrency,
            schedule=settings.callback_schedule,
            observe=Metrics().callback_sent,
        )
        self._listener = Listener(self.url, QUEUE_CHANNEL, self._heard, role=WORKER_ROLE)
        self._listener.start()
        self.task = asyncio.create_task(self._deliverer.run(self.stopping))

    def _heard(self, payload: str) -> None:
        if payload in ("", "callbacks"):
            self._deliverer.wake()

    async def __del__(self) -> None:
        await self._listener.close()
        await self._close()


class UpkeepDuty(_Duty):
    """Looks after leases, deadlines, delays, retention, expiry, orphaned files, results to place, and
    erasures that others left."""

    async def __init__(self, shared: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._open(shared, "ourvidz upkeep")
        self._notifier = Notifier(self.pool)
        settings = self.settings

        async def revive() -> None:
            await asyncio.to_thread(settings.postgres)

        own = revive if settings.embedded_postgres is not None else None
        retention = Retention(self.pool, settings.retention_policy())
        upkeep = Upkeep(Queue(self.pool), self._notifier, retention, own)
        self.task = asyncio.create_task(upkeep.run(self.settings.upkeep_seconds, self.stopping))
        blobs = BlobStore.from_url(self.settings.blobs())
        sweep = Sweep(blobs, Queue(self.pool), self.settings.orphan_grace_seconds)
        erasure = Erasure(Erasures(self.pool), blobs)
        expiry = Expiry(LibraryRows(self.pool), blobs, self.settings.orphan_grace_seconds)
        self._sweeping = asyncio.create_task(self._sweep(sweep, erasure, expiry))
        placing = Placing(Destinations(self.pool), blobs)
        self._placing = asyncio.create_task(placing.run(self.settings.upkeep_seconds, self.stopping))

    async def _sweep(self, sweep: Sweep, erasure: Erasure, expiry: Expiry) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_seconds)
            for duty in (erasure.resume, expiry.expire, sweep.once, expiry.sweep):
                try:
                    await duty()
                except Exception as error:  # the next round tries again; jobs don't wait for these duties
                    log.warning("sweep_failed", duty=duty.__qualname__, error=type(error).__name__)

    async def __del__(self) -> None:
        self._sweeping.cancel()
        self._placing.cancel()
        await self._notifier.close()
        await self._close()
