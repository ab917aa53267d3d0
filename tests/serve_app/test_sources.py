"""Where a reference's picture may come from: ids, paths and signed URLs of one's own, and nothing of anybody else's."""

import urllib.parse
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from db.blobs import StorageUnavailable
from db.jobs import Status
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.uploads import UPLOAD_BUCKET
from models.origin.pixels import decode, pixel_hash
from tests.serve_app.queueing import QUEUE, STEERED, Gallery, gallery, png, send
from tests.serve_app.test_rerun import A_MANIFEST, an_asset

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(
    shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Any
) -> AsyncIterator[Gallery]:
    """An API that may make nsfw content; alice's age is verified."""
    folder = tmp_path_factory.mktemp("sources")
    profile = folder / "steered.yaml"
    profile.write_text(STEERED)
    async with gallery(shared_database, folder, state_dir, profile=str(profile)) as opened:
        await opened.server.pool.execute("UPDATE profiles SET age_verified = true WHERE username = 'alice'")
        yield opened


def job(picture: str, **changes: Any) -> dict[str, Any]:
    body = {"job_type": "sdxl_image_fast", "prompt": "a mill", "steps": 4, "reference_image_url": picture}
    return body | changes


WAYS: dict[str, Any] = {
    "a path": lambda site: site.path,
    "a path without its bucket": lambda site: site.path.partition("/")[2],
    "an id": lambda site: site.upload_id,
    "an id in capitals": lambda site: site.upload_id.upper(),
    "a signed URL": lambda site: site.signed,
    "a signed URL in capitals": lambda site: site.signed.replace("http://api.test", "HTTP://API.TEST"),
    "an expired URL": lambda site: site.signed.partition("?")[0] + "?expires=1&signature=x",
    "the library": lambda site: site.kept,
    "the library without its bucket": lambda site: site.kept.partition("/")[2],
    "the workspace": lambda site: site.made,
    "the workspace without its bucket": lambda site: site.made.partition("/")[2],
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("route", ["/v1/jobs", QUEUE])
async def test_a_picture_of_ones_own_is_copied_for_the_job(site: Gallery, route: str, way: str) -> None:
    answer = await site.alice.post(route, json=job(WAYS[way](site)))
    assert answer.status_code in (200, 202), answer.text
    said = answer.json()
    made = said if route == "/v1/jobs" else said["job"]
    (kept,) = made["params"]["references"]
    assert (kept["bucket"], kept["key"]) == (UPLOAD_BUCKET, f"{site.alice_id}/{made['id']}.png")
    expected = {"the library": png("navy"), "the workspace": png("olive")}
    name = way.removesuffix(" without its bucket")
    assert await site.bytes_of(kept) == expected.get(name, await site.server.blobs.get(*site.path.split("/", 1)))


async def test_a_job_keeps_its_picture_when_the_upload_is_deleted(site: Gallery) -> None:
    upload = await send(site.alice, png("white"))
    made = (await site.alice.post("/v1/jobs", json=job(upload["id"], mask_image_url=upload["storage_path"]))).json()
    assert (await site.alice.delete(f"/v1/uploads/{upload['id']}")).status_code == 204
    (kept,) = made["params"]["references"]
    assert await site.bytes_of(kept) == await site.bytes_of(kept["mask"]) != b""
    again = await site.alice.post("/v1/jobs", json=job(upload["id"]))
    assert (again.status_code, again.json()["code"]) == (422, "reference_not_found")


async def test_a_result_of_ones_own_is_named_by_its_id(site: Gallery) -> None:
    asset_id, _ = await result(site, png("gold"))
    made = (await site.alice.post("/v1/jobs", json=job(str(asset_id)))).json()
    assert await site.bytes_of(made["params"]["references"][0]) == png("gold")
    assert (await site.bob.post("/v1/jobs", json=job(str(asset_id)))).json()["code"] == "reference_not_found"


FOREIGN: dict[str, Any] = {
    "a path": lambda site: site.foreign,
    "a path without its bucket": lambda site: site.foreign.partition("/")[2],
    "the library": lambda site: f"user-library/{site.bob_id}/saved/{UUID(int=1)}.png",
    "the workspace": lambda site: f"workspace-temp/{site.bob_id}/{UUID(int=1)}/1/0.png",
    "a signed URL": lambda site: site.server.edge.signer.sign(*site.foreign.split("/", 1), 600),
    "nobody's": lambda _: f"user-library/{UUID(int=5)}/x.png",
    "no user's": lambda _: "user-library/x.png",
    "another bucket in the user's place": lambda site: f"user-library/user-library/{site.alice_id}/x.png",
    "the caller's id in capitals": lambda site: site.path.replace(site.alice_id, site.alice_id.upper()),
    "the caller's id and more": lambda site: site.path.replace(site.alice_id, site.alice_id + "0"),
}


@pytest.mark.parametrize("way", list(FOREIGN))
async def test_a_picture_of_somebody_else_is_refused_as_theirs(site: Gallery, way: str) -> None:
    picture, before = FOREIGN[way](site), await site.server.stored()
    for body in (job(picture), job("x", metadata={"reference_image_url": picture})):
        answer = await site.alice.post(QUEUE, json=body)
        said = answer.json()
        assert (answer.status_code, said["success"], said["code"]) == (403, False, "CROSS_USER_REFERENCE"), answer.text
        assert [error["field"] for error in said["errors"]] == ["reference_image_url"]
    answer = await site.alice.post("/v1/jobs", json=job(site.path, mask_image_url=picture))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (403, "mask_image_url")
    frame = {
        "job_type": "video_fast",
        "prompt": "x",
        "metadata": {"end_reference_url": picture, "start_reference_url": site.path},
    }
    answer = await site.alice.post(QUEUE, json=frame)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (403, "metadata.end_reference_url")
    assert await site.server.stored() == before


HOSTILE: dict[str, Any] = {
    "up": lambda site: site.path.replace("/uploads/", "/../"),
    "up to another": lambda site: f"{UPLOAD_BUCKET}/{site.alice_id}/../{site.foreign.partition('/')[2]}",
    "up, encoded": lambda site: f"{UPLOAD_BUCKET}/{site.alice_id}/%2e%2e/{site.foreign.partition('/')[2]}",
    "up, encoded twice": lambda site: f"{UPLOAD_BUCKET}/{site.alice_id}/%252e%252e/x.png",
    "all of it encoded": lambda site: urllib.parse.quote(site.path, safe=""),
    "a slash encoded": lambda site: site.path.replace("/uploads/", "/uploads%2f"),
    "here": lambda site: site.path.replace("/uploads/", "/./uploads/"),
    "two slashes": lambda site: site.path.replace("/uploads/", "//uploads/"),
    "a slash before": lambda site: f"/{site.path}",
    "a slash behind": lambda site: f"{site.path}/",
    "a backslash": lambda site: site.path.replace("/uploads/", "\\uploads\\"),
    "a full-width slash": lambda site: site.path.replace("/uploads/", "\uff0fuploads\uff0f"),
    "full-width dots": lambda site: site.path.replace("/uploads/", "/\uff0e\uff0e/"),
    "a blank": lambda site: f"{site.path} ",
    "a line": lambda site: f"{site.path}\n",
    "a NUL": lambda site: f"{site.path}\0.png",
    "a query": lambda site: f"{site.path}?x=1",
    "a signed URL with a way up": lambda site: site.signed.replace("/uploads/", "/../"),
    "a bucket that is none of pictures": lambda site: f"archive/{site.alice_id}/x.png",
    "the avatars": lambda site: f"avatars/{site.alice_id}/x.png",
    "the system's": lambda site: f"system_assets/{site.alice_id}/x.png",
    "a bucket in capitals": lambda site: site.path.replace(UPLOAD_BUCKET, UPLOAD_BUCKET.upper()),
    "a bucket of nobody": lambda site: f"secrets/{site.alice_id}/x.png",
    "a bucket alone": lambda _: "user-library/",
    "a folder": lambda site: f"{UPLOAD_BUCKET}/{site.alice_id}/uploads",
    "what is not there": lambda site: f"{site.path}.png",
    "below a picture": lambda site: f"{site.path}/x.png",
    "an id of nobody": lambda _: str(UUID(int=9)),
    "an id of somebody else": lambda site: site.foreign_id,
    "a job's id": lambda site: site.made.split("/")[2],
}


@pytest.mark.parametrize("way", list(HOSTILE))
async def test_what_is_no_picture_of_ones_own_is_refused_by_its_field(site: Gallery, way: str) -> None:
    picture, before = HOSTILE[way](site), await site.server.stored()
    answer = await site.alice.post("/v1/jobs", json=job(picture))
    assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (
        422,
        ["reference_image_url"],
    ), answer.text
    assert answer.json()["code"] in ("invalid_reference_path", "reference_not_found", "url_refused")
    assert site.bob_id not in answer.text
    answer = await site.alice.post(QUEUE, json=job(picture))
    assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (400, ["reference_image_url"])
    assert await site.server.stored() == before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("big.png", png(size=(8, 8)) + bytes(20_000), "larger than 20000 bytes"),
        ("wide.png", png(size=(300, 200)), "more than 40000 pixels"),
        ("half.png", png()[:40], "no readable"),
        ("film.mp4", b"\0\0\0\x18ftypisom" + bytes(40), "no readable"),
        ("text.json", b"{}", "no readable"),
    ],
)
async def test_a_stored_file_keeps_to_the_limits_of_every_reference(
    site: Gallery, name: str, data: bytes, message: str
) -> None:
    kinds = {"png": "image/png", "mp4": "video/mp4", "json": "application/json"}
    key = f"{site.alice_id}/{name}"
    await site.server.blobs.put(WORKSPACE_BUCKET, key, data, kinds[name.rpartition(".")[2]])
    before = await site.server.stored()
    answer = await site.alice.post("/v1/jobs", json=job(f"{WORKSPACE_BUCKET}/{key}"))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "reference_image_url")
    assert message in answer.json()["detail"]
    assert await site.server.stored() == before


