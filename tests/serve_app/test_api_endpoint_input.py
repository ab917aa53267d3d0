"""What is refused about registered endpoints, on an API and an endpoint that all these tests leave as they are."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import pytest_asyncio

from tests.serve_app.conftest import in_process
from tests.serve_app.test_api_endpoints import EVER, HOOK, PATH, created, named, problem

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Site:
    """Callers, and the one endpoint that there is: alice's."""

    alice: httpx2.AsyncClient
    bob: httpx2.AsyncClient
    moderator: httpx2.AsyncClient
    nobody: httpx2.AsyncClient
    path: str
    listed: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_database: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with in_process(shared_database, tmp_path_factory.mktemp("api")) as server:
        alice, bob, staff = await server.user(), await server.user("bob"), await server.user("mo", "moderator")
        made = await created(alice)
        (listed,) = (await alice.get(PATH)).json()["data"]
        yield Site(alice, bob, staff, await server.client(), f"{PATH}/{made['id']}", listed)


async def send(client: httpx2.AsyncClient, method: str, path: str, body: Any) -> httpx2.Response:
    """With the body as ASCII, which can carry half a character."""
    headers = {"Content-Type": "application/json"}
    return await client.request(method, path, content=None if body is None else json.dumps(body), headers=headers)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"url": None}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://x.example/" + "x" * 2048}, "url"),
        ({"url": "http://93.184.215.14/"}, "url"),
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": "https://user:pass@93.184.215.14/"}, "url"),
        ({"url": "https://93.184.215.14/\u0000"}, "url"),
        ({"url": "https://93.184.215.14/\ud800"}, "url"),
        ({"url": HOOK, "description": "x" * 501}, "description"),
        ({"url": HOOK, "description": "a\u0000b"}, "description"),
        ({"url": HOOK, "description": "\ud800"}, "description"),
        ({"url": HOOK, "description": None}, "description"),
        ({"url": HOOK, "events": []}, "events"),
        ({"url": HOOK, "events": ["queued"]}, "events.0"),
        ({"url": HOOK, "events": ["failed", "failed"]}, "events"),
        ({"url": HOOK, "signature": "v2"}, "signature"),
        ({"url": HOOK, "enabled": True}, "enabled"),
        ({"url": HOOK, "user_id": str(uuid4())}, "user_id"),
    ],
)
async def test_wrong_field_is_named_and_nothing_is_made(site: Site, body: Any, field: str) -> None:
    assert named(await send(site.alice, "POST", PATH, body)) == (422, {field})
    assert (await site.alice.get(PATH)).json() == {"data": [site.listed]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": None}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"description": None}, "description"),
        ({"events": []}, "events"),
        ({"enabled": None}, "enabled"),
        ({"enabled": "yes"}, "enabled"),
        ({"signature": "v1a"}, "signature"),
        ({"enabled": False, "url": "https://10.0.0.1/"}, "url"),
    ],
)
async def test_wrong_change_is_named_and_nothing_is_changed(site: Site, body: Any, field: str) -> None:
    assert named(await send(site.alice, "PATCH", site.path, body)) == (422, {field})
    assert (await site.alice.get(PATH)).json() == {"data": [site.listed]}


OPERATIONS = [
    ("GET", "", None),
    ("PATCH", "", {"description": "mine"}),
    ("DELETE", "", None),
    ("POST", "/rotate", None),
    ("POST", "/test", None),
    ("GET", "/deliveries", None),
    ("POST", "/replay", EVER),
]


@pytest.mark.parametrize(("method", "below", "body"), OPERATIONS)
@pytest.mark.parametrize("caller", ["bob", "moderator"])
async def test_endpoint_of_somebody_else_is_not_there(
    site: Site, caller: str, method: str, below: str, body: Any
) -> None:
    client: httpx2.AsyncClient = getattr(site, caller)
    for path in (site.path, f"{PATH}/{uuid4()}"):
        assert problem(await send(client, method, path + below, body)) == (404, "endpoint_not_found")
    assert (await client.get(PATH)).json() == {"data": []}
    assert (await site.alice.get(PATH)).json() == {"data": [site.listed]}


@pytest.mark.parametrize(("method", "below", "body"), OPERATIONS)
async def test_nothing_is_done_without_a_key(site: Site, method: str, below: str, body: Any) -> None:
    assert problem(await send(site.nobody, method, site.path + below, body)) == (401, "missing_key")
    assert (await site.alice.get(PATH)).json() == {"data": [site.listed]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "since"),
        ({"since": "2026-01-01T00:00:00"}, "since"),
        ({"since": "soon"}, "since"),
        ({"since": "0001-01-01T00:00:00+14:00"}, "since"),
        ({"since": "9999-12-31T23:59:59-14:00"}, "since"),
        ({"since": "2026-01-01T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "until"),
        ({"since": (datetime.now(UTC) + timedelta(days=1)).isoformat()}, "until"),
        (EVER | {"states": []}, "states"),
        (EVER | {"states": ["due"]}, "states.0"),
        (EVER | {"ids": []}, "ids"),
    ],
)
async def test_wrong_range_is_named(site: Site, body: Any, field: str) -> None:
    assert named(await send(site.alice, "POST", f"{site.path}/replay", body)) == (422, {field})
