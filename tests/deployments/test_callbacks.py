"""Delivery from a real outbox to real sockets, the hostile ones included."""

import asyncio
import contextlib
import email.utils
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from standardwebhooks import Webhook, WebhookVerificationError

from deployments.callbacks import SCHEDULE_SECONDS, Deliverer, retry_after_seconds
from deployments.egress import AllowedHost, Egress, EgressPolicy
from deployments.signatures import CallbackSecrets
from tests.db.outbox import Outbox
from tests.deployments import hostile

SECRETS = CallbackSecrets(b"m" * 32)


@pytest.fixture
async def outbox(database: Any) -> Outbox:
    return await Outbox.open(database)


def deliverer(outbox: Outbox, *receivers: hostile.Receiver, **options: Any) -> Deliverer:
    allowed = tuple(AllowedHost("127.0.0.1", receiver.port, "http") for receiver in receivers)
    return Deliverer(outbox.callbacks, Egress(EgressPolicy(allow=allowed)), SECRETS, **options)


async def try_once(outbox: Outbox, answer: bytes | hostile.Script, **options: Any) -> tuple[str, hostile.Receiver]:
    async with hostile.receiving(answer) as receiver:
        await outbox.add("now", url=receiver.url)
        outcome = await deliverer(outbox, receiver, **options).deliver_one(await outbox.one())
    return outcome, receiver


async def wait_seconds(outbox: Outbox) -> float:
    return float(await outbox.pool.fetchval("SELECT extract(epoch FROM next_at - now()) FROM callback_outbox"))


@contextlib.asynccontextmanager
async def running(worker: Deliverer) -> AsyncIterator[None]:
    """The deliverer at work; afterwards it has stopped and written down all that it did."""
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield
        stop.set()
        async with asyncio.timeout(30):
            await task
    finally:
        task.cancel()


