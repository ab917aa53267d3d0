"""One job's prediction at a provider: asked for once, followed to its end, found again after a crash, and stopped.

What is asked is written down first (`db.providers`), so an attempt that finds a prediction without an end goes on with
it. The one gap is between the asking and the hearing of the provider's name for it: a row without a name. Then the
provider's list says what it took; only what is not on it is asked for again, and where the list can't tell, the job
fails with `provider_uncertain` rather than be paid for twice.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import structlog

from db.providers import ApiModel, Prediction, Providers, Usage
from deployments.held import Held, StopReason
from deployments.provider.api import (
    VERSION,
    ProviderApi,
    ProviderBusy,
    ProviderError,
    ProviderFailed,
    ProviderMisconfigured,
    ProviderRefused,
    ProviderTimeout,
    ProviderUnavailable,
    ProviderUncertain,
    Remote,
)
from deployments.provider.inputs import facts, input_hash
from models.engine import Cancelled, GenerationError

log = structlog.get_logger()


@dataclass(frozen=True)
class Pace:
    """Seconds: between two looks at a prediction; that a provider may be out of reach before the attempt ends; after a
    request, until it is sure to be on the provider's list if it was taken; by which clocks may differ."""

    poll: float = 2.0
    patience: float = 120.0
    settling: float = 45.0
    skew: float = 120.0


class ProviderRun:
    """One attempt's work on a prediction. `news` is set when there may be something new to see."""

    def __init__(
        self,
        held: Held,
        worker: UUID,
        model: ApiModel,
        api: ProviderApi,
        providers: Providers,
        *,
        news: asyncio.Event,
        webhook: str | None = None,
        limit_seconds: float = 1800.0,
        pace: Pace | None = None,
    ) -> None:
        self._held, self._worker, self.model, self._api, self._providers = held, worker, model, api, providers
        self._news, self._webhook, self._limit, self._pace = news, webhook, limit_seconds, pace or Pace()
        self._stopped = asyncio.Event()
        self._looks = 0
        self.given: Mapping[str, Any] = {}
        held.on_stop = self._stop
        if held.stop_reason is not None:
            self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        self._news.set()

    async def outcome(self, make_input: Callable[[], Awaitable[Mapping[str, Any]]]) -> tuple[Prediction, Remote]:
        """The prediction, succeeded. `make_input` is called where it must be asked for. Raises `ProviderError`;
        `Cancelled` when the job is to stop, and then it is stopped at the provider as well, unless another attempt will
        go on with it."""
        prediction = await self._providers.open_prediction(self._held.claim.job_id)
        remote = None
        if prediction is not None and prediction.prediction_id is None:
            remote = await self._recover(prediction)
            prediction = None if remote is None else replace(prediction, prediction_id=remote.id)
        if prediction is None:
            self._raise_if_stopped()
            self.given = await make_input()
            prediction, remote = await self._create()
        elif remote is None:
            log.info("prediction_resumed", job_id=str(prediction.job_id), attempt=self._held.claim.attempt)
        return prediction, await self._followed(prediction, remote)

    async def _create(self) -> tuple[Prediction, Remote]:
        model, claim = self.model, self._held.claim
        version = model.version or ""
        if not VERSION.fullmatch(version):
            raise ProviderMisconfigured("the provider's model has no version of 32 to 64 hexadecimal digits")
        if not (model.is_active and model.provider.is_active):
            raise ProviderRefused("the provider, or its model, has been turned off")
        prediction = await self._providers.ask(
            claim.job_id, claim.attempt, self._worker, model, version, input_hash(model, self.given)
        )
        if prediction is None:
            raise Cancelled("stopped: the job is not ours any more")
        limit = min(self._limit, claim.deadline_seconds or self._limit)
        try:
            # not interrupted: whoever stops it now could not say what has been taken
            remote = await self._api.create(version, self.given, self._webhook, limit)
        except (ProviderBusy, ProviderRefused, ProviderMisconfigured) as error:  # the answer was no
            await self.end(prediction, "refused", error=error)
            raise
        name = await self._providers.name(prediction, remote.id, remote.status)
        if name != remote.id:  # another attempt has found, or asked for, one of its own
            log.warning("prediction_not_ours", job_id=str(claim.job_id), attempt=claim.attempt)
            await self._api.cancel(remote.id)
            raise Cancelled("stopped: the job is not ours any more")
        log.info("prediction_created", job_id=str(claim.job_id), attempt=claim.attempt, prediction_id=remote.id)
        return replace(prediction, prediction_id=remote.id), remote

    async def _recover(self, prediction: Prediction) -> Remote | None:
        """What the provider took of a request whose answer nobody heard. None, and the row has ended: it took none."""
        remote = await self._find(prediction)
        age = (datetime.now(UTC) - prediction.requested_at).total_seconds()
        if remote is None and age < self._pace.settling:
            await self._pause(self._pace.settling - age, whole=True)
            remote = await self._find(prediction)
        if remote is None:
            await self.end(prediction, "gone", error=ProviderUnavailable("the provider has not taken the request"))
        return remote

    async def _find(self, prediction: Prediction) -> Remote | None:
        try:
            remote = await find(self._api, self._providers, self.model, prediction, self._pace)
        except ProviderUncertain as error:
            await self.end(prediction, "gone", error=error)
            raise
        if remote is not None:
            log.info("prediction_found", job_id=str(prediction.job_id), prediction_id=remote.id)
        return remote

    async def _followed(self, prediction: Prediction, remote: Remote | None) -> Remote:
        held, pace = self._held, self._pace
        taken = (datetime.now(UTC) - prediction.requested_at).total_seconds()
        until = time.monotonic() + max(self._limit - max(taken, 0), 0)
        heard, status, wait = time.monotonic(), prediction.status, 0.0 if remote is None else pace.poll
        while remote is None or not remote.ended:
            if remote is not None and remote.status != status:
                status = remote.status
                await self._providers.note(prediction, status)
            await self._pause(wait)
            if self._stopped.is_set():
                await self._stopped_with(prediction)
            if time.monotonic() > until:
                await self._cancel(prediction)
                raise ProviderTimeout(f"the provider did not make it within {self._limit:g} s")
            try:
                remote, wait, heard = await self._look(prediction), pace.poll, time.monotonic()
            except ProviderUnavailable as error:
                if time.monotonic() - heard > pace.patience:
                    raise
                wait = (
                    error.retry_after_seconds
                    if isinstance(error, ProviderBusy)
                    else min(max(wait, pace.poll) * 2, 30.0)
                )
                wait = min(wait, pace.patience)
                log.info("prediction_unheard", job_id=str(held.claim.job_id), reason=error.code)
        if remote.status != "succeeded":
            error_ = ProviderFailed(f"the prediction {remote.status} at the provider")
            await self.end(prediction, remote.status, remote, error_)
            raise error_
        await self._providers.note(prediction, remote.status)
        return remote

    async def _look(self, prediction: Prediction) -> Remote:
        assert prediction.prediction_id is not None  # it has been named, or found
        try:
            remote = await self._api.get(prediction.prediction_id)
        except ProviderRefused as error:
            await self.end(prediction, "gone", error=error)
            raise ProviderFailed("the provider knows the prediction no longer", error.status) from error
        self._looks += 1
        self._held.report("provider", activity=self._looks)
        return remote

    async def _pause(self, seconds: float, *, whole: bool = False) -> None:
        """Until there may be news, or the job is to stop, or so long; with `whole`, news are no reason to go on."""
        waiting = self._stopped if whole else self._news
        try:
            async with asyncio.timeout(seconds):
                await waiting.wait()
        except TimeoutError:
            pass
        self._news.clear()
        if whole:
            self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise Cancelled(f"stopped: {self._held.stop_reason}")

    async def _stopped_with(self, prediction: Prediction) -> None:
        if self._held.stop_reason in (StopReason.USER, StopReason.DEADLINE):
            await self._cancel(prediction)
        self._raise_if_stopped()

    async def _cancel(self, prediction: Prediction) -> None:
        """Stop it at the provider. Where that fails the row stays without an end, and is looked after as a stray."""
        try:
            assert prediction.prediction_id is not None
            await self._api.cancel(prediction.prediction_id)
            await self.end(prediction, "canceled", error=ProviderFailed("stopped, as the job was to stop"))
        except ProviderError as error:
            log.warning("prediction_not_cancelled", job_id=str(prediction.job_id), reason=error.code)

    async def end(
        self, prediction: Prediction, status: str, remote: Remote | None = None, error: GenerationError | None = None
    ) -> None:
        """Nothing more is expected of it: its row is ended, and told in the log of usage."""
        given = facts(self.model, self.given) if self.given else None
        await self._providers.end(prediction, status, usage(self.model, remote, error, given))


