"""Sends callbacks: drains the outbox, signs by the Standard Webhooks specification 1.0.0, and tries again by schedule.

At least once: a receiver tells repeats by `webhook-id`. What is kept between tries is in the outbox alone, so any
number of deliverers may run and any of them may die.
"""

import asyncio
import contextlib
import email.utils
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from db.callbacks import Attempt, Callbacks, Delivery
from db.pool import DATABASE_FAULTS
from deployments.egress import Egress, EgressFailed, EgressRefused, Posted
from deployments.signatures import CallbackSecrets

log = structlog.get_logger()

SCHEDULE_SECONDS = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""What passes before each try: ten tries in about three days, then the callback is dead."""

JITTER = 0.2
LEASE_MARGIN_SECONDS = 15.0


@dataclass(frozen=True)
class Sent:
    """What one try came to: `delivered`, `failed` or `dead`, and what the receiver asks for by Retry-After."""

    outcome: str
    attempt: Attempt
    retry_after_seconds: float | None = None


class Deliverer:
    """Sends what is due, `concurrency` at a time, at most `per_host` to one receiver and `per_user` of one user."""

    def __init__(
        self,
        callbacks: Callbacks,
        egress: Egress,
        secrets: CallbackSecrets,
        *,
        concurrency: int = 32,
        per_host: int = 4,
        per_user: int = 16,
        schedule: Sequence[float] = SCHEDULE_SECONDS,
        timeout_seconds: float = 15.0,
        poll_seconds: float = 1.0,
        max_response_bytes: int = 2048,
        observe: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        """`timeout_seconds` is for a whole try: name, connection, request and answer. `observe` hears of each try.

        `schedule` has the seconds before each try, as many as there are tries; the first is 0, since a callback is due
        when it comes to be. Raises ValueError for another schedule.
        """
        if not schedule or schedule[0] != 0 or any(seconds < 0 for seconds in schedule):
            raise ValueError("a schedule of callbacks begins with 0 and has no negative seconds")
        self._callbacks = callbacks
        self._egress = egress
        self._secrets = secrets
        self._concurrency = concurrency
        self._per_host = per_host
        self._per_user = per_user
        self._schedule = tuple(schedule)
        self._observe = observe
        self._timeout_seconds = timeout_seconds
        self._poll_seconds = poll_seconds
        self._max_response_bytes = max_response_bytes
        self._wanted = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """How many callbacks are being sent now."""
        return len(self._sending)

    def wake(self) -> None:
        """Look for due callbacks now instead of at the next poll. Call it from the loop that runs `run`."""
        self._wanted.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`, then finish what is under way, which takes no longer than the time-out of a try.

        A cancelled run abandons what is under way: the leases run out and it is sent again. An unreachable database
        is waited for; any other fault of the loop is raised.
        """
        watch = asyncio.create_task(stop.wait())
        watch.add_done_callback(lambda _: self._wanted.set())
        try:
            while not stop.is_set():
                self._wanted.clear()
                # claim until there is nothing: a claim passes over the receivers that the one before has filled
                if not await self._start_due():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._poll_seconds * _around_one()):
                            await self._wanted.wait()
            await asyncio.gather(*self._sending)
        finally:
            watch.cancel()
            abandoned = list(self._sending)
            for task in abandoned:
                task.cancel()
            await asyncio.gather(*abandoned, return_exceptions=True)

    async def _start_due(self) -> bool:
        free = self._concurrency - len(self._sending)
        if free == 0:
            return False
        lease_seconds = self._timeout_seconds + LEASE_MARGIN_SECONDS
        try:
            due = await self._callbacks.claim_due(free, lease_seconds, self._per_host, self._per_user)
        except DATABASE_FAULTS as fault:
            log.warning("callbacks_not_claimed", error=type(fault).__name__)
            return False
        for delivery in due:
            task = asyncio.create_task(self._guarded(delivery))
            self._sending.add(task)
            task.add_done_callback(self._finished)
        return bool(due)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._wanted.set()  # a slot is free, and the next callback of the same job may be due

    async def _guarded(self, delivery: Delivery) -> None:
        try:
            await self.deliver_one(delivery)
        except DATABASE_FAULTS as fault:
            # the lease runs out and the receiver gets it again
            log.warning("callback_result_not_written", callback_id=delivery.id, error=type(fault).__name__)
        except Exception:
            # a fault of ours; the lease runs out and it is tried again, up to the end of the schedule
            log.exception("callback_broke", callback_id=delivery.id, attempt=delivery.attempts)

    async def deliver_one(self, delivery: Delivery) -> str:
        """Try a claimed callback once and record what came of it.

        Returns `delivered`, `failed` (due again), `dead`, or `lost` where the lease was no longer ours. Only 2xx is
        success and a redirect is none; 410 and a refused URL are final.
        """
        if delivery.withdrawn is not None:
            return await self._record("dead", delivery, Attempt(error=delivery.withdrawn), None)
        if delivery.attempts > len(self._schedule):
            # claimed as often as it may be tried, and no deliverer came to write down what happened
            return await self._record("dead", delivery, Attempt(error="abandoned"), None)
        started = time.perf_counter()
        sent = await send(
            self._egress,
            delivery.url,
            delivery.body,
            self._secrets.headers(delivery, datetime.now(UTC)),
            self._timeout_seconds,
            self._max_response_bytes,
        )
        outcome = sent.outcome
        if outcome == "failed" and delivery.attempts == len(self._schedule):
            outcome = "dead"
        self._observe(outcome, time.perf_counter() - started)
        return await self._record(outcome, delivery, sent.attempt, sent.retry_after_seconds)

    async def _record(self, outcome: str, delivery: Delivery, attempt: Attempt, retry_after: float | None) -> str:
        if outcome == "delivered":
            ours = await self._callbacks.delivered(delivery, attempt)
        elif outcome == "dead":
            ours = await self._callbacks.dead(delivery, attempt)
        else:
            base = self._schedule[delivery.attempts]
            asked = base * _around_one() if retry_after is None else min(max(retry_after, base), 2 * base)
            ours = await self._callbacks.failed(delivery, attempt, asked)
        log.info(
            "callback_tried",
            callback_id=delivery.id,
            job_id=str(delivery.job_id),
            endpoint_id=None if delivery.endpoint_id is None else str(delivery.endpoint_id),
            attempt=delivery.attempts,
            outcome=outcome if ours else "lost",
            status=attempt.status,
            error=attempt.error,
            elapsed_ms=attempt.elapsed_ms,
        )
        return outcome if ours else "lost"


