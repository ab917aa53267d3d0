"""The plans of the statements that run all day, pinned by what they read: buffers do not depend on the machine.

The database behind them (filled.sql) is large where it must not matter: a million jobs that ended, a hundred thousand
that wait in other queues or for other users, a hundred thousand callbacks that were delivered or wait for later. Every
statement is explained twice: with the plan that Postgres makes for known parameters, and with the generic one that a
prepared statement changes to after a few runs.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.pool import PLANNER, as_user, open_pool, queries
from tests.conftest import with_database
from tests.db.test_queue import new_job

RUNNING, WORKER = 40, UUID(int=0xABC)  # as filled.sql has them
CUSTOM, GENERIC = "force_custom_plan", "force_generic_plan"
BOTH_PLANS = pytest.mark.parametrize("mode", [CUSTOM, GENERIC])


@pytest.fixture(scope="module")
def filled_url(postgres_url: str, template_database: str) -> Iterator[str]:
    """A database with a past and a backlog, made once for this module; every test rolls its changes back."""
    name = f"filled_{uuid4().hex[:12]}"
    url = with_database(postgres_url, name)

    async def on_server(statement: str) -> None:
        server = await asyncpg.connect(with_database(postgres_url, "postgres"))
        await server.execute(statement)
        await server.close()

    async def fill() -> None:
        await on_server(f'CREATE DATABASE "{name}" TEMPLATE "{template_database}"')
        connection = await asyncpg.connect(url)
        script = Path(__file__).with_name("filled.sql").read_text(encoding="utf-8")
        for statement in script.strip().removesuffix(";").split(";\n"):  # one by one, as VACUUM asks
            await connection.execute(statement)
        await connection.close()

    asyncio.run(fill())
    yield url
    asyncio.run(on_server(f'DROP DATABASE "{name}" WITH (FORCE)'))


@dataclass
class Plan:
    """What Postgres did: the nodes of a plan."""

    nodes: list[dict[str, Any]]

    @property
    def buffers(self) -> int:
        """All that was touched. A part that nobody reads from, as an event, is not in the top node's sum."""
        read_from = {node["CTE Name"] for node in self.nodes if node["Node Type"] == "CTE Scan"}
        apart = [
            node
            for node in self.nodes
            if node.get("Subplan Name", "").startswith("CTE ") and node["Subplan Name"][4:] not in read_from
        ]
        return sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in (self.nodes[0], *apart))

    def whole_scans(self, relation: str) -> int:
        """Scans of a whole table."""
        return sum(n["Node Type"] == "Seq Scan" and n["Relation Name"] == relation for n in self.nodes)

    @property
    def sorted_rows(self) -> float:
        """Rows that went through a sort."""
        return sum(n["Actual Rows"] * n["Actual Loops"] for n in self.nodes if "Sort" in n["Node Type"])

    @property
    def removed(self) -> float:
        """Rows that were read and then thrown away."""
        keys = ("Rows Removed by Filter", "Rows Removed by Index Recheck", "Rows Removed by Join Filter")
        return sum(node.get(key, 0) * node["Actual Loops"] for node in self.nodes for key in keys)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from walk(child)


def literal(value: object) -> str:
    if isinstance(value, list):
        value = "{" + ",".join("NULL" if v is None else str(v) for v in value) + "}"
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def parameters(file: str, name: str) -> list[str]:
    """The parameters of a statement in the order of their numbers, which is that of their first use."""
    text = files("db").joinpath("queries", f"{file}.sql").read_text(encoding="utf-8")
    block = next(b for b in text.split("-- name: ") if b.startswith(f"{name}("))
    body = re.sub("--.*", "", block.split("\n", 1)[1])
    return list(dict.fromkeys(re.findall(r"(?<!:):([a-z_]+)", body)))


async def explain(connection: asyncpg.Connection, file: str, name: str, mode: str, **values: object) -> Plan:
    """Run a statement of `queries/<file>.sql` under EXPLAIN, once to warm the caches and once to count, and undo it."""
    query = getattr(queries(file), name)
    order = parameters(file, name)
    given = f"({', '.join(literal(values[name]) for name in order)})" if order else ""
    await connection.execute(f"SET plan_cache_mode = {mode}")
    await connection.execute(f"PREPARE pinned AS {query.sql}")
    try:
        for _ in range(2):
            transaction = connection.transaction()
            await transaction.start()
            try:
                raw = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE pinned{given}")
            finally:
                await transaction.rollback()
    finally:
        await connection.execute("DEALLOCATE pinned")
    return Plan(list(walk(json.loads(raw)[0]["Plan"])))


