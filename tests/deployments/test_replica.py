"""A whole replica around a real tiny SDXL: from a queued row to files, rows and a callback, and every way out."""

import io
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import pytest
from PIL import Image
from uuid6 import uuid7

from db.blobs import BlobStore, UrlSigner
from db.jobs import NewJob, Stage
from db.queue import Queue
from deployments import replica as replica_module
from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings, SettingsError
from models.catalog import Family, resolve
from models.origin.pixels import decode, pixel_hash
from models.params import GivenParams, resolve_params
from tests.deployments.conftest import Desk

SECRET = "s" * 40
PROMPT = "a very private lighthouse"


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, made once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def settings(database: Any, tmp_path: Path, state_dir: Path) -> Settings:
    return Settings(
        database_url=database.url,
        state_dir=state_dir,
        blob_url=f"file://{tmp_path / 'blobs'}",
        public_url="https://api.example.com",
        signing_secret=SECRET,
        lease_seconds=30,
        renew_seconds=0.5,
        poll_seconds=0.1,
    )


@asynccontextmanager
async def serving(settings: Settings, family: str = "sdxl") -> AsyncIterator[Replica]:
    replica = Replica(settings, family, Metrics())
    await replica.start()
    try:
        assert replica.health() is None
        yield replica
    finally:
        await replica.stop(0)


async def submit(desk: Desk, settings: Settings, name: str = "sdxl_image_fast", **changes: Any) -> UUID:
    """A job as the API would accept it."""
    own = {key: changes.pop(key) for key in list(changes) if key in NewJob.__dataclass_fields__}
    job_type = resolve(name)
    spec = settings.loaded_profile.models[job_type.family]
    assert spec.defaults is not None
    given = {"prompt": PROMPT, "seed": 7, "steps": 2} | changes
    params = resolve_params(job_type, GivenParams(**given), spec.defaults, methods=spec.reference_methods).params
    job = NewJob(
        **{
            "id": UUID(int=uuid7().int),
            "user_id": await desk.database.user(),
            "job_type": name,
            "format": job_type.format.value,
            "quality": job_type.quality.value,
            "model_type": job_type.family.value,
            "stage": Stage.GENERATE,
            "queue": job_type.family.value,
            "cost": 1.0,
            "credits": 1,
            "original_prompt": PROMPT,
            "params": params.model_dump(mode="json"),
            "callback_url": "https://example.com/hook",
        }
        | own
    )
    await desk.jobs.accept(job)
    return job.id


async def ended(desk: Desk, job_id: UUID) -> str:
    """How a job ended."""
    status: str = await desk.until("SELECT status FROM jobs WHERE id = $1 AND completed_at IS NOT NULL", job_id)
    return status


