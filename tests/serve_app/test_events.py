"""Server-sent events over a real socket: what was, what is, and what comes, to the owner of the job only."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.access import Access
from db.queue import Renewal
from tests.serve_app.running import Site, running


@dataclass
class Sent:
    """One event as it came over the wire."""

    kind: str
    id: str | None
    data: Any


@dataclass
class Following:
    """A site, a client of its API, and one job."""

    site: Site
    client: httpx2.AsyncClient
    job: dict[str, Any]

    @property
    def path(self) -> str:
        return f"/v1/events/jobs/{self.job['id']}"

    @property
    def job_id(self) -> UUID:
        return UUID(self.job["id"])

    async def cancel(self) -> None:
        (await self.client.post(f"/v1/jobs/{self.job['id']}/cancel")).raise_for_status()

    @asynccontextmanager
    async def stream(self, **headers: str) -> AsyncIterator[AsyncIterator[Sent]]:
        async with (
            asyncio.timeout(60),
            self.client.stream("GET", self.path, headers={"Accept": "text/event-stream", **headers}) as answer,
        ):
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield events(answer)


async def events(answer: httpx2.Response) -> AsyncIterator[Sent]:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield Sent(fields.get("event", "message"), fields.get("id"), json.loads(fields["data"]))
            fields = {}


async def until(stream: AsyncIterator[Sent], kind: str) -> Sent:
    async for sent in stream:
        if sent.kind == kind:
            return sent
    raise AssertionError(f"the stream ended without {kind}")


async def history(stream: AsyncIterator[Sent]) -> list[str]:
    """The history's lines and the jobs' statuses until the stream ends."""
    return [f"{sent.kind} {sent.data.get('kind') or sent.data['status']}" async for sent in stream]


@pytest.fixture
async def following(database: Any, tmp_path: Path) -> AsyncIterator[Following]:
    async with running(database, tmp_path) as site:
        headers = {"Authorization": f"Bearer {site.api_key}"}
        async with httpx2.AsyncClient(base_url=site.url, headers=headers, timeout=30) as client:
            job = (await client.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "a mill"})).json()
            yield Following(site, client, job)


async def test_stream_begins_with_what_was_and_what_is(following: Following) -> None:
    async with following.stream() as stream:
        first, second = await anext(stream), await anext(stream)
    assert (first.kind, first.data["kind"], first.data["job_id"]) == ("event", "queued", following.job["id"])
    assert first.id == str(first.data["id"])
    assert (second.kind, second.data["id"], second.data["status"]) == ("job", following.job["id"], "queued")


async def test_stream_tells_a_change_when_it_is_notified(following: Following) -> None:
    async with following.stream() as stream:
        await until(stream, "job")
        worker = uuid4()
        claim = await following.site.claim(worker=worker)
        await following.site.step(claim, worker, 3, 15)
        async for sent in stream:
            if sent.kind == "job" and (sent.data["progress"] or {}).get("step"):
                assert sent.data["progress"] == {"phase": "denoise", "step": 3, "steps": 15}
                break


async def test_stream_tells_a_change_that_nobody_notified(following: Following) -> None:
    async with following.stream() as stream:
        await until(stream, "job")
        worker = uuid4()
        claim = await following.site.claim(worker=worker)  # a claim without its notification
        await following.site.queue.renew(worker, [Renewal(claim.job_id, 1, "denoise", 1, 15)])
        while (sent := await until(stream, "job")).data["status"] == "queued":
            pass
        assert sent.data["status"] == "processing"


async def test_stream_ends_after_the_job(following: Following) -> None:
    async with following.stream() as stream:
        await until(stream, "job")
        await following.cancel()
        assert await history(stream) == ["event cancelled", "job cancelled"]


async def test_stream_of_an_ended_job_tells_it_all_and_ends(following: Following) -> None:
    await following.cancel()
    async with following.stream() as stream:
        assert await history(stream) == ["event queued", "event cancelled", "job cancelled"]


async def test_stream_resumes_after_the_last_event(following: Following) -> None:
    async with following.stream() as stream:
        queued = await until(stream, "event")
    await following.cancel()
    async with following.stream(**{"Last-Event-ID": str(queued.id)}) as stream:
        assert await history(stream) == ["event cancelled", "job cancelled"]


async def test_stream_after_all_events_still_tells_the_job(following: Following) -> None:
    await following.cancel()
    async with following.stream(**{"Last-Event-ID": str(2**62)}) as stream:
        assert await history(stream) == ["job cancelled"]


async def test_many_streams_of_one_job_all_end(following: Following) -> None:
    async def follow() -> list[str]:
        async with following.stream() as stream:
            started.release()
            return await history(stream)

    started = asyncio.Semaphore(0)
    streams = [asyncio.create_task(follow()) for _ in range(20)]
    for _ in streams:
        await started.acquire()
    await following.cancel()
    for stream in streams:
        assert (await stream)[-1] == "job cancelled"


@pytest.mark.parametrize("last", ["x", "-1", str(2**63), str(2**200), "1.5"])
async def test_a_last_event_id_that_is_none_is_refused(following: Following, last: str) -> None:
    answer = await following.client.get(following.path, headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["errors"][0]["field"].lower() == "last-event-id"


@pytest.mark.parametrize("role", ["basic_user", "moderator"])
async def test_no_stream_of_somebody_elses_job(following: Following, role: str) -> None:
    access = Access(following.site.database.pool)
    key = await access.create_key(await access.ensure_user("bob", role), "test")
    headers = {"Authorization": f"Bearer {key.secret}"}
    answer = await following.client.get(following.path, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
    unknown = await following.client.get(f"/v1/events/jobs/{uuid4()}", headers=headers)
    assert {**answer.json(), "instance": ""} == {**unknown.json(), "instance": ""}


async def test_no_stream_without_a_key(following: Following) -> None:
    answer = await following.client.get(following.path, headers={"Authorization": "Bearer ovz_wrong"})
    assert answer.status_code == 401


async def test_a_stream_tells_neither_secrets_nor_other_jobs(following: Following) -> None:
    await following.client.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "another"})
    await following.cancel()
    async with following.stream() as stream:
        text = json.dumps([sent.data async for sent in stream])
    assert "another" not in text
    assert "ovz_" not in text
