"""The HTTP API of an outside provider, in Replicate's form: predictions that are created, asked for, listed, cancelled.

Everything goes through the egress guard: to the `base_url` of the provider's row and nowhere else, whatever URLs an
answer names. The secret is read from the environment at each request and is in no error, row or log. Sources:
https://replicate.com/docs/reference/http and https://replicate.com/docs/topics/predictions/lifecycle.

Errors are `ProviderError`, a `GenerationError`, and its leaves. Their messages hold nothing that the provider wrote.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import quote

from db.providers import ApiProvider
from deployments.egress import Answered, Egress, EgressError, EgressFailed
from models.engine import GenerationError

REQUEST_SECONDS = 20.0
MAX_ANSWER_BYTES = 4_000_000
MAX_LIST_PAGES = 5
MAX_RETRY_AFTER_SECONDS = 600.0
BUSY_SECONDS = 5.0  # where a 429 does not say when to come back
# an admin writes the rows, and must not be able to have any variable of the process sent to a host of their choice
SECRET_NAME = re.compile(r"(?!OURVIDZ_)[A-Z][A-Z0-9_]*_API_(TOKEN|KEY)")
PREDICTION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
VERSION = re.compile(r"[0-9a-f]{32,64}")
ENDED = ("succeeded", "failed", "canceled")


class ProviderError(GenerationError):
    """A job at an outside provider ended without a result. Messages hold nothing that the provider wrote."""

    retryable = False

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ProviderUnavailable(ProviderError):
    """The outside provider gave no usable answer. What it was asked for is found again, not asked for twice."""

    code = "provider_unavailable"
    retryable = True


class ProviderBusy(ProviderUnavailable):
    """The outside provider takes no more requests now. The job waits as long as it says, and no failure is counted."""

    code = "provider_busy"

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("the provider takes no more requests now", 429)
        self.retry_after_seconds = retry_after_seconds


class ProviderRefused(ProviderError):
    """The outside provider refused the request, or may not be given it."""

    code = "provider_refused"


class ProviderMisconfigured(ProviderError):
    """The row of the outside provider, or the secret that it names, does not do."""

    code = "provider_misconfigured"


class ProviderFailed(ProviderError):
    """The prediction failed, or was canceled, at the outside provider."""

    code = "provider_failed"


class ProviderTimeout(ProviderError):
    """The outside provider did not make it within `OURVIDZ_PROVIDER_SECONDS`, and was told to stop."""

    code = "provider_timeout"


class ProviderUncertain(ProviderError):
    """Nobody can say whether the outside provider is making, and charging for, this. It is not asked again."""

    code = "provider_uncertain"


class OutputRefused(ProviderError):
    """An output of the outside provider is too large, or lies where nothing is fetched from."""

    code = "provider_output_refused"


class OutputUnreadable(ProviderError):
    """An output of the outside provider is no picture or video that can be decoded within the limits."""

    code = "provider_output_unreadable"


class OutputGone(ProviderError):
    """An output is no longer kept by the outside provider."""

    code = "provider_output_gone"


@dataclass(frozen=True)
class Remote:
    """A prediction as the provider tells it. `output` are URLs."""

    id: str
    status: str
    version: str | None
    input: Mapping[str, Any]
    output: tuple[str, ...]
    predict_seconds: float | None
    created_at: datetime | None
    has_error: bool

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @classmethod
    def read(cls, document: Any) -> Self:
        """From an answer's JSON. Raises `ProviderUnavailable` for what is no prediction."""
        known = isinstance(document, dict) and isinstance(document.get("id"), str)
        status = document.get("status") if known else None
        if status == "aborted":  # stopped before it began
            status = "canceled"
        if not known or not PREDICTION_ID.fullmatch(document["id"]) or status not in ("starting", "processing", *ENDED):
            raise ProviderUnavailable("the provider's answer is no prediction")
        output, given = document.get("output"), document.get("input")
        urls = [output] if isinstance(output, str) else output if isinstance(output, list) else []
        metrics = document.get("metrics")
        seconds = metrics.get("predict_time") if isinstance(metrics, dict) else None
        return cls(
            id=document["id"],
            status=status,
            version=document.get("version") if isinstance(document.get("version"), str) else None,
            input=given if isinstance(given, dict) else {},
            output=tuple(url for url in urls if isinstance(url, str)),
            predict_seconds=float(seconds) if isinstance(seconds, int | float) and seconds >= 0 else None,
            created_at=_time(document.get("created_at")),
            has_error=document.get("error") is not None,
        )