def files(settings: Settings) -> list[str]:
    """What is in the object store, without the attempt's folders."""
    folder = Path(settings.blobs().removeprefix("file://"))
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_a_job_becomes_files_rows_and_a_callback(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, num_images=3, metadata={"order": 17})
        assert await ended(desk, job_id) == "completed"
        worker = replica.worker
    pool, blobs = desk.database.pool, BlobStore.from_url(settings.blobs())
    job = await pool.fetchrow("SELECT * FROM jobs")
    assert (job["attempts"], job["failures"], job["worker"]) == (1, 0, worker)
    assert job["generation_time_ms"] > 0
    used = job["generation_settings"]
    assert (used["steps"], used["width"], used["height"]) == (2, 128, 128)

    assets = await pool.fetch("SELECT * FROM workspace_assets ORDER BY asset_index")
    assert [asset["generation_seed"] for asset in assets] == [7, 8, 9]
    for index, asset in enumerate(assets):
        key, thumbnail_key = asset["temp_storage_path"], asset["thumbnail_path"]
        assert key == f"{job['user_id']}/{job_id}/1/{index}.png"
        assert thumbnail_key == f"{job['user_id']}/{job_id}/1/{index}.thumb.webp"
        data = await blobs.get("workspace-temp", key)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (asset["width"], asset["height"]))
            text = dict(image.info)
        assert (asset["file_size_bytes"], asset["mime_type"], asset["asset_type"]) == (len(data), "image/png", "image")
        assert text["Software"] == "ourvidz-serve"
        manifest = json.loads(text["ourvidz.manifest"])
        assert manifest == asset["manifest"], "the file and its row say the same"
        assert (manifest["seed"], manifest["asset_index"], manifest["job_id"]) == (7 + index, index, str(job_id))
        assert manifest["pixels"]["sha256"] == pixel_hash(decode(data))
        assert len(manifest["model"]["files"]) >= 4, "every weight is there with its hash"
        assert "trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]
        assert PROMPT.encode() not in data
        assert "private" not in json.dumps({name: str(value) for name, value in text.items()})
        with Image.open(io.BytesIO(await blobs.get("workspace-temp", thumbnail_key))) as small:
            assert small.format == "WEBP"
            assert max(small.size) <= 256
    assert len(files(settings)) == 6

    body = json.loads(await pool.fetchval("SELECT body FROM callback_outbox WHERE event_type = 'job.completed'"))
    assert (body["job_id"], body["status"], body["metadata"]["client"]) == (str(job_id), "completed", {"order": 17})
    signer = UrlSigner(SECRET.encode(), settings.public_url)
    for reference, asset in zip(body["assets"], assets, strict=True):
        assert (reference["bucket"], reference["key"]) == ("workspace-temp", asset["temp_storage_path"])
        for url, key in (
            (reference["url"], reference["key"]),
            (reference["thumbnail_url"], reference["thumbnail_key"]),
        ):
            query = {name: value for name, (value,) in parse_qs(urlsplit(url).query).items()}
            assert url.startswith("https://api.example.com/v1/files/")
            assert signer.verify("workspace-temp", key, int(query["expires"]), query["signature"])
        assert reference["metadata"]["seed"] == asset["generation_seed"]
    assert len(json.dumps(body)) < 20_000, "a callback carries references, never media"
    assert await desk.events(job_id) == ["queued", "started", "completed"]


