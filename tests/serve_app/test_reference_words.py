"""A picture says what it was made from: what is asked for beside it is judged as if it said that too, down the whole
line of pictures that were made from one another."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from db.blobs import UrlSigner
from db.jobs import Status
from db.library import LIBRARY_BUCKET
from deployments.storing import EncodedFile, Storing
from models.media import open_reference, probe, thumbnail
from models.origin.manifest import Manifest
from models.origin.pixels import decode, pixel_hash
from tests.serve_app.queueing import QUEUE, STEERED, Gallery, gallery, png
from tests.serve_app.test_rerun import A_MANIFEST
from tests.serve_app.test_sources import job

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHILD, WEAK, ADULT = "a ten year old child at the beach", "in lingerie, seductive", "nude"
MINORS = (422, "content_minors")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(
    shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Path
) -> AsyncIterator[Gallery]:
    folder = tmp_path_factory.mktemp("words")
    (folder / "steered.yaml").write_text(STEERED)
    async with gallery(shared_database, folder, state_dir, profile=str(folder / "steered.yaml")) as opened:
        await opened.server.pool.execute("UPDATE profiles SET age_verified = true WHERE username = 'alice'")
        yield opened


async def result(site: Gallery, enhanced: str | None = None, **asked: Any) -> tuple[UUID, UUID]:
    """What a job of alice's made, stored as replicas do: the ids of the job and of the picture. `enhanced` is what the
    language model made of its prompt."""
    body = {"job_type": "sdxl_image_fast"} | asked
    made = await site.alice.post("/v1/jobs", json=body)
    assert made.status_code == 202, made.text
    job_id = UUID(made.json()["id"])
    if enhanced is not None:
        await site.server.pool.execute("UPDATE jobs SET enhanced_prompt = $2 WHERE id = $1", job_id, enhanced)
    claim = await site.server.claim()
    while claim.job_id != job_id:
        claim = await site.server.claim()
    data = png("plum")
    parameters = {"content_mode": asked.get("content_mode", "sfw"), "references": claim.job["params"]["references"]}
    pixels = A_MANIFEST["pixels"] | {"sha256": pixel_hash(decode(data))}  # type: ignore[operator]
    manifest = Manifest.model_validate(A_MANIFEST | {"pixels": pixels, "parameters": parameters})
    file = EncodedFile("image", "png", data, thumbnail(open_reference(data, 40_000, 20_000)), probe(data), 1, manifest)
    storing = Storing(site.server.blobs, UrlSigner(b"s" * 32, "http://api.test"), 60)
    assets = await storing.put(claim, [file], {}, "tiny", lambda: None)
    await site.server.end(claim, status=Status.COMPLETED, assets=assets)
    return job_id, assets[0].id


async def said(site: Gallery, picture: object, prompt: str, **changes: Any) -> tuple[int, str | None]:
    answer = await site.alice.post("/v1/jobs", json=job(str(picture), prompt=prompt, **changes))
    assert "reference" not in answer.json().get("detail", ""), "an answer tells nobody whose words they were"
    return answer.status_code, answer.json().get("code")


@pytest.mark.parametrize("kind", ["image", "character", "style"])
async def test_words_beside_a_picture_of_a_child_are_judged_with_it(site: Gallery, kind: str) -> None:
    _, picture = await result(site, prompt=CHILD)
    before = await site.server.stored()
    for prompt in (ADULT, "a mill"):
        assert await said(site, picture, prompt, content_mode="nsfw", reference_type=kind) == MINORS
    assert await said(site, picture, WEAK, reference_type=kind) == MINORS
    assert await site.server.stored() == before
    assert await said(site, picture, "a castle of sand", reference_type=kind) == (202, None)


async def test_queue_job_judges_them_too(site: Gallery) -> None:
    _, picture = await result(site, prompt=CHILD)
    changed = {"job_type": "sdxl_image_fast", "prompt": ADULT, "reference_image_url": str(picture)}
    start = {"job_type": "video_fast", "prompt": "undressing", "metadata": {"start_reference_url": str(picture)}}
    copied = {"job_type": "sdxl_image_fast", "reference_image_url": str(picture)}
    for body, metadata in (
        (changed, {"contentType": "nsfw", "reference_mode": "modify"}),
        (start, {"contentType": "nsfw", "start_reference_url": str(picture)}),
        (copied, {"contentType": "nsfw", "exact_copy_mode": True}),
    ):
        answer = await site.alice.post(QUEUE, json=body | {"metadata": metadata})
        assert (answer.status_code, answer.json()["code"]) == (400, "content_minors"), answer.text


async def test_what_a_caller_or_the_model_made_of_the_prompt_counts(site: Gallery) -> None:
    _, picture = await result(site, enhanced=CHILD, prompt="somebody at the beach")
    assert await said(site, picture, WEAK) == MINORS
    terms = {"terms": [{"term": "a child", "weight": 1.2}]}
    _, picture = await result(site, prompt="somebody at the beach", compel_enabled=True, compel_weights=terms)
    assert await said(site, picture, WEAK) == MINORS


async def test_a_line_of_pictures_keeps_what_its_first_one_said(site: Gallery) -> None:
    first_job, picture = await result(site, prompt=CHILD)
    jobs = [first_job]
    for _ in range(2):
        job_id, picture = await result(site, prompt="a castle of sand", reference_image_url=str(picture))
        jobs.append(job_id)
    assert await said(site, picture, WEAK) == MINORS
    saved = (await site.alice.post(f"/v1/assets/{picture}/save", json={})).json()
    for job_id in jobs:  # nothing is left of them but the saved picture
        assert (await site.alice.delete(f"/v1/jobs/{job_id}")).status_code == 204
    assert await said(site, saved["id"], WEAK) == MINORS
    copy = (await site.alice.post(f"/v1/library/{saved['id']}/copy")).json()
    assert await said(site, copy["id"], WEAK) == MINORS
    assert await said(site, saved["id"], "a castle of sand") == (202, None)


async def test_a_line_in_nsfw_mode_keeps_it_too(site: Gallery) -> None:
    _, picture = await result(site, prompt="ein Junge mit einem Hund")
    _, picture = await result(site, prompt="by the sea", reference_image_url=str(picture), content_mode="nsfw")
    assert await said(site, picture, "by the sea", content_mode="nsfw") == (202, None)
    assert await said(site, picture, ADULT, content_mode="nsfw") == MINORS


async def test_a_thumbnail_says_what_its_picture_says(site: Gallery) -> None:
    _, picture = await result(site, prompt=CHILD)
    thumbnail = await site.server.pool.fetchval("SELECT thumbnail_path FROM workspace_assets WHERE id = $1", picture)
    assert await said(site, f"workspace-temp/{thumbnail}", WEAK) == MINORS


async def test_an_item_without_an_account_is_judged_by_its_own_words(site: Gallery) -> None:
    job_id, picture = await result(site, prompt=CHILD)
    saved = (await site.alice.post(f"/v1/assets/{picture}/save", json={})).json()
    await site.alice.delete(f"/v1/jobs/{job_id}")
    await site.server.pool.execute(
        "UPDATE user_library SET generation_metadata = '{}' WHERE id = $1", UUID(saved["id"])
    )
    assert await said(site, saved["id"], WEAK) == MINORS


async def test_an_upload_and_a_picture_of_adults_say_nothing(site: Gallery) -> None:
    assert await said(site, site.upload_id, WEAK) == (202, None)
    _, picture = await result(site, prompt="a lighthouse")
    assert await said(site, picture, ADULT, content_mode="nsfw") == (202, None)


async def test_a_rerun_and_a_retry_are_judged_with_their_references(site: Gallery) -> None:
    _, picture = await result(site, prompt=CHILD)
    job_id, _ = await result(site, prompt="a castle of sand", reference_image_url=str(picture))
    # as if the rules had been others when it was accepted
    change = """UPDATE jobs SET params = jsonb_set(params, '{prompt}', '"in lingerie, seductive"') WHERE id = $1"""
    await site.server.pool.execute(change, job_id)
    answer = await site.alice.post(f"/v1/jobs/{job_id}/rerun")
    assert (answer.status_code, answer.json()["code"]) == MINORS
    await site.server.pool.execute("UPDATE jobs SET status = 'failed', error_code = 'oom' WHERE id = $1", job_id)
    answer = await site.alice.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == MINORS


async def test_a_picture_that_moderation_rejected_is_no_reference(site: Gallery) -> None:
    _, picture = await result(site, prompt="a mill")
    saved = (await site.alice.post(f"/v1/assets/{picture}/save", json={})).json()
    assert await said(site, picture, "a mill") == (202, None)
    await site.server.pool.execute("SELECT ourvidz.moderate($1, 'rejected', 'test', NULL, NULL, NULL)", picture)
    before = await site.server.stored()
    path = await site.server.pool.fetchval("SELECT storage_path FROM user_library WHERE id = $1", UUID(saved["id"]))
    for one in (str(picture), saved["id"], f"{LIBRARY_BUCKET}/{path}"):
        for body in (job(one), job(one) | {"prompt": "", "metadata": {"exact_copy_mode": True}}):
            answer = await site.alice.post(QUEUE, json=body)
            assert (answer.status_code, answer.json()["code"]) == (403, "reference_not_allowed"), answer.text
    assert await site.server.stored() == before