async def send(
    egress: Egress,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    timeout_seconds: float,
    max_response_bytes: int,
) -> Sent:
    """Post once and judge what came back. A refused URL is an outcome like any other: nothing is raised for it."""
    started = time.perf_counter()
    try:
        posted = await egress.post(url, body, headers, timeout_seconds, max_response_bytes)
    except EgressRefused as refusal:
        return Sent("dead", Attempt(error=refusal.reason, elapsed_ms=_since(started)))
    except EgressFailed as failure:
        return Sent("failed", Attempt(error=failure.reason, elapsed_ms=_since(started)))
    outcome, attempt = _judge(posted)
    retry_after: float | None = None
    if posted.status in (429, 503):
        retry_after = retry_after_seconds(posted.headers.get("retry-after", ""), datetime.now(UTC))
    return Sent(outcome, attempt, retry_after)


def retry_after_seconds(value: str, now: datetime) -> float | None:
    """What a Retry-After header asks for (RFC 9110, section 10.2.3: seconds or a date); None for anything else."""
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return None if at.tzinfo is None else (at - now).total_seconds()


def _judge(posted: Posted) -> tuple[str, Attempt]:
    if 200 <= posted.status < 300:
        return "delivered", Attempt(posted.status, None, posted.elapsed_ms, posted.body_excerpt)
    if posted.status == 410:
        return "dead", Attempt(posted.status, "gone", posted.elapsed_ms, posted.body_excerpt)
    error = "redirect" if 300 <= posted.status < 400 else "status"
    return "failed", Attempt(posted.status, error, posted.elapsed_ms, posted.body_excerpt)


def _around_one() -> float:
    return random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  spreads load, keeps no secret


def _since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
