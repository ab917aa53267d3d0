"""Pictures that go somewhere: an admin's image and avatars, scenes and portraits; and generate-content."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import pytest_asyncio

from db.destinations import Destinations
from db.jobs import Status
from db.queue import Claim, NewAsset
from deployments.placing import Placing
from tests.serve_app.conftest import InProcess, a_job, in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")

FUNCTIONS = "/functions/v1/"
PICTURE = b"\x89PNG\r\n\x1a\n of a lighthouse"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(
    shared_database: Any, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InProcess]:
    """One API for the whole module."""
    async with in_process(shared_database, tmp_path_factory.mktemp("pictures"), state_dir=state_dir) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def server(opened: InProcess) -> InProcess:
    """The API, with nothing of an earlier test."""
    await opened.pool.execute(
        """DELETE FROM jobs; DELETE FROM user_library; DELETE FROM character_scenes; DELETE FROM conversations;
           DELETE FROM characters; DELETE FROM idempotency_keys"""
    )
    return opened


@pytest_asyncio.fixture(loop_scope="module")
async def alice(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an ordinary user."""
    return await server.user("alice")


@pytest_asyncio.fixture(loop_scope="module")
async def root(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an admin."""
    return await server.user("root", "admin")


async def call(client: httpx2.AsyncClient, name: str, body: Any, status: int = 200) -> Any:
    answer = await client.post(FUNCTIONS + name, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def finish(server: InProcess, claim: Claim, seed: int = 2**31) -> str:
    """Complete a job with one stored picture and its thumbnail; returns the picture's key."""
    stem = f"{claim.job['user_id']}/{claim.job_id}/{claim.attempt}/0"
    await server.blobs.put("workspace-temp", f"{stem}.png", PICTURE, "image/png")
    await server.blobs.put("workspace-temp", f"{stem}.thumb.webp", b"small", "image/webp")
    asset = NewAsset(
        id=uuid4(),
        asset_index=0,
        asset_type="image",
        key=f"{stem}.png",
        thumbnail_key=f"{stem}.thumb.webp",
        mime_type="image/png",
        file_size_bytes=len(PICTURE),
        width=8,
        height=8,
        frames=None,
        fps=None,
        duration_seconds=None,
        seed=seed,
        model_used="tiny-sdxl",
    )
    await server.end(claim, status=Status.COMPLETED, assets=[asset], generation_time_ms=1)
    return asset.key


async def place(server: InProcess) -> int:
    """What upkeep does, with the rights that it has."""
    return await Placing(Destinations(server.worker_pool), server.blobs).once()


async def character(server: InProcess, owner: str | None = "alice", name: str = "Élise of the Tower") -> UUID:
    user = None if owner is None else await server.pool.fetchval("SELECT id FROM profiles WHERE username = $1", owner)
    made: UUID = await server.pool.fetchval(
        """INSERT INTO characters (user_id, name, description, appearance_tags)
           VALUES ($1, $2, 'a keeper of the light', '{grey coat}') RETURNING id""",
        user,
        name,
    )
    return made


async def state(server: InProcess, job_id: Any) -> tuple[str, str | None]:
    row = await server.pool.fetchrow("SELECT state, reason FROM job_destinations WHERE job_id = $1", UUID(str(job_id)))
    return row["state"], row["reason"]


def portrait(of: UUID, **more: Any) -> dict[str, Any]:
    return {
        "job_type": "sdxl_image_fast",
        "prompt": "a keeper",
        "metadata": {"destination": "character_portrait", "character_id": str(of), **more},
    }


# ------------------------------------------------------------------------------------------------ destinations


async def test_a_portrait_is_kept_in_the_library_and_shown_by_its_character(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    of = await character(server)
    job = (await call(alice, "queue-job", portrait(of)))["jobId"]
    key = await finish(server, await server.claim())
    assert await place(server) == 1
    row = await server.pool.fetchrow("SELECT image_url, reference_image_url, seed_locked FROM characters")
    bucket, _, path = row["image_url"].partition("/")
    assert (bucket, row["reference_image_url"], row["seed_locked"]) == ("user-library", row["image_url"], 2**31)
    assert path == f"{key.partition('/')[0]}/{job}_{of}.png"
    assert await server.blobs.get(bucket, path) == PICTURE
    item = await server.pool.fetchrow("SELECT * FROM user_library")
    assert (item["storage_path"], item["tags"], item["content_category"]) == (
        path,
        ["character", "portrait"],
        "character",
    )
    assert await server.blobs.get(bucket, item["thumbnail_path"]) == b"small"
    assert (await state(server, job), await place(server)) == (("placed", None), 0)
    assert (await alice.delete(f"/v1/library/{item['id']}")).status_code == 204
    row = await server.pool.fetchrow("SELECT image_url, reference_image_url FROM characters")
    assert tuple(row) == (None, None)


async def test_placing_twice_at_once_makes_one_item(server: InProcess, alice: httpx2.AsyncClient) -> None:
    of = await character(server)
    await call(alice, "queue-job", portrait(of))
    await finish(server, await server.claim())
    rows = Destinations(server.worker_pool)
    (due,) = await rows.due()
    assert due.key is not None
    first = await rows.place(due.job_id, "a/b.png", None)
    assert await rows.place(due.job_id, "a/c.png", None) == first == "user-library/a/b.png"
    assert await server.pool.fetchval("SELECT count(*) FROM user_library") == 1


async def test_a_portrait_that_was_saved_before_keeps_its_file(server: InProcess, alice: httpx2.AsyncClient) -> None:
    of = await character(server)
    job = (await call(alice, "queue-job", portrait(of)))["jobId"]
    await finish(server, await server.claim())
    asset = await server.pool.fetchval("SELECT id FROM workspace_assets")
    await call(alice, "workspace-actions", {"action": "save_to_library", "assetId": str(asset)})
    saved = await server.pool.fetchval("SELECT storage_path FROM user_library")
    assert await place(server) == 1
    assert await server.pool.fetchval("SELECT image_url FROM characters") == f"user-library/{saved}"
    assert await server.pool.fetchval("SELECT tags FROM user_library") == ["character", "portrait"]
    user = str(saved).partition("/")[0]
    left = [info.key async for info in server.blobs.list("user-library", user)]
    assert saved in left
    assert not any(job in key for key in left), "the copy that nothing speaks of"


@pytest.mark.parametrize("named", ["scene_id", "conversation_id"])
async def test_a_scene_and_its_conversation_show_the_picture(
    server: InProcess, alice: httpx2.AsyncClient, named: str
) -> None:
    of = await character(server)
    owner = await server.pool.fetchval("SELECT user_id FROM characters")
    talk = await server.pool.fetchval("INSERT INTO conversations (user_id) VALUES ($1) RETURNING id", owner)
    scenes = [
        await server.pool.fetchval(
            """INSERT INTO character_scenes (character_id, conversation_id, scene_prompt, created_at)
               VALUES ($1, $2, 's', now() + make_interval(secs => $3)) RETURNING id""",
            of,
            talk,
            float(n),
        )
        for n in range(2)
    ]
    told = {"scene_id": str(scenes[0])} if named == "scene_id" else {"character_id": str(of), named: str(talk)}
    body = a_job(metadata={"destination": "roleplay_scene", **told})
    job = (await alice.post("/v1/jobs", json=body)).json()["id"]
    await finish(server, await server.claim())
    assert await place(server) == 1
    shown = scenes[0] if named == "scene_id" else scenes[1]
    row = await server.pool.fetchrow("SELECT id, image_url, job_id FROM character_scenes WHERE image_url IS NOT NULL")
    assert (row["id"], str(row["job_id"])) == (shown, job)
    assert await server.pool.fetchval("SELECT last_scene_image FROM conversations") == row["image_url"]
    item = await server.pool.fetchval("SELECT id FROM user_library")
    assert (await alice.delete(f"/v1/library/{item}")).status_code == 204
    assert await server.pool.fetchval("SELECT count(image_url) FROM character_scenes") == 0
    assert await server.pool.fetchval("SELECT last_scene_image FROM conversations") is None


async def test_what_is_not_ones_own_is_no_destination(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await server.user("bob")
    of = await character(server, "bob")
    for metadata in (
        portrait(of)["metadata"],
        portrait(uuid4())["metadata"],
        {"destination": "character_portrait", "character_id": "no id"},
        {"destination": "character_portrait"},
        {"destination": "roleplay_scene", "scene_id": str(uuid4())},
        {"destination": "character_avatar", "character_id": str(of), "avatar": "characters/a.png"},
    ):
        told = await call(alice, "queue-job", {"job_type": "sdxl_image_fast", "prompt": "x", "metadata": metadata}, 404)
        assert told["code"] == "destination_not_found"
    told = await call(alice, "queue-job", portrait(of) | {"job_type": "video_fast"}, 400)
    assert (told["code"], told["errors"][0]["field"]) == ("unsupported", "metadata.destination")
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


async def test_a_destination_that_is_gone_at_the_end_costs_the_job_nothing(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    of = await character(server)
    job = (await call(alice, "queue-job", portrait(of)))["jobId"]
    key = await finish(server, await server.claim())
    await server.pool.execute("DELETE FROM characters")
    assert await place(server) == 0
    assert await state(server, job) == ("refused", "destination_not_found")
    assert (await alice.get(f"/v1/jobs/{job}")).json()["status"] == "completed"
    assert await server.blobs.get("workspace-temp", key) == PICTURE


async def test_a_file_that_is_gone_is_not_spoken_of(server: InProcess, alice: httpx2.AsyncClient) -> None:
    of = await character(server)
    job = (await call(alice, "queue-job", portrait(of)))["jobId"]
    key = await finish(server, await server.claim())
    await server.blobs.delete("workspace-temp", [key])
    assert await place(server) == 0
    assert await state(server, job) == ("refused", "asset_file_missing")
    assert await server.pool.fetchval("SELECT image_url FROM characters") is None


async def test_other_words_for_a_destination_are_only_carried(server: InProcess, alice: httpx2.AsyncClient) -> None:
    body = {"job_type": "sdxl_image_fast", "prompt": "x", "metadata": {"destination": "library"}}
    await call(alice, "queue-job", body)
    await finish(server, await server.claim())
    assert await server.pool.fetchval("SELECT count(*) FROM job_destinations") == 0


# ----------------------------------------------------------------------------------------------------- avatars


async def test_avatars_are_queued_and_shown_when_they_are_made(server: InProcess, root: httpx2.AsyncClient) -> None:
    of = await character(server, None)
    told = await call(root, "generate-avatars", {"names": ["Élise of the Tower"]})
    (result,) = told["results"]
    assert (told["success"], result["name"], result["path"]) == (
        True,
        "Élise of the Tower",
        "avatars/characters/elise-of-the-tower.png",
    )
    job = await server.pool.fetchrow("SELECT id, original_prompt, job_type FROM jobs")
    assert (str(job["id"]), job["job_type"], "grey coat" in job["original_prompt"]) == (
        result["jobId"],
        "sdxl_image_high",
        True,
    )
    await finish(server, await server.claim())
    assert await place(server) == 1
    assert await server.pool.fetchval("SELECT image_url FROM characters WHERE id = $1", of) == result["path"]
    assert await server.blobs.get("avatars", "characters/elise-of-the-tower.png") == PICTURE
    assert await server.pool.fetchval("SELECT count(*) FROM user_library") == 0
    assert (await call(root, "generate-avatars", {}))["results"] == [], "none of the installation's is without one"


async def test_characters_of_one_slug_have_a_picture_each(server: InProcess, root: httpx2.AsyncClient) -> None:
    for name in ("Mira", "mira!", "未来"):
        await character(server, None, name)
    paths = [one["path"] for one in (await call(root, "generate-avatars", {}))["results"]]
    assert len(set(paths)) == 3
    assert "avatars/characters/mira.png" in paths
    await server.pool.execute("UPDATE characters SET image_url = 'avatars/characters/mira.png' WHERE name = 'mira!'")
    (other,) = (await call(root, "generate-avatars", {"names": ["Mira"]}))["results"]
    assert other["path"].startswith("avatars/characters/mira-")


async def test_a_name_that_names_nobody_or_several_is_refused(server: InProcess, root: httpx2.AsyncClient) -> None:
    for _ in range(2):
        await character(server, None, "twin")
    assert (await call(root, "generate-avatars", {"names": ["nobody"]}, 404))["code"] == "character_not_found"
    told = await call(root, "generate-avatars", {"names": ["twin"]}, 409)
    assert (told["code"], told["errors"][0]["field"]) == ("character_ambiguous", "names.0")
    for names in ("twin", [1], ["a", "a"], ["a"] * 30, [""]):
        assert (await call(root, "generate-avatars", {"names": names}, 400))["code"] == "type"
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


# --------------------------------------------------------------------------------------------- generate-content


async def test_generate_content_queues_a_job_that_is_enhanced_first(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    for body in (
        {"job_type": "sdxl_image_fast", "prompt": "a mill", "metadata": {"created_from": "admin_prompt_testing"}},
        {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a mill", "created_from": "admin_prompt_testing"}},
    ):
        told = await call(alice, "generate-content", body)
        assert (told["success"], told["status"], told["queue"]) == (True, "queued", "sdxl_queue")
        row = await server.pool.fetchrow("SELECT stage, metadata FROM jobs WHERE id = $1", UUID(told["jobId"]))
        assert (row["stage"], row["metadata"]["created_from"]) == ("enhance", "admin_prompt_testing")


@pytest.mark.parametrize("metadata", [{"skip_enhancement": True}, {"user_requested_enhancement": False}])
async def test_generate_content_enhances_nothing_where_the_body_says_so(
    server: InProcess, alice: httpx2.AsyncClient, metadata: dict[str, Any]
) -> None:
    body = {"job_type": "sdxl_image_fast", "prompt": "a mill", "metadata": metadata}
    told = await call(alice, "generate-content", body)
    assert await server.pool.fetchval("SELECT stage FROM jobs WHERE id = $1", UUID(told["jobId"])) == "generate"


@pytest.mark.parametrize("name", [{}, {"job_type": "image"}])
async def test_generate_content_without_a_job_type_only_enhances(
    server: InProcess, alice: httpx2.AsyncClient, name: dict[str, str]
) -> None:
    told = await call(alice, "generate-content", {"prompt": "a mill"} | name)
    assert (told["success"], told["original_prompt"], told["fallback_used"]) == (True, "a mill", True)
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


async def test_generate_content_refuses_as_the_function_that_it_stands_for(alice: httpx2.AsyncClient) -> None:
    assert (await call(alice, "generate-content", {"prompt": "x", "job_type": "magic"}, 400))["success"] is False
    assert (await call(alice, "generate-content", {"job_type": "sdxl_image_fast", "metadata": 1}, 400))[
        "code"
    ] == "type"
    assert (await call(alice, "generate-content", [], 400))["code"] == "type"
