"""`python -m benchmarks.streams`: many open event streams, and what they cost the API. On a cluster of its own.

Opens the streams as bare connections on loopback, spread over jobs of a paused queue. Requests to the API are timed
without and with the streams open, in turns on one cluster, so that a noisy machine hurts both alike; what counts is the
ratio. Then the queue is resumed, the jobs run, and every stream must tell its job's whole history in order, up to
the end. Exits with 1 where one did not.
"""

import argparse
import asyncio
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx2
import psutil

from db import embedded

ENDS = ("completed", "failed", "cancelled")
OPENING = 50  # streams that are being opened at once
CONNECTIONS = """SELECT application_name AS name, count(*) AS open, count(*) FILTER (WHERE state <> 'idle') AS busy
                 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE ANY ($1)
                 GROUP BY 1 ORDER BY 1"""


@dataclass
class Stream:
    """One event stream over a bare connection, and what it has told so far."""

    url: str
    key: str
    job_id: str
    last_event_id: int = 0
    kinds: list[str] = field(default_factory=list)  # of the history, as told
    ids: list[int] = field(default_factory=list)
    status: str | None = None  # of the job, as told last
    previews: int = 0
    closed: bool = False  # by the server, in good order
    _writer: asyncio.StreamWriter | None = None
    _reading: "asyncio.Task[None] | None" = None
    _begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> None:
        """Connect, and return when the stream has told its job for the first time. Raises `ConnectionError`."""
        parts = urlsplit(self.url)
        reader, self._writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = [
            f"GET /v1/events/jobs/{self.job_id} HTTP/1.1",
            f"Host: {parts.netloc}",
            f"Authorization: Bearer {self.key}",
            "Accept: text/event-stream",
            *([f"Last-Event-ID: {self.last_event_id}"] if self.last_event_id else []),
        ]
        self._writer.write("\r\n".join([*head, "", ""]).encode())
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(status.decode(errors="replace").strip() or "closed")
        self._reading = asyncio.create_task(self._read(reader))
        begun = asyncio.create_task(self._begun.wait())
        await asyncio.wait({begun, self._reading}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if not self._begun.is_set():
            raise ConnectionError("the stream ended before its first event")

    def cut(self) -> None:
        """End the connection without a word."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def ended(self, seconds: float) -> bool:
        """Whether the stream came to its end in time."""
        assert self._reading is not None
        await asyncio.wait({self._reading}, timeout=seconds)
        return self._reading.done()

    async def close(self) -> None:
        """Let go of everything."""
        self.cut()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    @property
    def whole(self) -> bool:
        """Whether the history came in order and the end was told, by an event and by the job."""
        in_order = all(one < other for one, other in zip(self.ids, self.ids[1:], strict=False))
        return in_order and self.status in ENDS and self.kinds[-1:] == [self.status]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        name = ""
        try:
            # the sizes of the chunks stand on lines of their own and are like no line of an event
            while line := await reader.readline():
                if line == b"0\r\n":
                    self.closed = True
                    return
                text = line.decode().strip()
                if text.startswith("event:"):
                    name = text.partition(":")[2].strip()
                elif text.startswith("data:"):
                    self._told(name, json.loads(text.partition(":")[2]))
        except OSError:
            return

    def _told(self, name: str, data: dict[str, Any]) -> None:
        if name == "event":
            self.kinds.append(data["kind"])
            self.ids.append(data["id"])
        elif name == "job":
            self.status = data["status"]
            self._begun.set()
        elif name == "preview":
            self.previews += 1


async def open_all(streams: Sequence[Stream], at_once: int = OPENING) -> Counter[str]:
    """Open streams, so many at a time; returns why some could not be."""
    refused: Counter[str] = Counter()
    places = asyncio.Semaphore(at_once)

    async def one(stream: Stream) -> None:
        async with places:
            try:
                await stream.open()
            except OSError as error:
                refused[str(error) or type(error).__name__] += 1

    await asyncio.gather(*map(one, streams))
    return refused


async def close_all(streams: Sequence[Stream]) -> None:
    """Cut all streams."""
    await asyncio.gather(*(stream.close() for stream in streams))


def allow_files(wanted: int) -> None:
    """Raise the limit of open files to what is needed. Raises SystemExit where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SystemExit(f"{wanted} open files are needed, and the limit is {hard}: raise it with ulimit -n")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def latencies(client: httpx2.AsyncClient, job_id: str, requests: int) -> list[float]:
    """Milliseconds of requests for a job, one after another."""
    took = []
    for _ in range(requests):
        started = time.perf_counter()
        (await client.get(f"/v1/jobs/{job_id}")).raise_for_status()
        took.append((time.perf_counter() - started) * 1000)
    return took


def percentiles(took: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


def resident_mib(title: str, processes: list[psutil.Process]) -> float:
    """Resident memory of the Serve replicas whose name begins so."""
    found = [p for p in processes if p.cmdline() and p.cmdline()[0].startswith(f"ray::ServeReplica:{title}")]
    return sum(process.memory_info().rss for process in found) / 2**20


async def measure(cluster: Any, count: int, jobs: int, rounds: int, requests: int) -> bool:
    """The measurement on a running cluster; prints what it finds and returns whether no stream missed anything."""
    headers = {"Authorization": f"Bearer {cluster.key()}"}
    async with httpx2.AsyncClient(base_url=cluster.api, headers=headers, timeout=60) as client:
        (await client.post("/v1/queues/sdxl/pause")).raise_for_status()
        body = {"job_type": "sdxl_image_fast", "prompt": "a mill", "previews": True}
        ids = [(await client.post("/v1/jobs", json=body)).raise_for_status().json()["id"] for _ in range(jobs)]
        await latencies(client, ids[0], requests)  # warm
        memory = resident_mib("ourvidz-events", cluster.processes())
        without: list[float] = []
        beside: list[float] = []
        streams: list[Stream] = []
        for number in range(rounds):
            without += await latencies(client, ids[0], requests)
            streams = [Stream(cluster.api, cluster.key(), ids[n % jobs]) for n in range(count)]
            started = time.perf_counter()
            refused = await open_all(streams)
            print(
                f"round {number + 1}: {count - refused.total()} of {count} streams opened in "
                f"{time.perf_counter() - started:.1f} s {dict(refused) or ''}"
            )
            beside += await latencies(client, ids[0], requests)
            if number < rounds - 1:
                await close_all(streams)
                await asyncio.sleep(3)  # for the far ends to notice
        database = await asyncpg.connect(embedded.ensure_running(cluster.data))
        connections = await database.fetch(CONNECTIONS, ["ourvidz%", "listen%"])
        await database.close()
        loaded = resident_mib("ourvidz-events", cluster.processes())
        (await client.post("/v1/queues/sdxl/resume")).raise_for_status()
        started = time.perf_counter()
        until = time.monotonic() + 120
        await asyncio.gather(*(s.ended(max(0, until - time.monotonic())) for s in streams if s.status))
        took = time.perf_counter() - started
        whole = sum(stream.whole and stream.closed for stream in streams)
        await close_all(streams)
    (p50, p99), (beside50, beside99) = percentiles(without), percentiles(beside)
    print(f"streams: {count} on {jobs} jobs; told everything in order, up to the end: {whole}; missed: {count - whole}")
    print(
        f"ends: {dict(Counter(s.status for s in streams))}, {took:.1f} s after the queue was resumed; "
        f"previews told: {sum(s.previews for s in streams)}"
    )
    print(
        f"API, GET /v1/jobs/{{id}}, {len(without)} requests each way: "
        f"p50 {p50:.1f} ms without, {beside50:.1f} ms with (x{beside50 / p50:.2f}); "
        f"p99 {p99:.1f} ms without, {beside99:.1f} ms with (x{beside99 / p99:.2f})"
    )
    print(f"events replica: {memory:.0f} MiB without, {loaded:.0f} MiB with all streams")
    for row in connections:
        print(f"database connections of {row['name']!r}: {row['open']} open, {row['busy']} in use")
    return whole == count


def main() -> int:
    """Read the arguments, start a cluster, measure, stop it."""
    from benchmarks.chaos.cluster import Cluster

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100, help="requests to the API in each half of a round")
    asked = parser.parse_args()
    allow_files(asked.streams * 2 + 1000)
    with tempfile.TemporaryDirectory(prefix="ovz") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the embedded Postgres of root runs as another user
        cluster = Cluster(folder, "http://127.0.0.1:1")
        try:
            cluster.start()
            ok = asyncio.run(measure(cluster, asked.streams, asked.jobs, asked.rounds, asked.requests))
        finally:
            cluster.stop()
            cluster.forget_logs()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
