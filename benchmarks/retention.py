"""`python -m benchmarks.retention`: what a long past costs the queue, and how fast it is pruned, archived and erased.

One embedded Postgres with its durable defaults. Claims are timed before and after the past is there, in turns with the
acceptance of the jobs that they claim; then the old events go, half of the past is archived into a folder, and the user
with the rest is erased. Says medians and rates of this machine; the pinned plans of the tests say what does not depend
on one.
"""

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
from uuid6 import uuid7

from db import embedded
from db.access import Access
from db.blobs import BlobStore
from db.erasures import Erasures
from db.jobs import Jobs, NewJob, Stage
from db.migrate import migrate
from db.pool import open_pool
from db.queue import Queue
from db.retention import Retention
from deployments.archive import ARCHIVE_BUCKET, Archive
from deployments.erasure import Erasure

# Jobs that ended one after the other within two years, each with three events, an asset, and a callback tried once.
PAST = """
WITH ended AS (
  INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, status, stage, original_prompt, params,
                    attempts, created_at, started_at, completed_at, generation_time_ms)
  SELECT gen_random_uuid(), $1, 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'completed', 'generate',
         repeat(md5(n::text), 8), jsonb_build_object('steps', 20, 'seed', n), 1, at, at, at, 4000
  FROM (SELECT n, now() - interval '1 day' - n * interval '2 years' / $2::int AS at
        FROM generate_series(1, $2::int) n) past
  RETURNING id, user_id, created_at AS at, original_prompt
), events AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, at, data)
  SELECT id, user_id, 1, kind, at, '{"queue": "sdxl"}'
  FROM ended, unnest(ARRAY['queued', 'started', 'completed']) kind
), assets AS (
  INSERT INTO workspace_assets (user_id, job_id, attempt, asset_type, temp_storage_path, mime_type, file_size_bytes,
                                original_prompt, model_used)
  SELECT user_id, id, 1, 'image', user_id || '/' || id || '/1/0.png', 'image/png', 1, original_prompt, 'm' FROM ended
), callbacks AS (
  INSERT INTO callback_outbox (id, job_id, user_id, seq, event_type, terminal, url, body, state, delivered_at)
  SELECT 'msg_' || id, id, user_id, 1, 'job.completed', true, 'https://example.com/',
         convert_to(repeat('{"status": "completed"}', 40), 'UTF8'), 'delivered', at
  FROM ended RETURNING id, delivered_at
)
INSERT INTO callback_attempts (callback_id, attempt, at, status, elapsed_ms)
SELECT id, 1, delivered_at, 200, 10 FROM callbacks
"""


async def claim_ms(pool: asyncpg.Pool, user: UUID, rounds: int) -> float:
    """The median time of a claim of one job out of a queue with a few."""
    jobs, queue, times = Jobs(pool), Queue(pool), []
    for _ in range(rounds):
        await jobs.accept(
            NewJob(
                id=UUID(int=uuid7().int),
                user_id=user,
                job_type="sdxl_image_fast",
                format="image",
                quality="fast",
                model_type="sdxl",
                stage=Stage.GENERATE,
                queue="sdxl",
                cost=5.0,
                credits=1,
                original_prompt="a lighthouse",
                params={},
            )
        )
        begun = time.perf_counter()
        assert len(await queue.claim("sdxl", uuid4(), 1)) == 1
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


async def measure(url: str, folder: Path, past: int, rounds: int) -> None:
    """Everything, in order."""
    connection = await asyncpg.connect(url)
    await migrate(connection)
    await connection.close()
    async with await open_pool(url, max_size=4) as pool:
        user, owner = await Access(pool).ensure_user("claims"), await Access(pool).ensure_user("past")
        await claim_ms(pool, user, rounds)  # warms up
        empty = await claim_ms(pool, user, rounds)
        for _ in range(0, past, 10_000):
            await pool.execute(PAST, owner, 10_000)
        async with pool.acquire() as filled:
            await filled.execute("VACUUM ANALYZE")
        full = await claim_ms(pool, user, rounds)
        print(f"claim, median: {empty:.2f} ms with no past, {full:.2f} ms with {past} ended jobs")

        events = await pool.fetchval("SELECT count(*) FROM job_events")
        begun, retention = time.perf_counter(), Retention(pool)
        while await retention.prune():
            pass
        gone = events - await pool.fetchval("SELECT count(*) FROM job_events")
        print(f"prune: {gone} events and the tries of the same age in {time.perf_counter() - begun:.1f} s")

        begun, jobs = time.perf_counter(), 0
        blobs = BlobStore.from_url(f"file://{folder}")
        async for archived in Archive(pool, blobs).run(timedelta(days=365)):
            jobs += archived.deleted
        seconds = time.perf_counter() - begun
        size = sum([info.size async for info in blobs.list(ARCHIVE_BUCKET)])
        print(f"archive: {jobs} jobs in {seconds:.1f} s, {jobs / seconds:.0f}/s, {size / max(jobs, 1):.0f} bytes a job")

        begun, left = time.perf_counter(), await pool.fetchval("SELECT count(*) FROM jobs WHERE user_id = $1", owner)
        erasures = Erasures(pool)
        await erasures.request(owner, "operator")
        requested = time.perf_counter() - begun
        assert await Erasure(erasures, blobs).carry_out(owner)
        seconds = time.perf_counter() - begun
        print(f"erase: request {requested * 1000:.0f} ms; {left} jobs in {seconds:.1f} s, {left / seconds:.0f}/s")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, default=1_000_000, help="ended jobs, in tens of thousands")
    parser.add_argument("--rounds", type=int, default=300, help="claims that are timed")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="ovz") as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            url = embedded.ensure_running(folder / "postgres")
            asyncio.run(measure(url, folder / "blobs", given.past, given.rounds))
        finally:
            embedded.stop(folder / "postgres")


if __name__ == "__main__":
    main()
