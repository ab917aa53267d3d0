"""Random histories of a few jobs on a real Postgres, step by step beside a model of dictionaries.

After every step each row must say what the model says, and the promises of db/jobs.py must hold. Time moves only
where a step moves it: leases, delays and deadlines are set to the past by hand.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from db.access import Access
from db.jobs import Jobs, Status
from db.pool import open_pool
from db.queue import CancelReason, Queue, Renewal, Requeue, Settlement
from tests.conftest import with_database
from tests.db.test_queue import new_job

T = TypeVar("T")
QUEUES = ("qwen", "sdxl")
WORKERS = (UUID(int=1), UUID(int=2))
MAX_ATTEMPTS = 3
ENDINGS = ("completed", "failed", "cancelled")


@dataclass
class Job:
    """What the model knows of a job."""

    id: UUID
    queue: str
    klass: int
    called: bool
    state: str = "ready"  # of its queue row; an ending when there is none
    attempt: int = 0
    failures: int = 0
    worker: UUID | None = None
    expired: bool = False
    cancel: str | None = None
    overdue: str | None = None  # the deadline that has passed: start or total
    kinds: list[str] = field(default_factory=lambda: ["queued"])

    @property
    def open(self) -> bool:
        return self.state not in ENDINGS

    @property
    def status(self) -> str:
        return {"ready": "queued", "scheduled": "queued", "running": "processing"}.get(self.state, self.state)

    @property
    def claimable(self) -> bool:
        too_late = self.overdue == "total" or (self.overdue == "start" and self.attempt == 0)
        return self.state == "ready" and not too_late

    def end(self, status: str) -> None:
        self.state, self.worker, self.cancel, self.expired, self.overdue = status, None, None, False, None
        self.kinds.append(status)

    def back(self, *, counts: bool, delayed: bool = False) -> None:
        self.state = "scheduled" if delayed else "ready"
        self.failures += counts
        self.worker, self.expired = None, False
        self.kinds.append("requeued")


@dataclass
class Server:
    """The database of the test, and the loop that its connections live in."""

    runner: asyncio.Runner
    pool: asyncpg.Pool
    user: UUID

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)


class Histories(RuleBasedStateMachine):
    """The moves that anybody can make at any time."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.jobs, self.queue = server, Jobs(server.pool), Queue(server.pool)
        self.model: dict[UUID, Job] = {}
        self.paused: set[str] = set()
        self.erased: set[UUID] = set()
        self.run = server.run
        self.execute("TRUNCATE queues, jobs CASCADE")

    def execute(self, statement: str, *values: object) -> None:
        self.run(self.server.pool.execute(statement, *values))

    def pick(self, data: st.DataObject, *states: str) -> Job:
        ids = [job.id for job in self.model.values() if not states or job.state in states]
        return self.model[data.draw(st.sampled_from(ids), label="job")]

    def some(self, *states: str) -> bool:
        return any(job.state in states for job in self.model.values())

    @rule(
        queue=st.sampled_from(QUEUES),
        klass=st.sampled_from([0, 1]),
        called=st.booleans(),
        delay=st.sampled_from([0, 60]),
    )
    def submit(self, queue: str, klass: int, called: bool, delay: int) -> None:
        changes: dict[str, Any] = {} if called else {"callback_url": None}
        job = new_job(
            self.server.user,
            queue=queue,
            klass=klass,
            start_after_seconds=float(delay),
            start_deadline_seconds=3600.0,
            deadline_seconds=7200.0,
            **changes,
        )
        self.run(self.jobs.accept(job))
        self.model[job.id] = Job(job.id, queue, klass, called, "scheduled" if delay else "ready")

    @rule(queue=st.sampled_from(QUEUES), worker=st.sampled_from(WORKERS), slots=st.integers(1, 3))
    def claim(self, queue: str, worker: UUID, slots: int) -> None:
        ready = [
            job for job in self.model.values() if job.claimable and job.queue == queue and queue not in self.paused
        ]
        claims = self.run(self.queue.claim(queue, worker, slots))
        taken = [self.model[claim.job_id] for claim in claims]
        assert len(taken) == min(slots, len(ready))
        assert {job.id for job in taken} <= {job.id for job in ready}
        passed_over = [job.klass for job in ready if job not in taken]
        assert [job.klass for job in taken] == sorted((job.klass for job in taken), reverse=True)
        assert not taken or not passed_over or taken[-1].klass >= max(passed_over)
        for job, claim in zip(taken, claims, strict=True):
            job.state, job.attempt, job.worker, job.expired = "running", job.attempt + 1, worker, False
            job.kinds.append("started")
            assert (claim.attempt, claim.failures) == (job.attempt, job.failures)

    @precondition(lambda self: self.some("running"))
    @rule(data=st.data(), stale=st.booleans(), stranger=st.booleans())
    def renew(self, data: st.DataObject, stale: bool, stranger: bool) -> None:
        job = self.pick(data, "running")
        worker = next(w for w in WORKERS if (w == job.worker) is not stranger)
        renewal = Renewal(job.id, job.attempt - stale, "denoise", 1, 4)
        answer = self.run(self.queue.renew(worker, [renewal]))
        assert answer == ({} if stale or stranger else {job.id: job.cancel})
        if answer:
            job.expired = False

    @precondition(lambda self: self.some("running"))
    @rule(data=st.data())
    def let_a_lease_run_out(self, data: st.DataObject) -> None:
        job = self.pick(data, "running")
        self.execute("UPDATE job_queue SET lease_until = now() - interval '1 second' WHERE job_id = $1", job.id)
        job.expired = True

    @rule()
    def rescue(self) -> None:
        seen = self.run(self.queue.expired())
        assert {lost.job_id for lost in seen} == {job.id for job in self.model.values() if job.expired}
        for lost in seen:
            job = self.model[lost.job_id]
            assert (lost.attempt, lost.failures, lost.cancel) == (job.attempt, job.failures, job.cancel)
            if job.cancel is None and lost.failures + 1 < lost.max_attempts:
                back = Requeue(job_id=job.id, attempt=lost.attempt, expired=True, counts=True)
                assert self.run(self.queue.requeue([back])) == {job.id: job.queue}
                job.back(counts=True)
            else:
                status = Status.CANCELLED if job.cancel == "user" else Status.FAILED
                self.settle_now(job, status, lost.attempt, expired=True)

    def settle_now(self, job: Job, status: Status, attempt: int | None, **changes: Any) -> None:
        code = {"error_code": "oom"} if status is Status.FAILED else {}
        end = Settlement(job_id=job.id, attempt=attempt, status=status, **code, **changes)
        (ended,) = self.run(self.queue.settle([end]))
        assert ended == end
        job.end(status)

    @precondition(lambda self: self.model)
    @rule(
        data=st.data(),
        status=st.sampled_from(Status).filter(lambda s: s.terminal),
        off_by=st.sampled_from([0, 0, -1, 1]),
    )
    def settle(self, data: st.DataObject, status: Status, off_by: int) -> None:
        job = self.pick(data)
        if job.state == "running" and off_by == 0:
            self.settle_now(job, status, job.attempt)
            return
        code = {"error_code": "oom"} if status is Status.FAILED else {}
        late = Settlement(job_id=job.id, attempt=job.attempt + off_by, status=status, **code)
        assert self.run(self.queue.settle([late])) == []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), counts=st.booleans(), delay=st.sampled_from([0.0, 60.0]), off_by=st.sampled_from([0, 0, -1]))
    def requeue(self, data: st.DataObject, counts: bool, delay: float, off_by: int) -> None:
        job = self.pick(data)
        if counts and job.failures + 1 >= MAX_ATTEMPTS:
            return  # then it fails for good, which is `settle`
        back = Requeue(job_id=job.id, attempt=job.attempt + off_by, counts=counts, delay_seconds=delay)
        moves = job.state == "running" and off_by == 0 and job.cancel is None
        assert self.run(self.queue.requeue([back])) == ({job.id: job.queue} if moves else {})
        if moves:
            job.back(counts=counts, delayed=delay > 0)

    @precondition(lambda self: self.some("running"))
    @rule(data=st.data())
    def hop(self, data: st.DataObject) -> None:
        job = self.pick(data, "running")
        other = next(queue for queue in QUEUES if queue != job.queue)
        move = Requeue(job_id=job.id, attempt=job.attempt, kind="enhanced", queue=other, cost=3.0)
        moved = self.run(self.queue.requeue([move]))
        assert moved == ({job.id: other} if job.cancel is None else {})
        if moved:
            job.back(counts=False)
            job.queue, job.kinds[-1] = other, "enhanced"

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.pick(data)
        answer = self.run(self.queue.cancel(job.id))
        if not job.open:
            assert answer == "ended"
        elif job.state != "running":
            assert answer == "cancelled"
            job.end("cancelled")
        else:
            assert answer == "cancelling"
            if job.cancel is None:
                job.cancel = "user"
                job.kinds.append("cancelling")

    @rule(queue=st.sampled_from(QUEUES), paused=st.booleans())
    def pause(self, queue: str, paused: bool) -> None:
        self.run(self.queue.pause(queue, paused))
        (self.paused.add if paused else self.paused.discard)(queue)

    @precondition(lambda self: self.some("scheduled"))
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        job = self.pick(data, "scheduled")
        self.execute("UPDATE job_queue SET run_at = now() WHERE job_id = $1", job.id)
        assert self.run(self.queue.promote()) == {job.queue}
        job.state = "ready"

    @precondition(lambda self: self.some("ready", "scheduled", "running"))
    @rule(data=st.data(), which=st.sampled_from(["start", "total"]))
    def let_a_deadline_pass(self, data: st.DataObject, which: str) -> None:
        job = self.pick(data, "ready", "scheduled", "running")
        if "retried" in job.kinds:
            return  # a retry has no deadlines
        column = "start_deadline" if which == "start" else "deadline"
        self.execute(f"UPDATE job_queue SET {column} = now() WHERE job_id = $1", job.id)  # noqa: S608
        job.overdue = "total" if "total" in (which, job.overdue) else "start"

    @rule()
    def end_overdue(self) -> None:
        expected = {
            job.id
            for job in self.model.values()
            if (job.overdue == "total" and job.cancel is None)
            or (job.overdue == "start" and job.attempt == 0 and job.state != "running")
        }
        overdue = self.run(self.queue.overdue())
        assert {late.job_id for late in overdue} == expected
        for late in overdue:
            job = self.model[late.job_id]
            if late.state == "running":
                assert self.run(self.queue.flag_deadline(job.id))
                job.cancel = CancelReason.DEADLINE
                job.kinds.append("cancelling")
            else:
                self.settle_now(job, Status.FAILED, None)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job = self.pick(data)
        can = job.state in ("failed", "cancelled")
        assert self.run(self.jobs.retry(job.id, queue=job.queue, cost=5.0)) is can
        if can:
            job.state, job.failures = "ready", 0
            job.kinds.append("retried")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def erase(self, data: st.DataObject) -> None:
        job = self.pick(data)
        gone = self.run(self.jobs.erase(job.id, self.server.user))
        assert (gone is None) is job.open
        if gone is not None:
            del self.model[job.id]
            self.erased.add(job.id)

    @invariant()
    def rows_say_what_the_model_says(self) -> None:
        rows = self.run(
            self.server.pool.fetch(
                """SELECT j.id, j.status, j.attempts, j.event_seq, q.queue, q.class, q.state::text, q.attempt,
                          q.failures, q.worker, q.cancel, q.lease_until < clock_timestamp() AS expired,
                          ARRAY(SELECT kind FROM job_events WHERE job_id = j.id ORDER BY id) AS kinds,
                          ARRAY(SELECT seq FROM callback_outbox WHERE job_id = j.id AND terminal ORDER BY seq) AS told,
                          ARRAY(SELECT state FROM callback_outbox WHERE job_id = j.id AND NOT terminal) AS progress
                   FROM current_jobs j LEFT JOIN job_queue q ON q.job_id = j.id"""
            )
        )
        assert {row["id"] for row in rows} == set(self.model)
        for row in rows:
            job = self.model[row["id"]]
            assert (row["status"], row["kinds"]) == (job.status, job.kinds)
            assert (row["queue"] is not None) is job.open, "a queue row is there as long as the job is open"
            ends = [kind for kind in job.kinds if kind in ENDINGS]
            assert len(row["told"]) == (len(ends) if job.called else 0), "one terminal callback per end"
            assert not row["told"] or row["told"][-1] <= row["event_seq"]
            since = job.kinds[job.kinds.index("started") :] if job.called and "started" in job.kinds else []
            overtaken = any(kind in ENDINGS for kind in since)
            assert row["progress"] == (["superseded" if overtaken else "due"] if since else [])
            if job.open:
                told = (row["state"], row["queue"], row["class"], row["attempt"], row["failures"], row["worker"])
                assert told == (job.state, job.queue, job.klass, job.attempt, job.failures, job.worker)
                assert (row["cancel"], bool(row["expired"])) == (job.cancel, job.expired)
            if job.state == "running":
                assert row["attempts"] == row["attempt"], "the job knows the attempt that runs"

    @invariant()
    def nothing_outlives_an_erased_job(self) -> None:
        left = self.server.pool.fetchval(
            """SELECT (SELECT count(*) FROM job_events WHERE job_id = ANY ($1))
                    + (SELECT count(*) FROM callback_outbox WHERE job_id = ANY ($1))""",
            list(self.erased),
        )
        assert self.run(left) == 0

    @invariant()
    def a_stop_never_waits_in_the_queue(self) -> None:
        assert self.run(self.queue.stopped_waiting()) == []


@pytest.fixture
def server(postgres_url: str, template_database: str) -> Iterator[Server]:
    name = f"model_{uuid4().hex[:12]}"

    async def on_server(statement: str) -> None:
        connection = await asyncpg.connect(with_database(postgres_url, "postgres"))
        await connection.execute(statement)
        await connection.close()

    with asyncio.Runner() as runner:
        runner.run(on_server(f'CREATE DATABASE "{name}" TEMPLATE "{template_database}"'))
        pool = runner.run(open_pool(with_database(postgres_url, name), max_size=2))
        yield Server(runner, pool, runner.run(Access(pool).ensure_user("alice", "basic_user")))
        runner.run(pool.close())
        runner.run(on_server(f'DROP DATABASE "{name}" WITH (FORCE)'))


def test_random_histories_keep_to_the_model(server: Server) -> None:
    run_state_machine_as_test(
        lambda: Histories(server),
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking would replay it for minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
