"""/v1/assets and /v1/library: reading, keeping, changing and signing, each by its owner alone."""

from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import pytest

from tests.deployments.results import Shelf
from tests.serve_app.conftest import InProcess

DATA = b"pixels of a lighthouse"


@pytest.fixture
async def shelf(server: InProcess, alice: httpx2.AsyncClient) -> Shelf:
    """Alice's."""
    user = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'alice'")
    return Shelf(server, server.blobs, user)


async def read(client: httpx2.AsyncClient, path: str, status: int = 200, **query: Any) -> Any:
    answer = await client.get(path, params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


async def saved(client: httpx2.AsyncClient, asset: object, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/v1/assets/{asset}/save", json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def test_a_workspace_is_read_in_pages(server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    results = [await shelf.result(2) for _ in range(3)]
    every = {str(one) for result in results for one in result.assets}
    seen: list[str] = []
    before = None
    while True:
        page = await read(alice, "/v1/assets", limit=4, **({"before": before} if before else {}))
        seen += [one["id"] for one in page["data"]]
        # what is shown may go, and moves no page
        assert (await alice.delete(f"/v1/assets/{page['data'][-1]['id']}")).status_code == 204
        if (before := page["next"]) is None:
            break
    assert (len(seen), set(seen)) == (6, every)
    one_job = await read(alice, "/v1/assets", job_id=str(results[2].job_id))
    assert {one["job_id"] for one in one_job["data"]} == {str(results[2].job_id)}
    assert (await read(alice, "/v1/assets", type="video"))["data"] == []
    assert (await read(await server.user("eve"), "/v1/assets"))["data"] == []


@pytest.mark.parametrize(
    "before", ["x", "", "é", "MjAyNi0xMS0yMQ", "0", "A" * 300, "MDAwMS0wMS0wMVQwMDowMDowMCsxNDowMCAw"]
)
async def test_a_page_begins_where_a_page_ended(alice: httpx2.AsyncClient, before: str) -> None:
    for path in ("/v1/assets", "/v1/library"):
        assert (await read(alice, path, 422, before=before))["errors"][0]["field"] == "before"


async def test_an_asset_that_has_expired_is_not_listed(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result(2)
    await shelf.pool.execute("UPDATE workspace_assets SET expires_at = now() WHERE id = $1", made.assets[0])
    assert [one["id"] for one in (await read(alice, "/v1/assets"))["data"]] == [str(made.assets[1])]
    assert (await saved(alice, made.assets[0]))["asset_id"] == str(made.assets[0])  # not too late


async def test_saving_gives_an_item_with_a_file_of_its_own(
    server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf
) -> None:
    made = await shelf.result()
    item = await saved(alice, made.assets[0], title="dusk", tags=["sea", "light"])
    assert (item["title"], item["tags"], item["visibility"]) == ("dusk", ["sea", "light"], "private")
    assert (await saved(alice, made.assets[0]))["id"] == item["id"]
    assert (await alice.delete(f"/v1/assets/{made.assets[0]}")).status_code == 204
    assert (await alice.delete(f"/v1/assets/{made.assets[0]}")).status_code == 404
    nobody = await server.client()
    assert (await nobody.get(urlsplit(item["url"])._replace(scheme="", netloc="").geturl())).content == DATA
    assert (await read(alice, f"/v1/library/{item['id']}"))["id"] == item["id"]
    assert (await read(alice, "/v1/library"))["data"][0]["id"] == item["id"]


async def test_a_library_is_found_by_what_is_known_of_it(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result(2)
    sea, hill = [await saved(alice, one, tags=[tag]) for one, tag in zip(made.assets, ("sea", "hill"), strict=True)]
    await alice.patch(f"/v1/library/{hill['id']}", json={"is_favorite": True})

    async def found(**query: Any) -> set[str]:
        return {one["id"] for one in (await read(alice, "/v1/library", **query))["data"]}

    assert await found(tag="sea") == {sea["id"]}
    assert await found(is_favorite="true") == {hill["id"]}
    assert await found(is_favorite="false") == {sea["id"]}
    assert await found(type="image") == {sea["id"], hill["id"]}
    assert await found(collection_id=str(uuid4())) == set()
    page = await read(alice, "/v1/library", limit=1)
    rest = await read(alice, "/v1/library", limit=1, before=page["next"])
    assert {page["data"][0]["id"], rest["data"][0]["id"]} == {sea["id"], hill["id"]}
    assert rest["next"] is None


async def test_a_change_changes_what_it_names(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    item = await saved(alice, (await shelf.result()).assets[0], title="dusk", tags=["sea"])
    path = f"/v1/library/{item['id']}"
    changed = (await alice.patch(path, json={"is_favorite": True})).json()
    assert (changed["title"], changed["tags"], changed["is_favorite"]) == ("dusk", ["sea"], True)
    changed = (await alice.patch(path, json={"title": None, "tags": []})).json()
    assert (changed["title"], changed["tags"], changed["is_favorite"]) == (None, [], True)
    changed = (await alice.patch(path, json={"collection_id": str(uuid4())})).json()
    assert (changed["code"], changed["errors"][0]["field"]) == ("collection_not_found", "collection_id")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"visibility": "everyone"}, "visibility"),
        ({"title": "a\x00b"}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"tags": None}, "tags"),
        ({"tags": [""]}, "tags.0"),
        ({"tags": ["x"] * 51}, "tags"),
        ({"is_favorite": "yes"}, "is_favorite"),
        ({"collection_id": 5}, "collection_id"),
    ],
)
async def test_a_wrong_change_is_refused_by_field(
    alice: httpx2.AsyncClient, shelf: Shelf, body: dict[str, Any], field: str
) -> None:
    item = await saved(alice, (await shelf.result()).assets[0])
    answer = await alice.patch(f"/v1/library/{item['id']}", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


async def test_an_item_is_removed_with_its_file(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    item = await saved(alice, made.assets[0])
    assert (await alice.delete(f"/v1/library/{item['id']}")).status_code == 204
    assert (await alice.delete(f"/v1/library/{item['id']}")).status_code == 404
    assert await shelf.files("user-library") == set()
    assert await shelf.readable(made.assets[0]) == [DATA]


async def test_an_item_is_copied_back(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    item = await saved(alice, made.assets[0])
    copied = (await alice.post(f"/v1/library/{item['id']}/copy")).json()
    assert copied["library_id"] == item["id"]
    assert (await alice.post(f"/v1/library/{item['id']}/copy")).json()["id"] == copied["id"]


@pytest.mark.parametrize("kind", ["assets", "library"])
async def test_a_signed_url_works_for_as_long_as_was_asked(
    server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf, kind: str
) -> None:
    made = await shelf.result()
    item = await saved(alice, made.assets[0])
    path = f"/v1/assets/{made.assets[0]}/url" if kind == "assets" else f"/v1/library/{item['id']}/url"
    nobody = await server.client()
    whole = await read(alice, path, seconds=60)
    small = await read(alice, path, thumbnail="true")
    assert (await nobody.get(whole["url"])).content == DATA
    assert (await nobody.get(small["url"])).content == b"small"
    assert whole["expires_at"] < small["expires_at"]
    for seconds in (59, 8 * 86400):
        assert (await read(alice, path, 422, seconds=seconds))["errors"][0]["field"] == "seconds"


async def test_a_file_that_is_known_to_be_gone_has_no_url(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    await shelf.pool.execute("UPDATE workspace_assets SET fault = 'missing', thumbnail_path = NULL")
    asset = await read(alice, f"/v1/assets/{made.assets[0]}")
    assert (asset["url"], asset["fault"]) == (None, "missing")
    assert (await read(alice, f"/v1/assets/{made.assets[0]}/url", 410))["code"] == "asset_file_missing"
    assert (await read(alice, f"/v1/assets/{made.assets[0]}/url", 404, thumbnail="true"))["code"] == "no_thumbnail"


async def test_somebody_elses_are_not_found(server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    item = await saved(alice, made.assets[0])
    asset, kept = f"/v1/assets/{made.assets[0]}", f"/v1/library/{item['id']}"
    for eve in (await server.user("eve"), await server.user("mod", "moderator")):
        for method, path, body in (
            ("GET", asset, None),
            ("GET", f"{asset}/url", None),
            ("DELETE", asset, None),
            ("POST", f"{asset}/save", {}),
            ("GET", kept, None),
            ("GET", f"{kept}/url", None),
            ("PATCH", kept, {"title": "mine"}),
            ("DELETE", kept, None),
            ("POST", f"{kept}/copy", None),
        ):
            answer = await eve.request(method, path, json=body)
            assert answer.status_code == 404, (method, path)
    assert (await read(alice, kept))["title"] is None
    assert len(await shelf.readable(made.assets[0])) == 2
    root = await server.user("root", "admin")
    assert (await read(root, asset))["id"] == str(made.assets[0])  # an admin looks, and takes nothing
    assert (await root.delete(asset)).status_code == 404
