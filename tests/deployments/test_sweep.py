"""The sweep on a real database and a real store: what is spoken of stays, the rest goes when it is old enough."""

from pathlib import Path
from typing import Any
from uuid import uuid4

from db.blobs import BlobStore
from db.jobs import Jobs, Status
from db.queue import Queue, Settlement
from deployments.storing import BUCKET, REFERENCE_BUCKET, attempt_prefix
from deployments.sweep import Sweep
from tests.db.test_queue import asset, new_job


async def keys(blobs: BlobStore, bucket: str) -> set[str]:
    return {info.key async for info in blobs.list(bucket)}


async def test_sweep_deletes_only_what_nothing_speaks_of(database: Any, tmp_path: Path) -> None:
    jobs, queue = Jobs(database.pool), Queue(database.worker_pool)
    blobs = BlobStore.from_url(f"file://{tmp_path}")
    user = await database.user()
    done, running = new_job(user), new_job(user)
    await jobs.accept(done)
    await jobs.accept(running)
    await queue.claim("sdxl", uuid4(), 2)
    files = {
        "winner": attempt_prefix(user, done.id, 1) + "0.png",
        "loser": attempt_prefix(user, done.id, 7) + "0.png",
        "being stored": attempt_prefix(user, running.id, 1) + "0.png",
        "of no job": attempt_prefix(user, uuid4(), 1) + "0.png",
        "of another form": "notes/readme.png",
    }
    for key in files.values():
        await blobs.put(BUCKET, key, b"x", "image/png")
    lost = uuid4()
    references = {"kept": f"{user}/{done.id}.png", "lost": f"{user}/{lost}.png"}
    references |= {"kept mask": f"{user}/{done.id}.mask.png", "lost mask": f"{user}/{lost}.mask.png"}
    for key in references.values():
        await blobs.put(REFERENCE_BUCKET, key, b"x", "image/png")
    await queue.settle([Settlement(job_id=done.id, attempt=1, status=Status.COMPLETED, assets=[asset(done.id, 1)])])

    assert await Sweep(blobs, queue, grace_seconds=3600).once() == 0  # all of it is too young
    assert await Sweep(blobs, queue, grace_seconds=0).once() == 4
    assert await keys(blobs, BUCKET) == {files["winner"], files["being stored"], files["of another form"]}
    assert await keys(blobs, REFERENCE_BUCKET) == {references["kept"], references["kept mask"]}
    assert await Sweep(blobs, queue, grace_seconds=0).once() == 0
