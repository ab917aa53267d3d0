"""`python -m benchmarks.queue`: our queue beside procrastinate and pgqueuer, on one embedded Postgres, in one run.

Jobs do nothing; the bookkeeping is all there: on our side that is the fence, the charge, three events, the fair share,
the run time and the outbox row. Every submit is a call of its own that returns when it is durable; calls that come at
the same time share a commit, as they do in the API's process. The contenders take turns, round by round, so that a
noisy machine hurts them alike; what counts are not the rates but the ratios within a round, of which the median is
told, and what a job costs in processor time. The peers run at the settings that were their best in a sweep. The server
is one that has run for a while, see `SERVER`, and every commit is on disk.

Needs `pip install procrastinate "pgqueuer[asyncpg]" "psycopg[binary,pool]"` beside this project.
"""

import argparse
import asyncio
import importlib.metadata
import logging
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import psutil
from uuid6 import uuid7

from db import embedded
from db.access import Access
from db.batches import GATHER_SECONDS, Batcher
from db.jobs import Jobs, NewJob, Stage, Status
from db.migrate import migrate
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import open_pool
from db.queue import Claim, Queue, Settlement

SUBMITTERS = 32
DRAINERS, DRAINED = 3, 1000  # the best of 2 to 5 with 500 to 2000
DRAIN_JOBS = 13000  # for each second of a turn: connections that are new to the statements are a small part of it
# For all contenders: with the defaults the tables of a turn would not fit into the buffers, and whoever writes most
# would pay for making files of the log, which a server that has run for a while uses again.
SERVER = {"shared_buffers": "512MB", "wal_buffers": "16MB", "min_wal_size": "1GB"}
WAL_MEGABYTES = 1100  # written before anything is measured, so that these files are there
LINGER = 0.01  # seconds that a worker waits after a claim that found less than it asked for
USERS = 50
PAYLOAD = {"prompt": "a" * 200, "steps": 30}
PAST = Path(__file__).parent.parent / "tests" / "db" / "filled.sql"


