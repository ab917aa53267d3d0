"""Erasing a user over HTTP: what goes, what stays, who may, and what dies in between."""

from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.blobs import BlobStore, StorageUnavailable
from db.callbacks import Attempt, Callbacks
from db.erasures import Erasures
from db.jobs import Status
from db.queue import Queue, Renewal, Settlement
from deployments.erasure import Erasure
from deployments.storing import BUCKET, REFERENCE_BUCKET
from serve_app.api import users
from tests.db.test_queue import asset
from tests.serve_app.conftest import InProcess, a_job

HOOK = "https://93.184.215.14/hook"


class Person:
    """A user with something of everything."""

    def __init__(self, server: InProcess, name: str, role: str = "basic_user") -> None:
        self.server, self.name, self.role = server, name, role

    async def settle_in(self) -> "Person":
        self.key = await self.server.key(self.name, self.role)
        self.client = await self.server.client(self.key)
        pool = self.server.pool
        self.id: UUID = await pool.fetchval("SELECT id FROM profiles WHERE username = $1", self.name)
        self.done = await self.submit(callback_url=HOOK)
        claim = await self.server.claim()
        key = f"{self.id}/{claim.job_id}/1/0.png"
        made = asset(claim.job_id, 1)
        await self.server.end(claim, status=Status.COMPLETED, assets=[type(made)(**vars(made) | {"key": key})])
        self.running = await self.submit(callback_url=HOOK)
        self.claim = await self.server.claim()
        assert str(self.claim.job_id) == self.running
        self.waiting = await self.submit(callback_url=HOOK)
        answer = await self.client.post("/v1/callbacks/endpoints", json={"url": HOOK})
        assert answer.status_code == 201
        for bucket, name in (
            (BUCKET, key),
            (BUCKET, f"{self.id}/{self.done}/2/0.png"),  # what an attempt left that did not win
            (REFERENCE_BUCKET, f"{self.id}/{self.done}.png"),
            ("user-library", f"{self.id}/saved.png"),
        ):
            await self.server.blobs.put(bucket, name, b"x", "image/png")
        await pool.execute(
            """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
                                         model_used) VALUES ($1, 'image', $2, 1, 'image/png', 'p', 'm')""",
            self.id,
            f"{self.id}/saved.png",
        )
        await pool.execute(
            """INSERT INTO user_activity_log (user_id, action, ip_address, user_agent)
               VALUES ($1, 'looked', '10.9.8.7', 'x')""",
            self.id,
        )
        return self

    async def submit(self, **changes: Any) -> str:
        answer = await self.client.post("/v1/jobs", json=a_job(**changes), headers={"Idempotency-Key": str(uuid4())})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    @property
    def path(self) -> str:
        return f"/v1/users/{self.id}/data"

    async def mentions(self) -> set[str]:
        """The tables in which any row says the user's id or name, and the buckets with files of the user."""
        found = set()
        pool = self.server.pool
        for (table,) in await pool.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
            rows = await pool.fetchval(
                f"SELECT count(*) FROM {table} t WHERE to_jsonb(t)::text ~ $1",  # noqa: S608
                f'{self.id}|"{self.name}"',
            )
            found |= {table} if rows else set()
        for bucket in (BUCKET, REFERENCE_BUCKET, "user-library"):
            if [info async for info in self.server.blobs.list(bucket) if str(self.id) in info.key]:
                found.add(bucket)
        return found


