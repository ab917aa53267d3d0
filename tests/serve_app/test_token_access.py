"""The API with tokens of an auth service: whom they make, what they open, and what they do not."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.access import Access
from db.blobs import BlobStore
from db.erasures import Erasures
from deployments.erasure import Erasure
from serve_app.app import event_streams
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.signing import ISSUER, JWT_SECRET, KeyServer, Signer, claims, key_server, shared

USER = UUID("7f3e1c52-8f0e-4d7c-9a51-2d1b6c0f4e11")
HOUR = 3600


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer("one")


@pytest.fixture
async def keys(signer: Signer) -> AsyncIterator[KeyServer]:
    async with key_server(signer.jwk()) as server:
        yield server


@pytest.fixture
async def guarded(database: Any, tmp_path: Path, state_dir: Path, keys: KeyServer) -> AsyncIterator[InProcess]:
    """The API that takes tokens of both kinds."""
    changes = {"jwt_secret": JWT_SECRET, "jwks_url": keys.url, "jwt_issuer": ISSUER}
    async with in_process(database, tmp_path, state_dir=state_dir, **changes) as opened:
        yield opened


async def test_a_new_user_works_by_token_alone(guarded: InProcess, signer: Signer) -> None:
    user, bob = uuid4(), uuid4()
    client, other = await guarded.client(shared(claims(user))), await guarded.client(signer.sign(claims(bob)))
    job = (await client.post("/v1/jobs", json=a_job())).json()
    assert (await client.get(f"/v1/jobs/{job['id']}")).json()["status"] == "queued"
    assert (await client.get("/v1/jobs")).json()["data"][0]["id"] == job["id"]
    assert (await other.get(f"/v1/jobs/{job['id']}")).status_code == 404
    assert (await other.get("/v1/jobs")).json()["data"] == []
    rows = await guarded.pool.fetch("SELECT user_id, role::text FROM user_roles")
    assert {tuple(row) for row in rows} == {(user, "basic_user"), (bob, "basic_user")}


async def test_the_functions_take_the_headers_of_their_clients(guarded: InProcess) -> None:
    anon = shared(claims(USER, role="anon", sub=None, aud=None))
    client = await guarded.client(shared(claims(USER)))
    body = {"job_type": "sdxl_image_fast", "prompt": "a mill"}
    answer = await client.post("/functions/v1/queue-job", json=body, headers={"apikey": anon})
    assert answer.status_code == 200
    nobody = await guarded.client(anon)
    answer = await nobody.post("/functions/v1/queue-job", json=body, headers={"apikey": anon})
    assert (answer.status_code, answer.json()["code"]) == (401, "anonymous_token")
    bare = await guarded.client()
    answer = await bare.post("/functions/v1/queue-job", json=body, headers={"apikey": anon})
    assert (answer.status_code, answer.json()["code"]) == (401, "missing_key")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"exp": int(time.time()) - HOUR}, "token_expired"),
        ({"aud": "other"}, "invalid_token"),
        ({"role": "anon"}, "anonymous_token"),
        ({"role": "service_role"}, "service_token"),
    ],
    ids=["expired", "audience", "anonymous", "service"],
)
async def test_a_refusal_says_why_and_makes_nobody(guarded: InProcess, changes: dict[str, Any], code: str) -> None:
    client = await guarded.client(shared(claims(USER, **changes)))
    answer = await client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert await guarded.pool.fetchval("SELECT count(*) FROM profiles") == 0


async def test_keys_that_are_away_are_no_refusal(guarded: InProcess, keys: KeyServer, signer: Signer) -> None:
    keys.status = 500
    client = await guarded.client(signer.sign(claims(USER)))
    answer = await client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "token_keys_unavailable")
    assert answer.headers["Retry-After"]


async def test_an_installation_without_an_auth_service_takes_no_token(server: InProcess) -> None:
    answer = await (await server.client(shared(claims(USER)))).get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")


async def test_roles_are_ours_and_never_the_tokens(guarded: InProcess) -> None:
    client = await guarded.client(shared(claims(USER, user_role="admin", roles=["admin"])))
    assert (await client.get("/v1/queues")).json()["code"] == "admin_only"
    await guarded.pool.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin')", USER)
    assert (await client.get("/v1/queues")).status_code == 200
    await guarded.pool.execute("DELETE FROM user_roles WHERE role = 'admin'")
    assert (await client.get("/v1/queues")).status_code == 403


async def test_first_requests_at_once_make_one_user(guarded: InProcess) -> None:
    client = await guarded.client(shared(claims(USER)))
    answers = await asyncio.gather(*(client.get("/v1/jobs") for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert await guarded.pool.fetchval("SELECT count(*) FROM user_roles") == 1


async def test_a_role_that_was_taken_away_is_not_given_back(guarded: InProcess) -> None:
    client = await guarded.client(shared(claims(USER)))
    await client.get("/v1/jobs")
    await guarded.pool.execute("DELETE FROM user_roles")
    assert (await client.get("/v1/jobs")).status_code == 200
    assert await guarded.pool.fetchval("SELECT count(*) FROM user_roles") == 0


async def test_the_token_of_an_erased_user_brings_nobody_back(guarded: InProcess) -> None:
    old = await guarded.client(shared(claims(USER, iat=int(time.time()) - 60)))
    assert (await old.get("/v1/jobs")).status_code == 200
    erasures = Erasures(guarded.pool)
    await erasures.request(USER, "operator")
    answer = await old.get("/v1/jobs")  # while it is under way
    assert (answer.status_code, answer.json()["code"]) == (401, "user_erased")
    assert await Erasure(erasures, BlobStore.from_url(guarded.settings.blobs())).carry_out(USER)
    assert (await old.get("/v1/jobs")).json()["code"] == "user_erased"
    assert await guarded.pool.fetchval("SELECT count(*) FROM profiles") == 0
    new = await guarded.client(shared(claims(USER, iat=int(time.time()) + 5)))
    assert (await new.get("/v1/jobs")).status_code == 200


# ------------------------------------------------------------------------------------------------------- the streams


async def test_streams_take_tokens_and_end_with_them(guarded: InProcess) -> None:
    now = int(time.time())
    token, short = shared(claims(USER)), shared(claims(USER, exp=now - 5))  # within the leeway, and over already
    client = await guarded.client(token)
    job = (await client.post("/v1/jobs", json=a_job())).json()
    streams = event_streams(guarded.settings)
    async with streams.router.lifespan_context(streams):
        follower = await guarded.client(short, app=streams)
        assert (await follower.get(f"/jobs/{job['id']}")).text.count("event: job") == 0
        other = await guarded.client(shared(claims(uuid4())), app=streams)
        assert (await other.get(f"/jobs/{job['id']}")).status_code == 404
        assert (await (await guarded.client(app=streams)).get(f"/jobs/{job['id']}")).status_code == 401
        following = await guarded.client(token, app=streams)
        await client.post(f"/v1/jobs/{job['id']}/cancel")
        said = (await following.get(f"/jobs/{job['id']}")).text
        assert "event: job" in said
        assert '"status":"cancelled"' in said


async def test_the_access_of_keys_is_as_before(guarded: InProcess) -> None:
    client = await guarded.user("alice")
    assert (await client.get("/v1/jobs")).status_code == 200
    answer: httpx2.Response = await (await guarded.client("ovz_" + "x" * 43)).get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_key")
    assert await Access(guarded.pool).authenticate("a.b.c") is None
