"""The demonstration on real replicas with tiny weights, and what it says when something is wrong."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from standardwebhooks import Webhook

from serve_app.api.wire import Job, JobRequest
from serve_app.client import Client
from serve_app.demo import DemoReport, run_demo
from serve_app.receiver import Receiver
from tests.serve_app.running import Site, replicas, running

SECRET = "whsec_" + "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
ONE = (JobRequest.model_validate({"job_type": "sdxl_image_fast", "prompt": "a lighthouse"}),)


async def test_demo_completes_opens_and_verifies_everything(database: Any, tmp_path: Path) -> None:
    seen: set[str] = set()

    def changed(job: Job) -> None:
        seen.add(job.status)

    with Receiver() as receiver:
        async with (
            running(database, tmp_path, egress_allow=(receiver.origin,)) as site,
            replicas(site),
            Client(site.endpoint) as client,
        ):
            report = await run_demo(client, receiver, tmp_path / "out", changed)
    assert report.passed, [job.problems for job in report.jobs]
    assert [len(job.files) for job in report.jobs] == [3, 1, 1]
    assert [job.files[0].suffix for job in report.jobs] == [".png", ".mp4", ".png"]
    assert [job.callbacks for job in report.jobs] == [("job.processing", "job.completed")] * 3
    assert {"queued", "processing", "completed"} >= seen >= {"completed"}


async def test_demo_says_that_a_callback_did_not_come(database: Any, tmp_path: Path) -> None:
    # nobody delivers here
    with Receiver() as receiver:
        async with running(database, tmp_path, egress_allow=(receiver.origin,)) as site:
            report = await one_job(site, receiver, tmp_path / "out")
    assert not report.passed
    assert "did not come" in report.jobs[0].problems[0]
    assert len(report.jobs[0].files) == 1


async def test_demo_says_that_a_file_is_not_what_the_api_says(database: Any, tmp_path: Path) -> None:
    with Receiver() as receiver:
        async with running(database, tmp_path, egress_allow=(receiver.origin,)) as site:
            report = await one_job(site, receiver, tmp_path / "out", width=512)
    assert any("512" in problem for problem in report.jobs[0].problems)


async def test_demo_says_that_a_job_failed(database: Any, tmp_path: Path) -> None:
    with Receiver() as receiver:
        async with running(database, tmp_path, egress_allow=(receiver.origin,)) as site:
            report = await one_job(site, receiver, tmp_path / "out", fails=True)
    assert "failed: oom" in report.jobs[0].problems
    assert not report.jobs[0].callback_verified


async def test_demo_that_is_interrupted_cancels_its_jobs(database: Any, tmp_path: Path) -> None:
    begun = asyncio.Event()
    with Receiver() as receiver:
        async with (
            running(database, tmp_path, egress_allow=(receiver.origin,)) as site,
            Client(site.endpoint) as client,
        ):
            work = run_demo(client, receiver, tmp_path / "out", lambda _: begun.set(), requests=ONE)
            running_demo = asyncio.create_task(work)
            await asyncio.wait_for(begun.wait(), 30)
            running_demo.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running_demo
            assert [job.status for job in (await client.list_jobs()).data] == ["cancelled"]


async def test_receiver_takes_what_is_signed() -> None:
    job_id = uuid4()
    with Receiver() as receiver:
        receiver.trust(SECRET)
        assert await post(receiver, callback(job_id)) == 204
        assert receiver.wait_for(job_id, "job.completed", 0)
        assert [delivery.type for delivery in receiver.deliveries(job_id)] == ["job.completed"]
        assert not receiver.wait_for(uuid4(), "job.completed", 0)


async def test_receiver_counts_a_repeat_once() -> None:
    job_id = uuid4()
    with Receiver() as receiver:
        receiver.trust(SECRET)
        assert [await post(receiver, callback(job_id)) for _ in range(2)] == [204, 204]
        assert len(receiver.deliveries(job_id)) == 1


@pytest.mark.parametrize("header", ["webhook-signature", "webhook-id", "webhook-timestamp"])
async def test_receiver_rejects_what_is_not_signed_by_the_one_it_trusts(header: str) -> None:
    job_id = uuid4()
    with Receiver() as receiver:
        receiver.trust(SECRET)
        assert await post(receiver, callback(job_id), {header: "1"}) == 401
        assert receiver.rejected == 1
        assert not receiver.deliveries(job_id)


async def test_receiver_takes_nothing_before_it_knows_whom_to_trust() -> None:
    with Receiver() as receiver:
        assert await post(receiver, callback(uuid4())) == 503
        assert receiver.rejected == 0


@pytest.mark.parametrize(("length", "status"), [("content-length: 1000001", b"413"), ("x: y", b"411")])
async def test_receiver_refuses_a_body_without_end(length: str, status: bytes) -> None:
    with Receiver() as receiver:
        receiver.trust(SECRET)
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx2.URL(receiver.origin).port)
        writer.write(f"POST / HTTP/1.1\r\nhost: receiver\r\n{length}\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.readline(), 30)
        writer.close()
    assert answer.split()[1] == status


async def one_job(site: Site, receiver: Receiver, out: Path, *, fails: bool = False, **changes: Any) -> DemoReport:
    """A demonstration of one job, which the test itself runs. No deliverer is there."""
    async with Client(site.endpoint) as client:
        work = run_demo(client, receiver, out, requests=ONE, callback_seconds=0.1)
        demo = asyncio.create_task(work)
        claim = await asyncio.wait_for(site.claim(), 30)
        await (site.fail(claim) if fails else site.finish(claim, **changes))
        return await asyncio.wait_for(demo, 30)


def callback(job_id: object) -> bytes:
    return json.dumps({"id": "msg_1", "type": "job.completed", "job_id": str(job_id), "status": "completed"}).encode()


async def post(receiver: Receiver, body: bytes, changes: dict[str, str] | None = None) -> int:
    at = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(SECRET).sign("msg_1", at, body.decode()),
    }
    async with httpx2.AsyncClient() as http:
        answer = await http.post(receiver.origin, content=body, headers=headers | (changes or {}))
    return answer.status_code
