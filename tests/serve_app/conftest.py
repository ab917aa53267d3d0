"""The API in this process: real Postgres, a real folder of blobs, and requests that go in as ASGI."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx2
import pytest
from fastapi import FastAPI

from db.access import Access
from db.blobs import BlobStore
from db.prompts import Prompts
from db.queue import Claim, Queue, Settlement
from deployments.prompting import negative_rows, template_rows
from deployments.settings import Settings
from serve_app.app import api
from serve_app.edge import Edge
from tests.provider_standin import Standin, standing_in

BASE = "http://api.test"
SECRET = "s" * 40


@dataclass
class InProcess:
    """The API with its lifespan run, and what it stores into."""

    settings: Settings
    app: FastAPI
    pool: asyncpg.Pool
    worker_pool: asyncpg.Pool
    stack: contextlib.AsyncExitStack

    @property
    def edge(self) -> Edge:
        edge: Edge = self.app.state.edge
        return edge

    @property
    def queue(self) -> Queue:
        return Queue(self.worker_pool)

    @property
    def blobs(self) -> BlobStore:
        return self.edge.blobs

    async def client(self, key: str | None = None, app: FastAPI | None = None, **options: Any) -> httpx2.AsyncClient:
        """A client with that API key, closed with the fixture."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx2.ASGITransport(app=app or self.app, **options)
        opened = httpx2.AsyncClient(transport=transport, base_url=BASE, headers=headers, timeout=30)
        return await self.stack.enter_async_context(opened)

    async def key(self, name: str = "alice", role: str = "basic_user", expires_at: datetime | None = None) -> str:
        """A new key of the user of that name."""
        access = Access(self.pool)
        made = await access.create_key(await access.ensure_user(name, role), "test", expires_at)
        assert made.secret is not None
        return made.secret

    async def user(self, name: str = "alice", role: str = "basic_user") -> httpx2.AsyncClient:
        """A client in the name of a user, who is made when new."""
        return await self.client(await self.key(name, role))

    async def claim(self, queue: str = "sdxl") -> Claim:
        """The next job of a queue, in the hands of a replica."""
        (claim,) = await self.queue.claim(queue, uuid4(), 1)
        return claim

    async def end(self, claim: Claim, **values: Any) -> None:
        """End a job that was claimed."""
        assert await self.queue.settle([Settlement(job_id=claim.job_id, attempt=claim.attempt, **values)])

    async def stored(self) -> dict[str, int]:
        """How many rows each table holds, and how many files the object store."""
        tables = await self.pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
        counts = {t: await self.pool.fetchval(f'SELECT count(*) FROM "{t}"') for (t,) in tables}  # noqa: S608
        return counts | {"blobs": count_files(Path(self.settings.blobs().removeprefix("file://")))}

    async def events(self, job_id: UUID | str) -> list[str]:
        """The kinds of a job's events, oldest first."""
        rows = await self.pool.fetch("SELECT kind FROM job_events WHERE job_id = $1 ORDER BY id", UUID(str(job_id)))
        return [kind for (kind,) in rows]


def count_files(folder: Path) -> int:
    """The files in a folder and below."""
    return sum(entry.is_file() for entry in folder.rglob("*"))


@contextlib.asynccontextmanager
async def in_process(database: Any, folder: Path, **changes: Any) -> AsyncIterator[InProcess]:
    """The API over a database and a folder of the test's own; `changes` are settings."""
    values: dict[str, Any] = {
        "database_url": database.url,
        "state_dir": folder / "state",
        "blob_url": f"file://{folder / 'blobs'}",
        "public_url": BASE,
        "signing_secret": SECRET,
        "callback_secret": SECRET[::-1] + "c",
        "job_callback_secret": SECRET + "j",
    }
    settings = Settings(**(values | changes))
    await Prompts(database.pool).seed(template_rows(), negative_rows())
    app = api(settings)
    async with app.router.lifespan_context(app), contextlib.AsyncExitStack() as stack:
        yield InProcess(settings, app, database.pool, database.worker_pool, stack)


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state folder for all, so that the tiny weights are made once; no test's rows or files are in it."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
async def provider() -> AsyncIterator[Standin]:
    """The stand-in of an outside provider."""
    async with standing_in() as standin:
        yield standin


@pytest.fixture
async def server(database: Any, tmp_path: Path, state_dir: Path) -> AsyncIterator[InProcess]:
    """The API with the settings of a laptop."""
    async with in_process(database, tmp_path, state_dir=state_dir) as opened:
        yield opened


@pytest.fixture
async def alice(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an ordinary user."""
    return await server.user("alice")


def a_job(**changes: Any) -> dict[str, Any]:
    """The body of a request for a small image."""
    return {"job_type": "sdxl_image_fast", "prompt": "a lighthouse at dusk", "steps": 1} | changes