@dataclass
class Bench:
    """The server, and what was measured: rates per contender, one per round."""

    url: str
    data: Path
    seconds: float
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # µs for each job: here, in Postgres

    def database(self, name: str) -> str:
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    async def fresh(self, name: str) -> str:
        """An empty database; after a checkpoint, so that nobody pays for another's pages."""
        server = await asyncpg.connect(self.database("postgres"))
        await server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await server.execute(f'CREATE DATABASE "{name}"')
        await server.execute("CHECKPOINT")
        await server.close()
        return self.database(name)

    async def fill_log(self) -> None:
        """Write as much of the log as is kept, so that the server has its files."""
        server = await asyncpg.connect(self.database("postgres"))
        await server.execute("CREATE TABLE filling (data text); ALTER TABLE filling ALTER data SET STORAGE EXTERNAL")
        for _ in range(WAL_MEGABYTES // 100):
            await server.execute("INSERT INTO filling SELECT repeat('x', 1000000) FROM generate_series(1, 100)")
            await server.execute("TRUNCATE filling")
        await server.execute("DROP TABLE filling; CHECKPOINT")
        await server.close()

    def begin(self) -> "Turn":
        postgres = self._postgres_seconds()
        return Turn(postgres=postgres, here=time.process_time(), clock=time.perf_counter())

    def end(self) -> "Turn":
        clock, here = time.perf_counter(), time.process_time()
        return Turn(postgres=self._postgres_seconds(), here=here, clock=clock)

    def add(self, name: str, jobs: int, begun: "Turn", ended: "Turn | None" = None) -> None:
        """Note a turn; while its connections are open, as Postgres' share is what its processes have used."""
        ended = ended or self.end()
        self.rates.setdefault(name, []).append(jobs / (ended.clock - begun.clock))
        spent = (1e6 * (ended.here - begun.here) / jobs, 1e6 * (ended.postgres - begun.postgres) / jobs)
        self.cpu.setdefault(name, []).append(spent)

    def _postgres_seconds(self) -> float:
        postmaster = int((self.data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        total = 0.0
        for child in psutil.Process(postmaster).children():
            with suppress(psutil.NoSuchProcess):  # a connection that has just been closed
                total += sum(child.cpu_times()[:2])
        return total

    def ratio(self, rates: list[float], peer: str) -> float:
        """The median of the rounds' own ratios, to whichever setting of the peer was its best in that round."""
        best = (max(found) for found in zip(*(r for n, r in self.rates.items() if n.startswith(peer)), strict=True))
        return statistics.median(own / theirs for own, theirs in zip(rates, best, strict=True))


@dataclass(frozen=True)
class Turn:
    """The beginning or end of a turn, in seconds: the clock, and the processor time of this process and of Postgres."""

    clock: float
    here: float
    postgres: float


async def share(count: int, tasks: int, work: Callable[[int, int], Awaitable[None]]) -> None:
    """Do `work(task, n)` for every n below count, by so many tasks."""
    left = iter(range(count))

    async def one(task: int) -> None:
        for n in left:
            await work(task, n)

    await asyncio.gather(*(one(task) for task in range(tasks)))


# --- ours ---


class Ours:
    """The queue as the API and a replica use it, in one process."""

    def __init__(self, pool: asyncpg.Pool, users: list[UUID]) -> None:
        self.jobs, self.queue, self.users = Jobs(pool), Queue(pool), users
        self.worker, self.finished = uuid4(), 0

    def job(self, n: int, queue: str = "sdxl") -> NewJob:
        return NewJob(
            id=UUID(int=uuid7().int), user_id=self.users[n % len(self.users)], job_type="sdxl_image_fast",
            format="image", quality="fast", model_type="sdxl", stage=Stage.GENERATE, queue=queue, cost=5.0, credits=1,
            original_prompt=PAYLOAD["prompt"], params=PAYLOAD, callback_url="https://example.com/hook",
            callback_events=("completed", "failed", "cancelled"),
        )  # fmt: skip

    async def submit(self, count: int) -> None:
        async def one(_task: int, n: int) -> None:
            await self.jobs.accept(self.job(n))

        await share(count, SUBMITTERS, one)

    async def work(self, count: int, batch: int = 100) -> None:
        """Claim and finish until so many are done."""
        tasks: set[asyncio.Task[None]] = set()
        ends = Batcher(self.queue.settle_each, gather_seconds=GATHER_SECONDS)
        while self.finished < count:
            claims = await self.queue.claim("sdxl", self.worker, batch) if len(tasks) <= 2 * batch else []
            for claim in claims:
                task = asyncio.create_task(self.finish(claim, ends))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if len(claims) < batch:
                await asyncio.sleep(LINGER)
        await asyncio.gather(*tasks)

    async def finish(self, claim: Claim, ends: Batcher[Settlement, Settlement | None]) -> None:
        if await ends.put(self.end(claim)) is not None:
            self.finished += 1

    async def drain(self, count: int) -> None:
        """The same for a queue that is full, by whole batches: as many as are claimed are finished by one call."""
        while self.finished < count:
            claims = await self.queue.claim("sdxl", self.worker, DRAINED)
            ended = await self.queue.settle([self.end(claim) for claim in claims])
            self.finished += len(ended)

    def end(self, claim: Claim) -> Settlement:
        return Settlement(
            job_id=claim.job_id,
            attempt=claim.attempt,
            status=Status.COMPLETED,
            worker=self.worker,
            generation_time_ms=1,
        )

    async def check(self, pool: asyncpg.Pool, count: int) -> None:
        sums = await pool.fetchrow(
            """SELECT (SELECT count(*) FROM jobs WHERE status = 'completed'), (SELECT count(*) FROM job_queue),
                      (SELECT count(*) FROM job_events), (SELECT count(*) FROM callback_outbox)"""
        )
        if tuple(sums) != (count, 0, 3 * count, count):
            raise SystemExit(f"the bookkeeping is wrong: {tuple(sums)} for {count} jobs")


@asynccontextmanager
async def ours(bench: Bench, name: str = "ours") -> Any:
    url = await bench.fresh(name)
    connection = await asyncpg.connect(url)
    await migrate(connection)
    await connection.close()
    pool = await open_pool(url, min_size=SUBMITTERS + 3, max_size=SUBMITTERS + 3)
    users = [await Access(pool).ensure_user(f"user {n}", "basic_user") for n in range(USERS)]
    yield Ours(pool, users), pool
    await pool.close()


async def ours_end_to_end(bench: Bench) -> None:
    count = round(2000 * bench.seconds)
    async with ours(bench) as (side, pool):
        begun = bench.begin()
        await asyncio.gather(side.submit(count), side.work(count))
        bench.add("ours, end to end", count, begun)
        await side.check(pool, count)


async def ours_drain(bench: Bench) -> None:
    count = round(DRAIN_JOBS * bench.seconds)
    async with ours(bench) as (side, pool):
        begun = bench.begin()
        await side.submit(count)
        bench.add("ours, submit only", count, begun)
        await pool.execute("VACUUM ANALYZE")
        begun = bench.begin()
        await asyncio.gather(*(side.drain(count) for _ in range(DRAINERS)))
        bench.add(f"ours, drain, {DRAINERS} x {DRAINED}", count, begun)
        await side.check(pool, count)


async def bare_commits(bench: Bench) -> None:
    """pgbench: one row of `jobs` per commit, with all its indexes and keys, and nothing else."""
    async with ours(bench, "bare") as (_side, pool):
        user = await pool.fetchval("SELECT id FROM profiles LIMIT 1")
    script = bench.data.parent / "insert.sql"
    prompt = PAYLOAD["prompt"]
    script.write_text(
        "INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, original_prompt, params) VALUES "  # noqa: S608
        f"(gen_random_uuid(), '{user}', 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'generate', '{prompt}', "
        "'{\"steps\": 30}');"
    )
    command = [embedded._binaries() / "pgbench", "-h", bench.data, "-U", "postgres", "-n", "-M", "prepared",
               "-f", script, "-c", SUBMITTERS, "-j", 1, "-T", max(1, round(bench.seconds)), "bare"]  # fmt: skip
    result = await asyncio.to_thread(
        subprocess.run, [str(c) for c in command], capture_output=True, text=True, check=True
    )
    rate = float(re.search(r"tps = ([\d.]+)", result.stdout)[1])  # type: ignore[index]
    bench.rates.setdefault("bare one-row commits", []).append(rate)


# --- the peers ---


async def until_empty(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    while await connection.fetchval(statement):  # noqa: ASYNC110 (the library tells nobody)
        await asyncio.sleep(0.01)
    await connection.close()


async def pgqueuer(bench: Bench, name: str, count: int, managers: int, batch: int, *, drain: bool) -> None:
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    url = await bench.fresh("pgqueuer")
    connections = [await asyncpg.connect(url) for _ in range(SUBMITTERS + managers)]
    queries = [Queries(AsyncpgDriver(connection)) for connection in connections[:SUBMITTERS]]
    await queries[0].install()
    body = b"a" * 230
    finished = 0

    async def submit() -> None:
        async def one(task: int, _n: int) -> None:
            await queries[task].enqueue("noop", body, 0)

        await share(count, SUBMITTERS, one)

    async def work() -> None:
        sides = [PgQueuer(AsyncpgDriver(connection)) for connection in connections[SUBMITTERS:]]
        for side in sides:

            @side.entrypoint("noop")
            async def noop(job: object) -> None:
                nonlocal finished
                finished += 1

        async def watch() -> None:
            while finished < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await until_empty(url, "SELECT count(*) FROM pgqueuer")
            ended.append(bench.end())
            for side in sides:
                side.shutdown.set()

        await asyncio.gather(watch(), *(side.run(batch_size=batch) for side in sides))

    ended: list[Turn] = []
    if drain:
        for first in range(0, count, 1000):
            size = min(1000, count - first)
            await queries[0].enqueue(["noop"] * size, [body] * size, [0] * size)
        await connections[0].execute("VACUUM ANALYZE")
    begun = bench.begin()
    await asyncio.gather(work(), *([] if drain else [submit()]))
    bench.add(name, count, begun, ended[0])
    for connection in connections:
        await connection.close()


async def procrastinate(bench: Bench, name: str, count: int, concurrency: int) -> None:
    import procrastinate as library

    url = await bench.fresh("procrastinate")

    def app(size: int) -> Any:
        made = library.App(connector=library.PsycopgConnector(conninfo=url, min_size=size, max_size=size))

        @made.task(name="noop", queue="noop")
        async def noop(**values: object) -> None:
            pass

        return made, noop

    (submitter, noop), (worker, _) = app(SUBMITTERS), app(concurrency + 2)
    async with submitter.open_async(), worker.open_async():
        await submitter.schema_manager.apply_schema_async()

        async def one(_task: int, _n: int) -> None:
            await noop.defer_async(**PAYLOAD)

        begun = bench.begin()
        running = asyncio.create_task(
            worker.run_worker_async(
                queues=["noop"], concurrency=concurrency, fetch_job_polling_interval=0.05, install_signal_handlers=False
            )
        )
        await share(count, SUBMITTERS, one)
        await until_empty(url, "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')")
        bench.add(name, count, begun)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# --- latency and the weight of the past ---


async def latency(bench: Bench, count: int = 200) -> list[float]:
    """Milliseconds from the call that submits to the answer of the claim, one job at a time in an idle system."""
    async with ours(bench) as (side, pool):
        woken, taken, notifier = asyncio.Event(), asyncio.Queue[float](), Notifier(pool)
        ends = Batcher(side.queue.settle_each)
        listener = Listener(bench.database("ours"), QUEUE_CHANNEL, lambda _payload: woken.set())
        listener.start()
        await listener.connected.wait()

        async def replica() -> None:
            while True:
                woken.clear()
                claims = await side.queue.claim("sdxl", side.worker, 1)
                for claim in claims:
                    taken.put_nowait(time.perf_counter())
                    await side.finish(claim, ends)
                if not claims:
                    await woken.wait()

        task = asyncio.create_task(replica())
        found = []
        for n in range(count):
            await asyncio.sleep(0.05)
            started = time.perf_counter()
            await side.jobs.accept(side.job(n))
            notifier.queue("sdxl")
            found.append(1000 * (await asyncio.wait_for(taken.get(), 10) - started))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listener.close()
        await notifier.close()
    return found


async def claim_times(bench: Bench, count: int = 300) -> tuple[float, float]:
    """Median milliseconds of a claim: in an empty database, and behind a million ended and many waiting jobs."""
    async with ours(bench, "empty") as (light, _pool), ours(bench, "full") as (heavy, _):
        connection = await asyncpg.connect(bench.database("full"))
        for statement in (
            PAST.read_text(encoding="utf-8").replace("'user '", "'past '").strip().removesuffix(";").split(";\n")
        ):
            await connection.execute(statement)
        await connection.close()
        for side in (light, heavy):
            for n in range(count):
                await side.jobs.accept(side.job(n, "qwen"))
        times: dict[Ours, list[float]] = {light: [], heavy: []}
        for _ in range(count):
            for side, found in times.items():
                started = time.perf_counter()
                if len(await side.queue.claim("qwen", side.worker, 1)) != 1:
                    raise SystemExit("nothing was claimed")
                found.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[light]), statistics.median(times[heavy])


def report(bench: Bench, waits: list[float], claims: tuple[float, float], rounds: int) -> None:
    """The table, as Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("asyncpg", "pgqueuer", "procrastinate")
    )
    print(
        f"\n{rounds} rounds, {os.cpu_count()} CPUs, {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}\n"
    )
    print("| jobs per second | median | lowest | highest |\n|---|---|---|---|")
    for name, rates in sorted(bench.rates.items()):
        print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} |")
    ends = bench.rates["ours, end to end"]
    drain = f"ours, drain, {DRAINERS} x {DRAINED}"
    waits = sorted(waits)
    rows = [
        ("end to end: ours / best pgqueuer", bench.ratio(ends, "pgqueuer, end to end"), "at least 3"),
        ("end to end: ours / procrastinate", bench.ratio(ends, "procrastinate"), ""),
        ("end to end: ours / bare one-row commits", bench.ratio(ends, "bare"), "at least 0.35"),
        ("drain: ours / best pgqueuer", bench.ratio(bench.rates[drain], "pgqueuer, drain"), "at least 2"),
        ("idle, submit to claimed, ms, p50", waits[len(waits) // 2], "below 5"),
        ("idle, submit to claimed, ms, p99", waits[int(len(waits) * 0.99)], "below 25"),
        ("claim with a past / claim in an empty database", claims[1] / claims[0], "at most 1.5"),
    ]
    print("\n| | measured | bar |\n|---|---|---|")
    for name, value, bar in rows:
        print(f"| {name} | {value:.2f} | {bar} |")
    print(f"\nMedian claim: {claims[0]:.2f} ms in an empty database, {claims[1]:.2f} ms with a past.")


def report_cpu(bench: Bench) -> None:
    """What a job costs: medians of the turns. It tells what the machine allows when nothing else runs on it."""
    cores = os.cpu_count() or 1
    print(f"\n| processor µs per job | here | in Postgres | both | {cores} processors allow, per second |")
    print("|---|---|---|---|---|")
    for name, spent in sorted(bench.cpu.items()):
        here, postgres = (statistics.median(column) for column in zip(*spent, strict=True))
        both = here + postgres
        print(f"| {name} | {here:.0f} | {postgres:.0f} | {both:.0f} | {cores * 1e6 / both:,.0f} |")


async def run(rounds: int, seconds: float, only: str) -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ovz") as name:
        folder = Path(name)
        folder.chmod(0o755)  # noqa: ASYNC240 (before anything is measured)
        data = folder / "postgres"
        try:
            bench = Bench(embedded.ensure_running(data, options=SERVER), data, seconds)
            await bench.fill_log()
            contenders: dict[str, Callable[[], Awaitable[None]]] = {
                "bare": lambda: bare_commits(bench),
                "ours end": lambda: ours_end_to_end(bench),
                "pgqueuer end 1": lambda: pgqueuer(
                    bench, "pgqueuer, end to end, 1 x 50", round(1000 * seconds), 1, 50, drain=False
                ),
                "pgqueuer end 2": lambda: pgqueuer(
                    bench, "pgqueuer, end to end, 2 x 50", round(1000 * seconds), 2, 50, drain=False
                ),
                "procrastinate": lambda: procrastinate(bench, "procrastinate, end to end", round(200 * seconds), 5),
                "ours drain": lambda: ours_drain(bench),
                "pgqueuer drain": lambda: pgqueuer(
                    bench, "pgqueuer, drain, 2 x 200", round(DRAIN_JOBS * seconds), 2, 200, drain=True
                ),
            }
            for number in range(rounds):
                for title, contender in contenders.items():
                    if only in title:
                        await contender()
                print(
                    f"round {number + 1}: " + ", ".join(f"{n} {r[-1]:,.0f}/s" for n, r in bench.rates.items()),
                    flush=True,
                )
            if not only:
                report(bench, await latency(bench), await claim_times(bench), rounds)
            report_cpu(bench)
        finally:
            embedded.stop(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender has its turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long a turn is to take")
    parser.add_argument("--only", default="", help="contenders whose title has this in it, without the table")
    asked = parser.parse_args()
    try:
        import uvloop

        loop: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        loop = None
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run(asked.rounds, asked.seconds, asked.only))


if __name__ == "__main__":
    main()
