"""Making jobs again: the API's part on its own, and the command around real replicas, pixels compared."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from db.jobs import Status
from db.queue import NewAsset
from deployments.metrics import Metrics
from deployments.replica import Replica
from models.samples.tiny import ensure_tiny
from serve_app.client import Client
from tests.serve_app.conftest import InProcess, a_job
from tests.serve_app.running import Site, running

PROMPT = "a very particular lighthouse"
PINNED = {"field": "parameters.reproducible", "before": False, "after": True}  # every second making is


# --- the API ----------------------------------------------------------------------------------------------


def an_asset(**changes: Any) -> NewAsset:
    values: dict[str, Any] = {
        "id": uuid4(),
        "asset_index": 0,
        "asset_type": "image",
        "key": "x/0.png",
        "thumbnail_key": None,
        "mime_type": "image/png",
        "file_size_bytes": 10,
        "width": 16,
        "height": 16,
        "frames": None,
        "fps": None,
        "duration_seconds": None,
        "seed": 1,
        "model_used": "tiny",
    }
    return NewAsset(**(values | changes))


A_MANIFEST = {
    "manifest_version": 1,
    "software": "ourvidz-serve",
    "software_version": "0.1.0",
    "digital_source_type": "x",
    "job_id": "j",
    "attempt": 1,
    "asset_index": 0,
    "created_at": "2026-01-01T00:00:00Z",
    "media_type": "image/png",
    "pixels": {"sha256": "a", "source_sha256": None, "width": 16, "height": 16, "frames": 1},
    "seed": 1,
    "prompts": {"original": "h", "enhanced": None, "negative": None},
    "parameters": {"steps": 1},
    "used": {},
    "model": {"name": "tiny", "source": None, "revision": None, "files": {}, "files_error": None, "loras": []},
    "libraries": {"torch": "1"},
    "device": {"type": "cpu", "name": "x", "capability": "y", "runtime": {}},
}


async def completed(server: InProcess, user: httpx2.AsyncClient, **changes: Any) -> dict[str, Any]:
    """A job that ran, with one file that has a manifest and one that has none."""
    made = (await user.post("/v1/jobs", json=a_job(**changes))).json()
    claim = await server.claim()
    assets = [an_asset(manifest=A_MANIFEST), an_asset(asset_index=1, key="x/1.png")]
    await server.end(claim, status=Status.COMPLETED, assets=assets, settings={"batch_size": 2})
    answer: dict[str, Any] = (await user.get(f"/v1/jobs/{made['id']}")).json()
    return answer


async def test_a_manifest_is_read_by_its_url(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(server, alice)
    first, second = job["assets"]
    assert first["manifest_url"] == f"http://api.test/v1/jobs/{job['id']}/assets/0/manifest"
    answer = await alice.get(first["manifest_url"])
    assert (answer.status_code, answer.json()) == (200, A_MANIFEST)
    assert second["manifest_url"] is None
    for index in (1, 2):
        answer = await alice.get(f"/v1/jobs/{job['id']}/assets/{index}/manifest")
        assert (answer.status_code, answer.json()["code"]) == (404, "no_manifest")


async def test_lists_carry_no_manifests(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await completed(server, alice)
    text = (await alice.get("/v1/jobs")).text
    assert "manifest_url" in text
    assert "manifest_version" not in text


async def test_a_manifest_and_a_rerun_are_for_the_owner_alone(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(server, alice)
    bob, admin, nobody = await server.user("bob"), await server.user("root", "admin"), await server.client()
    path = f"/v1/jobs/{job['id']}/assets/0/manifest"
    codes = [(await who.get(path)).status_code for who in (bob, nobody, admin)]
    assert codes == [404, 401, 200]
    before = await server.stored()
    codes = [(await who.post(job["urls"]["rerun"])).status_code for who in (bob, nobody)]
    assert codes == [404, 401]
    assert await server.stored() == before


async def test_a_rerun_has_everything_that_was_recorded(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(
        server,
        alice,
        seed=41,
        num_images=3,
        negative_prompt="blur",
        scheduler="heun",
        guidance_scale=3.5,
        previews=True,
    )
    await server.pool.execute(
        "UPDATE jobs SET enhanced_prompt = 'a red mill', compel_weights = NULL WHERE id = $1", UUID(job["id"])
    )
    answer = await alice.post(job["urls"]["rerun"])
    again = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, again["urls"]["self"])
    assert again["id"] != job["id"]
    assert again["params"] == job["params"] | {"previews": False, "reproducible": True}
    assert (again["prompt"], again["enhanced_prompt"]) == (job["prompt"], "a red mill")
    assert (again["stage"], again["status"], again["metadata"]) == ("generate", "queued", {"rerun_of": job["id"]})
    assert await server.pool.fetchval("SELECT rows FROM job_queue") == 4
    claim = await server.claim()
    assert (str(claim.job_id), claim.batch_size) == (again["id"], 2), "as many at a time as then"


async def test_a_rerun_of_an_enhanced_type_is_not_enhanced_again(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made = (await alice.post("/v1/jobs", json=a_job(job_type="image7b_fast_enhanced"))).json()
    await server.end(await server.claim("qwen"), status=Status.COMPLETED, assets=[an_asset()])
    again = (await alice.post(f"/v1/jobs/{made['id']}/rerun")).json()
    assert (again["stage"], again["job_type"]) == ("generate", "image7b_fast_enhanced")


async def test_a_rerun_has_a_copy_of_the_reference(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(server, alice)
    user = await server.pool.fetchval("SELECT user_id FROM jobs")
    key = f"{user}/{job['id']}.png"
    await server.blobs.put("reference_images", key, b"picture", "image/png")
    reference = {"bucket": "reference_images", "key": key, "strength": 0.5, "kind": None, "mask": None}
    await server.pool.execute("UPDATE jobs SET params = params || $1", {"reference": reference})
    again = (await alice.post(job["urls"]["rerun"])).json()
    (own,) = again["params"]["references"]
    assert own == reference | {
        "key": f"{user}/{again['id']}.png",
        "kind": "image",
        "asked_as": None,
        "signs": {"minors": 0, "sexual": 0},
    }
    assert await server.blobs.get("reference_images", own["key"]) == b"picture"

    await server.blobs.delete("reference_images", [key])
    answer = await alice.post(job["urls"]["rerun"])
    assert (answer.status_code, answer.json()["code"]) == (409, "not_rerunnable")
    assert "reference" in answer.json()["detail"]


async def test_only_completed_jobs_are_made_again(server: InProcess, alice: httpx2.AsyncClient) -> None:
    made = (await alice.post("/v1/jobs", json=a_job())).json()
    assert made["urls"]["rerun"] is None
    answer = await alice.post(f"/v1/jobs/{made['id']}/rerun")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_rerunnable")


async def test_one_key_makes_one_rerun(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(server, alice)
    headers = {"Idempotency-Key": "again"}
    answers = [await alice.post(job["urls"]["rerun"], headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 200]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert answers[1].headers["idempotency-replayed"] == "true"
    await server.claim()
    other = await completed(server, alice)
    answer = await alice.post(other["urls"]["rerun"], headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


async def test_the_words_of_a_rerun_are_checked_anew(server: InProcess, alice: httpx2.AsyncClient) -> None:
    job = await completed(server, alice)
    await server.pool.execute(
        "UPDATE jobs SET content_mode = 'nsfw', params = params || '{\"content_mode\": \"nsfw\"}'"
    )
    answer = await alice.post(job["urls"]["rerun"])
    assert (answer.status_code, answer.json()["code"]) == (403, "nsfw_not_allowed")


# --- the command, around a real tiny model ----------------------------------------------------------------


@asynccontextmanager
async def serving(site: Site, family: str = "sdxl") -> AsyncIterator[Replica]:
    """A replica of one of the site's models."""
    replica = Replica(site.settings, family, Metrics())
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop(5)