class ProviderApi:
    """Asks one provider. Raises `ProviderUnavailable`, `ProviderBusy`, `ProviderRefused`, `ProviderMisconfigured`."""

    def __init__(self, provider: ApiProvider, egress: Egress, environment: Mapping[str, str] = os.environ) -> None:
        self._provider, self._egress, self._environment = provider, egress, environment

    async def create(
        self, version: str, given: Mapping[str, Any], webhook: str | None, stop_after_seconds: float
    ) -> Remote:
        """Ask for a prediction. It is being made, and charged for, from the moment that this is heard there.

        `Cancel-After` has the provider stop by itself what nobody comes back for."""
        body: dict[str, Any] = {"version": version, "input": dict(given)}
        if webhook is not None:
            body |= {"webhook": webhook, "webhook_events_filter": ["completed"]}
        headers = {"prefer": "respond-async", "cancel-after": f"{max(5, round(stop_after_seconds))}s"}
        return Remote.read(await self._ask("POST", "/predictions", body, headers))

    async def get(self, prediction_id: str) -> Remote:
        """How a prediction stands."""
        return Remote.read(await self._ask("GET", f"/predictions/{quote(prediction_id, safe='')}"))

    async def cancel(self, prediction_id: str) -> None:
        """Stop a prediction. One that has ended stays as it is."""
        try:
            await self._ask("POST", f"/predictions/{quote(prediction_id, safe='')}/cancel")
        except ProviderRefused as error:
            # it is not there, or has ended; anything else is told
            if error.status not in (404, 409, 410, 422):
                raise

    async def recent(self, since: datetime) -> AsyncIterator[Remote]:
        """Predictions from `since` on, newest first. Raises `ProviderUncertain` where there are too many to read."""
        path = "/predictions"
        for _ in range(MAX_LIST_PAGES):
            page = await self._ask("GET", path)
            if not isinstance(page, dict) or not isinstance(page.get("results"), list):
                raise ProviderUnavailable("the provider's answer is no list of predictions")
            for document in page["results"]:
                remote = Remote.read(document)
                if remote.created_at is not None and remote.created_at < since:
                    return
                yield remote
            cursor = re.search(r"[?&]cursor=([^&#]+)", str(page.get("next") or ""))
            if cursor is None:
                return
            path = f"/predictions?cursor={cursor[1]}"
        raise ProviderUncertain("the provider has more predictions than could be looked through for this job's")

    async def _ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        sent = {"accept": "application/json", **self._authorization(), **(headers or {})}
        data = None
        if body is not None:
            data, sent["content-type"] = json.dumps(body).encode(), "application/json"
        elif method == "POST":
            data = b""
        url = self._base_url() + path
        try:
            answer = await self._egress.request(method, url, sent, data, REQUEST_SECONDS, MAX_ANSWER_BYTES)
        except EgressFailed as error:
            raise ProviderUnavailable(f"the provider could not be asked ({error.reason})") from error
        except EgressError as error:
            message = f"the provider's base_url is not one that may be called ({error.reason})"
            raise ProviderMisconfigured(message) from error
        return _document(answer)

    def _base_url(self) -> str:
        if not self._provider.base_url:
            raise ProviderMisconfigured("the provider has no base_url")
        return self._provider.base_url.rstrip("/")

    def _authorization(self) -> dict[str, str]:
        provider = self._provider
        if provider.auth_scheme == "none":
            return {}
        name = provider.secret_name or ""
        if not SECRET_NAME.fullmatch(name):
            raise ProviderMisconfigured("the provider's secret_name must end in _API_TOKEN or _API_KEY")
        secret = self._environment.get(name, "").strip()
        if not secret.isascii() or not secret.isprintable() or not secret:
            raise ProviderMisconfigured(f"the environment variable {name} holds no secret")
        prefix = {"bearer": "Bearer ", "token": "Token ", "header": "", "api_key": ""}.get(provider.auth_scheme.lower())
        if prefix is None or not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", provider.auth_header_name):
            raise ProviderMisconfigured("the provider's auth_scheme or auth_header_name is not one that we know")
        return {provider.auth_header_name.lower(): prefix + secret}


def _document(answer: Answered) -> Any:
    status = answer.status
    if status == 429:
        raise ProviderBusy(_retry_after(answer.headers.get("retry-after", "")))
    if status >= 500 or status < 200:
        raise ProviderUnavailable(f"the provider answered with status {status}", status)
    if status in (401, 403):
        raise ProviderMisconfigured(f"the provider does not accept our secret (status {status})", status)
    if status >= 300:
        raise ProviderRefused(f"the provider refused the request with status {status}", status)
    try:
        return json.loads(answer.data) if answer.data else None
    except ValueError:
        raise ProviderUnavailable("the provider's answer is not JSON", status) from None


def _retry_after(text: str) -> float:
    """Seconds, from a number or a date (RFC 9110, section 10.2.3)."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        seconds = float(text)
    else:
        try:
            when = parsedate_to_datetime(text)
            seconds = (when - datetime.now(when.tzinfo)).total_seconds()
        except (ValueError, TypeError):
            seconds = BUSY_SECONDS
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)


def _time(text: Any) -> datetime | None:
    try:
        read = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return read if read.tzinfo is not None else None
