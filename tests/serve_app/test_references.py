"""Masks of reference images: how they are fetched, kept, copied and erased, and what is refused."""

import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest
from PIL import Image

from db.jobs import Status
from deployments.storing import REFERENCE_BUCKET
from tests.deployments import hostile
from tests.serve_app.conftest import InProcess, a_job, in_process


def picture(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, kind)
    return buffer.getvalue()


def mask(size: tuple[int, int] = (64, 48), white: int = 32, kind: str = "PNG") -> bytes:
    """White on its left, so many pixels wide."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, white, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def said(data: bytes, content_type: str = "image/png") -> bytes:
    return hostile.answer(200, data, content_type=content_type)


@contextlib.asynccontextmanager
async def offering(database: Any, folder: Path, state_dir: Path, *answers: bytes) -> AsyncIterator[tuple[Any, ...]]:
    """The API, a user, and the URL of a receiver that gives these answers in turn and that the operator trusts."""
    async with hostile.receiving(*answers) as receiver:
        changes = {"egress_allow": (f"http://127.0.0.1:{receiver.port}",), "state_dir": state_dir}
        limits = {"max_reference_bytes": 20_000, "max_reference_pixels": 10_000}
        async with in_process(database, folder, **changes, **limits) as server:
            yield server, await server.user("alice"), receiver


def asking(url: str, **changes: Any) -> dict[str, Any]:
    return a_job(reference_image_url=url, reference_strength=0.2, mask_image_url=url, steps=4) | changes


async def keys(server: InProcess) -> set[str]:
    return {info.key async for info in server.blobs.list(REFERENCE_BUCKET)}


async def test_a_mask_is_kept_beside_its_reference(database: Any, tmp_path: Path, state_dir: Path) -> None:
    drawn = mask(kind="WEBP")
    async with offering(database, tmp_path, state_dir, said(picture()), said(drawn, "image/webp")) as (
        server,
        alice,
        at,
    ):
        answer = await alice.post("/v1/jobs", json=asking(at.url))
        assert answer.status_code == 202, answer.text
        job = answer.json()
        user = await server.pool.fetchval("SELECT user_id FROM jobs")
        kept = job["params"]["references"][0]
        assert kept["key"] == f"{user}/{job['id']}.png"
        assert kept["mask"] == {"bucket": REFERENCE_BUCKET, "key": f"{user}/{job['id']}.mask.webp"}
        assert await server.blobs.get(kept["bucket"], kept["key"]) == picture()
        assert await server.blobs.get(**kept["mask"]) == drawn
        params = (await server.claim()).job["params"]
        assert params["references"] == [kept]


async def test_erasing_a_job_erases_its_reference_and_its_mask(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with offering(database, tmp_path, state_dir, said(picture()), said(mask())) as (server, alice, at):
        job = (await alice.post("/v1/jobs", json=asking(at.url))).json()
        assert len(await keys(server)) == 2
        await server.end(await server.claim(), status=Status.FAILED, error_code="oom")
        assert (await alice.delete(job["urls"]["self"])).status_code == 204
        assert await keys(server) == set()


async def test_a_rerun_has_a_copy_of_the_mask(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with offering(database, tmp_path, state_dir, said(picture()), said(mask())) as (server, alice, at):
        job = (await alice.post("/v1/jobs", json=asking(at.url))).json()
        await server.end(await server.claim(), status=Status.COMPLETED)
        again = (await alice.post(f"{job['urls']['self']}/rerun")).json()
        before, after = job["params"]["references"][0], again["params"]["references"][0]
        user = before["key"].partition("/")[0]
        assert after["mask"] == {"bucket": REFERENCE_BUCKET, "key": f"{user}/{again['id']}.mask.png"}
        assert await server.blobs.get(**after["mask"]) == mask()
        assert len(await keys(server)) == 4

        await server.blobs.delete(REFERENCE_BUCKET, [before["mask"]["key"]])
        refused = await alice.post(f"{job['urls']['self']}/rerun")
        assert (refused.status_code, refused.json()["code"]) == (409, "not_rerunnable")
        assert len(await keys(server)) == 3, "nothing was copied for a job that was not made"


async def test_a_repeat_fetches_and_keeps_nothing(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with offering(database, tmp_path, state_dir, said(picture()), said(mask())) as (server, alice, at):
        codes = []
        for _ in range(2):
            answer = await alice.post("/v1/jobs", json=asking(at.url), headers={"Idempotency-Key": "once"})
            codes.append(answer.status_code)
        assert codes == [202, 200]
        assert (len(at.requests), len(await keys(server))) == (2, 2)


async def test_a_batch_keeps_the_masks_of_all_its_jobs(database: Any, tmp_path: Path, state_dir: Path) -> None:
    answers = [said(picture()), said(mask())] * 2
    async with offering(database, tmp_path, state_dir, *answers) as (server, alice, at):
        made = await alice.post("/v1/jobs/batch", json={"jobs": [asking(at.url), asking(at.url)]})
        assert made.status_code == 202, made.text
        assert len(await keys(server)) == 4
        # the last answer, a mask, is a reference too
        refused = await alice.post("/v1/jobs/batch", json={"jobs": [asking(at.url), asking(at.url, steps=1000)]})
        assert [error["field"] for error in refused.json()["errors"]] == ["jobs.1.steps"]
        assert len(await keys(server)) == 4


REFUSED: list[tuple[str, bytes]] = [
    ("missing", hostile.answer(404)),
    ("text", hostile.answer(200, b"<html>", content_type="text/html")),
    ("text that says png", said(b"<html>")),
    ("a gif", said(mask(kind="GIF"), "image/gif")),
    ("half a png", said(mask()[:40])),
    ("too many pixels", said(mask((200, 150)))),
    ("too many bytes", said(mask() + b"\0" * 20_000)),
    ("all black", said(mask(white=0))),
    ("of other proportions", said(mask((64, 64)))),
]


@pytest.mark.parametrize("answer", [row[1] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_a_mask_that_can_not_be_used_is_refused_and_nothing_kept(
    database: Any, tmp_path: Path, state_dir: Path, answer: bytes
) -> None:
    async with offering(database, tmp_path, state_dir, said(picture()), answer) as (server, alice, at):
        before = await server.stored()
        refused = await alice.post("/v1/jobs", json=asking(at.url))
        assert (refused.status_code, [error["field"] for error in refused.json()["errors"]]) == (
            422,
            ["mask_image_url"],
        )
        assert len(at.requests) == 2
        assert await server.stored() == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reference_image_url": None, "reference_strength": None}, "mask_image_url"),
        ({"job_type": "video_fast", "reference_image_url": None, "reference_strength": None}, "mask_image_url"),
        ({"job_type": "video_fast"}, "reference_image_url"),
        ({"mask_image_url": "x" * 2049}, "mask_image_url"),
        ({"mask_image_url": 5}, "mask_image_url"),
    ],
)
async def test_a_mask_that_has_no_place_is_refused_before_anything_is_fetched(
    server: InProcess, alice: httpx2.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    async with hostile.receiving(said(picture())) as receiver:
        before = await server.stored()
        refused = await alice.post("/v1/jobs", json=asking(receiver.url, **changes))
        assert (refused.status_code, [error["field"] for error in refused.json()["errors"]]) == (422, [field])
        assert receiver.connections == 0
        assert await server.stored() == before


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "https://169.254.169.254/latest/meta-data", "file:///etc/passwd"]
)
async def test_a_mask_from_inside_is_refused(database: Any, tmp_path: Path, state_dir: Path, url: str) -> None:
    async with offering(database, tmp_path, state_dir, said(picture())) as (server, alice, at):
        before = await server.stored()
        refused = await alice.post("/v1/jobs", json=asking(at.url, mask_image_url=url))
        assert refused.status_code == 422
        assert [error["field"] for error in refused.json()["errors"]] == ["mask_image_url"]
        assert await server.stored() == before


async def test_a_mask_of_an_erased_user_is_gone(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with offering(database, tmp_path, state_dir, said(picture()), said(mask())) as (server, alice, at):
        job = (await alice.post("/v1/jobs", json=asking(at.url))).json()
        user = UUID(job["params"]["references"][0]["key"].partition("/")[0])
        await server.blobs.delete_below(REFERENCE_BUCKET, str(user))  # as the erasure of a user does
        assert await keys(server) == set()