async def test_a_store_that_is_away_is_no_missing_picture(site: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> Any:
        raise StorageUnavailable("away")

    monkeypatch.setattr(site.server.blobs, "head", away)
    assert (await site.alice.post("/v1/jobs", json=job(site.path))).status_code == 503


# ------------------------------------------------------------------------------------------------------ nsfw


async def result(site: Gallery, data: bytes, **parameters: Any) -> tuple[UUID, str]:
    """A picture that a job of alice's has made: the id of its row, and its path. `parameters` are the manifest's."""
    made = (await site.alice.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "a mill"})).json()
    claim = await site.server.claim()
    while str(claim.job_id) != made["id"]:
        claim = await site.server.claim()
    key = f"{site.alice_id}/{made['id']}/1/0.png"
    await site.server.blobs.put(WORKSPACE_BUCKET, key, data, "image/png")
    pixels = A_MANIFEST["pixels"] | {"sha256": pixel_hash(decode(data))}
    manifest = A_MANIFEST | {"pixels": pixels, "parameters": {"content_mode": "sfw", "references": []} | parameters}
    asset_id = uuid4()
    asset = an_asset(id=asset_id, key=key, file_size_bytes=len(data), manifest=manifest)
    await site.server.end(claim, status=Status.COMPLETED, assets=[asset])
    return asset_id, f"{WORKSPACE_BUCKET}/{key}"


