"""Registered endpoints over HTTP: their life, their secrets, tests, deliveries and replays."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from db.callbacks import Attempt, Callbacks
from db.endpoints import MOST_OF_USER
from tests.deployments import hostile
from tests.deployments.test_signatures import verifies
from tests.serve_app.conftest import InProcess, a_job, in_process

PATH = "/v1/callbacks/endpoints"
HOOK = "https://93.184.215.14/hook"  # an address, so that nothing is looked up; nothing is sent there in these tests
EVER = {"since": "2020-01-01T00:00:00Z"}


async def created(client: httpx2.AsyncClient, **values: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"url": HOOK} | values)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"{PATH}/{answer.json()['id']}"
    return dict(answer.json())


def problem(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def named(answer: httpx2.Response) -> tuple[int, set[str]]:
    """The status of a problem, and the fields that it names."""
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, {error["field"] for error in answer.json()["errors"]}


async def cancelled_job(client: httpx2.AsyncClient) -> str:
    """A job that has ended, and so has been told to everybody who wants to hear of it."""
    answer = await client.post("/v1/jobs", json=a_job())
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["id"])
    assert (await client.post(f"/v1/jobs/{job_id}/cancel")).status_code == 200
    return job_id


@pytest.fixture
async def receiver() -> AsyncIterator[hostile.Receiver]:
    async with hostile.receiving(hostile.answer(200, b"thanks"), hostile.answer(500)) as opened:
        yield opened


@pytest.fixture
async def near(database: Any, tmp_path: Path, receiver: hostile.Receiver) -> AsyncIterator[InProcess]:
    """The API of an operator who allows the receiver."""
    async with in_process(database, tmp_path, egress_allow=f"http://127.0.0.1:{receiver.port}") as opened:
        yield opened


# -------------------------------------------------------------------------------------------------------- life


async def test_endpoint_is_created_listed_and_read_by_its_owner(alice: httpx2.AsyncClient) -> None:
    made = await created(alice, description="orders", events=["failed", "completed"])
    expected = {
        "url": HOOK,
        "description": "orders",
        "events": ["failed", "completed"],
        "signature": "v1",
        "enabled": True,
        "disabled_at": None,
        "disabled_reason": None,
        "failures": 0,
        "secret_version": 1,
    }
    assert expected.items() <= made.items()
    assert (await alice.get(f"{PATH}/{made['id']}")).json() == made
    (listed,) = (await alice.get(PATH)).json()["data"]
    assert listed == {name: value for name, value in made.items() if name not in ("secret", "public_key", "previous")}


async def test_endpoint_hears_of_everything_unless_told_otherwise(alice: httpx2.AsyncClient) -> None:
    assert (await created(alice))["events"] == ["processing", "completed", "failed", "cancelled"]


async def test_change_changes_what_is_given_and_no_more(alice: httpx2.AsyncClient) -> None:
    made = await created(alice, description="orders")
    path = f"{PATH}/{made['id']}"
    assert (await alice.patch(path, json={})).json()["description"] == "orders"
    changed = (await alice.patch(path, json={"description": "", "events": ["failed"], "url": HOOK + "/2"})).json()
    assert (changed["description"], changed["events"], changed["url"]) == ("", ["failed"], HOOK + "/2")
    after = (await alice.get(path)).json()
    assert {name for name in made if after[name] != made[name]} == {"description", "events", "url"}


async def test_disabled_endpoint_hears_nothing_until_it_is_enabled(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    made = await created(alice, events=["cancelled"])
    path = f"{PATH}/{made['id']}"
    disabled = (await alice.patch(path, json={"enabled": False})).json()
    assert (disabled["enabled"], disabled["disabled_reason"]) == (False, "manual")
    await cancelled_job(alice)
    enabled = (await alice.patch(path, json={"enabled": True})).json()
    assert (enabled["enabled"], enabled["disabled_at"], enabled["disabled_reason"]) == (True, None, None)
    job_id = await cancelled_job(alice)
    (delivery,) = (await alice.get(f"{path}/deliveries")).json()["data"]
    assert delivery["job_id"] == job_id
    rows = await server.pool.fetch("SELECT action, resource_id, metadata FROM user_activity_log")
    assert [tuple(row) for row in rows] == [("callback_endpoint.disabled", made["id"], {"reason": "manual"})]


async def test_deleted_endpoint_is_gone_at_once(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made = await created(alice)
    await cancelled_job(alice)
    answer = await alice.delete(f"{PATH}/{made['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert problem(await alice.delete(f"{PATH}/{made['id']}")) == (404, "endpoint_not_found")
    assert (await alice.get(PATH)).json() == {"data": []}
    assert await Callbacks(server.worker_pool).claim_due(9, 30, per_host=9) == []


async def test_no_more_endpoints_than_the_limit(alice: httpx2.AsyncClient) -> None:
    for _ in range(MOST_OF_USER):
        made = await created(alice)
    assert problem(await alice.post(PATH, json={"url": HOOK})) == (409, "too_many_endpoints")
    await alice.delete(f"{PATH}/{made['id']}")
    await created(alice)


async def test_admin_looks_after_an_endpoint_without_seeing_its_secret(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    made = await created(alice)
    admin = await server.user("root", "admin")
    seen = (await admin.get(f"{PATH}/{made['id']}")).json()
    assert seen == made | {"secret": None}
    rotated = (await admin.post(f"{PATH}/{made['id']}/rotate")).json()
    assert (rotated["secret"], rotated["previous"]) == (None, None)
    assert (await admin.patch(f"{PATH}/{made['id']}", json={"enabled": False})).json()["enabled"] is False
    rows = await server.pool.fetch(
        "SELECT l.action, p.username FROM user_activity_log l JOIN profiles p ON p.id = l.user_id ORDER BY l.created_at"
    )
    told = ("request.rotateEndpointSecret", "request.changeEndpoint", "callback_endpoint.disabled")
    assert [tuple(row) for row in rows] == [(action, "root") for action in told]


# ----------------------------------------------------------------------------------------------------- secrets


async def test_each_endpoint_has_a_secret_of_its_own_that_survives_until_it_is_rotated(
    alice: httpx2.AsyncClient,
) -> None:
    first, second = await created(alice), await created(alice)
    users = (await alice.get("/v1/callbacks/secret")).json()["secret"]
    assert len({first["secret"], second["secret"], users}) == 3
    rotated = (await alice.post(f"{PATH}/{first['id']}/rotate")).json()
    assert (rotated["secret_version"], rotated["previous"]) == (2, first["secret"])
    assert rotated["secret"] not in (first["secret"], second["secret"])
    assert (await alice.get(f"{PATH}/{first['id']}")).json() == rotated
    assert (await alice.get(f"{PATH}/{second['id']}")).json() == second


async def test_the_owner_of_an_asymmetric_endpoint_gets_public_keys_only(alice: httpx2.AsyncClient) -> None:
    made = await created(alice, signature="v1a")
    assert (made["secret"], made["public_key"][:5]) == (None, "whpk_")
    rotated = (await alice.post(f"{PATH}/{made['id']}/rotate")).json()
    assert (rotated["secret"], rotated["previous"]) == (None, made["public_key"])
    assert rotated["public_key"] != made["public_key"]
    assert "whs" not in json.dumps(rotated)


# -------------------------------------------------------------------------------------------------------- test


@pytest.mark.parametrize("signature", ["v1", "v1a"])
async def test_test_is_sent_signed_and_tells_what_came_of_it(
    near: InProcess, receiver: hostile.Receiver, signature: str
) -> None:
    alice = await near.user()
    made = await created(alice, url=receiver.url, signature=signature)
    result = (await alice.post(f"{PATH}/{made['id']}/test")).json()
    assert (result["delivered"], result["status"], result["error"]) == (True, 200, None)
    assert (result["response_excerpt"], result["elapsed_ms"] >= 0) == ("thanks", True)
    (sent,) = receiver.requests
    assert verifies(made["secret"] or made["public_key"], sent.headers, sent.body)
    body = json.loads(sent.body)
    assert (body["type"], body["endpoint_id"]) == ("endpoint.test", made["id"])
    assert body["id"] == sent.headers["webhook-id"] == result["id"]
    assert (await alice.get(f"{PATH}/{made['id']}/deliveries")).json() == {"data": []}


async def test_failed_test_is_an_answer_and_counts_as_no_failure(near: InProcess, receiver: hostile.Receiver) -> None:
    alice = await near.user()
    endpoints = [await created(alice, url=receiver.url) for _ in range(2)]
    results = [(await alice.post(f"{PATH}/{made['id']}/test")).json() for made in endpoints]
    assert [(r["delivered"], r["status"], r["error"]) for r in results] == [(True, 200, None), (False, 500, "status")]
    assert (await alice.get(f"{PATH}/{endpoints[1]['id']}")).json()["failures"] == 0


async def test_test_does_not_reach_inside(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made = await created(alice)
    await server.pool.execute("UPDATE callback_endpoints SET url = 'https://127.0.0.1/'")
    result = (await alice.post(f"{PATH}/{made['id']}/test")).json()
    assert (result["delivered"], result["status"], result["error"]) == (False, None, "private_address")


async def test_tests_are_not_sent_one_after_the_other(near: InProcess, receiver: hostile.Receiver) -> None:
    alice = await near.user()
    made = await created(alice, url=receiver.url)
    assert (await alice.post(f"{PATH}/{made['id']}/test")).status_code == 200
    again = await alice.post(f"{PATH}/{made['id']}/test")
    assert (problem(again), again.headers["retry-after"]) == ((429, "tested_lately"), "5")
    assert len(receiver.requests) == 1
    await near.pool.execute("UPDATE callback_endpoints SET tested_at = tested_at - interval '5 seconds'")
    assert (await alice.post(f"{PATH}/{made['id']}/test")).status_code == 200


# ------------------------------------------------------------------------------------------ deliveries and replay


async def test_deliveries_are_told_newest_first_with_their_attempts(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    made, outbox = await created(alice, events=["cancelled"]), Callbacks(server.worker_pool)
    jobs = [await cancelled_job(alice) for _ in range(3)]
    (oldest,) = await outbox.claim_due(1, 30, per_host=9)
    await outbox.failed(oldest, Attempt(500, "status", 3, "no"), 3600)
    path = f"{PATH}/{made['id']}/deliveries"
    rows = (await alice.get(path)).json()["data"]
    assert [row["job_id"] for row in rows] == jobs[::-1]
    tried = next(row for row in rows if row["id"] == oldest.id)
    assert (tried["event"], tried["state"], tried["error"], tried["url"]) == ("job.cancelled", "due", "status", HOOK)
    assert tried["next_at"] is not None
    (attempt,) = tried["attempts"]
    assert (attempt["attempt"], attempt["status"], attempt["error"]) == (1, 500, "status")
    assert [row["attempts"] for row in rows if row is not tried] == [[], []]
    assert len((await alice.get(path, params={"limit": 2})).json()["data"]) == 2
    await outbox.delivered((await outbox.claim_due(1, 30, per_host=9))[0], Attempt(200, None, 3))
    (delivered,) = (await alice.get(path, params={"state": "delivered"})).json()["data"]
    assert (delivered["next_at"], delivered["attempts"][0]["status"]) == (None, 200)
    assert named(await alice.get(path, params={"state": "lost"})) == (422, {"state"})
    assert named(await alice.get(path, params={"limit": 101})) == (422, {"limit"})


async def test_job_says_which_endpoint_a_callback_goes_to(alice: httpx2.AsyncClient) -> None:
    made = await created(alice, events=["cancelled"])
    job_id = await cancelled_job(alice)
    (log,) = (await alice.get(f"/v1/jobs/{job_id}/callbacks")).json()["data"]
    assert (log["endpoint_id"], log["event"]) == (made["id"], "job.cancelled")


async def test_range_is_replayed_and_counted(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made, outbox = await created(alice, events=["cancelled"]), Callbacks(server.worker_pool)
    other = await created(alice, events=["cancelled"])
    for _ in range(2):
        await cancelled_job(alice)
    sent = await outbox.claim_due(9, 30, per_host=9)
    assert len(sent) == 4
    for delivery in sent:
        await outbox.dead(delivery, Attempt(500, "status", 3))
    path = f"{PATH}/{made['id']}/replay"
    early = {"since": "2020-01-01T00:00:00Z", "until": "2021-01-01T00:00:00+01:00"}
    assert (await alice.post(path, json=early)).json() == {"replayed": 0}
    assert (await alice.post(path, json=EVER | {"states": ["delivered"]})).json() == {"replayed": 0}
    assert (await alice.post(path, json=EVER)).json() == {"replayed": 2}
    assert (await alice.post(path, json=EVER)).json() == {"replayed": 0}
    again = await outbox.claim_due(9, 30, per_host=9)
    assert {(d.id, d.body) for d in again} == {(d.id, d.body) for d in sent if str(d.endpoint_id) == made["id"]}
    assert (await alice.get(f"{PATH}/{other['id']}/deliveries", params={"state": "dead"})).json()["data"] != []


async def test_nothing_is_replayed_to_a_disabled_endpoint(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made, outbox = await created(alice, events=["cancelled"]), Callbacks(server.worker_pool)
    job_id = await cancelled_job(alice)
    (delivery,) = await outbox.claim_due(9, 30, per_host=9)
    await outbox.dead(delivery, Attempt(410, "gone", 3))
    assert (await alice.get(f"{PATH}/{made['id']}")).json()["disabled_reason"] == "gone"
    assert problem(await alice.post(f"{PATH}/{made['id']}/replay", json=EVER)) == (409, "endpoint_disabled")
    single = f"/v1/jobs/{job_id}/callbacks/{delivery.id}/replay"
    assert problem(await alice.post(single)) == (409, "not_replayable")
    await alice.patch(f"{PATH}/{made['id']}", json={"enabled": True})
    assert (await alice.post(single)).status_code == 200


async def test_a_page_of_another_site_may_change_an_endpoint(alice: httpx2.AsyncClient) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "PATCH"}
    assert (await alice.options(f"{PATH}/{uuid4()}", headers=asked)).status_code == 200
