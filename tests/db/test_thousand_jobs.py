"""A thousand jobs: all that were accepted end, each once; and whoever may see all of them reads little for a page."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.jobs import Jobs, Status
from db.pool import as_user, open_pool
from db.queue import Queue, Settlement
from tests.db.test_plans import AN_ADMIN, ANYTHING, Plan, explain_as_served, walk
from tests.db.test_queue import asset, new_job
from tests.db.test_security import acting

JOBS, BATCH, LOOPS, SLOTS, USERS = 1000, 50, 6, 7, 10
PAGE = 100


def batches(users: list[UUID]) -> list[list[Any]]:
    """The jobs of all users in turn, so many to a batch, in the order of their ids."""
    jobs = [new_job(users[n % len(users)]) for n in range(JOBS)]
    return [jobs[n : n + BATCH] for n in range(0, JOBS, BATCH)]


async def test_a_thousand_jobs_of_several_loops_end_once_each(database: Any) -> None:
    users = [await database.user(f"user {n}") for n in range(USERS)]
    given = batches(users)
    queue, ended, taken = Queue(database.worker_pool), Counter[UUID](), Counter[int]()

    async def accept(some: list[list[Any]]) -> None:
        for batch in some:
            await Jobs(database.pool).accept_all(batch)

    async def loop(number: int) -> None:
        """A replica: it takes what is free, ends it, and says so once more, as after an answer that was lost."""
        worker, chance = uuid4(), random.Random(number)
        while ended.total() < JOBS:
            claims = await queue.claim("sdxl", worker, chance.randint(1, SLOTS))
            taken[number] += len(claims)
            ends = [
                Settlement(
                    job_id=c.job_id, attempt=c.attempt, status=Status.COMPLETED, assets=[asset(c.job_id, c.attempt)]
                )
                for c in claims
            ]
            ended.update(one.job_id for one in await queue.settle(ends))
            assert await queue.settle(ends) == []

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for half in (given[::2], given[1::2]):  # two servers of the API
            group.create_task(accept(half))
        for number in range(LOOPS):
            group.create_task(loop(number))

    assert ended == Counter(job.id for batch in given for job in batch)
    for what, query in {
        "jobs": "SELECT id FROM jobs WHERE status = 'completed' AND attempts = 1",
        "ends told": "SELECT job_id FROM job_events WHERE kind = 'completed'",
        "files": "SELECT job_id FROM workspace_assets",
        "last callbacks": "SELECT job_id FROM callback_outbox WHERE terminal",
    }.items():
        assert Counter(job_id for (job_id,) in await database.pool.fetch(query)) == ended, what
    assert await database.pool.fetchval("SELECT count(*) FROM job_queue") == 0
    assert (taken.total(), len(+taken) > 1) == (JOBS, True), "one loop alone would have nobody in its way"


# ---------------------------------------------------------------------------------------------------- an admin's list


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def listed(shared_database: Any) -> AsyncIterator[tuple[asyncpg.Pool, list[UUID]]]:
    """The API's pool with one connection, and the ids of a thousand jobs of several users, newest first."""
    users = [await shared_database.user(f"user {n}") for n in range(USERS)]
    await shared_database.pool.execute("INSERT INTO profiles (id, username) VALUES ($1, 'root')", AN_ADMIN)
    await shared_database.pool.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin')", AN_ADMIN)
    given = batches(users)
    for batch in given:
        await Jobs(shared_database.pool).accept_all(batch)
    await shared_database.pool.execute("ANALYZE jobs, job_queue, workspace_assets")
    async with await open_pool(shared_database.url, max_size=1) as pool:
        yield pool, sorted((job.id for batch in given for job in batch), reverse=True)


async def walked(pool: asyncpg.Pool, reader: UUID) -> list[UUID]:
    """All that a reader may see, page by page."""
    seen: list[UUID] = []
    while True:
        async with as_user(pool, reader) as connection:
            page = await Jobs(pool).list_page(connection, before=seen[-1] if seen else None, page_size=PAGE)
        if not page:
            return seen
        seen += [UUID(record.job["id"]) for record in page]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_admin_pages_through_the_jobs_of_all_users(listed: tuple[asyncpg.Pool, list[UUID]]) -> None:
    pool, ids = listed
    assert await walked(pool, AN_ADMIN) == ids
    owner = await pool.fetchval("SELECT user_id FROM jobs WHERE id = $1", ids[0])
    assert await walked(pool, owner) == ids[::USERS]
    assert await walked(pool, uuid4()) == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("page", [0, 5, 9])
async def test_a_page_of_an_admin_reads_each_job_once_at_most(
    listed: tuple[asyncpg.Pool, list[UUID]], page: int
) -> None:
    """Of so few rows Postgres walks through those that are newer than the page, and looks in the queue for each."""
    pool, ids = listed
    before = {"before": ids[page * PAGE - 1]} if page else {}
    plan = await explain_as_served(pool, "list_page", page_size=PAGE, **(ANYTHING | before))
    assert plan.nodes[0]["Actual Rows"] == PAGE
    assert plan.removed <= page * PAGE
    assert plan.buffers <= PAGE * 12 + JOBS * 4


@pytest.mark.asyncio(loop_scope="module")
async def test_an_admins_table_of_a_thousand_jobs_is_one_short_read(listed: tuple[asyncpg.Pool, list[UUID]]) -> None:
    """What the portal asks the REST layer for. Who may see a row is found out once, not for each."""
    pool, ids = listed
    statement = "SELECT * FROM jobs ORDER BY created_at DESC, id DESC LIMIT 1000"
    async with acting(pool, "authenticated", AN_ADMIN) as connection:
        assert [row["id"] for row in await connection.fetch(statement)] == ids
        raw = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
    plan = Plan(list(walk(raw[0]["Plan"])))
    assert plan.nodes[0]["Actual Rows"] == JOBS
    assert plan.buffers <= JOBS // 2, "some rows to a page, and the roles of one user"
