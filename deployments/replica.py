"""A media replica: claim, run, store, finish. The steps of one job read in order in `_work`."""

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import structlog

from db.blobs import BlobNotFound, BlobStore, StorageUnavailable, UrlSigner
from db.costs import CostProfiles
from db.jobs import Jobs, Status
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import WORKER_ROLE, open_pool
from db.queue import Claim, Fit, NewAsset, Queue, Settlement
from db.workers import Workers
from deployments.claims import ClaimLoop
from deployments.endings import Endings, Outcome
from deployments.gauges import EngineGauges
from deployments.held import Held, StopReason
from deployments.hosting import Host
from deployments.loras import learn
from deployments.metrics import Metrics
from deployments.previews import Previews, cleaned
from deployments.prompting import prompt_account
from deployments.settings import Settings, SettingsError
from deployments.states import RunStates
from deployments.storing import Finishing, StorageFailed, Storing
from models.catalog import Family
from models.engine import (
    Cancelled,
    Engine,
    Generation,
    GenerationError,
    GenerationFailed,
    GenerationRequest,
    Ticket,
)
from models.guiding.reference import StoredImage
from models.origin.fingerprint import Fingerprint, Hashes, fingerprint
from models.origin.manifest import Origin
from models.params import GenerationParams
from models.profile import ModelSpec

log = structlog.get_logger()

WATCH_SECONDS = 0.1
FINGERPRINT_SECONDS = 120.0  # that finished work waits for the hashes of the weights, well within the phase's allowance
CLEAN_SECONDS = 2.0  # for previews that are being deleted; the sweep finds what is left


