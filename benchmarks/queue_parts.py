"""`python -m benchmarks.queue_parts`: what each part of a claim and of an end costs Postgres, in µs per job.

The statements run as they are and with their parts taken out one after the other, from the last one on, each time on a
copy of one full queue and on one connection. What a part costs is what goes with it. The least of the rounds counts, as
other work on the machine can only add to it.
"""

import argparse
import asyncio
import re
import tempfile
from pathlib import Path
from uuid import uuid4

import aiosql
import asyncpg
import psutil

from benchmarks.queue import Bench, Ours, ours
from db import embedded
from db.pool import open_pool
from db.queue import Claim

SQL = Path(__file__).parent.parent / "db" / "queries" / "queue.sql"
JOBS, BATCH = 10_000, 500
NO_JOB = (
    "FROM started;",
    "FROM (SELECT c.*, NULL::uuid AS user_id, ''::text AS job_type, ''::text AS stage, ''::text AS content_mode, "
    "''::text AS original_prompt, ''::text AS enhanced_prompt, NULL::jsonb AS enhancement, '{}'::jsonb AS params, "
    "3 AS max_attempts, 0 AS queue_wait_ms FROM claimed c) started;",
)
# the statement, what is taken out of it, and what else has to be another text then
CUTS: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    ("claim", "callback", ("called",), ()),
    ("claim", "event", ("noted",), ()),
    ("claim", "clock", ("clock",), ()),
    ("claim", "reading the job", ("started",), (NO_JOB,)),
    ("settle", "callback", ("called",), ()),
    ("settle", "event", ("noted",), ()),
    ("settle", "files, share, run time, refund", ("superseded", "stored", "timed", "charged", "refunded"), ()),
    ("settle", "writing the job", ("ended",), (("FROM ended;", "FROM gone;"),)),
    ("settle", "leaving the queue", ("gone",), (("FROM gone;", "FROM given;"),)),
)
REST = {"claim": "picking, locking, leasing", "settle": "taking in what is given"}


def without(text: str, statement: str, parts: tuple[str, ...], changes: tuple[tuple[str, str], ...]) -> str:
    """The file with parts of a statement taken out. Raises `ValueError` where one is not there."""
    begin = text.index(f"-- name: {statement}(")
    end = text.index("\n-- name:", begin + 1)
    body = re.sub("--.*", "", text[begin:end].split("\n", 1)[1])
    for part in parts:
        found = re.search(rf"\), {part} AS (MATERIALIZED )?\(", body)
        if found is None:
            raise ValueError(f"{statement}: {part}")
        at = found.start()
        depth = 0
        for close in range(body.index("(", at), len(body)):
            depth += {"(": 1, ")": -1}.get(body[close], 0)
            if depth == 0:
                break
        body = body[:at] + body[close:]
    for before, after in changes:
        if before not in body:
            raise ValueError(f"{statement}: {before}")
        body = body.replace(before, after)
    head = text[begin:end].split("\n", 1)[0]
    return text[:begin] + head + "\n" + body + text[end:]


def variants(text: str) -> dict[str, list[tuple[str, str]]]:
    """For each statement the parts in the order in which they go, with the file as it is before each goes; what is left
    at last has the name of the rest."""
    found: dict[str, list[tuple[str, str]]] = {"claim": [], "settle": []}
    left = dict.fromkeys(found, text)
    for statement, name, parts, changes in CUTS:
        found[statement].append((name, left[statement]))
        left[statement] = without(left[statement], statement, parts, changes)
    for statement, name in REST.items():
        found[statement].append((name, left[statement]))
    return found


async def spent(bench: Bench, statement: str, text: str) -> float:
    """µs per job of one variant on a fresh copy of the full queue."""
    server = await asyncpg.connect(bench.database("postgres"))
    await server.execute('DROP DATABASE IF EXISTS "part" WITH (FORCE)')
    await server.execute('CREATE DATABASE "part" TEMPLATE "ours"')
    await server.close()
    async with await open_pool(bench.database("part"), min_size=1, max_size=1) as pool:
        side = Ours(pool, [])
        whole, cut = side.queue._sql, aiosql.from_str(text, "asyncpg")
        backend = psutil.Process(await pool.fetchval("SELECT pg_backend_pid()"))
        side.worker = uuid4()
        side.queue._sql = cut if statement == "claim" else whole
        before = sum(backend.cpu_times()[:2])
        batches: list[list[Claim]] = []
        for _ in range(JOBS // BATCH):
            batches.append(await side.queue.claim("sdxl", side.worker, BATCH))
        if statement == "settle":
            side.queue._sql = cut
            before = sum(backend.cpu_times()[:2])
            for batch in batches:
                await side.queue.settle([side.end(claim) for claim in batch])
        return 1e6 * (sum(backend.cpu_times()[:2]) - before) / JOBS


async def run(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="ovz") as name:
        folder = Path(name)
        folder.chmod(0o755)  # noqa: ASYNC240 (before anything is measured)
        data = folder / "postgres"
        try:
            bench = Bench(embedded.ensure_running(data), data, 1)
            async with ours(bench) as (side, pool):
                await side.submit(JOBS)
                await pool.execute("VACUUM ANALYZE")
            least: dict[tuple[str, str], float] = {}
            found = variants(SQL.read_text(encoding="utf-8"))
            for _ in range(rounds):
                for statement, parts in found.items():
                    for part, text in parts:
                        cost = await spent(bench, statement, text)
                        least[statement, part] = min(cost, least.get((statement, part), cost))
        finally:
            embedded.stop(data)
    print("| | part | µs per job |\n|---|---|---|")
    for statement, parts in found.items():
        costs = [least[statement, part] for part, _ in parts]
        print(f"| **{statement}** | | **{costs[0]:.1f}** |")
        for (part, _), cost, rest in zip(parts, costs, [*costs[1:], 0.0], strict=True):
            print(f"| | {part} | {cost - rest:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is measured")
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
