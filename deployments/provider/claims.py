"""Jobs at an outside provider: claimed like any other, made elsewhere, stored and finished here.

Every job that a provider runs has one replica that holds it under its attempt, so that cancels, deadlines, drains and
crashes have their usual ways. What comes in from the provider only wakes it, and it then asks the provider itself.
"""

import asyncio
import base64
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import structlog

from db.blobs import BlobNotFound, BlobStore, UrlSigner
from db.jobs import Jobs, Status
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import WORKER_ROLE, open_pool
from db.providers import PROVIDER_QUEUE, ApiModel, Prediction, Providers
from db.queue import NewAsset, Queue, Requeue, Settlement
from db.workers import Workers
from deployments.claims import ClaimLoop
from deployments.egress import Egress
from deployments.endings import Endings, Outcome
from deployments.held import Held, StopReason
from deployments.metrics import Metrics
from deployments.provider.api import (
    OutputGone,
    OutputRefused,
    OutputUnreadable,
    ProviderApi,
    ProviderBusy,
    ProviderFailed,
    ProviderMisconfigured,
    ProviderRefused,
    Remote,
)
from deployments.provider.inputs import build, facts, key_of
from deployments.provider.outputs import MAX_OUTPUTS, encode, fetch
from deployments.provider.run import Pace, ProviderRun
from deployments.provider.strays import Strays
from deployments.settings import Settings
from deployments.storing import Finishing, Storing
from models.engine import Cancelled, GenerationError
from models.guiding.reference import StoredImage
from models.moderation import ContentRefused
from models.params import GenerationParams

log = structlog.get_logger()

STRAY_SECONDS = 30.0
MAX_DATA_URL_BYTES = 256_000  # what Replicate takes for a file within a request; larger ones need a URL
FILE_URL_SECONDS = 3600


