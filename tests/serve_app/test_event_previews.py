"""Previews over HTTP: asked for in every dialect, told by the stream and by polling, to the owner alone."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest

from db.access import Access
from db.queue import Claim, Renewal
from deployments.previews import preview_key
from deployments.storing import BUCKET
from tests.serve_app.conftest import InProcess, a_job
from tests.serve_app.running import Site
from tests.serve_app.test_events import Following, events, following, until

__all__ = ["following"]  # a fixture


class Run:
    """A job with previews in a replica's hands."""

    def __init__(self, site: Site, claim: Claim, worker: UUID) -> None:
        self.site, self.claim, self.worker = site, claim, worker

    async def show(self, step: int, notify: bool = True) -> None:
        """Tell a preview, as a replica's renewal does."""
        renewal = Renewal(self.claim.job_id, self.claim.attempt, "denoise", step, 15, preview=(step, 15))
        assert await self.site.queue.renew(self.worker, [renewal])
        if notify:
            await self.site.tell(self.claim.job_id)


@asynccontextmanager
async def a_run(following: Following) -> AsyncIterator[tuple[Run, AsyncIterator[Any]]]:
    """The job of the fixture, running, and a stream that has told so."""
    async with following.stream() as stream:
        await until(stream, "job")
        worker = uuid4()
        yield Run(following.site, await following.site.claim(worker=worker), worker), stream


async def test_a_stream_tells_each_preview_once(following: Following) -> None:
    async with a_run(following) as (run, stream):
        await run.show(2)
        first = (await until(stream, "preview")).data
        await run.show(2)
        await run.show(5)
        second = (await until(stream, "preview")).data
    assert first | {"url": ""} == {
        "job_id": following.job["id"],
        "attempt": 1,
        "step": 2,
        "of": 15,
        "url": "",
        "width": 128,
        "height": 128,
    }
    assert (second["step"], second["attempt"]) == (5, 1)
    assert second["url"] != first["url"]


async def test_a_stream_tells_a_preview_that_nobody_notified(following: Following) -> None:
    async with a_run(following) as (run, stream):
        await run.show(3, notify=False)
        assert (await until(stream, "preview")).data["step"] == 3


async def test_a_preview_has_no_event_id_so_that_the_history_can_be_resumed(following: Following) -> None:
    async with a_run(following) as (run, stream):
        await run.show(3)
        assert (await until(stream, "preview")).id is None


async def test_the_url_shows_the_picture_for_a_minute(following: Following) -> None:
    async with a_run(following) as (run, stream):
        key = preview_key(run.claim.job["user_id"], run.claim.job_id, 1, 4)
        blobs = following.site.settings.blobs()
        await _store(blobs, key)
        await run.show(4)
        url = (await until(stream, "preview")).data["url"]
        async with httpx2.AsyncClient() as anybody:
            answer = await anybody.get(url)
            assert (answer.status_code, answer.content) == (200, b"picture")
            assert answer.headers["content-type"] == "image/webp"
            assert (await anybody.get(url.replace("preview-4", "preview-5"))).status_code == 403
        assert int(httpx2.URL(url).params["expires"]) <= time.time() + 60


async def _store(url: str, key: str) -> None:
    from db.blobs import BlobStore

    await BlobStore.from_url(url).put(BUCKET, key, b"picture", "image/webp")


async def test_polling_shows_the_preview_only_while_the_job_runs(following: Following) -> None:
    async def polled() -> str | None:
        job = (await following.client.get(f"/v1/jobs/{following.job['id']}")).json()
        listed = (await following.client.get("/v1/jobs")).json()["data"][0]
        assert bool(job["urls"]["preview"]) == bool(listed["urls"]["preview"])
        url: str | None = job["urls"]["preview"]
        return url

    async with a_run(following) as (run, _):
        assert await polled() is None
        await run.show(7)
        url = await polled()
        assert url is not None
        assert "/1/preview-7.webp?" in url
        await following.site.fail(run.claim)
        assert await polled() is None


async def test_a_stream_without_a_preview_tells_none(following: Following) -> None:
    async with a_run(following) as (run, stream):
        await following.site.step(run.claim, run.worker, 3, 15)
        await following.site.fail(run.claim)
        assert "preview" not in {sent.kind async for sent in stream}


async def test_a_later_stream_gets_the_latest_preview(following: Following) -> None:
    async with a_run(following) as (run, _):
        await run.show(2)
        await run.show(6)
        async with following.stream() as later:
            assert (await until(later, "preview")).data["step"] == 6


async def test_an_admin_sees_the_job_and_not_its_preview(following: Following) -> None:
    access = Access(following.site.database.pool)
    key = await access.create_key(await access.ensure_user("root", "admin"), "test")
    headers = {"Authorization": f"Bearer {key.secret}"}
    async with a_run(following) as (run, mine):
        await run.show(2)
        await until(mine, "preview")
        job = (await following.client.get(f"/v1/jobs/{following.job['id']}", headers=headers)).json()
        assert (job["status"], job["urls"]["preview"]) == ("processing", None)
        async with following.client.stream("GET", following.path, headers=headers) as answer:
            stream = events(answer)
            assert (await until(stream, "job")).data["urls"]["preview"] is None
            await following.site.fail(run.claim)
            assert "preview" not in {sent.kind async for sent in stream}


@pytest.mark.parametrize("wanted", [True, False, None])
async def test_previews_are_a_parameter_of_the_job(alice: httpx2.AsyncClient, wanted: bool | None) -> None:
    body = a_job() if wanted is None else a_job(previews=wanted)
    answer = await alice.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["params"]["previews"]) == (202, bool(wanted))


@pytest.mark.parametrize(
    "body",
    [
        {"job_type": "sdxl_image_fast", "prompt": "a mill", "previews": True},
        {"job_type": "sdxl_image_fast", "prompt": "a mill", "metadata": {"previews": True}},
        {"jobType": "sdxl_image_fast", "previews": True, "metadata": {"prompt": "a mill"}},
        {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a mill", "previews": True}},
    ],
    ids=json.dumps,
)
async def test_both_dialects_of_the_functions_take_previews(alice: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    answer = await alice.post("/functions/v1/queue-job", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["job"]["params"]["previews"] is True


@pytest.mark.parametrize("path", ["/v1/jobs", "/functions/v1/queue-job"])
@pytest.mark.parametrize("wanted", ["true", 1, [True]])
async def test_what_is_no_boolean_is_refused_by_name(
    server: InProcess, alice: httpx2.AsyncClient, path: str, wanted: Any
) -> None:
    answer = await alice.post(path, json=a_job(previews=wanted))
    assert answer.status_code == (422 if path == "/v1/jobs" else 400)
    assert [error["field"] for error in answer.json()["errors"]] == ["previews"]
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


def test_the_path_of_a_preview_is_of_one_attempt(tmp_path: Path) -> None:
    user, job = uuid4(), uuid4()
    assert preview_key(user, job, 2, 7) == f"{user}/{job}/2/preview-7.webp"