class Replica:
    """One model and its claim loop, on the engine of its host. No Ray in it: the Serve deployment around it is in
    `deployments.serving`."""

    def __init__(self, settings: Settings, family: str, metrics: Metrics, host: Host | None = None) -> None:
        """Without a `host` the replica is alone on an engine of its own."""
        self.host, self._alone = host or Host(settings, [family]), host is None
        self.settings, self.family, self.metrics = settings, family, metrics
        self.worker: UUID = uuid4()
        self.spec: ModelSpec = settings.loaded_profile.models[Family(family)]
        self.engine: Engine | None = None
        self._loop: ClaimLoop | None = None

    async def start(self) -> None:
        """Load and warm the model, then claim. Raises `ModelLoadFailed`, `DatabaseUnavailable`, `SettingsError`."""
        settings = self.settings
        url = await asyncio.to_thread(settings.postgres)
        self._pool = await open_pool(url, role=WORKER_ROLE, max_size=6, name=f"ourvidz {self.family}")
        self._workers = Workers(self._pool)
        self._notifier = Notifier(self._pool)
        queue = Queue(self._pool)
        self._endings = Endings(
            queue, Jobs(self._pool), self.worker, settings.lease_seconds, settings.store_outage_seconds
        )
        self._blobs = BlobStore.from_url(settings.blobs())
        signer = UrlSigner(settings.secret("signing_secret"), settings.public_url)
        self._storing = Storing(self._blobs, signer, settings.callback_url_seconds, settings.store_patience_seconds)
        await self._load()
        self._loop = ClaimLoop(
            queue,
            self.family,
            self.worker,
            self._work,
            slots=self.spec.slots,
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.renew_seconds,
            poll_seconds=settings.poll_seconds,
            on_news=self._notifier.job,
            on_lost=lambda: self.metrics.lease_lost(self.family),
            # what could not be stored had better not be made
            fit=self._fit,
            may_claim=lambda: self.engine is not None and self.engine.alive and not self._storing.away,
        )
        self._listener = Listener(url, QUEUE_CHANNEL, self._heard, role=WORKER_ROLE)
        self._listener.start()
        self._loop.start()
        self._life: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._sign_of_life()),
            asyncio.create_task(self._await_store()),
            self._fingerprint,
        ]

    async def _load(self) -> None:
        started = time.monotonic()
        await self._workers.enter(self.worker, self.family, "loading", model_name=self.spec.model_name)
        try:
            self._finishing = await asyncio.to_thread(Finishing.of, self.settings)
        except SettingsError as error:
            await self._workers.enter(self.worker, self.family, "failed", error=f"{error.code}: {error}")
            raise
        try:
            self.engine = await self.host.engine()
        except GenerationError as error:
            await self._workers.enter(self.worker, self.family, "failed", error=f"{error.code}: {error.message}")
            raise
        seconds = time.monotonic() - started
        self.metrics.model_loaded(self.family, seconds)
        model = self.model = self.engine.models[self.spec.model_name]
        weights = self.host.weights[self.spec.model_name]
        costs = self.engine.costs[self.spec.model_name]
        self._gauges = EngineGauges(self.family, costs, model, self.metrics)
        await CostProfiles(self._pool).publish(self.family, self.spec.model_name, costs.document())
        # beside the first jobs: gigabytes are read, once for each file
        hashes = Hashes(self.settings.state_dir / "fingerprints.json")
        self._fingerprint = asyncio.create_task(asyncio.to_thread(fingerprint, self.spec, weights, hashes))
        await self._workers.enter(
            self.worker,
            self.family,
            "ready",
            model_name=model.model_name,
            device=model.device,
            load_ms=round(seconds * 1000),
        )

    def _fit(self) -> Fit | None:
        """What shares the forwards of the jobs that run now, has room beside them, and loads no LoRA for it."""
        if self.engine is None:
            return None
        shapes = {shape.name: rows for shape, rows in self.engine.shapes(self.spec.model_name).items()}
        adapters = getattr(self.model, "adapters", None)
        return Fit(shapes, adapters.names_loaded if adapters is not None else ())

    def health(self) -> str | None:
        """What is wrong with this replica beyond repair, or None. Serve replaces an unhealthy one."""
        if self.engine is None or not self.engine.alive:
            return (self.engine.broken if self.engine else None) or "the engine has ended"
        return self._loop.fault if self._loop else "not started"

    async def stop(self, seconds: float) -> None:
        """Drain: no more claims; running jobs get so many seconds; the rest goes back to the queue at once."""
        if self._loop is None:
            return
        await self._workers.enter(self.worker, self.family, "draining")
        await self._loop.drain(seconds)
        for task in self._life:
            task.cancel()
        await asyncio.wait([asyncio.create_task(cleaned())], timeout=CLEAN_SECONDS)
        await self._listener.close()
        await self._notifier.close()
        if self._alone:
            await self.host.close()
        await self._workers.enter(self.worker, self.family, "stopped")
        await self._pool.close()

    def _heard(self, payload: str) -> None:
        if payload in ("", self.family) and self._loop is not None:
            self._loop.wake()

    async def _sign_of_life(self) -> None:
        while True:
            await asyncio.sleep(self.settings.renew_seconds)
            try:
                self._gauges.report()
                await self._workers.seen(self.worker, self._loop.running if self._loop else 0)
            except Exception as error:
                log.warning("sign_of_life_failed", error=type(error).__name__)

    async def _await_store(self) -> None:
        while True:
            await asyncio.sleep(self.settings.renew_seconds)
            try:
                if self._storing.away and self._loop is not None and await self._storing.is_back(str(self.worker)):
                    self._loop.wake()
            except Exception as error:  # a replica that stopped looking would never claim again
                log.warning("store_probe_failed", error=type(error).__name__)

    async def _work(self, held: Held) -> None:
        """One job, from claim to end."""
        # `UNKNOWN` stays when the end could not be written and may or may not have been: then the files are not ours
        # to delete, since a committed row may speak of them
        claim, outcome, failed = held.claim, Outcome.UNKNOWN, False
        started = time.monotonic()
        count = partial(self.metrics.previewed, self.family)
        previews = Previews(held, self.settings.preview_seconds, self._blobs, count)
        states = RunStates(held, self.spec.state_steps, self._blobs)
        try:
            generation, assets = await self._make(held, previews, states)
            outcome = Outcome.COMPLETED if await self._finish(held, generation, assets) else Outcome.LOST
        except GenerationError as error:
            failed = isinstance(error, GenerationFailed)
            outcome = await self._endings.failed(held, error)
            self.metrics.job_failed(self.family, error.code, outcome)
        finally:
            previews.end()
            over = outcome in (Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED)
            await states.end(job_is_over=over or (states.resumed and failed))
            if outcome not in (Outcome.COMPLETED, Outcome.UNKNOWN):
                await self._storing.discard(claim)
            self._notifier.job(claim.job_id)
            self._notifier.queue("callbacks")
            self.metrics.job_ended(self.family, claim.job, outcome, time.monotonic() - started)
            log.info("job_ended", job_id=str(claim.job_id), attempt=claim.attempt, outcome=outcome)

    async def _make(self, held: Held, previews: Previews, states: RunStates) -> tuple[Generation, list[NewAsset]]:
        assert self.engine is not None
        try:
            resume = await states.resume()
        except StorageUnavailable as error:
            raise StorageFailed("the object store is not available") from error
        request = replace(await self._request(held), snapshots=previews.snapshots, states=states.states, resume=resume)
        ticket = self.engine.submit(request)
        held.on_stop = ticket.cancel
        if held.stop_reason is not None:
            ticket.cancel()
        try:
            generation = await self._watched(held, ticket, previews, states)
        finally:
            held.leave_slot()
        held.report("encode_media")
        model_name = self.model.model_name
        origin = await self._origin(held.claim, request)
        files = await asyncio.to_thread(self._finishing.files, generation, origin)
        held.report("store")
        return generation, await self._storing.put(
            held.claim, files, generation.settings, model_name, lambda: _raise_if_stopped(held)
        )

    async def _origin(self, claim: Claim, request: GenerationRequest) -> Origin:
        assert self.engine is not None
        try:
            weights = await asyncio.wait_for(asyncio.shield(self._fingerprint), FINGERPRINT_SECONDS)
        except TimeoutError:
            weights = Fingerprint(self.spec.revision, error="the weights were still being hashed")
        return Origin(
            job_id=str(claim.job_id),
            attempt=claim.attempt,
            params=request.params,
            original_prompt=claim.job["original_prompt"],
            enhanced_prompt=claim.job["enhanced_prompt"],
            model_name=self.model.model_name,
            device=self.model.device,
            fingerprint=weights,
            files=request.files,
        )

    async def _request(self, held: Held) -> GenerationRequest:
        claim = held.claim
        params = GenerationParams.model_validate(claim.job["params"])
        enhanced = claim.job["enhanced_prompt"]
        if enhanced:
            params = params.model_copy(update={"prompt": enhanced})
        await learn(self._pool, self.model, self.family, params.loras)
        reference = params.reference
        return GenerationRequest(
            str(claim.job_id),
            params,
            await self._stored(held, reference),
            claim.batch_size,
            priority=0 if claim.klass > 0 else 1,
            deadline=None if claim.deadline_seconds is None else time.monotonic() + claim.deadline_seconds,
            model=self.spec.model_name,
            mask=await self._stored(held, reference.mask if reference else None),
            guides={
                one.kind: data
                for one in params.references
                if one.kind != "image" and (data := await self._stored(held, one)) is not None
            },
        )

    async def _stored(self, held: Held, image: StoredImage | None) -> bytes | None:
        if image is None:
            return None
        try:
            return await self._storing.read(image.bucket, image.key, lambda: _raise_if_stopped(held))
        except BlobNotFound as error:
            raise ReferenceGone("a stored reference image, or its mask, is gone") from error

    async def _watched(self, held: Held, ticket: Ticket, previews: Previews, states: RunStates) -> Generation:
        result, denoised = asyncio.create_task(ticket.result()), asyncio.create_task(ticket.denoised())
        while not result.done():
            waits: set[asyncio.Task[Any]] = {result, denoised} if held.in_slot else {result}
            await asyncio.wait(waits, timeout=WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            progress = ticket.progress
            denoising = progress.phase == "denoise"
            held.report(
                progress.phase,
                progress.step if denoising else None,
                progress.of if denoising else None,
                progress.activity,
            )
            previews.look()
            states.look()
            if progress.denoised:
                held.leave_slot()
        return result.result()

    async def _finish(self, held: Held, generation: Generation, assets: list[NewAsset]) -> bool:
        total_ms = round(generation.timings_ms["total"])
        settings = generation.settings | {"timings_ms": {k: round(v, 1) for k, v in generation.timings_ms.items()}}
        settings |= prompt_account(held.claim.job["enhancement"] or {}, settings)
        end = Settlement(
            job_id=held.claim.job_id,
            attempt=held.claim.attempt,
            status=Status.COMPLETED,
            settings=settings,
            generation_time_ms=total_ms,
            compute_seconds=_compute_seconds(generation),
            worker=self.worker,
            assets=assets,
            callback_assets=self._storing.references(assets),
            facts={
                "seed": generation.seeds[0],
                "generation_time": total_ms / 1000,
                "num_images": len(assets) if generation.images is not None else 0,
                "fallback_used": bool(settings.get("fallback_used") or settings["enhancement_fallbacks"]),
                **{name: settings.get(name) for name in ("enhancement_strategy", "compel_success")},
            },
        )
        return await self._endings.settle(held, end)


def _compute_seconds(generation: Generation) -> float:
    """The replica's time that the job had: its share of the forwards, and what was done for it alone."""
    timings = generation.timings_ms
    return timings.get("compute", timings["total"]) / 1000


class ReferenceGone(GenerationError):
    """A reference image of the job, or its mask, is no longer stored."""

    code = "reference_gone"
    retryable = False


def _raise_if_stopped(held: Held) -> None:
    if held.stop_reason is not None and held.stop_reason is not StopReason.DRAIN:
        raise Cancelled(f"stopped: {held.stop_reason}")
