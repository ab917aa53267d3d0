"""The client against the real API on a socket, and against servers that are not it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.access import Access
from serve_app.api.wire import CreateKey, Job, JobRequest
from serve_app.client import (
    ApiError,
    CannotConnect,
    Client,
    DownloadFailed,
    NoSuchJob,
    UnexpectedAnswer,
    short_id,
)
from serve_app.endpoint import Endpoint
from tests.serve_app.running import Site, running

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def request(**changes: Any) -> JobRequest:
    return JobRequest.model_validate({"job_type": "sdxl_image_fast", "prompt": "a lighthouse"} | changes)


async def test_submit_gives_a_durable_job(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        made = await client.submit(request(seed=7))
        assert (made.job.status, made.job.params["seed"], made.replayed) == ("queued", 7, False)
        assert await database.pool.fetchval("SELECT id FROM jobs") == made.job.id


async def test_submit_with_a_used_key_gives_the_first_job(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        first, again = [await client.submit(request(), "order-17") for _ in range(2)]
        assert again.job.id == first.job.id
        assert (first.replayed, again.replayed) == (False, True)


async def test_submit_asks_again_with_the_same_key_when_the_answer_is_lost(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        async with losing_first_answer(site) as url, Client(Endpoint(url, site.api_key)) as client:
            made = await client.submit(request())
        assert made.replayed
        assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 1


async def test_refusal_carries_the_fields_of_the_problem(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        with pytest.raises(ApiError) as caught:
            await client.submit(request(steps=1000, num_images=4))
    assert (caught.value.status, {field.field for field in caught.value.errors}) == (422, {"steps", "num_images"})


async def test_wrong_key_is_refused_with_401(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(Endpoint(site.url, "ovz_wrong")) as client:
        with pytest.raises(ApiError) as caught:
            await client.get(uuid4())
    assert caught.value.status == 401


async def test_nobody_there_is_cannot_connect(unused_tcp_port: int) -> None:
    async with Client(Endpoint(f"http://127.0.0.1:{unused_tcp_port}", "ovz_k")) as client:
        with pytest.raises(CannotConnect, match="no answer"):
            await client.list_jobs()


async def test_another_program_at_the_address_is_an_unexpected_answer() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello") as url, Client(Endpoint(url)) as client:
        with pytest.raises(UnexpectedAnswer):
            await client.list_jobs()


async def test_error_that_is_no_problem_document_keeps_its_status() -> None:
    gateway = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 4\r\n\r\noops"
    async with answering(gateway) as url, Client(Endpoint(url)) as client:
        with pytest.raises(ApiError) as caught:
            await client.list_jobs()
    assert (caught.value.status, caught.value.code) == (502, "http_error")


async def test_list_filters_and_pages(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        made = [(await client.submit(request(job_type=kind))).job.id for kind in ("sdxl_image_fast", "image_fast") * 2]
        fast = await client.list_jobs(job_type="image_fast", limit=1)
        assert ([job.id for job in fast.data], fast.has_more) == ([made[3]], True)
        rest = await client.list_jobs(job_type="image_fast", before=fast.last_id)
        assert [job.id for job in rest.data] == [made[1]]
        assert not (await client.list_jobs(status="completed")).data


async def test_find_takes_a_unique_end_of_an_id(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        made = [(await client.submit(request())).job.id for _ in range(2)]
        assert await client.find(short_id(made[0])) == made[0]
        assert await client.find(str(made[1])) == made[1]


@pytest.mark.parametrize("text", ["", "abc", "not-an-id", "ffffffff"])
async def test_find_refuses_what_fits_no_job(database: Any, tmp_path: Path, text: str) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        await client.submit(request())
        with pytest.raises(NoSuchJob):
            await client.find(text)


async def test_find_refuses_what_fits_two_jobs(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        made = [(await client.submit(request())).job.id for _ in range(2)]
        shared = made[0].hex[:6]  # the time stamp of one minute
        assert made[1].hex.startswith(shared)
        with pytest.raises(NoSuchJob, match="2 of your"):
            await client.find(shared)


async def test_cancel_and_retry_move_the_job(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        job = (await client.submit(request())).job
        assert (await client.cancel(job.id)).status == "cancelled"
        assert (await client.retry(job.id)).status == "queued"
        with pytest.raises(ApiError) as caught:
            await client.retry(job.id)
    assert caught.value.status == 409


async def test_wait_reports_every_state_up_to_the_end(database: Any, tmp_path: Path) -> None:
    # an hour between polls: what arrives came by the event stream
    async with running(database, tmp_path) as site, Client(site.endpoint, poll_seconds=3600) as client:
        job, seen, worker = (await client.submit(request())).job, Seen(), uuid4()
        waiting = asyncio.create_task(client.wait(job.id, seen))
        await seen.until(lambda state: state.status == "queued")
        claim = await site.claim(job.id, worker)
        await site.step(claim, worker, 2, 15)
        at = await seen.until(lambda state: state.progress is not None and state.progress.step == 2)
        assert at.status == "processing"
        await site.finish(claim)
        ended = await asyncio.wait_for(waiting, 30)
    assert (ended.status, ended.generation_seconds, len(ended.assets)) == ("completed", 1.5, 1)
    assert seen.states[-1] == ended


async def test_wait_polls_where_event_streams_do_not_get_through(database: Any, tmp_path: Path) -> None:
    async with (
        running(database, tmp_path) as site,
        without_event_streams(site) as url,
        Client(Endpoint(url, site.api_key), poll_seconds=0.05) as client,
    ):
        job, seen = (await client.submit(request())).job, Seen()
        waiting = asyncio.create_task(client.wait(job.id, seen))
        await seen.until(lambda state: state.status == "queued")
        claim = await site.claim(job.id)
        await seen.until(lambda state: state.status == "processing")
        await site.fail(claim)
        ended = await asyncio.wait_for(waiting, 30)
    assert ended.error is not None
    assert (ended.status, ended.error.code) == ("failed", "oom")


async def test_wait_for_a_job_of_nobody_raises(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint, poll_seconds=0.05) as client:
        with pytest.raises(ApiError) as caught:
            await client.wait(uuid4())
    assert caught.value.status == 404


async def test_watch_gives_up_when_its_patience_ends(unused_tcp_port: int) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{unused_tcp_port}")
    async with Client(endpoint, poll_seconds=0.01) as client:
        with pytest.raises(CannotConnect):
            await anext(client.watch(uuid4(), patience_seconds=0))


async def test_download_writes_the_whole_file_under_a_name_of_its_own(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        job = (await client.submit(request())).job
        data = await site.finish(await site.claim(job.id))
        (path,) = await client.download(await client.get(job.id), tmp_path / "out")
    assert path.read_bytes() == data
    assert path.name == f"sdxl_image_fast-{short_id(job.id)}-0.png"
    assert list(path.parent.iterdir()) == [path]


async def test_download_of_a_file_of_another_size_leaves_nothing(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        job = (await client.submit(request())).job
        await site.finish(await site.claim(job.id), file_size_bytes=9999)
        with pytest.raises(DownloadFailed, match="not 9999"):
            await client.download(await client.get(job.id), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


async def test_download_of_a_forged_url_fails(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        job = (await client.submit(request())).job
        await site.finish(await site.claim(job.id))
        seen = await client.get(job.id)
        forged = seen.assets[0].model_copy(update={"url": seen.assets[0].url[:-4] + "0000"})
        with pytest.raises(DownloadFailed, match="HTTP 4"):
            await client.download(seen.model_copy(update={"assets": [forged]}), tmp_path / "out")


async def test_keys_of_an_admin_open_and_close_the_api(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        admin = await Access(database.pool).create_key(await database.user("root", "admin"), "root")
        async with Client(Endpoint(site.url, admin.secret)) as client:
            made = await client.create_key(CreateKey(username="bob"))
            async with Client(Endpoint(site.url, made.key)) as bob:
                assert [key.id for key in await bob.list_keys()] == [made.id]
                await client.revoke_key(made.id)
                with pytest.raises(ApiError):
                    await bob.list_keys()
            assert {key.username for key in await client.list_keys(everyone=True)} == {"root", "bob", "alice"}


async def test_callback_secret_is_a_signing_key(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site, Client(site.endpoint) as client:
        assert (await client.callback_secret()).secret.startswith("whsec_")


def test_endpoint_keeps_the_admin_key_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "admin-key").write_text("ovz_admin\n")
    monkeypatch.setenv("OURVIDZ_STATE_DIR", str(tmp_path))
    assert Endpoint.find().api_key == "ovz_admin"
    assert Endpoint.find("http://localhost:9000").api_key == "ovz_admin"
    assert Endpoint.find("https://gpu.example.com").api_key is None
    assert Endpoint.find("http://127.0.0.1.example.com").api_key is None


def test_endpoint_prefers_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "admin-key").write_text("ovz_admin\n")
    monkeypatch.setenv("OURVIDZ_URL", "http://127.0.0.1:9999/")
    monkeypatch.setenv("OURVIDZ_API_KEY", "ovz_environment")
    assert Endpoint.find(state_dir=tmp_path) == Endpoint("http://127.0.0.1:9999", "ovz_environment")
    assert Endpoint.find("http://127.0.0.1:1", "ovz_given") == Endpoint("http://127.0.0.1:1", "ovz_given")


def test_endpoint_does_not_show_its_key() -> None:
    assert "ovz_secret" not in repr(Endpoint("http://127.0.0.1:1", "ovz_secret"))


@pytest.mark.parametrize("url", ["ftp://host", "http://", "127.0.0.1:8000", "http://[::1"])
def test_endpoint_refuses_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="address of the API"):
        Endpoint.find(url)


class Seen:
    """Collects the states that a wait reports, and waits for one."""

    def __init__(self) -> None:
        self.states: list[Job] = []
        self._changed = asyncio.Event()

    def __call__(self, job: Job) -> None:
        self.states.append(job)
        self._changed.set()

    async def until(self, wanted: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while True:
                for state in self.states:
                    if wanted(state):
                        return state
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def listening(handle: Handle) -> AsyncIterator[str]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that gives every request the same answer."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with listening(handle) as url:
        yield url


@contextlib.asynccontextmanager
async def passing_on(site: Site, judge: Callable[[httpx2.Response, int], bytes | None]) -> AsyncIterator[str]:
    """A proxy before the site, one connection a request; `judge` may replace an answer, with nothing by b""."""
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("Content-Length", headers.get("content-length", "0"))))
        kept = {name: value for name, value in headers.items() if name.lower() not in ("host", "connection")}
        async with httpx2.AsyncClient() as http:
            answer = await http.request(method, site.url + path, headers=kept, content=body)
        count += 1
        told = judge(answer, count)
        if told is None:
            told = f"HTTP/1.1 {answer.status_code} -\r\nconnection: close\r\n".encode()
            told += b"".join(
                name + b": " + value + b"\r\n"
                for name, value in answer.headers.raw
                if name.lower() not in (b"connection", b"transfer-encoding")
            )
            told += b"\r\n" + answer.content
        writer.write(told)
        await writer.drain()
        writer.close()

    async with listening(handle) as url:
        yield url


def losing_first_answer(site: Site) -> contextlib.AbstractAsyncContextManager[str]:
    """A line that breaks after the first request was carried out."""
    return passing_on(site, lambda _, count: b"" if count == 1 else None)


def without_event_streams(site: Site) -> contextlib.AbstractAsyncContextManager[str]:
    """A proxy that answers for event streams with a page of its own."""
    page = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno"
    return passing_on(site, lambda answer, _: page if answer.request.url.path.endswith("/events") else None)


def test_short_id_is_the_end_of_the_id() -> None:
    assert short_id(UUID("019234ab-0000-7000-8000-0000deadbeef")) == "deadbeef"