async def find(
    api: ProviderApi, providers: Providers, model: ApiModel, prediction: Prediction, pace: Pace
) -> Remote | None:
    """What a provider made of a request whose answer was not heard, named from now on. Raises `ProviderUncertain`
    where its list can't tell, `ProviderUnavailable` where it can't be read."""
    since = prediction.requested_at - timedelta(seconds=pace.skew)
    try:
        recent = [remote async for remote in api.recent(since) if remote.version in (None, prediction.version)]
    except ProviderRefused as error:
        raise ProviderUncertain("the provider lists no predictions, so one may be running", error.status) from error
    known = await providers.names_known(prediction.provider_id, [remote.id for remote in recent])
    unknown = [remote for remote in recent if remote.id not in known]
    same = [remote for remote in unknown if input_hash(model, remote.input) == prediction.input_hash]
    for remote in reversed(same):
        if await providers.name(prediction, remote.id, remote.status) == remote.id:
            return remote
    near = prediction.requested_at + timedelta(seconds=pace.settling + pace.skew)
    if any(not remote.input and (remote.created_at is None or remote.created_at < near) for remote in unknown):
        raise ProviderUncertain("the provider no longer tells what its predictions were made from")
    return None


def usage(
    model: ApiModel | None,
    remote: Remote | None,
    error: GenerationError | None = None,
    given: Mapping[str, Any] | None = None,
) -> Usage:
    """What is logged of a prediction at its end."""
    seconds = remote.predict_seconds if remote is not None else None
    return Usage(
        response_status=error.status if isinstance(error, ProviderError) else 200,
        cost_usd=None if model is None or remote is None else cost(model.pricing, remote),
        error_message=None if error is None else f"{error.code}: {error.message}",
        request_payload=given,
        provider_metadata={} if seconds is None else {"predict_seconds": seconds},
    )


def cost(pricing: Mapping[str, Any], remote: Remote) -> float | None:
    """US dollars, by what the model's row says of `usd_per_prediction`, `usd_per_output` and `usd_per_second`; None
    where it says nothing, or the provider has not told the seconds."""
    counts = {
        "usd_per_prediction": 1.0,
        "usd_per_output": float(len(remote.output)),
        "usd_per_second": remote.predict_seconds,
    }
    total = None
    for name, count in counts.items():
        price = pricing.get(name)
        if isinstance(price, int | float) and not isinstance(price, bool):
            if count is None:
                return None
            total = (total or 0.0) + price * count
    return None if total is None else round(total, 6)
