"""Predictions that go on at a provider although their jobs have ended: stopped, and their rows ended.

A job may end without its replica: cancelled while it waited for another attempt, or given up after lost leases. What
was asked for it would then be made, and paid for, for nobody.
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime

import structlog

from db.providers import ApiProvider, Prediction, Providers
from deployments.egress import Egress
from deployments.provider.api import ProviderApi, ProviderError, ProviderFailed, ProviderRefused, ProviderUncertain
from deployments.provider.run import Pace, find, usage

log = structlog.get_logger()


class Strays:
    """Any replica may look after them; whoever is second changes nothing."""

    def __init__(
        self, providers: Providers, egress: Egress, pace: Pace, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._providers, self._egress, self._pace, self._environment = providers, egress, pace, environment

    async def end(self) -> int:
        """Stop what is still being made for jobs that have ended. How many rows were ended."""
        ended = 0
        for prediction, provider in await self._providers.strays():
            try:
                ended += await self._end(prediction, provider)
            except ProviderError as error:  # the next round tries again
                log.warning("stray_not_ended", prediction_id=prediction.prediction_id, reason=error.code)
        return ended

    async def _end(self, prediction: Prediction, provider: ApiProvider) -> bool:
        api = ProviderApi(provider, self._egress, self._environment)
        model = None if prediction.model_id is None else await self._providers.model(prediction.model_id)
        age = (datetime.now(UTC) - prediction.requested_at).total_seconds()
        if prediction.prediction_id is None and age < self._pace.settling:
            return False  # it may yet come onto the provider's list
        remote = None
        try:
            if prediction.prediction_id is not None:
                remote = await api.get(prediction.prediction_id)
            elif model is not None:
                remote = await find(api, self._providers, model, prediction, self._pace)
        except (ProviderRefused, ProviderUncertain) as error:
            return await self._providers.end(prediction, "gone", usage(model, None, error))
        if remote is None:
            fault = ProviderFailed("the provider has not taken the request")
            return await self._providers.end(prediction, "gone", usage(model, None, fault))
        if not remote.ended:
            await api.cancel(remote.id)
            fault = ProviderFailed("stopped, as the job has ended")
            return await self._providers.end(prediction, "canceled", usage(model, remote, fault))
        failed = None if remote.status == "succeeded" else ProviderFailed(f"the prediction {remote.status}")
        return await self._providers.end(prediction, remote.status, usage(model, remote, failed))
