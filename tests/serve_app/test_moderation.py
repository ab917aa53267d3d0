"""/v1/moderation and /v1/published: who decides, who sees what, and for how long a URL outlives a decision."""

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx2
import pytest

from db.jobs import Status
from serve_app.api.moderation import URL_SECONDS
from tests.db.test_queue import asset
from tests.serve_app.conftest import InProcess, a_job


class Studio:
    """Alice with results, Bob without, and a moderator."""

    def __init__(self, server: InProcess, people: dict[str, httpx2.AsyncClient]) -> None:
        self.server = server
        self.alice, self.bob, self.mod = people["alice"], people["bob"], people["mod"]

    async def made(self, **values: Any) -> tuple[str, str]:
        """A completed job of Alice's, and its asset, whose file is in the store."""
        answer = await self.alice.post("/v1/jobs", json=a_job(prompt="a very private lighthouse"))
        claim = await self.server.claim()
        key = f"{claim.job['user_id']}/{claim.job_id}/1/0.png"
        await self.server.blobs.put("workspace-temp", key, b"0123456789", "image/png")
        one = type(asset(claim.job_id, 1))(**{**vars(asset(claim.job_id, 1)), "key": key, **values})
        await self.server.end(claim, status=Status.COMPLETED, assets=[one])
        return answer.json()["id"], str(one.id)

    async def saved(self, asset_id: str, visibility: str = "public") -> str:
        """The item of an asset, with that visibility."""
        item = (await self.alice.post(f"/v1/assets/{asset_id}/save", json={})).json()["id"]
        answer = await self.alice.patch(f"/v1/library/{item}", json={"visibility": visibility})
        assert (answer.status_code, answer.json()["visibility"]) == (200, visibility)
        return str(item)

    async def decide(self, key: str, status: str, **values: Any) -> httpx2.Response:
        return await self.mod.post(f"/v1/moderation/{key}", json={"status": status, **values})

    async def public(self, client: httpx2.AsyncClient | None = None) -> list[str]:
        answer = await (client or self.bob).get("/v1/published")
        return [one["id"] for one in answer.json()["data"]]


@pytest.fixture
async def studio(server: InProcess) -> Studio:
    people = {name: await server.user(name) for name in ("alice", "bob")}
    return Studio(server, people | {"mod": await server.user("mod", "moderator")})


async def test_an_item_is_published_when_it_is_approved_and_withdrawn_when_it_is_not(studio: Studio) -> None:
    _, one = await studio.made()
    item = await studio.saved(one)
    assert await studio.public() == [], "it waits for a review"
    (waiting,) = (await studio.mod.get("/v1/moderation")).json()["data"]
    assert (waiting["id"], waiting["kind"], waiting["moderation_status"]) == (item, "library", "pending")
    assert (await studio.bob.get(waiting["url"])).content == b"0123456789"

    assert (await studio.decide(item, "approved")).status_code == 200
    assert await studio.public() == [item]
    shown = (await studio.bob.get(f"/v1/published/{item}")).json()
    assert (await studio.bob.get(shown["url"])).content == b"0123456789"
    assert "private lighthouse" not in str(shown)
    assert not shown.keys() & {"prompt", "user_id", "job_id", "key"}

    decided = await studio.decide(item, "rejected", reason="likeness", notes="seen before")
    assert [one["status"] for one in decided.json()["reviews"]] == ["rejected", "approved"]
    assert await studio.public() == []
    assert (await studio.bob.get(f"/v1/published/{item}")).status_code == 404
    again = await studio.alice.patch(f"/v1/library/{item}", json={"visibility": "unlisted"})
    assert (again.status_code, again.json()["code"], again.json()["errors"][0]["field"]) == (
        409,
        "not_publishable",
        "visibility",
    )
    assert (await studio.alice.patch(f"/v1/library/{item}", json={"visibility": "private"})).status_code == 200


async def test_an_unlisted_item_is_for_those_who_know_its_id(studio: Studio) -> None:
    _, one = await studio.made()
    item = await studio.saved(one, "unlisted")
    await studio.decide(one, "approved")
    assert await studio.public() == []
    assert (await studio.bob.get(f"/v1/published/{item}")).json()["id"] == item
    assert (await studio.bob.get(f"/v1/library/{item}")).status_code == 404, "that route is the owner's"


