"""Delivery to registered endpoints: from the end of a job, through the outbox, to real sockets."""

import asyncio
import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook

from db.endpoints import Endpoint, Endpoints
from tests.db.outbox import Outbox
from tests.db.test_endpoints import ended
from tests.db.test_queue import new_job
from tests.deployments import hostile
from tests.deployments.test_callbacks import SECRETS, deliverer, running


@pytest.fixture
async def outbox(database: Any) -> Outbox:
    return await Outbox.open(database)


async def reason(outbox: Outbox, endpoint: Endpoint) -> str | None:
    statement = "SELECT disabled_reason FROM callback_endpoints WHERE id = $1"
    return await outbox.pool.fetchval(statement, endpoint.id)


async def test_every_receiver_gets_the_end_of_a_job_under_its_own_id_and_key(database: Any, outbox: Outbox) -> None:
    async with (
        hostile.receiving(hostile.answer(204)) as of_job,
        hostile.receiving(hostile.answer(204)) as shared,
        hostile.receiving(hostile.answer(204)) as public,
    ):
        v1 = await outbox.endpoint(shared.url, events=["completed"])
        v1a = await outbox.endpoint(public.url, events=["completed"], signature="v1a")
        job = new_job(outbox.user_id, callback_url=of_job.url, callback_events=["completed"])
        await ended(database, job)
        async with running(deliverer(outbox, of_job, shared, public)):
            for receiver in (of_job, shared, public):
                await receiver.until(1)
    (to_job,), (to_v1,), (to_v1a,) = of_job.requests, shared.requests, public.requests
    assert len({request.headers["webhook-id"] for request in (to_job, to_v1, to_v1a)}) == 3
    for request in (to_job, to_v1, to_v1a):
        body = json.loads(request.body)
        assert (body["id"], body["job_id"]) == (request.headers["webhook-id"], str(job.id))
    Webhook(SECRETS.secret(outbox.user_id, 1)).verify(to_job.body, to_job.headers)
    Webhook(SECRETS.verifying(v1.key)[0]).verify(to_v1.body, to_v1.headers)
    raw = base64.b64decode(SECRETS.verifying(v1a.key)[0].removeprefix("whpk_"))
    version, signature = to_v1a.headers["webhook-signature"].split(",")
    content = f"{to_v1a.headers['webhook-id']}.{to_v1a.headers['webhook-timestamp']}.".encode() + to_v1a.body
    Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(signature), content)
    assert version == "v1a"
    assert set((await outbox.states()).values()) == {"delivered"}


async def test_rotated_endpoint_is_told_under_both_keys(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(204)) as receiver:
        endpoint = await outbox.endpoint(receiver.url)
        await Endpoints(outbox.pool).rotate(endpoint.id)
        await outbox.add("now", url=receiver.url, endpoint_id=endpoint.id)
        assert await deliverer(outbox, receiver).deliver_one(await outbox.one()) == "delivered"
    (sent,) = receiver.requests
    rotated = await Endpoints(outbox.pool).read(outbox.user_id, endpoint.id)
    assert rotated is not None
    keys = SECRETS.verifying(rotated.key)
    assert keys[1:] == SECRETS.verifying(endpoint.key)
    for key in keys:
        Webhook(key).verify(sent.body, sent.headers)


async def test_gone_endpoint_is_called_no_more_and_its_job_url_still_is(database: Any, outbox: Outbox) -> None:
    async with (
        hostile.receiving(hostile.answer(410)) as gone,
        hostile.receiving(hostile.answer(204)) as of_job,
    ):
        endpoint = await outbox.endpoint(gone.url, events=["completed"])
        jobs = [new_job(outbox.user_id, callback_url=of_job.url, callback_events=["completed"]) for _ in range(5)]
        await ended(database, *jobs)
        # one at a time, so that the rest is due when the endpoint says that it is gone
        async with running(deliverer(outbox, gone, of_job, concurrency=1)):
            await of_job.until(5)
    assert len(gone.requests) == 1
    assert await reason(outbox, endpoint) == "gone"
    states = dict(
        await outbox.pool.fetch("SELECT endpoint_id, array_agg(DISTINCT state) FROM callback_outbox GROUP BY 1")
    )
    assert states == {endpoint.id: ["dead"], None: ["delivered"]}


@pytest.mark.parametrize("ended_by", ["disabled", "deleted"])
async def test_withdrawn_callback_is_dead_and_never_sent(outbox: Outbox, ended_by: str) -> None:
    async with hostile.receiving(hostile.answer(204)) as receiver:
        endpoint, endpoints = await outbox.endpoint(receiver.url), Endpoints(outbox.pool)
        if ended_by == "disabled":
            await endpoints.change(endpoint.id, outbox.user_id, enabled=False)
        else:
            await endpoints.remove(endpoint.id, outbox.user_id)
        await outbox.add("late", url=receiver.url, endpoint_id=endpoint.id)
        assert await deliverer(outbox, receiver).deliver_one(await outbox.one()) == "dead"
    assert receiver.connections == 0
    assert (await outbox.row("late"))["last_error"] == f"endpoint_{ended_by}"


async def test_endpoint_that_moved_inside_is_refused_when_it_is_called(outbox: Outbox) -> None:
    endpoint = await outbox.endpoint()
    await outbox.add("now", endpoint_id=endpoint.id)
    await Endpoints(outbox.pool).change(endpoint.id, outbox.user_id, url="https://169.254.169.254/latest")
    assert await deliverer(outbox).deliver_one(await outbox.one()) == "dead"
    assert (await outbox.row("now"))["last_error"] == "private_address"
    assert await reason(outbox, endpoint) is None
    assert await outbox.pool.fetchval("SELECT failures FROM callback_endpoints") == 1


async def test_endpoint_that_failed_for_days_is_disabled_by_the_next_failure(outbox: Outbox) -> None:
    async with hostile.receiving(hostile.answer(500)) as receiver:
        endpoint = await outbox.endpoint(receiver.url)
        await outbox.failing(endpoint.id, 20, 6)
        await outbox.add("now", url=receiver.url, endpoint_id=endpoint.id)
        assert await deliverer(outbox, receiver).deliver_one(await outbox.one()) == "failed"
    assert await reason(outbox, endpoint) == "failing"
    assert await outbox.states() == {"now": "dead"}
    (logged,) = await outbox.callbacks.attempts_of("now")
    assert (logged.status, logged.error) == (500, "status")


async def test_tripped_endpoint_is_called_one_at_a_time_and_delays_no_other(outbox: Outbox) -> None:
    release = asyncio.Event()

    async def when_released(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(hostile.answer(200))
        await writer.drain()

    async with (
        hostile.receiving(when_released, hostile.answer(200)) as sick,
        hostile.receiving(hostile.answer(200)) as sound,
    ):
        tripped, other = await outbox.endpoint(sick.url), await outbox.endpoint(sound.url)
        await outbox.failing(tripped.id, 10, 1)
        for index in range(6):
            job = await outbox.job()
            await outbox.add(f"sick{index}", job_id=job, url=sick.url, age=100, endpoint_id=tripped.id)
            await outbox.add(f"sound{index}", job_id=job, url=sound.url, endpoint_id=other.id)
        async with running(deliverer(outbox, sick, sound, poll_seconds=0.02)):
            await sound.until(6)
            assert sick.connections == 1
            release.set()
            await sick.until(6)
    assert set((await outbox.states()).values()) == {"delivered"}
    assert await outbox.pool.fetchval("SELECT sum(failures) FROM callback_endpoints") == 0