async def adult(site: Gallery, picture: str) -> tuple[int, str | None]:
    answer = await site.alice.post("/v1/jobs", json=job(picture, content_mode="nsfw"))
    return answer.status_code, answer.json().get("code")


REFUSAL = (403, "reference_not_allowed")


async def test_nsfw_takes_what_was_made_here_from_words(site: Gallery) -> None:
    asset_id, path = await result(site, png("plum"))
    assert (await adult(site, path))[0] == (await adult(site, str(asset_id)))[0] == 202
    saved = (await site.alice.post(f"/v1/assets/{asset_id}/save", json={})).json()
    assert (await adult(site, saved["id"]))[0] == 202


async def test_nsfw_takes_what_was_made_in_nsfw_from_a_reference(site: Gallery) -> None:
    references = [{"sha256": "a", "strength": 0.5, "kind": "image"}]
    _, path = await result(site, png("tan"), content_mode="nsfw", references=references)
    assert (await adult(site, path))[0] == 202


async def test_sfw_takes_no_result_of_nsfw_mode(site: Gallery) -> None:
    asset_id, path = await result(site, png("plum"), content_mode="nsfw")
    for picture in (str(asset_id), path):
        answer = await site.alice.post("/v1/jobs", json=job(picture))
        assert (answer.status_code, answer.json()["code"]) == (403, "reference_not_allowed"), picture


async def plain_result(site: Gallery, *, mode: str) -> tuple[UUID, UUID]:
    """A result without a manifest, as a provider's are, of a job of this mode: the ids of the job and of the asset."""
    asset_id, path = await result(site, png("navy"))
    job_id = UUID(path.split("/")[2])
    thumbnail = path.split("/", 1)[1].replace(".png", ".thumb.webp")
    await site.server.blobs.put(WORKSPACE_BUCKET, thumbnail, png("navy", (16, 12)), "image/webp")
    await site.server.pool.execute("UPDATE jobs SET content_mode = $2 WHERE id = $1", job_id, mode)
    await site.server.pool.execute(
        "UPDATE workspace_assets SET manifest = NULL, thumbnail_path = $2 WHERE id = $1", asset_id, thumbnail
    )
    return job_id, asset_id


