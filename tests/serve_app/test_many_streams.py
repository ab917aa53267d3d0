"""Many open streams on one events application: none holds a connection of the pool, none misses the end.

300 here, so that a small machine does it in time; `benchmarks/streams.py` opens 1,000 on a whole cluster.
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2

from benchmarks.streams import Stream, allow_files, close_all, open_all
from serve_app.watches import Watches
from tests.serve_app.conftest import InProcess, a_job
from tests.serve_app.running import Site, running

STREAMS, JOBS, CUT = 300, 10, 30
POOL = 20  # of the events application, as of the API


async def connections(site: Site) -> dict[str, tuple[int, int]]:
    """By application: how many connections there are, and how many are in a statement or a transaction."""
    rows = await site.database.pool.fetch(
        """SELECT application_name AS name, count(*) AS open, count(*) FILTER (WHERE state <> 'idle') AS busy
           FROM pg_stat_activity WHERE datname = current_database() GROUP BY 1"""
    )
    return {row["name"]: (row["open"], row["busy"]) for row in rows}


async def test_hundreds_of_streams_hold_no_connection_and_miss_no_end(database: Any, tmp_path: Path) -> None:
    allow_files(STREAMS * 2 + 200)
    async with running(database, tmp_path) as site, asyncio.timeout(240):
        headers = {"Authorization": f"Bearer {site.api_key}"}
        async with httpx2.AsyncClient(base_url=site.url, headers=headers, timeout=60) as client:
            ids = [(await client.post("/v1/jobs", json=a_job())).json()["id"] for _ in range(JOBS)]
            streams = [Stream(site.url, site.api_key, ids[n % JOBS]) for n in range(STREAMS)]
            try:
                assert await open_all(streams) == {}
                assert {(stream.status, *stream.kinds) for stream in streams} == {("queued", "queued")}
                while (seen := await connections(site))["ourvidz events"][1]:
                    pass  # the last reads of the opening; a stream that held its connection would never let go
                assert seen["ourvidz events"][0] <= POOL
                cut, kept = streams[:CUT], streams[CUT:]
                await close_all(cut)

                for job_id in ids:
                    (await client.post(f"/v1/jobs/{job_id}/cancel")).raise_for_status()
                assert all(await asyncio.gather(*(stream.ended(60) for stream in kept)))
                assert [stream for stream in kept if not (stream.whole and stream.closed)] == []
                assert {tuple(stream.kinds) for stream in kept} == {("queued", "cancelled")}
                assert {tuple(stream.kinds) for stream in cut} == {("queued",)}

                again = [Stream(s.url, s.key, s.job_id, last_event_id=s.ids[-1]) for s in cut]
                streams += again
                assert await open_all(again) == {}
                assert all(await asyncio.gather(*(stream.ended(60) for stream in again)))
                assert {tuple(stream.kinds) for stream in again} == {("cancelled",)}
                assert all(stream.whole and stream.closed for stream in again)
            finally:
                await close_all(streams)


async def test_streams_of_one_job_and_viewer_are_read_for_once(server: InProcess) -> None:
    alice = await server.user("alice")
    job_id = UUID((await alice.post("/v1/jobs", json=a_job())).json()["id"])
    viewers: dict[str, Any] = {}
    for name, role in (("alice", "basic_user"), ("root", "admin")):
        viewers[name] = await server.edge.access.authenticate(await server.key(name, role))
    url = server.settings.postgres()
    watches = Watches(server.edge, url)
    watches.start()
    try:
        async with AsyncExitStack() as stack, asyncio.timeout(60):
            alices = [await stack.enter_async_context(watches.watching(viewers["alice"], job_id)) for _ in range(100)]
            root = await stack.enter_async_context(watches.watching(viewers["root"], job_id))
            assert len(set(map(id, alices))) == 1
            assert root is not alices[0]  # what an admin may see is another thing
            await asyncio.gather(*(watch.fresh() for watch in alices))
            assert alices[0]._begun <= 2
            first = await alices[0].after(0)
            assert first is not None
            server.edge.notifier.job(job_id)
            await server.edge.queue.cancel(job_id)
            server.edge.notifier.job(job_id)
            sights = await asyncio.gather(*(watch.after(first.number) for watch in alices))
            assert len(set(map(id, sights))) == 1
            assert alices[0]._begun <= 6
        assert (watches._watches, watches._by_job) == ({}, {})
    finally:
        await watches.close()