def problem(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.fixture
async def ann(server: InProcess) -> Person:
    return await Person(server, "ann").settle_in()


@pytest.fixture
async def bob(server: InProcess) -> Person:
    return await Person(server, "bob").settle_in()


async def test_everything_of_a_user_goes_and_nothing_of_others(server: InProcess, ann: Person, bob: Person) -> None:
    bobs = await bob.mentions()
    assert bobs >= {"profiles", "api_keys", "jobs", "job_queue", "job_events", "workspace_assets", "callback_outbox"}
    assert bobs >= {"callback_endpoints", "idempotency_keys", "usage_logs", "user_library", "fair_shares", "user_roles"}
    answer = await ann.client.delete(ann.path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert await ann.mentions() == {"user_activity_log"}
    assert await bob.mentions() == bobs
    assert (await bob.client.get(f"/v1/jobs/{bob.done}")).status_code == 200
    assert problem(await ann.client.get("/v1/jobs")) == (401, "invalid_key")


async def test_one_audit_row_says_that_it_was_done_and_nothing_personal(server: InProcess, ann: Person) -> None:
    await ann.client.delete(ann.path)
    rows = await server.pool.fetch(
        """SELECT user_id, action, resource_id, metadata, ip_address, user_agent
           FROM user_activity_log ORDER BY created_at"""
    )
    assert [row["action"] for row in rows] == ["looked", "user.erased"]
    assert {(row["user_id"], row["ip_address"], row["user_agent"]) for row in rows} == {(None, None, None)}
    assert rows[1]["resource_id"] == str(ann.id)
    assert rows[1]["metadata"] == {"asked_by": "user", "open_jobs": 2}


async def test_a_replica_can_not_write_to_what_was_erased(server: InProcess, ann: Person) -> None:
    await ann.client.delete(ann.path)
    claim, queue = ann.claim, Queue(server.worker_pool)
    assert await queue.renew(uuid4(), [Renewal(claim.job_id, claim.attempt, "denoise")]) == {}
    late = Settlement(
        job_id=claim.job_id, attempt=claim.attempt, status=Status.COMPLETED, assets=[asset(claim.job_id, claim.attempt)]
    )
    assert await queue.settle([late]) == []
    assert await queue.claim("sdxl", uuid4(), 10) == []
    assert await ann.mentions() == {"user_activity_log"}


async def test_nobody_is_called_any_more(server: InProcess, ann: Person) -> None:
    outbox = Callbacks(server.worker_pool)
    sending = await outbox.claim_due(1, 30, per_host=10)
    assert len(sending) == 1
    await ann.client.delete(ann.path)
    assert await outbox.claim_due(10, 30, per_host=10) == []
    await outbox.delivered(sending[0], Attempt(status=200, error=None, elapsed_ms=1))
    assert await ann.mentions() == {"user_activity_log"}


async def test_a_user_erases_nobody_else_and_an_admin_anybody(server: InProcess, ann: Person, bob: Person) -> None:
    before = await bob.mentions()
    assert problem(await ann.client.delete(bob.path)) == (404, "user_not_found")
    assert problem(await ann.client.delete(f"/v1/users/{uuid4()}/data")) == (404, "user_not_found")
    assert (await (await server.client()).delete(bob.path)).status_code == 401
    assert (await ann.client.delete("/v1/users/nobody/data")).status_code == 422
    assert await bob.mentions() == before
    admin = await server.user("root", "admin")
    assert (await admin.delete(bob.path)).status_code == 204
    assert await bob.mentions() == {"user_activity_log"}
    row = await server.pool.fetchrow(
        """SELECT username, metadata FROM user_activity_log l JOIN profiles p ON p.id = l.user_id
           WHERE action = 'user.erased'"""
    )
    assert (row["username"], row["metadata"]["asked_by"]) == ("root", "admin")
    assert problem(await admin.delete(bob.path)) == (404, "user_not_found")
    assert (await ann.client.get("/v1/jobs")).status_code == 200


async def test_a_name_is_free_again_and_the_new_user_another(server: InProcess, ann: Person) -> None:
    await ann.client.delete(ann.path)
    again = await server.user("ann")
    assert (await again.get("/v1/jobs")).json()["data"] == []
    assert await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'ann'") != ann.id


# ----------------------------------------------------------------------------------------------- what dies in between


async def test_a_request_is_durable_before_anything_is_deleted_and_upkeep_ends_it(
    server: InProcess, ann: Person
) -> None:
    stopped = await Erasures(server.pool).request(ann.id, "admin")
    assert {str(job_id) for job_id in stopped} == {ann.running, ann.waiting}
    # the process dies here; nothing works in the user's name, and no job is open
    assert (await ann.client.get("/v1/jobs")).status_code == 401
    assert await server.pool.fetchval("SELECT count(*) FROM job_queue") == 0
    assert await server.pool.fetchval("SELECT count(*) FROM jobs WHERE completed_at IS NULL") == 0
    assert await server.pool.fetchval("SELECT count(*) FROM callback_outbox WHERE state IN ('due', 'sending')") == 0
    assert await Erasure(Erasures(server.worker_pool), server.blobs).resume() == 1  # with a replica's rights
    assert await ann.mentions() == {"user_activity_log"}
    assert await Erasure(Erasures(server.worker_pool), server.blobs).resume() == 0
    assert await server.pool.fetchval("SELECT count(*) FROM user_activity_log WHERE action = 'user.erased'") == 1


async def test_files_go_although_the_store_was_away(server: InProcess, ann: Person) -> None:
    class Away(BlobStore):
        async def delete_below(self, bucket: str, prefix: str) -> int:
            raise StorageUnavailable("away")

    store = Away.from_url(server.settings.blobs())
    await Erasures(server.pool).request(ann.id, "user", ann.id)
    with pytest.raises(StorageUnavailable):
        await Erasure(Erasures(server.pool), store).carry_out(ann.id)
    assert await ann.mentions() == {"user_activity_log", "erasures", BUCKET, REFERENCE_BUCKET, "user-library"}
    assert await Erasure(Erasures(server.worker_pool), server.blobs).resume() == 1
    assert await ann.mentions() == {"user_activity_log"}


async def test_what_takes_too_long_goes_on_after_the_answer(
    server: InProcess, ann: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "ERASE_SECONDS", -1.0)
    answer = await ann.client.delete(ann.path)
    assert (answer.status_code, answer.content) == (202, b"")
    assert "jobs" not in await ann.mentions()  # one batch went
    assert "erasures" in await ann.mentions()
    admin = await server.user("root", "admin")
    monkeypatch.undo()
    assert (await admin.delete(ann.path)).status_code == 204  # whoever asks again goes on
    assert await ann.mentions() == {"user_activity_log"}


async def test_batches_end_whatever_their_size(server: InProcess, ann: Person) -> None:
    erasures, calls = Erasures(server.pool), 0
    await erasures.request(ann.id, "operator")
    while await erasures.delete_some(ann.id, batch=1):
        calls += 1
    assert calls == 3 + 3 + 1  # jobs, charges, and what is in the library
    assert await ann.mentions() == {"user_activity_log", "erasures", BUCKET, REFERENCE_BUCKET, "user-library"}


async def test_nothing_is_deleted_of_a_user_whose_erasure_nobody_requested(server: InProcess, ann: Person) -> None:
    before = await ann.mentions()
    assert await Erasures(server.worker_pool).delete_some(ann.id) is False
    assert await ann.mentions() == before