async def taken(site: Gallery, picture: str) -> tuple[int, str | None]:
    """What an sfw job by either route says to a picture; both must say the same."""
    answer, function = (
        await site.alice.post("/v1/jobs", json=job(picture)),
        await site.alice.post(QUEUE, json=job(picture)),
    )
    assert function.json().get("code") == answer.json().get("code")
    assert (function.status_code == 200) == (answer.status_code == 202), function.text
    return answer.status_code, answer.json().get("code")


@pytest.mark.parametrize(("mode", "said"), [("nsfw", REFUSAL), ("sfw", (202, None))])
async def test_sfw_takes_nothing_of_an_nsfw_job_that_has_no_manifest(
    site: Gallery, mode: str, said: tuple[int, str | None]
) -> None:
    job_id, asset_id = await plain_result(site, mode=mode)
    stem = f"{site.alice_id}/{job_id}"
    await site.server.blobs.put(UPLOAD_BUCKET, f"{stem}.ref1.png", png("navy"), "image/png")
    await site.server.blobs.put(WORKSPACE_BUCKET, f"{stem}/1/preview.webp", png("navy"), "image/webp")
    files = (f"{WORKSPACE_BUCKET}/{stem}/1/{name}" for name in ("0.png", "0.thumb.webp", "preview.webp"))
    for picture in (str(asset_id), *files, f"{UPLOAD_BUCKET}/{stem}.ref1.png", f"{stem}.ref1.png"):
        assert await taken(site, picture) == said, picture
    saved = (await site.alice.post(f"/v1/assets/{asset_id}/save", json={})).json()
    statement = "SELECT storage_path, thumbnail_path FROM user_library WHERE id = $1"
    for picture in (saved["id"], *await site.server.pool.fetchrow(statement, UUID(saved["id"]))):
        assert await taken(site, picture) == said, picture


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"content_category": "nsfw"}, REFUSAL),
        ({"generation_metadata": {"content_mode": "nsfw"}}, REFUSAL),
        ({"content_category": "character", "generation_metadata": {"content_mode": "sfw"}}, (202, None)),
    ],
)
async def test_sfw_takes_no_nsfw_item_that_another_system_has_saved(
    site: Gallery, values: dict[str, Any], said: tuple[int, str | None]
) -> None:
    key = f"{site.alice_id}/older-{uuid4()}.png"
    await site.server.blobs.put(LIBRARY_BUCKET, key, png("teal"), "image/png")
    item = await site.server.pool.fetchval(
        """INSERT INTO user_library (user_id, asset_type, storage_path, file_size_bytes, mime_type, original_prompt,
             model_used, content_category, generation_metadata)
           VALUES ($1, 'image', $2, 1, 'image/png', 'p', 'm', $3, $4) RETURNING id""",
        UUID(site.alice_id),
        key,
        values.get("content_category", "general"),
        values.get("generation_metadata", {}),
    )
    for picture in (str(item), f"{LIBRARY_BUCKET}/{key}", key):
        assert await taken(site, picture) == said, picture


async def test_nsfw_takes_nothing_else(site: Gallery) -> None:
    before = await site.server.stored()
    for picture in (site.path, site.upload_id, site.signed, site.kept, site.made, "https://8.8.8.8/a.png"):
        assert await adult(site, picture) == REFUSAL, picture
    assert await site.server.stored() == before


@pytest.mark.parametrize("name", ["reference", "references"])
async def test_nsfw_takes_no_copy_of_an_upload(site: Gallery, name: str) -> None:
    reference = {"sha256": "a", "strength": 0.95, "kind": "image"}
    _, path = await result(site, png("pink"), **{name: reference if name == "reference" else [reference]})
    assert await adult(site, path) == REFUSAL


async def test_nsfw_takes_no_file_that_was_put_in_the_place_of_a_result(site: Gallery) -> None:
    _, path = await result(site, png("lime"))
    await site.server.blobs.put(*path.split("/", 1), png("snow"), "image/png")
    assert await adult(site, path) == REFUSAL


async def test_nsfw_takes_no_result_without_a_manifest(site: Gallery) -> None:
    _, path = await result(site, png("gray"))
    await site.server.pool.execute(
        "UPDATE workspace_assets SET manifest = NULL WHERE temp_storage_path = $1", path.partition("/")[2]
    )
    assert await adult(site, path) == REFUSAL