async def made(site: Site, *more: str, kind: str = "sdxl_image_fast") -> str:
    """A job that the replica of the site has completed."""
    code, out, err = await site.command("submit", kind, PROMPT, "-p", "steps=2", "--wait", "--json", *more)
    assert code == 0, err
    return str(json.loads(out)["id"])


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The laptop's SDXL from a folder that a test may change."""
    weights = ensure_tiny("sdxl", tmp_path / "weights")
    entry = {"model_name": "tiny-sdxl", "source": str(weights), "dtype": "float32", "device": "cpu"}
    text = (Path(__file__).parents[2] / "configs/profiles/laptop.yaml").read_text()
    laptop = yaml.safe_load(text)
    laptop["models"]["sdxl"] |= entry
    for guide in ("ip_adapter", "controlnet"):  # tiny ones, which do not go with a folder
        del laptop["models"]["sdxl"][guide]
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(laptop))
    return path


async def test_a_rerun_makes_the_same_pixels(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site, serving(site):
        job = await made(site, "-p", "seed=7", "-p", "num_images=3", "-p", "scheduler=euler")
        code, out, err = await site.command("rerun", job[-8:])
        assert (code, out.splitlines()) == (0, [f"file {n}: identical pixels" for n in range(3)]), err
        code, out, _ = await site.command("rerun", job, "--index", "1", "--json")
        answer = json.loads(out)
    assert (code, answer["identical"], answer["job_id"]) == (0, True, job)
    (file,) = answer["files"]
    assert (file["index"], file["basis"], file["pixels"]) == (1, "files", None)
    assert file["differences"] == [PINNED]
    rows = await database.pool.fetch("SELECT metadata FROM jobs ORDER BY id")
    assert [row["metadata"] for row in rows] == [{}, {"rerun_of": job}, {"rerun_of": job}]
    assert PROMPT not in out + err


async def test_a_rerun_of_a_video_makes_the_same_pixels(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site, serving(site, "wan"):
        # as many rows in a forward as the rerun has: how many are worth one is measured, and differs with the load
        job = await made(site, "-p", "frames=17", "-p", "reproducible=true", kind="video_fast")
        code, out, err = await site.command("rerun", job)
        assert (code, out.splitlines()) == (0, ["file 0: identical pixels"]), err
    manifests = [row["manifest"] for row in await database.pool.fetch("SELECT manifest FROM workspace_assets")]
    assert manifests[0]["pixels"] == manifests[1]["pixels"]
    assert (manifests[0]["media_type"], manifests[0]["pixels"]["frames"]) == ("video/mp4", 17)


async def test_a_rerun_with_other_weights_names_the_file(
    database: Any, tmp_path: Path, profile: Path, state_dir: Path
) -> None:
    async with running(database, tmp_path, state_dir=state_dir, profile=str(profile)) as site:
        async with serving(site):
            job = await made(site)
        path = next((tmp_path / "weights").rglob("unet/*.safetensors"))
        weights = load_file(path)
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, path, {"format": "pt"})
        async with serving(site):
            code, out, _ = await site.command("rerun", job)
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("file 0: different pixels: ")
    assert " of the samples, by " in lines[0]
    assert {line.split(":")[0].strip() for line in lines[1:]} == {PINNED["field"], f"model.files.unet/{path.name}"}


async def test_a_rerun_with_another_parameter_names_it(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site, serving(site):
        job = await made(site, "-p", "guidance_scale=6.0")
        await database.pool.execute("UPDATE jobs SET params = params || '{\"guidance_scale\": 3.0}'")
        code, out, _ = await site.command("rerun", job, "--json")
    (file,) = json.loads(out)["files"]
    assert (code, file["identical"], file["basis"]) == (1, False, "files")
    assert "of the samples" in file["pixels"]
    found = {one["field"]: (one["before"], one["after"]) for one in file["differences"]}
    assert found == {"parameters.guidance_scale": (6.0, 3.0), PINNED["field"]: (False, True)}


async def test_a_rerun_compares_by_hash_where_the_file_is_gone(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site, serving(site) as replica:
        job = await made(site)
        key = await database.pool.fetchval("SELECT temp_storage_path FROM workspace_assets")
        await replica._blobs.delete("workspace-temp", [key])
        code, out, _ = await site.command("rerun", job)
        assert (code, out.splitlines()[0]) == (0, "file 0: identical pixels (by their hash)")
        assert "404" in out
        await database.pool.execute("UPDATE workspace_assets SET manifest = NULL WHERE job_id = $1", UUID(job))
        code, out, _ = await site.command("rerun", job)
    assert (code, out.splitlines()[0]) == (1, "file 0: nothing to compare")
    assert "has no manifest" in out


async def test_a_rerun_notices_a_file_that_was_exchanged(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site, serving(site) as replica:
        job = await made(site, "-p", "reproducible=true")
        buffer = io.BytesIO()
        Image.new("RGB", (128, 128), "teal").save(buffer, "PNG")
        row = await database.pool.fetchrow(
            "UPDATE workspace_assets SET file_size_bytes = $1 RETURNING temp_storage_path", len(buffer.getvalue())
        )
        await replica._blobs.put("workspace-temp", row["temp_storage_path"], buffer.getvalue(), "image/png")
        code, out, _ = await site.command("rerun", job)
    assert code == 1
    assert "different pixels" in out
    assert "nothing that is recorded differs" in out, "the job was pinned, as its second making is"
    assert "the first file is not the one that its manifest speaks of" in out


async def test_a_job_that_is_not_completed_can_not_be_compared(database: Any, tmp_path: Path, state_dir: Path) -> None:
    async with running(database, tmp_path, state_dir=state_dir) as site:
        code, out, _ = await site.command("submit", "sdxl_image_fast", PROMPT)
        job = out.strip()
        code, out, err = await site.command("rerun", job)
        assert (code, out) == (1, "")
        assert "only a completed job" in err
        async with Client(site.endpoint) as client:
            assert len((await client.list_jobs()).data) == 1
        code, _, err = await site.command("rerun", str(uuid4()))
    assert code == 1
    assert "job_not_found" in err