class ProviderClaims:
    """Claims from the queue of the providers. No model is loaded, and no GPU needed."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        egress: Egress | None = None,
        pace: Pace | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.settings, self.metrics, self._pace = settings, metrics, pace or Pace()
        self._egress, self._environment = egress or Egress(settings.egress_policy()), environment
        self.worker: UUID = uuid4()
        self._news: dict[UUID, asyncio.Event] = {}
        self._loop: ClaimLoop | None = None

    async def start(self) -> None:
        """Connect, then claim. Raises `DatabaseUnavailable`, `SettingsError`."""
        settings = self.settings
        url = await asyncio.to_thread(settings.postgres)
        self._finishing = await asyncio.to_thread(Finishing.of, settings)
        self._pool = await open_pool(url, role=WORKER_ROLE, max_size=6, name="ourvidz provider")
        self._workers, self._notifier, self._providers = (
            Workers(self._pool),
            Notifier(self._pool),
            Providers(self._pool),
        )
        self.strays = Strays(self._providers, self._egress, self._pace, self._environment)
        self._queue = Queue(self._pool)
        self._endings = Endings(
            self._queue, Jobs(self._pool), self.worker, settings.lease_seconds, settings.store_outage_seconds
        )
        self._signer = UrlSigner(settings.secret("signing_secret"), settings.public_url)
        blobs = BlobStore.from_url(settings.blobs())
        self._storing = Storing(blobs, self._signer, settings.callback_url_seconds, settings.store_patience_seconds)
        self._loop = ClaimLoop(
            self._queue,
            PROVIDER_QUEUE,
            self.worker,
            self._work,
            slots=settings.provider_slots,
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.renew_seconds,
            poll_seconds=settings.poll_seconds,
            on_news=self._notifier.job,
            on_lost=lambda: self.metrics.lease_lost(PROVIDER_QUEUE),
            may_claim=lambda: not self._storing.away,
            shared=False,  # nothing there would let one go before another
        )
        await self._workers.enter(self.worker, PROVIDER_QUEUE, "ready", slots=settings.provider_slots)
        self._listener = Listener(url, QUEUE_CHANNEL, self._heard, role=WORKER_ROLE)
        self._listener.start()
        self._loop.start()
        self._life = [asyncio.create_task(self._sign_of_life()), asyncio.create_task(self._look_after_strays())]

    def health(self) -> str | None:
        """What is wrong beyond repair, or None."""
        return self._loop.fault if self._loop else "not started"

    async def stop(self, seconds: float) -> None:
        """Drain. What is still being made goes on at the provider, and another replica goes on with it here."""
        if self._loop is None:
            return
        await self._workers.enter(self.worker, PROVIDER_QUEUE, "draining")
        await self._loop.drain(seconds)
        for task in self._life:
            task.cancel()
        await asyncio.gather(*self._life, return_exceptions=True)
        await self._listener.close()
        await self._notifier.close()
        await self._workers.enter(self.worker, PROVIDER_QUEUE, "stopped")
        await self._pool.close()

    def _heard(self, payload: str) -> None:
        if payload in ("", PROVIDER_QUEUE) and self._loop is not None:
            self._loop.wake()
        queue, _, job_id = payload.partition("/")
        for held_id, news in self._news.items():
            if payload == "" or (queue == PROVIDER_QUEUE and job_id == str(held_id)):
                news.set()

    async def _sign_of_life(self) -> None:
        while True:
            await asyncio.sleep(self.settings.renew_seconds)
            try:
                await self._workers.seen(self.worker, self._loop.running if self._loop else 0)
                if self._storing.away and self._loop is not None and await self._storing.is_back(str(self.worker)):
                    self._loop.wake()
            except Exception as error:  # a replica that stopped looking would never claim again
                log.warning("sign_of_life_failed", error=type(error).__name__)

    async def _look_after_strays(self) -> None:
        while True:
            try:
                await self.strays.end()
            except Exception as error:
                log.warning("strays_failed", error=type(error).__name__)
            await asyncio.sleep(STRAY_SECONDS)

    async def _work(self, held: Held) -> None:
        """One job, from claim to end."""
        claim, outcome = held.claim, Outcome.UNKNOWN
        started = asyncio.get_running_loop().time()
        self._news[claim.job_id] = asyncio.Event()
        try:
            outcome = await self._make(held)
        except ProviderBusy as error:
            outcome = await self._later(held, error)
        except GenerationError as error:
            outcome = await self._endings.failed(held, error)
            self.metrics.job_failed(PROVIDER_QUEUE, error.code, outcome)
        finally:
            self._news.pop(claim.job_id, None)
            if outcome not in (Outcome.COMPLETED, Outcome.UNKNOWN):
                await self._storing.discard(claim)
            self._notifier.job(claim.job_id)
            self._notifier.queue("callbacks")
            seconds = asyncio.get_running_loop().time() - started
            self.metrics.job_ended(PROVIDER_QUEUE, claim.job, outcome, seconds)
            log.info("job_ended", job_id=str(claim.job_id), attempt=claim.attempt, outcome=outcome)

    async def _later(self, held: Held, error: ProviderBusy) -> Outcome:
        """A provider that has too much to do is asked again when it says, and no failure is counted for it."""
        if held.stop_reason is not None:
            return await self._endings.failed(held, error)
        back = Requeue(
            job_id=held.claim.job_id,
            attempt=held.claim.attempt,
            error_code=error.code,
            error_message=error.message,
            delay_seconds=error.retry_after_seconds,
        )
        return await self._endings.requeue(held, back)

    async def _make(self, held: Held) -> Outcome:
        claim = held.claim
        model = await self._providers.model_of(claim.job_id)
        if model is None:
            raise ProviderMisconfigured("the provider's model that the job was accepted for is gone")
        if claim.job["content_mode"] == "nsfw" and not model.provider.nsfw_allowed:
            raise ProviderRefused("nsfw jobs may not go to this provider")
        params = GenerationParams.model_validate(claim.job["params"])
        prompt = claim.job["enhanced_prompt"] or params.prompt
        api = ProviderApi(model.provider, self._egress, self._environment)
        run = ProviderRun(
            held,
            self.worker,
            model,
            api,
            self._providers,
            news=self._news[claim.job_id],
            webhook=self.settings.provider_webhook(),
            limit_seconds=self.settings.provider_seconds,
            pace=self._pace,
        )

        async def make_input() -> Mapping[str, Any]:
            return build(model, params, prompt, await self._files(held, params))

        prediction, remote = await run.outcome(make_input)
        run.given = run.given or build(model, params, prompt, {})
        settings = settings_of(model, params, remote, run.given)
        try:
            assets = await self._stored(held, model, params, remote, settings)
        except (OutputGone, OutputRefused, OutputUnreadable, ProviderFailed, ContentRefused) as error:
            await run.end(prediction, remote.status, remote, error)  # a retry has to ask anew
            raise
        if not await self._finish(held, settings, assets, prediction):
            return Outcome.LOST
        await run.end(prediction, remote.status, remote)
        return Outcome.COMPLETED

    async def _stored(
        self, held: Held, model: ApiModel, params: GenerationParams, remote: Remote, settings: dict[str, Any]
    ) -> list[NewAsset]:
        if not remote.output or len(remote.output) > MAX_OUTPUTS:
            raise ProviderFailed(f"the prediction succeeded with {len(remote.output)} outputs")
        held.report("store")
        limit, pixels = self.settings.max_output_bytes, self.settings.max_reference_pixels
        output = "video" if model.modality == "video" else "image"
        # only of a lone output is it certain what its seed was
        seed = settings["seed"] if len(remote.output) == 1 else None
        files = []
        for number, url in enumerate(remote.output):
            _raise_if_stopped(held)
            data = await fetch(self._egress, model.provider, url, output, limit)
            files.append(await asyncio.to_thread(encode, data, output, seed, model.model_key, self._finishing, pixels))
            held.report("store", number + 1, len(remote.output))
        log.info("outputs_fetched", job_id=str(held.claim.job_id), outputs=len(files))
        return await self._storing.put(held.claim, files, settings, model.model_key, lambda: _raise_if_stopped(held))

    async def _files(self, held: Held, params: GenerationParams) -> dict[str, str]:
        """The reference and its mask as URLs that the provider can read."""
        if params.reference is None:
            return {}
        files = {"image": await self._url_of(held, params.reference)}
        if params.reference.mask is not None:
            files["mask"] = await self._url_of(held, params.reference.mask)
        return files

    async def _url_of(self, held: Held, image: StoredImage) -> str:
        if self.settings.public_url.startswith("https://"):
            return self._signer.sign(image.bucket, image.key, FILE_URL_SECONDS)
        try:
            data = await self._storing.read(image.bucket, image.key, lambda: _raise_if_stopped(held))
        except BlobNotFound as error:
            raise ProviderRefused("the stored reference image, or its mask, is gone") from error
        if len(data) > MAX_DATA_URL_BYTES:
            message = f"a provider that can't reach this installation takes references of {MAX_DATA_URL_BYTES} bytes"
            raise ProviderRefused(message)
        ending = image.key.rpartition(".")[2]
        return f"data:image/{ending};base64,{base64.b64encode(data).decode()}"

    async def _finish(
        self, held: Held, settings: dict[str, Any], assets: list[NewAsset], prediction: Prediction
    ) -> bool:
        taken = datetime.now(UTC) - prediction.requested_at
        taken_ms = max(round(taken.total_seconds() * 1000), 0)
        end = Settlement(
            job_id=held.claim.job_id,
            attempt=held.claim.attempt,
            status=Status.COMPLETED,
            settings=settings,
            generation_time_ms=taken_ms,
            worker=self.worker,
            assets=assets,
            callback_assets=self._storing.references(assets),
            facts={
                "seed": assets[0].seed,
                "generation_time": taken_ms / 1000,
                "num_images": sum(asset.asset_type == "image" for asset in assets),
                "provider": settings["provider"],
            },
        )
        return await self._endings.settle(held, end)


def settings_of(model: ApiModel, params: GenerationParams, remote: Remote, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was really used, and where. None stands for what the provider chose."""
    said = {name: key_of(model, name) in given for name in ("seed", "steps", "guidance_scale")}
    return {
        "ran_at": "provider",
        "provider": model.provider.name,
        "provider_model": model.model_key,
        "provider_version": remote.version or model.version,
        "prediction_id": remote.id,
        "predict_seconds": remote.predict_seconds,
        "input": facts(model, given),
        "images_asked": params.num_images,
        "outputs": len(remote.output),
        **{name: getattr(params, name) if sent else None for name, sent in said.items()},
    }


def _raise_if_stopped(held: Held) -> None:
    if held.stop_reason is not None and held.stop_reason is not StopReason.DRAIN:
        raise Cancelled(f"stopped: {held.stop_reason}")