async def test_the_owner_sees_status_and_reason_everywhere_and_keeps_the_file(studio: Studio) -> None:
    job, one = await studio.made(moderation_status="rejected", moderation_reason="classifier:logo")
    item = (await studio.alice.post(f"/v1/assets/{one}/save", json={"title": "Dusk"})).json()["id"]
    views = [
        (await studio.alice.get(f"/v1/assets/{one}")).json(),
        (await studio.alice.get("/v1/assets")).json()["data"][0],
        (await studio.alice.get(f"/v1/library/{item}")).json(),
        (await studio.alice.get(f"/v1/jobs/{job}")).json()["assets"][0],
    ]
    for view in views:
        assert (view["moderation_status"], view["moderation_reason"]) == ("rejected", "classifier:logo")
        assert (await studio.alice.get(view["url"])).content == b"0123456789"
    for path in (f"/v1/assets/{one}", f"/v1/assets/{one}/url", f"/v1/library/{item}", f"/v1/library/{item}/url"):
        assert (await studio.bob.get(path)).status_code == 404
        assert (await studio.mod.get(f"/v1/moderation/{one}")).status_code == 200


async def test_only_moderators_and_admins_review(studio: Studio) -> None:
    _, one = await studio.made()
    admin, nobody = await studio.server.user("root", "admin"), await studio.server.client()
    calls = (("GET", "/v1/moderation"), ("GET", f"/v1/moderation/{one}"), ("POST", f"/v1/moderation/{one}"))
    for method, path in calls:
        body = {"status": "approved"} if method == "POST" else None
        answers = [await c.request(method, path, json=body) for c in (studio.alice, studio.bob, nobody, admin)]
        assert [answer.status_code for answer in answers] == [403, 403, 401, 200]
        assert answers[0].json()["code"] == "moderators_only"


async def test_of_two_moderators_the_second_is_told(studio: Studio) -> None:
    _, one = await studio.made()
    answers = await asyncio.gather(
        *(studio.decide(one, status, expected="pending") for status in ("approved", "rejected"))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    (late,) = [answer.json() for answer in answers if answer.status_code == 409]
    assert (late["code"], late["errors"][0]["field"]) == ("moderation_changed", "expected")


async def test_a_decision_about_what_was_deleted_is_a_404(studio: Studio) -> None:
    _, one = await studio.made()
    assert (await studio.alice.delete(f"/v1/assets/{one}")).status_code == 204
    for key in (one, str(uuid4())):
        assert (await studio.decide(key, "approved")).status_code == 404
        assert (await studio.mod.get(f"/v1/moderation/{key}")).status_code == 404


async def test_pages_follow_one_another(studio: Studio) -> None:
    made = [(await studio.made(moderation_status="flagged"))[1] for _ in range(3)]
    first = (await studio.mod.get("/v1/moderation", params={"status": "flagged", "limit": 2})).json()
    second = (await studio.mod.get("/v1/moderation", params={"limit": 2, "cursor": first["next"]})).json()
    assert [row["id"] for row in [*first["data"], *second["data"]]] == made
    assert second["next"] is None
    broken = await studio.mod.get("/v1/moderation", params={"cursor": "x"})
    assert (broken.status_code, broken.json()["errors"][0]["field"]) == (422, "cursor")


async def test_urls_that_others_hold_outlive_a_rejection_by_minutes_only(studio: Studio) -> None:
    _, one = await studio.made()
    item = await studio.saved(one)
    await studio.decide(item, "approved")
    now = await studio.server.pool.fetchval("SELECT extract(epoch FROM clock_timestamp())::int")
    for view in (
        (await studio.bob.get(f"/v1/published/{item}")).json(),
        (await studio.mod.get(f"/v1/moderation/{item}")).json(),
    ):
        expires = int(parse_qs(urlsplit(view["url"]).query)["expires"][0])
        assert expires - URL_SECONDS <= now + 60
        assert URL_SECONDS <= 300
        late = view["url"].replace(f"expires={expires}", f"expires={expires + 1}")
        assert (await studio.bob.get(late)).status_code == 403, "nobody makes it last longer"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "status"),
        ({"status": "fine"}, "status"),
        ({"status": "approved", "reason": "Two words"}, "reason"),
        ({"status": "approved", "notes": "x" * 2001}, "notes"),
        ({"status": "approved", "expected": "none"}, "expected"),
        ({"status": "approved", "other": 1}, "other"),
    ],
)
async def test_a_decision_that_is_not_clear_is_refused(studio: Studio, body: dict[str, Any], field: str) -> None:
    answer = await studio.mod.post(f"/v1/moderation/{uuid4()}", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
