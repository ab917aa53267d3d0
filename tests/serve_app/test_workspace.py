"""/functions/v1/workspace-actions and delete-workspace-item as older clients call them, each action twice."""

from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from tests.deployments.results import Shelf
from tests.serve_app.conftest import InProcess

ACTIONS, DELETE = "/functions/v1/workspace-actions", "/functions/v1/delete-workspace-item"


@pytest.fixture
async def shelf(server: InProcess, alice: httpx2.AsyncClient) -> Shelf:
    """Alice's."""
    user = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'alice'")
    return Shelf(server, server.blobs, user)


async def act(client: httpx2.AsyncClient, action: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = await client.post(ACTIONS, json={"action": action} | body)
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def test_save_to_library(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    asked: dict[str, Any] = {
        "assetId": str(made.assets[0]),
        "customTitle": "dusk",
        "tags": ["sea"],
        "collectionId": None,
    }
    first = await act(alice, "save_to_library", **asked)
    assert first.keys() == {"success", "libraryAssetId", "message"}
    assert first["success"] is True
    assert await act(alice, "save_to_library", **asked) == first
    item = await shelf.item(UUID(first["libraryAssetId"]))
    assert (item.custom_title, item.tags) == ("dusk", ["sea"])
    assert len(await shelf.readable(made.assets[0])) == 2


async def test_clear_asset(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    first = await act(alice, "clear_asset", assetId=str(made.assets[0]))
    assert await act(alice, "clear_asset", assetId=str(made.assets[0])) == first
    assert first.keys() == {"success", "libraryAssetId", "message"}
    assert await shelf.rows.asset(made.assets[0]) is None
    assert len(await shelf.readable(made.assets[0])) == 1


async def test_discard_asset(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    for _ in range(2):
        answer = await act(alice, "discard_asset", assetId=str(made.assets[0]))
        assert answer.keys() == {"success", "message"}
        assert answer["success"] is True
    assert await shelf.files(WORKSPACE_BUCKET) == set()


async def test_clear_job(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made, other = await shelf.result(3), await shelf.result()
    await act(alice, "save_to_library", assetId=str(made.assets[0]))
    first = await act(alice, "clear_job", jobId=str(made.job_id))
    assert (first["success"], first["assetsProcessed"], first["newSaves"]) == (True, 3, 2)
    assert "errors" not in first
    again = await act(alice, "clear_job", jobId=str(made.job_id))
    assert (again["success"], again["assetsProcessed"], again["newSaves"]) == (True, 0, 0)
    assert [len(await shelf.readable(one)) for one in (*made.assets, *other.assets)] == [1, 1, 1, 1]
    refused = await act(alice, "clear_job", 404, jobId=str(uuid4()))
    assert (refused["success"], refused["error"]) == (False, "No assets found for job")


async def test_clear_workspace(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = [await shelf.result(2), await shelf.result()]
    first = await act(alice, "clear_workspace")
    assert (first["assetsProcessed"], first["newSaves"]) == (3, 3)
    again = await act(alice, "clear_workspace")
    assert (again["success"], again["assetsProcessed"], again["newSaves"]) == (True, 0, 0)
    assert [len(await shelf.readable(one)) for result in made for one in result.assets] == [1, 1, 1]


async def test_copy_to_workspace(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    saved = await act(alice, "clear_asset", assetId=str(made.assets[0]))
    first = await act(alice, "copy_to_workspace", libraryAssetId=saved["libraryAssetId"])
    assert first.keys() == {"success", "workspaceAssetId", "message"}
    assert await act(alice, "copy_to_workspace", libraryAssetId=saved["libraryAssetId"]) == first
    asset = await shelf.rows.asset(UUID(first["workspaceAssetId"]))
    assert asset is not None
    job = (await alice.get(f"/v1/jobs/{asset.job_id}")).json()
    assert (job["status"], job["metadata"]["source"], len(job["assets"])) == ("completed", "library_copy", 1)
    assert (await alice.post(f"/v1/jobs/{asset.job_id}/rerun")).status_code == 409  # it was not made here
    refused = await act(alice, "copy_to_workspace", 404, libraryAssetId=str(uuid4()))
    assert refused.keys() >= {"error", "details"}


@pytest.mark.parametrize("action", ["clear_job", "clear_workspace"])
async def test_a_copy_that_fails_keeps_the_source_and_says_so(
    alice: httpx2.AsyncClient, shelf: Shelf, action: str
) -> None:
    made = await shelf.result(2)
    await shelf.blobs.put(WORKSPACE_BUCKET, made.keys[0], b"cut", "image/png")
    body: dict[str, Any] = {"jobId": str(made.job_id)} if action == "clear_job" else {}
    answer = await act(alice, action, **body)
    assert (answer["assetsProcessed"], answer["newSaves"]) == (1, 1)
    assert answer["errors"] == [{"assetId": str(made.assets[0]), "error": "asset_file_missing"}]
    assert await shelf.rows.asset(made.assets[0]) is not None
    assert await shelf.blobs.get(WORKSPACE_BUCKET, made.keys[0]) == b"cut"
    assert (await act(alice, "clear_asset", 410, assetId=str(made.assets[0])))["code"] == "asset_file_missing"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "choice", "action"),
        ({"action": "burn"}, "choice", "action"),
        ({"action": ["clear_job"]}, "choice", "action"),
        ({"action": "save_to_library"}, "missing", "assetId"),
        ({"action": "save_to_library", "assetId": "x"}, "type", "assetId"),
        ({"action": "clear_asset", "assetId": 5}, "type", "assetId"),
        ({"action": "discard_asset"}, "missing", "assetId"),
        ({"action": "discard_asset", "assetId": str(UUID(int=1)), "tags": []}, "unknown", "tags"),
        ({"action": "clear_job", "jobId": {}}, "type", "jobId"),
        ({"action": "copy_to_workspace", "assetId": str(UUID(int=1))}, "unknown", "assetId"),
        ({"action": "clear_workspace", "jobId": str(UUID(int=1))}, "unknown", "jobId"),
        ({"action": "save_to_library", "assetId": str(UUID(int=1)), "customTitle": "a\x00b"}, "type", "customTitle"),
        ({"action": "save_to_library", "assetId": str(UUID(int=1)), "tags": "sea"}, "type", "tags"),
        ({"action": "save_to_library", "assetId": str(UUID(int=1)), "tags": [""]}, "type", "tags"),
        ({"action": "save_to_library", "assetId": str(UUID(int=1)), "tags": ["a\x00"]}, "type", "tags"),
        ({"action": "save_to_library", "assetId": str(UUID(int=1)), "collectionId": 3}, "type", "collectionId"),
    ],
)
async def test_a_wrong_body_is_refused_by_field(
    alice: httpx2.AsyncClient, body: dict[str, Any], code: str, field: str
) -> None:
    answer = await alice.post(ACTIONS, json=body)
    assert answer.status_code == 400, answer.text
    document = answer.json()
    assert (document["success"], document["errors"][0]["field"], document["errors"][0]["code"]) == (False, field, code)


@pytest.mark.parametrize("action", ["save_to_library", "clear_asset"])
async def test_an_asset_that_is_not_there_is_not_found(alice: httpx2.AsyncClient, action: str) -> None:
    refused = await act(alice, action, 404, assetId=str(uuid4()))
    assert refused["error"] == "Asset not found"


async def test_somebody_elses_are_as_good_as_not_there(
    server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf
) -> None:
    made = await shelf.result()
    saved = await act(alice, "save_to_library", assetId=str(made.assets[0]))
    for eve in (await server.user("eve"), await server.user("root", "admin")):
        for action in ("save_to_library", "clear_asset"):
            await act(eve, action, 404, assetId=str(made.assets[0]))
        await act(eve, "clear_job", 404, jobId=str(made.job_id))
        await act(eve, "copy_to_workspace", 404, libraryAssetId=saved["libraryAssetId"])
        await act(eve, "discard_asset", assetId=str(made.assets[0]))  # as for any id that is not there
        assert (await act(eve, "clear_workspace"))["assetsProcessed"] == 0
        assert (await eve.post(DELETE, json={"item_id": str(made.assets[0])})).status_code == 200
    assert len(await shelf.readable(made.assets[0])) == 2


async def test_a_collection_of_somebody_else_is_not_found(
    server: InProcess, alice: httpx2.AsyncClient, shelf: Shelf
) -> None:
    made = await shelf.result()
    await server.user("eve")
    statement = """INSERT INTO user_collections (user_id, name)
                   SELECT id, 'hers' FROM profiles WHERE username = 'eve' RETURNING id"""
    hers = await server.pool.fetchval(statement)
    answer = await act(alice, "save_to_library", 404, assetId=str(made.assets[0]), collectionId=str(hers))
    assert (answer["code"], answer["errors"][0]["field"]) == ("collection_not_found", "collectionId")
    assert await shelf.files(LIBRARY_BUCKET) == set()


async def test_delete_workspace_item(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    for _ in range(2):
        answer = await alice.post(DELETE, json={"item_id": str(made.assets[0]), "user_id": str(shelf.user)})
        assert answer.status_code == 200
        document = answer.json()
        assert document.keys() == {"success", "deleted_item_id", "timestamp"}
        assert document["deleted_item_id"] == str(made.assets[0])
    assert await shelf.rows.asset(made.assets[0]) is None


async def test_delete_workspace_item_refuses_another_users_name(alice: httpx2.AsyncClient, shelf: Shelf) -> None:
    made = await shelf.result()
    answer = await alice.post(DELETE, json={"item_id": str(made.assets[0]), "user_id": str(uuid4())})
    assert (answer.status_code, answer.json()["code"]) == (403, "CROSS_USER_ITEM")
    assert await shelf.rows.asset(made.assets[0]) is not None
    for body in ({}, {"item_id": 4}, {"item_id": str(uuid4()), "force": True}):
        assert (await alice.post(DELETE, json=body)).status_code == 400


@pytest.mark.parametrize("path", [ACTIONS, DELETE])
async def test_the_functions_want_a_key_and_post_and_answer_preflights(
    server: InProcess, alice: httpx2.AsyncClient, path: str
) -> None:
    nobody = await server.client()
    assert (await nobody.post(path, json={"action": "clear_workspace"})).status_code == 401
    assert (await alice.get(path)).status_code == 405
    assert (await alice.post(path, content=b"{", headers={"Content-Type": "application/json"})).status_code == 400
    asked = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-client-info, apikey, content-type",
    }
    preflight = await nobody.options(path, headers=asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "*")
