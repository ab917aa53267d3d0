"""The reconciler on real rows and files: what it reports, what it mends, and what it leaves alone."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from db.blobs import BlobStore
from db.jobs import Jobs
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.queue import Queue
from db.reconciliation import Reconciliation
from db.uploads import UPLOAD_BUCKET, Uploads
from deployments.reconciler import Finding, NothingAgrees, Reconciler
from deployments.states import state_key
from deployments.storing import attempt_prefix
from tests.db.test_queue import new_job
from tests.deployments.results import Shelf


@pytest.fixture
async def shelf(database: Any, tmp_path: Path) -> Shelf:
    return Shelf(database, BlobStore.from_url(f"file://{tmp_path}"), await database.user())


def reconciler(shelf: Shelf, grace_seconds: float = 0, blobs: BlobStore | None = None) -> Reconciler:
    rows, queue = Reconciliation(shelf.pool), Queue(shelf.pool)
    return Reconciler(rows, shelf.rows, queue, blobs or shelf.blobs, grace_seconds)


async def mended(shelf: Shelf, grace_seconds: float = 0) -> list[Finding]:
    once = reconciler(shelf, grace_seconds)
    return await once.repair(await once.compare())


def told(findings: list[Finding]) -> set[tuple[str, str, str | None]]:
    return {(finding.kind, finding.key, finding.repair) for finding in findings}


async def fault(shelf: Shelf, table: str, row: object) -> str | None:
    value: str | None = await shelf.pool.fetchval(f"SELECT fault FROM {table} WHERE id = $1", row)  # noqa: S608
    return value


async def test_a_system_in_order_has_no_findings(shelf: Shelf, database: Any) -> None:
    made = await shelf.result(2)
    await shelf.library.save(shelf.user, made.assets[0])
    running = new_job(shelf.user)
    await Jobs(shelf.pool).accept(running)
    await Queue(shelf.worker_pool).claim("sdxl", uuid4(), 1)
    for key in (attempt_prefix(shelf.user, running.id, 1) + "0.png", state_key(shelf.user, running.id)):
        await shelf.blobs.put(WORKSPACE_BUCKET, key, b"x", "image/png" if key.endswith("png") else OCTETS)
    await shelf.blobs.put(WORKSPACE_BUCKET, "probes/x.json", b"{}", "application/json")
    await shelf.blobs.put(UPLOAD_BUCKET, f"{shelf.user}/{made.job_id}.png", b"x", "image/png")
    once = reconciler(shelf)
    assert await once.compare() == []
    assert (once.tally.users, once.tally.agreeing) == (1, 6)


OCTETS = "application/octet-stream"


async def test_a_row_whose_file_is_gone_is_marked_until_the_file_is_back(shelf: Shelf) -> None:
    made = await shelf.result(2)
    data = await shelf.blobs.get(WORKSPACE_BUCKET, made.keys[0])
    await shelf.blobs.delete(WORKSPACE_BUCKET, [made.keys[0]])
    (found,) = await reconciler(shelf).compare()
    assert (found.kind, found.row and found.row.id, found.repair) == ("missing", made.assets[0], None)
    assert await fault(shelf, "workspace_assets", made.assets[0]) is None  # nothing was changed
    assert told(await mended(shelf)) == {("missing", made.keys[0], "marked")}
    assert await fault(shelf, "workspace_assets", made.assets[0]) == "missing"
    assert told(await mended(shelf)) == {("missing", made.keys[0], "left")}
    await shelf.blobs.put(WORKSPACE_BUCKET, made.keys[0], data, "image/png")
    assert told(await mended(shelf)) == {("healed", made.keys[0], "unmarked")}
    assert await fault(shelf, "workspace_assets", made.assets[0]) is None
    assert await mended(shelf) == []


@pytest.mark.parametrize("damage", ["missing", "size"])
async def test_an_item_is_restored_from_the_workspace(shelf: Shelf, damage: str) -> None:
    made = await shelf.result()
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    await shelf.blobs.delete(LIBRARY_BUCKET, [item.key])
    if damage == "size":
        await shelf.blobs.put(LIBRARY_BUCKET, item.key, b"cut", "image/png")
    findings = await mended(shelf)
    assert (damage, item.key, "restored") in told(findings)
    again = await shelf.item(item.id)
    assert await shelf.blobs.get(LIBRARY_BUCKET, again.key) == await shelf.blobs.get(WORKSPACE_BUCKET, made.keys[0])
    await mended(shelf)  # what is left of the damaged copy
    assert await reconciler(shelf).compare() == []


async def test_an_item_without_a_source_is_marked(shelf: Shelf) -> None:
    kept, made = await shelf.result(), await shelf.result()
    item = await shelf.item((await shelf.library.clear(shelf.user, made.assets[0])).item_id)
    await shelf.blobs.put(LIBRARY_BUCKET, item.key, b"cut", "image/png")
    assert told(await mended(shelf)) == {("size", item.key, "marked")}
    assert await fault(shelf, "user_library", item.id) == "size"
    assert await shelf.blobs.get(LIBRARY_BUCKET, item.key) == b"cut"  # what there is of it is not thrown away
    assert await shelf.readable(kept.assets[0])


async def test_orphans_go_when_they_are_old_and_strange_files_stay(shelf: Shelf) -> None:
    made = await shelf.result()
    left_over = attempt_prefix(shelf.user, made.job_id, 1) + "5.png"  # of the winner's attempt: the sweep spares it
    of_nobody = attempt_prefix(uuid4(), uuid4(), 1) + "0.png"
    for key in (left_over, of_nobody, "notes/readme.png"):
        await shelf.blobs.put(WORKSPACE_BUCKET, key, b"x", "image/png")
    copy, upload = f"{shelf.user}/saved/{uuid4()}.png", f"{shelf.user}/uploads/{uuid4()}.png"
    older = f"{shelf.user}/{uuid4()}.png"
    for bucket, key in ((LIBRARY_BUCKET, copy), (LIBRARY_BUCKET, older), (UPLOAD_BUCKET, upload)):
        await shelf.blobs.put(bucket, key, b"x", "image/png")
    orphans = {left_over, of_nobody, copy, upload}
    strange = {("unknown", "notes/readme.png", "left"), ("unknown", older, "left")}
    assert told(await mended(shelf, grace_seconds=3600)) == {("orphan", key, "left") for key in orphans} | strange
    assert told(await mended(shelf)) == {("orphan", key, "deleted") for key in orphans} | strange
    assert told(await mended(shelf)) == strange
    assert await shelf.readable(made.assets[0])


async def test_a_lost_thumbnail_is_told_and_no_fault_of_the_row(shelf: Shelf) -> None:
    made = await shelf.result()
    thumbnail = made.keys[0].replace(".png", ".thumb.webp")
    await shelf.blobs.delete(WORKSPACE_BUCKET, [thumbnail])
    assert told(await mended(shelf)) == {("missing", thumbnail, "left")}
    assert await fault(shelf, "workspace_assets", made.assets[0]) is None


async def test_an_upload_that_is_gone_is_marked(shelf: Shelf) -> None:
    await shelf.result()
    key = f"{shelf.user}/uploads/{uuid4()}.png"
    upload_id = uuid4()
    await Uploads(shelf.pool).add(
        upload_id,
        shelf.user,
        key=key,
        mime_type="image/png",
        file_size_bytes=3,
        size=(1, 1),
        sha256=b"x" * 32,
    )
    assert told(await mended(shelf)) == {("missing", key, "marked")}
    assert await fault(shelf, "reference_uploads", upload_id) == "missing"


async def test_the_wrong_store_is_not_mended(shelf: Shelf, tmp_path: Path) -> None:
    made = await shelf.result()
    empty = reconciler(shelf, blobs=BlobStore.from_url(f"file://{tmp_path}/elsewhere"))
    findings = await empty.compare()
    assert {finding.kind for finding in findings} == {"missing"}
    with pytest.raises(NothingAgrees):
        await empty.repair(findings)
    assert await fault(shelf, "workspace_assets", made.assets[0]) is None
    await shelf.pool.execute("DELETE FROM jobs")
    with pytest.raises(NothingAgrees):  # and the other way round: a database that knows none of the files
        await mended(shelf)
    assert len(await shelf.files(WORKSPACE_BUCKET)) == 2


async def test_a_file_in_somebody_elses_folder_is_no_orphan_while_a_row_speaks_of_it(shelf: Shelf) -> None:
    made = await shelf.result()
    moved = made.keys[0].replace(str(shelf.user), str(uuid4()))
    await shelf.blobs.copy(WORKSPACE_BUCKET, made.keys[0], WORKSPACE_BUCKET, moved)
    await shelf.blobs.delete(WORKSPACE_BUCKET, [made.keys[0]])
    await shelf.pool.execute("UPDATE workspace_assets SET temp_storage_path = $1", moved)
    assert await mended(shelf) == []
    assert await shelf.blobs.head(WORKSPACE_BUCKET, moved)
