"""generate-admin-image: a picture that an admin waits for, of a body that is read as queue-job's is."""

from typing import Any
from uuid import uuid4

import httpx2
import pytest
import pytest_asyncio

from db.jobs import Status
from tests.serve_app.conftest import InProcess
from tests.serve_app.test_functions_pictures import FUNCTIONS, PICTURE, call, finish, opened

__all__ = ["opened"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def server(opened: InProcess) -> InProcess:
    """The API, with no job of an earlier test."""
    await opened.pool.execute("DELETE FROM jobs; DELETE FROM idempotency_keys")
    return opened


@pytest_asyncio.fixture(loop_scope="module")
async def root(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an admin."""
    return await server.user("root", "admin")


async def test_an_admins_image_that_is_not_ready_yet_says_so(server: InProcess, root: httpx2.AsyncClient) -> None:
    body = {"prompt": "a pier", "mode": "hero", "metadata": {"seed": 7, "note": "n"}, "wait_seconds": 0}
    told = await call(root, "generate-admin-image", body, 202)
    assert (told["pending"], told["status"], told["images"]) == (True, "queued", [])
    image = told["image"]
    assert (image["url"], image["thumbnail_url"], image["prompt"], image["mode"]) == (None, None, "a pier", "hero")
    assert image["metadata"] == {"seed": 7, "note": "n"}
    row = await server.pool.fetchrow("SELECT job_type, params, metadata FROM jobs")
    assert (row["job_type"], row["params"]["seed"], row["metadata"]["mode"]) == ("sdxl_image_high", 7, "hero")


async def test_an_admins_image_is_answered_when_it_is_made(server: InProcess, root: httpx2.AsyncClient) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = {"prompt": "a pier", "metadata": {"quality": "fast"}, "wait_seconds": 0}
    first = await root.post(f"{FUNCTIONS}generate-admin-image", json=body, headers=key)
    assert first.status_code == 202, first.text
    await finish(server, await server.claim())
    answer = await root.post(f"{FUNCTIONS}generate-admin-image", json=body, headers=key)
    told = answer.json()
    assert (answer.status_code, told["pending"], told["jobId"]) == (200, False, first.json()["jobId"])
    assert set(told["image"]) == {"id", "url", "thumbnail_url", "prompt", "mode", "timestamp", "metadata"}
    assert (await root.get(told["image"]["url"])).content == PICTURE
    assert told["image"]["metadata"]["seed"] == 2**31


async def test_an_admins_image_that_failed_is_an_error(server: InProcess, root: httpx2.AsyncClient) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = {"prompt": "a pier", "wait_seconds": 0}
    await root.post(f"{FUNCTIONS}generate-admin-image", json=body, headers=key)
    claim = await server.claim()
    await server.end(claim, status=Status.FAILED, error_code="oom", error_message="x", retryable=False)
    answer = await root.post(f"{FUNCTIONS}generate-admin-image", json=body, headers=key)
    assert (answer.status_code, answer.json()["code"]) == (500, "generation_failed")
    assert "oom" in answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mode": 3}, "mode"),
        ({"metadata": []}, None),
        ({"metadata": ["x"]}, "metadata"),
        ({"metadata": {"quality": "best"}}, "metadata.quality"),
        ({"wait_seconds": 61}, "wait_seconds"),
        ({"wait_seconds": True}, "wait_seconds"),
        ({"quality": "best"}, "quality"),
        ({"quality": "fast", "metadata": {"quality": "high"}}, "metadata.quality"),
        ({"job_type": "video_fast"}, "job_type"),
        ({"jobType": "sdxl_image_high"}, "jobType"),
        ({"seed": "x"}, "seed"),
        ({"contentType": "gore"}, "contentType"),
        ({"enhance": True}, "enhance"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
    ],
)
async def test_an_admins_image_is_checked_first(
    server: InProcess, root: httpx2.AsyncClient, change: dict[str, Any], field: str | None
) -> None:
    body = {"prompt": "a pier", "wait_seconds": 0} | change
    told = await call(root, "generate-admin-image", body, 202 if field is None else 400)
    assert [error["field"] for error in told.get("errors", [])] == ([] if field is None else [field])


async def test_an_admins_image_is_of_everything_that_the_body_says(server: InProcess, root: httpx2.AsyncClient) -> None:
    size = {"width": 224, "height": 128}
    given = {"seed": 5, "negative_prompt": "fog", "num_images": 2, "steps": 3, "guidance_scale": 4.5, **size}
    body = {"prompt": "a pier", "quality": "fast", "contentType": "sfw", "note": "n", "wait_seconds": 0}
    told = await call(root, "generate-admin-image", body | given, 202)
    assert [(one["field"], one["given"], one["used"]) for one in told["adjustments"]] == [("num_images", 2, 3)]
    row = await server.pool.fetchrow("SELECT job_type, params, metadata FROM jobs")
    params = row["params"]
    assert {name: params[name] for name in ("seed", "steps", "guidance_scale", *size)} == {
        name: given[name] for name in ("seed", "steps", "guidance_scale", *size)
    }
    assert params["negative_prompt"].endswith("fog")
    assert (row["job_type"], params["num_images"], row["metadata"]) == ("sdxl_image_fast", 3, {"note": "n"})
    assert told["image"]["metadata"] == {"seed": 5}
