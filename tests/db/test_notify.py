"""Wake-ups over a real connection: sent together, heard by all, and taken up again after the connection is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from db.notify import JOB_CHANNEL, QUEUE_CHANNEL, Listener, Notifier
from db.pool import open_pool
from tests.conftest import with_database


class Heard:
    """What a listener heard, in order; `next` waits for more."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[str] = asyncio.Queue()

    def __call__(self, payload: str) -> None:
        self._queue.put_nowait(payload)

    async def next(self) -> str:
        async with asyncio.timeout(30):
            return await self._queue.get()

    def waiting(self) -> list[str]:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]


@asynccontextmanager
async def listening(
    database: Any, channel: str = QUEUE_CHANNEL, **options: Any
) -> AsyncIterator[tuple[Listener, Heard]]:
    heard = Heard()
    listener = Listener(database.url, channel, heard, **options)
    listener.start()
    try:
        assert await heard.next() == ""  # it listens now; what came before may have been missed
        yield listener, heard
    finally:
        await listener.close()


async def test_a_listener_hears_what_is_sent(database: Any) -> None:
    async with listening(database, role="ourvidz_worker") as (_, heard):
        notifier = Notifier(database.worker_pool)
        notifier.queue("sdxl")
        assert await heard.next() == "sdxl"
        notifier.queue("wan")
        assert await heard.next() == "wan"
        await notifier.close()


async def test_what_is_sent_at_once_arrives_once(database: Any) -> None:
    async with listening(database) as (_, heard):
        notifier = Notifier(database.pool)
        for _ in range(100):
            notifier.queue("sdxl")
            notifier.queue("wan")
        await notifier.close()
        await database.pool.execute("SELECT pg_notify($1, 'end')", QUEUE_CHANNEL)
        got = []
        while (payload := await heard.next()) != "end":
            got.append(payload)
        assert sorted(got) == ["sdxl", "wan"]


async def test_channels_do_not_mix(database: Any) -> None:
    async with listening(database, JOB_CHANNEL) as (_, jobs), listening(database) as (_, queues):
        notifier = Notifier(database.pool)
        notifier.queue("sdxl")
        notifier.job("7")
        assert (await jobs.next(), await queues.next()) == ("7", "sdxl")
        await notifier.close()
        assert jobs.waiting() == queues.waiting() == []


async def test_closing_sends_what_waits(database: Any) -> None:
    async with listening(database) as (_, heard):
        notifier = Notifier(database.pool)
        notifier.queue("sdxl")
        await notifier.close()
        assert await heard.next() == "sdxl"


async def test_closing_a_notifier_that_never_sent_is_no_error(database: Any) -> None:
    await Notifier(database.pool).close()


async def kill(database: Any) -> None:
    """End the listeners' connections as a restart of the server would."""
    killed = await database.pool.fetchval(
        """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
           WHERE application_name LIKE 'listen %' AND datname = current_database()"""
    )
    assert killed


async def test_a_listener_connects_again_and_says_that_something_may_be_missing(database: Any) -> None:
    async with listening(database) as (listener, heard):
        for round_ in range(2):
            await kill(database)
            assert await heard.next() == ""
            async with asyncio.timeout(30):
                await listener.connected.wait()
            await database.pool.execute("SELECT pg_notify($1, $2)", QUEUE_CHANNEL, f"after {round_}")
            assert await heard.next() == f"after {round_}"


async def test_a_listener_waits_for_a_server_that_is_away(database: Any) -> None:
    name = await database.pool.fetchval("SELECT current_database()")
    heard = Heard()
    server = await asyncpg.connect(with_database(database.url, "postgres"))
    await server.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
    listener = Listener(database.url, QUEUE_CHANNEL, heard)
    listener.start()
    try:
        with pytest.raises(asyncpg.PostgresError):
            await asyncpg.connect(database.url)
        assert not listener.connected.is_set()
        await server.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
        assert await heard.next() == ""
    finally:
        await listener.close()
        await server.close()


async def test_a_closed_listener_has_let_go_of_its_connection(database: Any) -> None:
    count = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'listen %' AND datname = current_database()"
    )
    async with listening(database):
        assert await database.pool.fetchval(count) == 1
    async with asyncio.timeout(30):
        while await database.pool.fetchval(count):
            pass


async def test_a_closed_listener_was_never_started_is_no_error(database: Any) -> None:
    await Listener(database.url, QUEUE_CHANNEL, lambda payload: None).close()


async def test_a_failed_send_is_dropped_and_the_next_one_goes_out(database: Any) -> None:
    pool = await open_pool(database.url, max_size=1)
    notifier = Notifier(pool)
    async with listening(database) as (_, heard):
        victim = await pool.fetchval("SELECT pg_backend_pid()")
        await database.pool.execute("SELECT pg_terminate_backend($1)", victim)
        notifier.queue("sdxl")
        await notifier.close()  # raises nothing, whether the pool noticed or not
        heard.waiting()
        notifier.queue("wan")
        await notifier.close()
        while await heard.next() != "wan":
            pass
    await pool.close()


async def test_a_send_into_a_closed_pool_is_dropped(database: Any) -> None:
    pool = await open_pool(database.url, max_size=1)
    await pool.close()
    notifier = Notifier(pool)
    notifier.queue("sdxl")
    await notifier.close()


async def test_an_error_in_what_listens_does_not_end_the_listening(database: Any) -> None:
    error = ValueError("a bug in what listens")
    heard = Heard()

    def hear(payload: str) -> None:
        heard(payload)
        if payload == "bad":
            raise error

    reported: list[BaseException | None] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context.get("exception")))
    listener = Listener(database.url, QUEUE_CHANNEL, hear)
    listener.start()
    try:
        assert await heard.next() == ""
        for payload in ("bad", "good"):
            await database.pool.execute("SELECT pg_notify($1, $2)", QUEUE_CHANNEL, payload)
            assert await heard.next() == payload
    finally:
        await listener.close()
    assert reported == [error]
