"""What all tests share: a real Postgres, with a fresh and migrated database for each test that asks for one."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db import embedded
from db.access import Access
from db.migrate import migrate
from db.pool import open_pool
from tests import javascript

# one thread for each sum, in this process and in those it starts: two processes test side by side on two cores, and
# how a sum is split among threads shows in its last bit
os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in [name for name in os.environ if name.startswith("OURVIDZ_")] + ["DATABASE_URL"]:
    if name != "OURVIDZ_TEST_DATABASE_URL":
        os.environ.pop(name, None)  # a developer's own settings must not leak into the tests


def with_database(url: str, name: str) -> str:
    """The same server's URL with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextmanager
def state_folder(parent: str | None = None) -> Iterator[Path]:
    """A folder for an embedded Postgres. Not pytest's own: that is private, and as root the server is another user."""
    with tempfile.TemporaryDirectory(prefix="ovz", dir=parent) as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            for data in (folder / "postgres", folder / "state" / "postgres"):
                embedded.stop(data)


def memory() -> str | None:
    """Where Linux keeps files in memory, if there is room for thousands of databases that come and go."""
    shm = "/dev/shm"  # noqa: S108 (that is what it is called)
    there = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 4 * 2**30
    return shm if there else None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server to make databases on: OURVIDZ_TEST_DATABASE_URL, or an embedded one that ends with the tests."""
    given = os.environ.get("OURVIDZ_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with state_folder(memory()) as folder:
        # these databases live for a test each; that the real ones survive a crash is tested with the real settings
        fast = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        yield embedded.ensure_running(folder / "postgres", options=fast)


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> str:
    """A migrated database that the tests' own are copied from: a copy takes a tenth of a migration's time."""

    async def make() -> str:
        name = f"template_{uuid4().hex[:12]}"
        server = await asyncpg.connect(with_database(postgres_url, "postgres"))
        await server.execute(f'CREATE DATABASE "{name}"')
        connection = await asyncpg.connect(with_database(postgres_url, name))
        await migrate(connection)
        await connection.close()
        await server.close()
        return name

    return asyncio.run(make())


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official JavaScript libraries in it, for `tests.javascript.run`."""
    folder = tmp_path_factory.mktemp("javascript")
    javascript.install(folder)
    return folder


@dataclass
class TestDatabase:
    """A database of one test: `pool` acts as the owner, `worker_pool` as the replicas' role."""

    __test__ = False
    url: str
    pool: asyncpg.Pool
    worker_pool: asyncpg.Pool

    async def user(self, name: str = "alice", role: str = "basic_user") -> UUID:
        """A user of that name."""
        return await Access(self.pool).ensure_user(name, role)


@asynccontextmanager
async def fresh_database(postgres_url: str, template_database: str) -> AsyncIterator[TestDatabase]:
    """A migrated database with nothing in it, dropped at the end."""
    name = f"test_{uuid4().hex[:12]}"
    server = await asyncpg.connect(with_database(postgres_url, "postgres"))
    await server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template_database}" STRATEGY file_copy')
    url = with_database(postgres_url, name)
    pool = await open_pool(url)
    worker_pool = await open_pool(url, role="ourvidz_worker")
    try:
        yield TestDatabase(url, pool, worker_pool)
    finally:
        await worker_pool.close()
        await pool.close()
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


@pytest.fixture
async def database(postgres_url: str, template_database: str) -> AsyncIterator[TestDatabase]:
    """A fresh, migrated database, dropped after the test."""
    async with fresh_database(postgres_url, template_database) as fresh:
        yield fresh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_database(postgres_url: str, template_database: str) -> AsyncIterator[TestDatabase]:
    """One database for the tests of a module that all leave it as it was. They need the module's event loop."""
    async with fresh_database(postgres_url, template_database) as fresh:
        yield fresh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on the real cluster come first: they take longest, and the other files fill up beside them."""
    items.sort(key=lambda item: item.path.parent.name != "e2e")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side, a file's tests stay in one process, with what they share; and all that share the one cluster do."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "e2e" if "/e2e/" in file else file

    return ByFile(config, log)
