"""What a real Postgres answers when it can't: it is tried again, or refused clearly, and never taken for bad data."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from db import embedded
from db.callbacks import Callbacks
from db.jobs import Jobs, Status
from db.migrate import migrate
from db.pool import CONNECTION_FAULTS, WORKER_ROLE, open_pool
from db.queue import Queue, Requeue, Settlement
from deployments.callbacks import Deliverer
from deployments.claims import ClaimLoop
from deployments.egress import AllowedHost, Egress, EgressPolicy
from deployments.endings import Endings, Outcome
from deployments.held import Held
from deployments.signatures import CallbackSecrets
from tests.conftest import TestDatabase, state_folder
from tests.db.outbox import Outbox
from tests.deployments import hostile
from tests.deployments.conftest import Desk, Road
from tests.serve_app.conftest import a_job, in_process

# out of disk, of memory, of connections; shut down, crashed, starting; a standby; a deadlock; a broken disk
STATES = ["53100", "53200", "53300", "57P01", "57P02", "57P03", "25006", "40P01", "58030"]


async def fail_times(pool: asyncpg.Pool, table: str, moment: str, state: str, times: int) -> None:
    """Let Postgres refuse the next writes of a table with an SQLSTATE. A sequence counts: no rollback takes it back."""
    await pool.execute(
        f"""CREATE SEQUENCE faults;
            CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
              IF nextval('faults') <= {times} THEN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END IF;
              RETURN NEW; END $$;
            CREATE TRIGGER fault BEFORE {moment} ON {table} FOR EACH ROW EXECUTE FUNCTION fault()"""
    )


def completed(desk: Desk, held: Held) -> Settlement:
    return Settlement(job_id=held.claim.job_id, attempt=held.claim.attempt, status=Status.COMPLETED, worker=desk.worker)


@pytest.mark.parametrize("state", STATES)
async def test_an_end_is_written_again_after_a_fault_of_the_server(desk: Desk, state: str) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await fail_times(desk.database.pool, "jobs", "UPDATE", state, 2)
    assert await endings.settle(held, completed(desk, held))
    assert await desk.status(held.claim.job_id) == ("completed", None)
    assert await desk.database.pool.fetchval("SELECT last_value FROM faults") >= 3, "it was refused before"


async def test_a_requeue_is_written_again_after_a_fault_of_the_server(desk: Desk) -> None:
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(desk.database.worker_pool), desk.worker, 30)
    await fail_times(desk.database.pool, "jobs", "UPDATE", "53100", 2)
    back = Requeue(job_id=held.claim.job_id, attempt=1, counts=True)
    assert await endings.requeue(held, back) is Outcome.REQUEUED
    assert await desk.queued(held.claim.job_id) == ("ready", 1)


@pytest.mark.parametrize("state", ["53100", "53300", "25006"])
async def test_a_claim_waits_for_a_server_that_can_not_and_goes_on(desk: Desk, state: str) -> None:
    await desk.accept()
    taken: asyncio.Queue[Held] = asyncio.Queue()

    async def work(held: Held) -> None:
        taken.put_nowait(held)
        await desk.queue.settle([completed(desk, held)])

    await fail_times(desk.database.pool, "jobs", "UPDATE", state, 3)
    loop = ClaimLoop(
        desk.queue, "sdxl", desk.worker, work, slots=1, lease_seconds=30, renew_seconds=1, poll_seconds=0.05
    )
    loop.start()
    try:
        async with asyncio.timeout(60):
            held = await taken.get()
    finally:
        await loop.drain(10)
    assert held.claim.failures == 0
    assert loop.fault is None


async def test_a_claim_whose_answer_was_lost_is_given_back_at_once(
    desk: Desk, road: Road, far_pool: asyncpg.Pool
) -> None:
    taken: asyncio.Queue[Held] = asyncio.Queue()

    async def work(held: Held) -> None:
        await desk.queue.settle([completed(desk, held)])
        taken.put_nowait(held)

    # the statement is prepared, so that the claim just runs
    assert await Queue(far_pool).claim("sdxl", desk.worker, 1) == []
    loop = ClaimLoop(
        Queue(far_pool), "sdxl", desk.worker, work, slots=1, lease_seconds=3600, renew_seconds=600, poll_seconds=0.2
    )
    (job_id,) = await desk.accept()
    road.hold_answers()
    loop.start()
    try:
        await desk.until("SELECT state = 'running' FROM job_queue")
        road.cut()
        async with asyncio.timeout(60):
            held = await taken.get()
    finally:
        await loop.drain(10)
    assert (held.claim.attempt, held.claim.failures) == (2, 0), "nothing was held against it"
    assert await desk.events(job_id) == ["queued", "started", "requeued claim_unheard", "started", "completed"]


async def test_a_pool_that_was_filled_by_a_standby_leaves_it(database: TestDatabase) -> None:
    name = await database.pool.fetchval("SELECT current_database()")
    await database.pool.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    pool = await open_pool(database.url, role=WORKER_ROLE, max_size=1)
    try:
        await database.pool.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await pool.execute("UPDATE workers SET running = 0")
        await pool.execute("UPDATE workers SET running = 0")
        assert pool.get_size() == 1
    finally:
        await pool.close()


# --------------------------------------------------------------------------------------------------------- the API


@pytest.mark.parametrize("state", ["53100", "25006", "57P01"])
async def test_a_submission_that_postgres_can_not_take_is_503_and_stores_nothing(
    database: TestDatabase, tmp_path: Path, state: str
) -> None:
    async with in_process(database, tmp_path) as server:
        alice = await server.user("alice")
        before = await server.stored()
        await fail_times(database.pool, "jobs", "INSERT", state, 1)
        refused = await alice.post("/v1/jobs", json=a_job())
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert await server.stored() == before
        assert (await alice.post("/v1/jobs", json=a_job())).status_code == 202


async def test_an_acceptance_whose_commit_was_not_heard_of_is_found_by_its_key(
    database: TestDatabase, road: Road, tmp_path: Path
) -> None:
    await database.pool.execute(
        """CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             PERFORM pg_advisory_xact_lock(42); RETURN NULL; END $$;
           CREATE CONSTRAINT TRIGGER held AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION held()"""
    )
    blocker = await asyncpg.connect(database.url)
    await blocker.execute("SELECT pg_advisory_lock(42)")
    async with in_process(database, tmp_path, database_url=road.url) as server:
        alice = await server.user("alice")
        key = {"Idempotency-Key": "order-17"}
        sending = asyncio.create_task(alice.post("/v1/jobs", json=a_job(), headers=key))
        waiting = "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"
        desk = Desk(database)
        await desk.until(waiting)  # at the commit
        road.hold_answers()
        await blocker.close()
        await desk.until("SELECT count(*) = 1 FROM jobs")
        road.cut()
        answer = await sending
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        again = await alice.post("/v1/jobs", json=a_job(), headers=key)
        assert again.status_code in (200, 202)
        assert await database.pool.fetchval("SELECT id::text FROM jobs") == again.json()["id"]


async def test_a_delivery_whose_commit_was_not_heard_of_is_not_sent_again(database: TestDatabase, road: Road) -> None:
    outbox = await Outbox.open(database)
    async with (
        hostile.receiving(hostile.answer(200)) as receiver,
        await open_pool(road.url, role=WORKER_ROLE, max_size=1) as pool,
    ):
        worker = delivering(Callbacks(pool), receiver)
        await outbox.add("earlier", url=receiver.url)
        await worker.deliver_one(await outbox.one())  # the statement is prepared, so that it is one message from now on
        await outbox.add("now", job_id=await outbox.job(), url=receiver.url)
        taken = await outbox.one()
        road.hold_answers()
        sending = asyncio.create_task(worker.deliver_one(taken))
        await Desk(database).until("SELECT state = 'delivered' FROM callback_outbox WHERE id = 'now'")
        road.cut()
        with pytest.raises(CONNECTION_FAULTS):
            await sending
        assert await outbox.claimed() == []
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["earlier", "now"]


async def test_a_delivery_that_could_not_be_written_down_is_sent_again_under_its_id(
    database: TestDatabase, road: Road
) -> None:
    outbox = await Outbox.open(database)
    async with hostile.receiving(hostile.answer(200)) as receiver, await open_pool(road.url, role=WORKER_ROLE) as pool:
        await outbox.add("now", url=receiver.url)
        taken = await outbox.one()
        worker = delivering(Callbacks(pool), receiver)
        road.close()
        with pytest.raises(CONNECTION_FAULTS):
            await worker.deliver_one(taken)
        road.open()
        await outbox.expire("now")
        assert await worker.deliver_one(await outbox.one()) == "delivered"
    assert [request.headers["webhook-id"] for request in receiver.requests] == ["now", "now"]


def delivering(callbacks: Callbacks, receiver: hostile.Receiver) -> Deliverer:
    allowed = AllowedHost("127.0.0.1", receiver.port, "http")
    return Deliverer(callbacks, Egress(EgressPolicy(allow=(allowed,))), CallbackSecrets(b"m" * 32))


# ------------------------------------------------------------------------------------------- a server of one's own


@pytest.fixture
async def own_server() -> AsyncIterator[tuple[TestDatabase, Path]]:
    """A small server that a test may fill or break."""
    with state_folder() as folder:
        data = folder / "postgres"
        url = await asyncio.to_thread(embedded.ensure_running, data, options={"max_connections": "16"})
        connection = await asyncpg.connect(url)
        await migrate(connection)
        await connection.close()
        pool, worker_pool = await open_pool(url, max_size=2), await open_pool(url, role=WORKER_ROLE, max_size=2)
        try:
            yield TestDatabase(url, pool, worker_pool), data
        finally:
            pool.terminate()
            worker_pool.terminate()


async def test_no_connection_left_is_503_at_the_api_and_passes(
    own_server: tuple[TestDatabase, Path], tmp_path: Path
) -> None:
    database, _ = own_server
    async with in_process(database, tmp_path) as server:
        alice = await server.user("alice")
        before = await server.stored()
        taken: list[asyncpg.Connection] = []
        refused = None
        async with asyncio.timeout(60):
            while refused is None:
                taken += await fill(database.url)
                # the API's own idle connections would still serve it: they end, and their places are taken
                await taken[0].execute(
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE application_name LIKE 'ourvidz%' AND pid <> pg_backend_pid()"""
                )
                taken += await fill(database.url)
                answer = await alice.get("/v1/jobs")
                refused = answer if answer.status_code == 503 else None
        taken += await fill(database.url)  # a place may have come free meanwhile
        submitted = await alice.post("/v1/jobs", json=a_job())
        for connection in taken:
            await connection.close()
        for answer in (refused, submitted):
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert await server.stored() == before
        assert (await alice.post("/v1/jobs", json=a_job())).status_code == 202


async def fill(url: str) -> list[asyncpg.Connection]:
    """Connections until there are no more."""
    taken = []
    while True:
        try:
            taken.append(await asyncpg.connect(url, server_settings={"application_name": "filler"}))
        except asyncpg.TooManyConnectionsError:
            return taken


async def test_an_end_outlives_a_crash_of_the_server(own_server: tuple[TestDatabase, Path]) -> None:
    database, _ = own_server
    desk = Desk(database)
    held = await desk.hold()
    endings = Endings(desk.queue, Jobs(database.worker_pool), desk.worker, 60)
    pid = await database.pool.fetchval("SELECT pg_backend_pid()")
    os.kill(pid, signal.SIGKILL)  # one backend that dies takes all others along, and the server recovers
    assert await endings.settle(held, completed(desk, held))
    settled = await database.worker_pool.fetchval("SELECT status FROM jobs")
    assert settled == "completed"