def verifies(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------- one try


async def test_delivered_callback_arrived_signed_and_unchanged(outbox: Outbox) -> None:
    outcome, receiver = await try_once(outbox, hostile.answer(204))
    (sent,) = receiver.requests
    assert (outcome, (await outbox.states())["now"]) == ("delivered", "delivered")
    assert (sent.method, sent.target, sent.body) == ("POST", "/hook?a=1", b"{}")
    assert (sent.headers["webhook-id"], sent.headers["content-type"]) == ("now", "application/json")
    assert sent.headers["user-agent"].startswith("ourvidz-serve/")
    assert verifies(SECRETS.secret(outbox.user_id, 1), sent.headers, sent.body)


@pytest.mark.parametrize(
    ("answer", "outcome", "status", "error"),
    [
        (hostile.answer(200, b"ok"), "delivered", 200, None),
        (hostile.answer(299), "delivered", 299, None),
        (hostile.answer(301, location="http://127.0.0.1/"), "failed", 301, "redirect"),
        (hostile.answer(400), "failed", 400, "status"),
        (hostile.answer(404), "failed", 404, "status"),
        (hostile.answer(410), "dead", 410, "gone"),
        (hostile.answer(500), "failed", 500, "status"),
        (hostile.endless, "delivered", 200, None),
        (hostile.reset, "failed", None, "connection_lost"),
        (hostile.hang_up, "failed", None, "protocol"),
    ],
)
async def test_answer_decides_the_outcome(
    outbox: Outbox, answer: bytes | hostile.Script, outcome: str, status: int | None, error: str | None
) -> None:
    assert (await try_once(outbox, answer))[0] == outcome
    row = await outbox.row("now")
    assert row["state"] == {"failed": "due"}.get(outcome, outcome)
    assert (row["last_status"], row["last_error"]) == (status, error)
    (logged,) = await outbox.callbacks.attempts_of("now")
    assert (logged.status, logged.error) == (status, error)


@pytest.mark.parametrize("script", [hostile.silence, hostile.slow_head, hostile.trickle])
async def test_receiver_that_dawdles_fails_by_timeout(outbox: Outbox, script: hostile.Script) -> None:
    outcome, _ = await try_once(outbox, script, timeout_seconds=0.5, max_response_bytes=2_000_000)
    assert (outcome, (await outbox.row("now"))["last_error"]) == ("failed", "timeout")


async def test_refused_url_is_dead_at_once_with_its_reason(outbox: Outbox) -> None:
    await outbox.add("now", url="https://169.254.169.254/latest")
    assert await deliverer(outbox).deliver_one(await outbox.one()) == "dead"
    assert (await outbox.row("now"))["last_error"] == "private_address"


async def test_excerpt_of_the_answer_is_kept_and_bounded(outbox: Outbox) -> None:
    await try_once(outbox, hostile.answer(500, b"no\x00" + b"x" * 10_000), max_response_bytes=10)
    (logged,) = await outbox.callbacks.attempts_of("now")
    assert logged.response_excerpt == "no\ufffdxxxxxxx"


async def test_result_under_a_lost_lease_is_not_written(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(500), hostile.answer(200)) as receiver:
        await outbox.add("now", url=receiver.url)
        old = await outbox.one()
        await outbox.expire("now")
        new = await outbox.one()
        worker = deliverer(outbox, receiver)
        assert await worker.deliver_one(old) == "lost"
        assert await worker.deliver_one(new) == "delivered"
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["now", "now"]
    assert len(await outbox.callbacks.attempts_of("now")) == 1


async def test_log_holds_no_url_and_no_body(outbox: Outbox) -> None:
    with structlog.testing.capture_logs() as logs:
        await try_once(outbox, hostile.answer(500, b"secret answer"))
    assert [entry["event"] for entry in logs] == ["callback_tried"]
    assert "127.0.0.1" not in str(logs)
    assert "hook" not in str(logs)
    assert "secret" not in str(logs)


# ---------------------------------------------------------------------------------------------------- schedule


async def test_each_failure_waits_its_step_of_the_schedule(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(500)) as receiver:
        await outbox.add("now", url=receiver.url)
        worker = deliverer(outbox, receiver)
        for step_seconds in SCHEDULE_SECONDS[1:]:
            assert await worker.deliver_one(await outbox.one()) == "failed"
            assert 0.8 * step_seconds - 5 <= await wait_seconds(outbox) <= 1.2 * step_seconds
            await outbox.pool.execute("UPDATE callback_outbox SET next_at = now()")
        assert await worker.deliver_one(await outbox.one()) == "dead"
    assert len(await outbox.callbacks.attempts_of("now")) == len(SCHEDULE_SECONDS) == 10
    assert (await outbox.row("now"))["last_error"] == "status"


async def test_callback_that_kills_its_deliverers_is_given_up(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        await outbox.add("now", url=receiver.url)
        for _ in range(2):
            await outbox.one()
            await outbox.expire("now")
        assert await deliverer(outbox, receiver, schedule=(0, 5)).deliver_one(await outbox.one()) == "dead"
    assert receiver.connections == 0
    assert (await outbox.row("now"))["last_error"] == "abandoned"


@pytest.mark.parametrize(
    ("status", "value", "least", "most"),
    [
        (429, "90", 85, 90),
        (503, "90", 85, 90),
        (429, "1", 55, 60),
        (429, "100000", 115, 120),
        (429, "9" * 400, 115, 120),
        (429, "1e9", 43, 72),
        (429, "-1", 43, 72),
        (429, "soon", 43, 72),
        (500, "100000", 43, 72),
    ],
)
async def test_retry_after_is_honoured_between_one_and_two_steps(
    outbox: Outbox, status: int, value: str, least: float, most: float
) -> None:
    await try_once(outbox, hostile.answer(status, retry_after=value), schedule=(0, 60))
    assert least <= await wait_seconds(outbox) <= most


def test_retry_after_may_be_a_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    date = email.utils.format_datetime(now + timedelta(seconds=90), usegmt=True)
    assert retry_after_seconds(date, now) == 90


@pytest.mark.parametrize("value", ["", "-1", "1e9", "1.5", "١", "soon", "Mon, 01 Jan 99999 00:00:00 GMT"])
def test_retry_after_that_is_garbage_is_none(value: str) -> None:
    assert retry_after_seconds(value, datetime.now(UTC)) is None


@pytest.mark.parametrize("schedule", [(), (5,), (0, -1)])
def test_schedule_that_can_not_be_kept_is_refused(schedule: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        Deliverer(None, None, SECRETS, schedule=schedule)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the loop


async def test_run_tries_again_until_it_is_taken(outbox: Outbox) -> None:
    outcomes: list[str] = []
    async with hostile.receiving(hostile.answer(500), hostile.reset, hostile.answer(200)) as receiver:
        await outbox.add("now", url=receiver.url)
        worker = deliverer(
            outbox,
            receiver,
            schedule=(0, 0.01, 0.01),
            poll_seconds=0.02,
            observe=lambda outcome, seconds: outcomes.append(outcome),
        )
        async with running(worker):
            await receiver.until(3)
    assert {(request.headers["webhook-id"], request.body) for request in receiver.requests} == {("now", b"{}")}
    assert outcomes == ["failed", "failed", "delivered"]
    assert (await outbox.row("now"))["attempts"] == 3


async def test_run_keeps_the_order_of_a_job(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        for seq in (3, 1, 2):
            await outbox.add(f"event{seq}", seq=seq, url=receiver.url, age=seq)
        # only finishing one makes the next one due, so it is the finishing that wakes the loop
        async with running(deliverer(outbox, receiver, poll_seconds=3600)):
            await receiver.until(3)
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["event1", "event2", "event3"]


async def test_wake_ends_the_wait_for_the_next_poll(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        worker = deliverer(outbox, receiver, poll_seconds=3600)
        await outbox.add("first", url=receiver.url)
        async with running(worker):
            await receiver.until(1)
            await outbox.add("second", job_id=await outbox.job(), url=receiver.url)
            worker.wake()
            await receiver.until(2)
    assert set((await outbox.states()).values()) == {"delivered"}


async def test_silent_receiver_delays_no_other(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.silence) as silent, hostile.receiving(hostile.answer(200)) as quick:
        for index in range(8):
            await outbox.add(f"silent{index}", job_id=await outbox.job(), url=silent.url, age=100)
        await outbox.add("quick", url=quick.url)
        worker = deliverer(outbox, silent, quick, concurrency=4, per_host=2, timeout_seconds=60, poll_seconds=3600)
        task = asyncio.create_task(worker.run(asyncio.Event()))
        await quick.until(1)
        await silent.until(2)
        assert worker.in_flight <= 3
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert len(silent.requests) == 2
    assert worker.in_flight == 0


async def test_run_never_sends_more_at_once_than_it_may(outbox: Outbox) -> None:
    together: list[int] = []
    async with hostile.receiving(hostile.answer(200)) as receiver:
        for index in range(12):
            await outbox.add(f"n{index}", job_id=await outbox.job(), url=receiver.url)
        worker = deliverer(outbox, receiver, concurrency=3, per_host=100)
        worker._observe = lambda outcome, seconds: together.append(worker.in_flight)
        async with running(worker):
            await receiver.until(12)
    assert len(together) == 12
    assert max(together) <= 3


async def test_stopped_run_finishes_what_is_under_way(outbox: Outbox) -> None:
    release = asyncio.Event()

    async def when_released(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(hostile.answer(200))
        await writer.drain()

    async with hostile.receiving(when_released) as receiver:
        await outbox.add("now", url=receiver.url)
        stop = asyncio.Event()
        task = asyncio.create_task(deliverer(outbox, receiver).run(stop))
        await receiver.until(1)
        stop.set()
        release.set()
        async with asyncio.timeout(30):
            await task
    assert await outbox.states() == {"now": "delivered"}


async def test_two_deliverers_send_each_callback_once(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        names = [await outbox.add(f"n{index}", job_id=await outbox.job(), url=receiver.url) for index in range(20)]
        first, second = (deliverer(outbox, receiver, concurrency=4) for _ in range(2))
        async with running(first), running(second):
            await receiver.until(20)
    assert sorted(request.headers["webhook-id"] for request in receiver.requests) == sorted(names)


async def test_run_outlives_the_loss_of_its_database_connections(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(200)) as receiver:
        worker = deliverer(outbox, receiver, poll_seconds=0.02)
        await outbox.add("first", url=receiver.url)
        async with running(worker):
            await receiver.until(1)
            await outbox.pool.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()"""
            )
            await outbox.add("second", job_id=await outbox.job(), url=receiver.url)
            async with asyncio.timeout(30):
                while "second" not in {request.headers["webhook-id"] for request in receiver.requests}:
                    await receiver.until(len(receiver.requests) + 1)