@pytest.fixture
async def filled(filled_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the filled database."""
    connection = await asyncpg.connect(filled_url, server_settings=PLANNER)
    yield connection
    await connection.close()


async def running(connection: asyncpg.Connection, count: int) -> list[UUID]:
    rows = await connection.fetch(
        "SELECT job_id FROM job_queue WHERE state = 'running' ORDER BY job_id LIMIT $1", count
    )
    return [row["job_id"] for row in rows]


@BOTH_PLANS
async def test_claim_reads_a_handful_of_pages_behind_any_backlog(filled: asyncpg.Connection, mode: str) -> None:
    plan = await explain(
        filled, "queue", "claim", mode, queue="sdxl", slots=1, worker=WORKER, lease_seconds=30, chosen=[], least_class=0
    )
    assert plan.whole_scans("job_queue") == plan.whole_scans("jobs") == 0
    assert plan.sorted_rows <= 1  # the answer, never the queue
    assert plan.removed <= 10
    assert plan.buffers <= 40, "in all: the queue row, the clock, the job, the event and the outbox row"


@BOTH_PLANS
async def test_claim_costs_by_the_job_and_not_by_the_queue(filled: asyncpg.Connection, mode: str) -> None:
    plan = await explain(
        filled, "queue", "claim", mode, queue="wan", slots=4, worker=WORKER, lease_seconds=30, chosen=[], least_class=0
    )
    assert plan.nodes[0]["Actual Rows"] == 4
    assert plan.whole_scans("job_queue") == plan.whole_scans("jobs") == 0
    # the order of the answer is that of its outer side
    assert {node["Node Type"] for node in plan.nodes if "Join" in node["Node Type"]} == set()
    assert plan.sorted_rows <= 4
    assert plan.removed <= 4 * 10
    assert plan.buffers <= 4 * 40


@BOTH_PLANS
async def test_claim_of_an_empty_queue_reads_almost_nothing(filled: asyncpg.Connection, mode: str) -> None:
    plan = await explain(
        filled, "queue", "claim", mode, queue="qwen", slots=4, worker=WORKER, lease_seconds=30, chosen=[], least_class=0
    )
    assert plan.nodes[0]["Actual Rows"] == 0
    assert plan.buffers <= 12


@BOTH_PLANS
async def test_renew_touches_its_own_rows_only(filled: asyncpg.Connection, mode: str) -> None:
    ids = await running(filled, 8)
    given = {"attempts": [1] * 8, "phases": ["denoise"] * 8, "steps": [1] * 8, "totals": [4] * 8}
    given |= {"preview_steps": [None] * 8, "preview_totals": [None] * 8}
    plan = await explain(filled, "queue", "renew", mode, job_ids=ids, worker=WORKER, lease_seconds=30, **given)
    assert plan.nodes[0]["Actual Rows"] == 8
    assert plan.whole_scans("job_queue") == 0
    assert plan.removed == 0
    assert plan.buffers <= 8 * 10


@BOTH_PLANS
async def test_expired_reads_the_running_rows_only(filled: asyncpg.Connection, mode: str) -> None:
    plan = await explain(filled, "queue", "expired", mode, page_size=100)
    assert plan.whole_scans("job_queue") == 0
    assert plan.removed <= RUNNING
    assert plan.buffers <= RUNNING + 10


@BOTH_PLANS
@pytest.mark.parametrize("duty", ["overdue", "promote", "stopped_waiting"])
async def test_upkeep_with_nothing_to_do_reads_almost_nothing(filled: asyncpg.Connection, mode: str, duty: str) -> None:
    plan = await explain(filled, "queue", duty, mode, page_size=100)
    assert plan.whole_scans("job_queue") == 0
    assert plan.removed == 0
    assert plan.buffers <= 6


@BOTH_PLANS
@pytest.mark.parametrize("move", ["settle", "requeue"])
async def test_the_end_of_a_run_is_found_by_its_key(filled: asyncpg.Connection, mode: str, move: str) -> None:
    (job_id,) = await running(filled, 1)
    end = {"job_ids": [job_id], "attempts": [1], "statuses": ["completed"], "times": [1], "workers": [WORKER]}
    back = {"n": 0, "job_id": str(job_id), "attempt": 1, "kind": "requeued"}
    given = end | {"details": [None]} if move == "settle" else {"rows": json.dumps([back])}
    plan = await explain(filled, "queue", move, mode, **given)
    (left,) = (node for node in plan.nodes if node["Node Type"] == "ModifyTable" and node["Relation Name"] == "jobs")
    assert left["Actual Rows"] == 1
    assert plan.whole_scans("job_queue") == plan.whole_scans("jobs") == plan.whole_scans("callback_outbox") == 0
    assert plan.removed <= RUNNING
    assert plan.buffers <= 100


@BOTH_PLANS
async def test_accepting_under_every_limit_reads_no_past_and_no_backlog(filled: asyncpg.Connection, mode: str) -> None:
    row = {name: value for name, value in new_job(UUID(int=5)).to_row().items() if value is not None}
    given = {"rows": json.dumps([row | {"submission": 0}], default=str)}
    free = await explain(filled, "jobs", "accept", mode, **given)
    limits = {"maxJobsPerUser": 1000, "maxJobsPerHour": 1000, "rateLimitRequestsPerMinute": 1000, "chargeCredits": True}
    change = "UPDATE system_config SET config = $1::text::jsonb"
    past = """INSERT INTO usage_logs (user_id, action, created_at)
              SELECT $1, 'past', now() - n * interval '1 hour' FROM generate_series(1, 5000) n"""
    await filled.execute(past, UUID(int=5))
    await filled.execute(change, json.dumps(limits))
    try:
        limited = await explain(filled, "jobs", "accept", mode, **given)
    finally:
        await filled.execute(change, "{}")
        await filled.execute("DELETE FROM usage_logs WHERE action = 'past'")
    assert free.buffers <= 60, "in all: the job, its place, its event, its charge, their indexes"
    assert limited.buffers <= free.buffers + 80, "at most, for a first job: a quota row is made, a balance charged"
    assert limited.whole_scans("jobs") == limited.whole_scans("job_queue") == limited.whole_scans("usage_logs") == 0


@BOTH_PLANS
async def test_outbox_claim_passes_over_what_is_delivered_or_not_due(filled: asyncpg.Connection, mode: str) -> None:
    caps = {"per_host": 4, "per_user": 10, "window": 200}
    plan = await explain(filled, "callbacks", "claim_due", mode, limit=10, lease_seconds=30, **caps)
    assert plan.nodes[0]["Actual Rows"] == 3
    assert plan.whole_scans("callback_outbox") == 0
    assert plan.removed <= 10 * 10
    assert plan.sorted_rows <= 3 * 4
    assert plan.buffers <= 150


@BOTH_PLANS
async def test_run_times_come_from_an_index(filled: asyncpg.Connection, mode: str) -> None:
    plan = await explain(filled, "jobs", "run_seconds", mode, job_type="sdxl_image_fast")
    assert plan.whole_scans("jobs") == 0
    assert plan.buffers <= 10


async def test_a_page_of_a_user_does_not_read_the_jobs_of_others(filled: asyncpg.Connection) -> None:
    nobody = dict.fromkeys(("status", "job_type", "created_after", "before", "after"))
    plan = await explain(filled, "jobs", "list_page", CUSTOM, user_id=UUID(int=5), page_size=20, **nobody)
    assert plan.nodes[0]["Actual Rows"] == 20
    assert plan.whole_scans("jobs") == 0
    assert plan.removed == 0
    assert plan.buffers <= 20 * 12


# ------------------------------------------------------------------------- what is read of a past of a million jobs

ANYTHING = dict.fromkeys(("user_id", "status", "job_type", "created_after", "before", "after"))
A_USER, AN_ADMIN, A_JOB = UUID(int=5), UUID(int=1000), UUID(int=500_000)


@pytest.fixture
async def served(filled_url: str) -> AsyncIterator[asyncpg.Pool]:
    """The API's pool, with one connection. User 1000 is an admin."""
    async with await open_pool(filled_url, max_size=1) as pool:
        await pool.execute(
            "INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin') ON CONFLICT DO NOTHING", AN_ADMIN
        )
        yield pool


async def explain_as_served(pool: asyncpg.Pool, name: str, **values: object) -> Plan:
    """The plan of a connection that is in use, for a read of jobs in a user's name, or in an admin's for all users."""
    query, order = getattr(queries("jobs"), name), parameters("jobs", name)
    given = f"({', '.join(literal(values[name]) for name in order)})"
    user = values.get("user_id")
    async with as_user(pool, user if isinstance(user, UUID) else AN_ADMIN) as connection:
        await connection.execute(f"PREPARE pinned AS {query.sql}")
        for _ in range(8):
            await connection.execute(f"EXECUTE pinned{given}")
        raw = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE pinned{given}")
        await connection.execute("DEALLOCATE pinned")
    return Plan(list(walk(raw[0]["Plan"])))


@pytest.mark.parametrize(
    ("given", "removed"),
    [
        pytest.param({"user_id": A_USER}, 0, id="of a user"),
        pytest.param({"user_id": A_USER, "status": "completed"}, 100, id="of a user and a status"),
        pytest.param({"user_id": A_USER, "before": A_JOB}, 0, id="of a user, further down"),
        pytest.param({"user_id": A_USER, "after": A_JOB}, 0, id="of a user, further up"),
        pytest.param({}, 0, id="of everybody"),
        pytest.param({"before": A_JOB}, 0, id="of everybody, further down"),
    ],
)
async def test_a_page_reads_little_on_a_connection_that_is_in_use(
    served: asyncpg.Pool, given: dict[str, object], removed: int
) -> None:
    plan = await explain_as_served(served, "list_page", page_size=20, **(ANYTHING | given))
    assert plan.nodes[0]["Actual Rows"] == 20
    assert plan.whole_scans("jobs") == 0
    assert plan.removed <= removed
    assert plan.buffers <= 20 * 12 + removed * 7, (
        "a row of the page is looked up in the queue too, before its status is known"
    )


@pytest.mark.parametrize("job_id", [A_JOB, UUID("eeeeeeee-0000-0000-0000-000000000005")], ids=["ended", "waiting"])
async def test_one_job_is_found_by_its_key(served: asyncpg.Pool, job_id: UUID) -> None:
    plan = await explain_as_served(served, "read", job_id=job_id)
    assert plan.nodes[0]["Actual Rows"] == 1
    assert plan.whole_scans("jobs") == plan.whole_scans("job_queue") == plan.whole_scans("callback_outbox") == 0
    # what stands before a waiting job is counted in the queue, up to a limit, by a function that no plan shows
    reads = [node for node in plan.nodes if node["Node Type"] != "Function Scan"]
    assert max(node["Actual Rows"] * node["Actual Loops"] for node in reads) <= 5
    ended = job_id == A_JOB
    assert not ended or plan.buffers <= 40


@BOTH_PLANS
@pytest.mark.parametrize(("name", "given"), [("depth", {}), ("work", {"queue": "sdxl"})])
async def test_counting_what_is_open_does_not_look_at_the_past(
    filled: asyncpg.Connection, mode: str, name: str, given: dict[str, object]
) -> None:
    plan = await explain(filled, "queue", name, mode, **given)
    assert {node["Relation Name"] for node in plan.nodes if "Relation Name" in node} == {"job_queue"}


async def test_an_end_does_not_read_what_is_due_although_its_plan_was_made_when_nothing_was(database: Any) -> None:
    connection = await asyncpg.connect(database.url, server_settings=PLANNER)
    end = {"job_ids": [uuid4()], "attempts": [1], "statuses": ["completed"], "times": [1], "workers": [WORKER]}
    try:
        plan = await explain(connection, "queue", "settle", GENERIC, **end, details=[])
    finally:
        await connection.close()
    used = {node["Index Name"] for node in plan.nodes if node.get("Index Name", "").startswith("callback_outbox")}
    assert used == {"callback_outbox_job_id_seq_endpoint_id_key"}


@BOTH_PLANS
async def test_pruning_reads_the_batch_that_it_deletes(filled: asyncpg.Connection, mode: str) -> None:
    transaction = filled.transaction()
    await transaction.start()
    await filled.execute(
        """INSERT INTO job_events (job_id, user_id, attempt, kind, at)
           SELECT id, user_id, 1, kind, completed_at
           FROM (SELECT * FROM jobs WHERE completed_at IS NOT NULL LIMIT 20000) ended,
                unnest(ARRAY['queued', 'started', 'completed']) kind"""
    )
    try:
        plan = await explain(filled, "retention", "prune_events", mode, days=30, jobs=100)
    finally:
        await transaction.rollback()
    assert plan.whole_scans("jobs") == plan.whole_scans("job_events") == 0
    assert plan.removed == 0
    assert plan.buffers <= 100 * 20


@BOTH_PLANS
async def test_an_archive_finds_its_jobs_from_the_oldest_on(filled: asyncpg.Connection, mode: str) -> None:
    cutoff = await filled.fetchval("SELECT now() - interval '30 days'")
    plan = await explain(filled, "archives", "archivable", mode, cutoff=cutoff, batch=100)
    assert plan.nodes[0]["Actual Rows"] == 100
    assert plan.whole_scans("jobs") == plan.whole_scans("callback_outbox") == 0
    assert plan.removed <= 100  # every other one has a callback to send
    assert plan.buffers <= 3 * 200 * 12, "for each of up to three processes"