async def test_a_slot_is_given_on_with_the_last_step(
    desk: Desk, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not with the picture: one job more is taken while the first are kept from their decoding."""
    monkeypatch.setattr(replica_module, "WATCH_SECONDS", 60.0)
    opened = threading.Event()
    async with serving(settings) as replica:
        vae = replica.model._pipeline.vae
        decode = vae.decode

        def held_up(*args: Any, **kwargs: Any) -> Any:
            assert opened.wait(60)
            return decode(*args, **kwargs)

        monkeypatch.setattr(vae, "decode", held_up)
        slots = replica.spec.slots
        jobs = [await submit(desk, settings) for _ in range(slots + 1)]
        try:
            await desk.until("SELECT 1 FROM job_queue WHERE state = 'running' HAVING count(*) = $1", slots + 1)
        finally:
            opened.set()
        assert [await ended(desk, job) for job in jobs] == ["completed"] * (slots + 1)


async def test_the_same_seed_gives_the_same_picture(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        ids = [await submit(desk, settings, seed=seed, reproducible=True) for seed in (7, 7, 8)]
        for job_id in ids:
            await ended(desk, job_id)
    pictures = []
    for job_id in ids:
        key = await desk.database.pool.fetchval(
            "SELECT temp_storage_path FROM workspace_assets WHERE job_id = $1", job_id
        )
        data = await BlobStore.from_url(settings.blobs()).get("workspace-temp", key)
        with Image.open(io.BytesIO(data)) as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


async def test_the_enhanced_prompt_is_the_one_that_is_drawn(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        plain = await submit(desk, settings)
        enhanced = await submit(desk, settings, enhanced_prompt="a red mill on a hill")
        for job_id in (plain, enhanced):
            await ended(desk, job_id)
    hashes = {
        (await BlobStore.from_url(settings.blobs()).get("workspace-temp", key))[-2000:]
        for (key,) in await desk.database.pool.fetch("SELECT temp_storage_path FROM workspace_assets")
    }
    assert len(hashes) == 2


async def test_a_cancelled_job_stops_in_the_middle_and_leaves_no_file(desk: Desk, settings: Settings) -> None:
    async with serving(settings):
        job_id = await submit(desk, settings, steps=100)
        await desk.until("SELECT step > 0 FROM job_queue WHERE job_id = $1", job_id)
        assert await Queue(desk.database.pool).cancel(job_id) == "cancelling"
        assert await ended(desk, job_id) == "cancelled"
        after = await submit(desk, settings)
        assert await ended(desk, after) == "completed"  # the replica goes on
    assert await desk.events(job_id) == ["queued", "started", "cancelling", "cancelled"]
    assert [name for name in files(settings) if str(job_id) in name] == []
    assert await desk.callbacks(job_id) == ["job.cancelled"]


async def test_a_job_that_was_lost_meanwhile_is_dropped(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, steps=100)
        await desk.until("SELECT step > 0 FROM job_queue WHERE job_id = $1", job_id)
        await desk.take(job_id)
        after = await submit(desk, settings)
        assert await ended(desk, after) == "completed"
        assert replica.health() is None
    assert await desk.status(job_id) == ("processing", None)
    assert [name for name in files(settings) if str(job_id) in name] == []
    assert await desk.events(job_id) == ["queued", "started"]


async def test_a_reference_is_read_from_the_store(desk: Desk, settings: Settings) -> None:
    blobs = BlobStore.from_url(settings.blobs())
    buffer = io.BytesIO()
    Image.new("RGB", (160, 90), "orange").save(buffer, "PNG")
    await blobs.put("reference_images", "u/r.png", buffer.getvalue(), "image/png")
    reference = {"bucket": "reference_images", "key": "u/r.png", "strength": 0.5}
    async with serving(settings):
        kept = await submit(desk, settings, reference=reference, steps=4)
        gone = await submit(desk, settings, reference=reference | {"key": "u/gone.png"}, steps=4)
        assert await ended(desk, kept) == "completed"
        assert await ended(desk, gone) == "failed"
    assert await desk.status(gone) == ("failed", "reference_gone")
    assert (await desk.database.pool.fetchrow("SELECT failures, retryable FROM jobs WHERE id = $1", gone))[1] is False


async def test_references_of_every_kind_are_read_from_the_store(desk: Desk, settings: Settings) -> None:
    blobs = BlobStore.from_url(settings.blobs())
    buffer = io.BytesIO()
    Image.new("RGB", (160, 90), "orange").save(buffer, "PNG")
    kinds = ("image", "style", "character", "composition", "start_frame")
    for kind in kinds:
        await blobs.put("reference_images", f"u/{kind}.png", buffer.getvalue(), "image/png")
    *of_image, of_video = ({"bucket": "reference_images", "key": f"u/{kind}.png", "kind": kind} for kind in kinds)
    async with serving(settings):
        kept = await submit(desk, settings, references=of_image, steps=4)
        gone = await submit(desk, settings, references=[of_image[1] | {"key": "u/gone.png"}])
        video = await submit(desk, settings, "video_fast", references=[of_video], frames=17)
        assert await ended(desk, kept) == "completed"
        assert await ended(desk, gone) == "failed"
    async with serving(settings, "wan"):
        assert await ended(desk, video) == "completed"
    query = "SELECT generation_settings -> 'references' FROM jobs WHERE id = $1"
    assert (await desk.database.pool.fetchval(query, kept)).keys() == set(kinds[:4])
    assert (await desk.database.pool.fetchval(query, video)).keys() == {"start_frame"}
    manifest = await desk.database.pool.fetchval("SELECT manifest FROM workspace_assets WHERE job_id = $1", kept)
    assert manifest["parameters"]["references"].keys() == set(kinds[:4])
    assert await desk.status(gone) == ("failed", "reference_gone")


async def test_a_mask_is_read_from_the_store(desk: Desk, settings: Settings) -> None:
    blobs = BlobStore.from_url(settings.blobs())
    for key, colour in {"u/r.png": "orange", "u/r.mask.png": "white"}.items():
        buffer = io.BytesIO()
        Image.new("RGB", (160, 90), colour).save(buffer, "PNG")
        await blobs.put("reference_images", key, buffer.getvalue(), "image/png")
    mask = {"bucket": "reference_images", "key": "u/r.mask.png"}
    reference = {"bucket": "reference_images", "key": "u/r.png", "strength": 0.5, "mask": mask}
    async with serving(settings):
        kept = await submit(desk, settings, reference=reference, steps=4)
        gone = await submit(desk, settings, reference=reference | {"mask": mask | {"key": "u/gone.png"}}, steps=4)
        assert await ended(desk, kept) == "completed"
        assert await ended(desk, gone) == "failed"
    used = await desk.database.pool.fetchval(
        "SELECT generation_settings #> '{references,image}' FROM jobs WHERE id = $1", kept
    )
    assert used["mask"] == {"width": 160, "height": 90, "repainted": 1.0}
    assert await desk.status(gone) == ("failed", "reference_gone")


async def test_a_drain_hands_back_and_says_so(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, steps=100)
        await desk.until("SELECT step > 0 FROM job_queue WHERE job_id = $1", job_id)
    assert await desk.queued(job_id) == ("ready", 0)
    assert await desk.events(job_id) == ["queued", "started", "requeued drained"]
    states = await desk.database.pool.fetch("SELECT id, state FROM workers")
    assert [tuple(row) for row in states] == [(replica.worker, "stopped")]
    assert files(settings) == []


async def test_a_replica_is_listed_while_it_serves(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        row = await desk.database.pool.fetchrow("SELECT id, queue, state, model_name, device, load_ms FROM workers")
        assert tuple(row)[:5] == (replica.worker, "sdxl", "ready", "tiny-sdxl", "cpu")
        assert row["load_ms"] > 0
        job_id = await submit(desk, settings, steps=100)
        await desk.until("SELECT running = 1 FROM workers")
        await Queue(desk.database.pool).cancel(job_id)
        await ended(desk, job_id)
        await desk.until("SELECT running = 0 FROM workers")


async def test_a_model_that_can_not_be_loaded_is_told(desk: Desk, settings: Settings, tmp_path: Path) -> None:
    profile = tmp_path / "broken.yaml"
    profile.write_text(
        f"""name: broken
description: a model that is not there
laptop: true
models:
  sdxl: {{model_name: none, source: {tmp_path / "nothing"}, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0}}
"""
    )
    broken = settings.model_copy(update={"profile": str(profile)})
    replica = Replica(broken, Family.SDXL.value, Metrics())
    with pytest.raises(Exception, match=r".+") as caught:
        await replica.start()
    assert getattr(caught.value, "code", None) == "model_load_failed"
    row = await desk.database.pool.fetchrow("SELECT state, error FROM workers")
    assert row["state"] == "failed"
    assert row["error"].startswith("model_load_failed")
    assert replica.health() is not None
    await replica.stop(0)


async def test_a_replica_that_can_not_sign_does_not_start(desk: Desk, settings: Settings, tmp_path: Path) -> None:
    missing = {"c2pa_certificate": tmp_path / "none.pem", "c2pa_key": tmp_path / "none.key"}
    replica = Replica(settings.model_copy(update={"provenance": "c2pa"} | missing), "sdxl", Metrics())
    with pytest.raises(SettingsError, match="OURVIDZ_PROVENANCE=c2pa"):
        await replica.start()
    row = await desk.database.pool.fetchrow("SELECT state, error FROM workers")
    assert row["state"] == "failed"
    assert row["error"].startswith("settings: OURVIDZ_PROVENANCE=c2pa")
    await replica.stop(0)


async def test_a_job_with_parameters_of_another_version_fails_in_the_end(desk: Desk, settings: Settings) -> None:
    async with serving(settings) as replica:
        job_id = await submit(desk, settings, max_attempts=1)
        broken = await submit(desk, settings, max_attempts=1, params={"prompt": "x", "unknown": 1})
        assert await ended(desk, broken) == "failed"
        assert await ended(desk, job_id) == "completed"
        assert replica.health() is None
    assert await desk.status(broken) == ("failed", "internal")
    message = await desk.database.pool.fetchval("SELECT error_message FROM jobs WHERE id = $1", broken)
    assert "unknown" not in message


async def test_two_replicas_share_a_queue(desk: Desk, settings: Settings) -> None:
    async with serving(settings), serving(settings):
        ids = [await submit(desk, settings) for _ in range(4)]
        for job_id in ids:
            assert await ended(desk, job_id) == "completed"
    rows = await desk.database.pool.fetch("SELECT attempts FROM jobs")
    assert [attempts for (attempts,) in rows] == [1] * 4
