"""Jobs in the hands of replicas, and a road to Postgres that can be blocked."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.jobs import Jobs, NewJob
from db.pool import open_pool
from db.queue import Queue
from deployments.held import Held
from tests.db.test_queue import new_job


class Road:
    """A TCP proxy in front of Postgres. It can keep the server's answers to itself, and be cut."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._socket = parse_qs(parts.query).get("host", [None])[0]
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 5432
        self._parts = parts
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers = asyncio.Event()
        self._answers.set()
        self._closed = False
        self._refusals = 0
        self._refused = asyncio.Condition()
        self.port = 0

    @property
    def url(self) -> str:
        """The database by way of this road."""
        user = self._parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
        return urlunsplit(self._parts._replace(netloc=netloc, query="sslmode=disable"))

    def hold_answers(self) -> None:
        """From now on the server is heard by nobody, while it hears everybody."""
        self._answers.clear()

    def let_answers_through(self) -> None:
        """What the server said meanwhile arrives now."""
        self._answers.set()

    def cut(self) -> None:
        """End all connections; what was held back is lost."""
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        self._answers.set()

    def close(self) -> None:
        """The server is away: connections end, and new ones are turned down."""
        self._closed = True
        self.cut()

    def open(self) -> None:
        """It is back."""
        self._closed = False

    async def refused(self, times: int) -> None:
        """Wait until so many connections were turned down since the road was made."""
        async with asyncio.timeout(30), self._refused:
            await self._refused.wait_for(lambda: self._refusals >= times)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, in both directions."""
        if self._closed:
            writer.transport.abort()
            async with self._refused:
                self._refusals += 1
                self._refused.notify_all()
            return
        if self._socket:
            onward, back = await asyncio.open_unix_connection(f"{self._socket}/.s.PGSQL.{self._port}")
        else:
            onward, back = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, back}
        for source, sink, answers in ((reader, back, False), (onward, writer, True)):
            task = asyncio.create_task(self._carry(source, sink, answers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(65536):
                if answers:
                    await self._answers.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
            self._writers.discard(sink)


@pytest.fixture
async def road(database: Any) -> AsyncIterator[Road]:
    """A road to the test's database."""
    opened = Road(database.url)
    server = await asyncio.start_server(opened.serve, "127.0.0.1", 0)
    opened.port = server.sockets[0].getsockname()[1]
    try:
        yield opened
    finally:
        server.close()
        opened.cut()
        await asyncio.gather(*opened._tasks, return_exceptions=True)


@pytest.fixture
async def far_pool(road: Road) -> AsyncIterator[asyncpg.Pool]:
    """The replicas' pool over that road."""
    pool = await open_pool(road.url, role="ourvidz_worker", max_size=3)
    try:
        yield pool
    finally:
        pool.terminate()


class Desk:
    """Accepts jobs, puts them into the hands of a worker, and looks at what became of them."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.jobs, self.queue = Jobs(database.pool), Queue(database.worker_pool)
        self.worker = uuid4()

    async def accept(self, count: int = 1, **changes: Any) -> list[UUID]:
        """New jobs of one user, in their order."""
        user = await self.database.user()
        made: list[NewJob] = [new_job(user, **changes) for _ in range(count)]
        for job in made:
            await self.jobs.accept(job)
        return [job.id for job in made]

    async def hold(self, **changes: Any) -> Held:
        """A new job in this worker's hands."""
        await self.accept(**changes)
        (claim,) = await self.queue.claim("sdxl", self.worker, 1)
        return Held(claim)

    async def take(self, job_id: UUID) -> None:
        """Give a running job to another worker, as happens when its lease has run out."""
        await self.database.pool.execute(
            "UPDATE job_queue SET worker = $2, attempt = attempt + 1 WHERE job_id = $1", job_id, uuid4()
        )

    async def expire(self, job_id: UUID | None = None) -> None:
        """Let leases run out, by the database's own clock."""
        await self.database.pool.execute(
            """UPDATE job_queue SET lease_until = now() - interval '1 second'
               WHERE state = 'running' AND ($1::uuid IS NULL OR job_id = $1)""",
            job_id,
        )

    async def status(self, job_id: UUID) -> tuple[str, str | None]:
        """A job's status and error code."""
        row = await self.database.pool.fetchrow("SELECT status, error_code FROM current_jobs WHERE id = $1", job_id)
        return tuple(row)

    async def queued(self, job_id: UUID) -> tuple[str, int] | None:
        """A job's state in the queue, and its failures."""
        row = await self.database.pool.fetchrow("SELECT state::text, failures FROM job_queue WHERE job_id = $1", job_id)
        return None if row is None else tuple(row)

    async def events(self, job_id: UUID) -> list[str]:
        """What happened to a job, with the error codes."""
        rows = await self.database.pool.fetch(
            "SELECT kind, data ->> 'error_code' AS code FROM job_events WHERE job_id = $1 ORDER BY id", job_id
        )
        return [f"{row['kind']} {row['code']}" if row["code"] else row["kind"] for row in rows]

    async def callbacks(self, job_id: UUID) -> list[str]:
        """The events that somebody is called about."""
        rows = await self.database.pool.fetch(
            "SELECT event_type FROM callback_outbox WHERE job_id = $1 AND state <> 'superseded' ORDER BY seq", job_id
        )
        return [event for (event,) in rows]

    async def until(self, statement: str, *arguments: Any) -> Any:
        """The first value of a statement that is true."""
        async with asyncio.timeout(120):
            while not (value := await self.database.pool.fetchval(statement, *arguments)):
                pass
        return value


@pytest.fixture
def desk(database: Any) -> Desk:
    return Desk(database)
