"""The sweep on a real database and a real store: what is spoken of stays, the rest goes when it is old enough."""

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from uuid6 import uuid7

from db.blobs import BlobStore, content_type_of
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
    lost = UUID(int=uuid7().int)
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


async def test_of_the_references_only_names_that_we_make_are_swept(database: Any, tmp_path: Path) -> None:
    blobs = BlobStore.from_url(f"file://{tmp_path}")
    user, theirs, ours = uuid4(), uuid4(), UUID(int=uuid7().int)
    taken_over = f"{theirs}.0123456789abcdef"
    swept = {
        f"{user}/{name}"
        for name in (
            f"{ours}.png",
            f"{ours}.ref1.jpeg",
            f"{ours}.mask.webp",
            f"{ours}.ref12.mask.png",
            f"{taken_over}.png",
            f"{taken_over}.ref2.mask.png",
            f"{ours}.fedcba9876543210.png",  # another system's ids may be of this version as well
        )
    }
    left = {
        f"{user}/{name}"
        for name in (
            f"{theirs}.png",
            f"{theirs}.mask.png",
            f"{theirs}.ref1.png",
            f"{theirs}.0123456789ABCDEF.png",
            f"{theirs}.0123456789abcdef0.png",
            f"{ours}.jpg",
            f"{ours}.ref0.png",
            f"{ours}.copy.png",
            f"{ours}",
            f"{str(ours).upper()}.png",
            f"{ours.hex}.png",
            f"uploads/{ours}.png",
            f"mine/{ours}.png",
        )
    } | {f"holidays/{ours}.png", f"{ours}.png"}
    for key in swept | left:
        await blobs.put(REFERENCE_BUCKET, key, b"x", content_type_of(key))
    assert await Sweep(blobs, Queue(database.worker_pool), grace_seconds=0).once() == len(swept)
    assert await keys(blobs, REFERENCE_BUCKET) == left
