"""Wake-ups: NOTIFY after the commit, debounced, and LISTEN on a connection of its own.

A notification is a hint and never the truth: whoever waits for one also polls slowly. NOTIFY inside the changing
transaction halves the commit rate, because Postgres takes a lock of the whole cluster for it; so it is sent
afterwards, and what is asked for within a few milliseconds is sent once.
"""

import asyncio
from collections.abc import Callable

import asyncpg
import structlog

from db.pool import CONNECTION_FAULTS

QUEUE_CHANNEL = "ourvidz_queue"  # payload: the queue that has new work, or "callbacks"
JOB_CHANNEL = "ourvidz_job"  # payload: the id of a job with news
DEBOUNCE_SECONDS = 0.02
PROBE_SECONDS = 15.0

log = structlog.get_logger()


class Notifier:
    """Collects wake-ups and sends them together. A failed send is dropped: pollers will see the rows anyway."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._waiting: set[tuple[str, str]] = set()
        self._task: asyncio.Task[None] | None = None

    def send(self, channel: str, payload: str) -> None:
        """Ask for a wake-up within the next few milliseconds."""
        self._waiting.add((channel, payload))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())

    def queue(self, name: str) -> None:
        """There is new work in a queue."""
        self.send(QUEUE_CHANNEL, name)

    def job(self, job_id: object) -> None:
        """Something about a job has changed."""
        self.send(JOB_CHANNEL, str(job_id))

    async def close(self) -> None:
        """Send what is waiting."""
        if self._task is not None:
            await self._task

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = list(self._waiting), set()
            try:
                await self._pool.execute(
                    "SELECT pg_notify(c, p) FROM unnest($1::text[], $2::text[]) AS n(c, p)",
                    [channel for channel, _ in batch],
                    [payload for _, payload in batch],
                )
            except (*CONNECTION_FAULTS, asyncpg.PostgresError) as error:
                log.warning("notify_failed", error=type(error).__name__, count=len(batch))
            # the first goes out at once, so that an idle system is quick; what follows closely is sent together
            await asyncio.sleep(DEBOUNCE_SECONDS)


class Listener:
    """One connection that LISTENs, reconnects by itself, and hands every payload to `heard`.

    After a reconnect `heard` gets an empty payload: something may have been missed, look at everything.
    """

    def __init__(self, url: str, channel: str, heard: Callable[[str], None], role: str | None = None) -> None:
        self._url, self._channel, self._heard, self._role = url, channel, heard, role
        self._task: asyncio.Task[None] | None = None
        self.connected = asyncio.Event()

    def start(self) -> None:
        """Begin listening in the background."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delay = 0.1
        while True:
            try:
                await self._listen()
            except (*CONNECTION_FAULTS, asyncpg.PostgresError) as error:
                log.warning("listen_lost", channel=self._channel, error=type(error).__name__)
            if self.connected.is_set():  # it was there: this is a new fault, and not the last one going on
                delay = 0.1
            self.connected.clear()
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    async def _listen(self) -> None:
        settings = {"application_name": f"listen {self._channel}"} | ({"role": self._role} if self._role else {})
        connection = await asyncpg.connect(self._url, timeout=10, server_settings=settings)
        try:
            await connection.add_listener(self._channel, lambda _c, _pid, _ch, payload: self._heard(str(payload)))
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _connection: lost.set())
            self.connected.set()
            self._heard("")
            while not lost.is_set():
                try:
                    async with asyncio.timeout(PROBE_SECONDS):
                        await lost.wait()
                except TimeoutError:  # a half-open connection never tells that it is lost; a round trip does
                    await connection.execute("SELECT 1", timeout=10)
            raise ConnectionResetError("the server closed the connection")
        finally:
            await connection.close(timeout=2)
