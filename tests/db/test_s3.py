"""The object store on S3, against a server that implements it: names, copies, pages, and a job's files their life long.

The server is moto's, on loopback and in this process. It checks no signatures; what it is asked for is the real thing.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from db.backup import TargetNotEmpty, back_up
from db.blobs import BUCKETS, BlobNotFound, BlobStore, StorageUnavailable, UrlSigner
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.queue import Queue
from db.reconciliation import Reconciliation
from db.restore import restore
from db.uploads import UPLOAD_BUCKET
from deployments.expiry import Expiry
from deployments.reconciler import Reconciler
from deployments.sweep import Sweep
from tests.db.test_backup import empty_url, rows_at
from tests.deployments.results import Shelf
from tests.serve_app.conftest import BASE, SECRET, in_process

__all__ = ["empty_url"]

SHARED = "media"  # a bucket of the operator's, in which ours are prefixes
# the server looks at who asks, not at the signature
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server with the buckets that an operator has made."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in (*BUCKETS, SHARED):
        assert httpx2.put(f"http://{host}:{port}/{name}").status_code == 200
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def url(endpoint: str, name: str = SHARED, prefix: str | None = None) -> str:
    """The URL of a store of this test's own, or of the one whose buckets are ours."""
    path = f"{name}/{prefix or uuid4().hex}" if name else ""
    return f"s3://{path}?endpoint={endpoint}&region=us-east-1"


async def names(store: BlobStore, bucket: str, prefix: str = "") -> set[str]:
    return {info.key async for info in store.list(bucket, prefix)}


@pytest.mark.parametrize("layout", ["one bucket with prefixes", "a bucket for each"])
async def test_a_blob_lives_on_s3_as_in_a_folder(endpoint: str, layout: str) -> None:
    store = BlobStore.from_url(url(endpoint, SHARED if layout.startswith("one") else ""))
    user = uuid4().hex
    first, second = f"{user}/j/1/0.png", f"{user}/saved/x.png"
    data = PNG + bytes(range(256)) * 20
    await store.put(WORKSPACE_BUCKET, first, data, "image/png")
    assert await store.get(WORKSPACE_BUCKET, first) == data
    info = await store.head(WORKSPACE_BUCKET, first)
    assert (info.size, info.content_type, info.key) == (len(data), "image/png", first)
    assert info.modified_at.tzinfo is not None
    assert b"".join([part async for part in store.stream(WORKSPACE_BUCKET, first, 3, 700)]) == data[3:700]
    assert (await store.copy(WORKSPACE_BUCKET, first, LIBRARY_BUCKET, second)).size == len(data)
    await store.put(WORKSPACE_BUCKET, first, b"other", "image/png")
    assert await store.get(LIBRARY_BUCKET, second) == data, "a copy is a file of its own"
    assert await names(store, WORKSPACE_BUCKET, user) == {first}
    assert await names(store, LIBRARY_BUCKET, user) == {second}
    assert await names(store, UPLOAD_BUCKET, user) == set()
    await store.delete(WORKSPACE_BUCKET, [first, f"{user}/never.png"])
    for asked in (store.get, store.head):
        with pytest.raises(BlobNotFound):
            await asked(WORKSPACE_BUCKET, first)
    with pytest.raises(BlobNotFound):
        await store.copy(WORKSPACE_BUCKET, first, LIBRARY_BUCKET, second)
    assert await store.delete_below(LIBRARY_BUCKET, user) == 1
    assert await names(store, LIBRARY_BUCKET, user) == set()


async def test_a_large_file_goes_in_parts_and_keeps_its_type(endpoint: str) -> None:
    store = BlobStore.from_url(url(endpoint, prefix="large"))
    data = hashlib.sha256(b"x").digest() * (12 * 2**20 // 32)
    await store.put(WORKSPACE_BUCKET, "u/j/1/0.mp4", data, "video/mp4")
    await store.copy(WORKSPACE_BUCKET, "u/j/1/0.mp4", LIBRARY_BUCKET, "u/saved/0.mp4")
    for path in ("workspace-temp/u/j/1/0.mp4", "user-library/u/saved/0.mp4"):
        answer = httpx2.get(f"{endpoint}/{SHARED}/large/{path}", headers=SIGNED)
        assert answer.headers["content-type"] == "video/mp4"
        assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()


async def test_what_is_listed_and_deleted_goes_over_more_pages_than_one(endpoint: str) -> None:
    backend = s3_backends["123456789012"]["aws"]
    for number in range(1105):  # S3 lists and deletes 1000 at a time
        backend.put_object(SHARED, f"pages/workspace-temp/u/{number}.png", PNG)
    backend.put_object(SHARED, "pages/workspace-temp/uv/0.png", PNG)
    store = BlobStore.from_url(url(endpoint, prefix="pages"))
    assert len(await names(store, WORKSPACE_BUCKET, "u")) == 1105, "and not those of a name that begins alike"
    assert await store.delete_below(WORKSPACE_BUCKET, "u") == 1105
    assert await names(store, WORKSPACE_BUCKET) == {"uv/0.png"}


async def test_a_bucket_that_is_not_there_is_a_store_that_is_away(endpoint: str) -> None:
    store = BlobStore.from_url(url(endpoint, "nobodys"))
    with pytest.raises(StorageUnavailable):
        await store.put(WORKSPACE_BUCKET, "u/0.png", PNG, "image/png")


async def test_a_jobs_files_their_whole_life_long(endpoint: str, database: Any) -> None:
    shelf = Shelf(database, BlobStore.from_url(url(endpoint)), await database.user())
    made = await shelf.result(3)
    saved = await shelf.library.save(shelf.user, made.assets[0])
    await shelf.library.clear(shelf.user, made.assets[1])
    assert await shelf.readable(made.assets[0]) == [b"pixels of a lighthouse"] * 2
    assert await shelf.library.discard(shelf.user, made.assets[0])
    back = await shelf.library.copy_back(shelf.user, saved.item_id)
    assert (await shelf.readable(back.item_id))[0] == b"pixels of a lighthouse"
    for bucket, files in ((WORKSPACE_BUCKET, 4), (LIBRARY_BUCKET, 4)):
        kept = await shelf.files(bucket)
        assert len(kept) == files
        assert {key.split("/")[0] for key in kept} == {str(shelf.user)}, "the first part of a path is whose it is"


async def test_what_disagrees_on_s3_is_found_and_mended(endpoint: str, database: Any) -> None:
    shelf = Shelf(database, BlobStore.from_url(url(endpoint)), await database.user())
    made = await shelf.result(2)
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    await shelf.blobs.delete(LIBRARY_BUCKET, [item.key])
    await shelf.blobs.put(WORKSPACE_BUCKET, made.keys[1], b"torn", "image/png")
    orphan = f"{shelf.user}/saved/{uuid4()}.png"
    await shelf.blobs.put(LIBRARY_BUCKET, orphan, PNG, "image/png")
    late = f"{shelf.user}/{made.job_id}/7/0.png"
    await shelf.blobs.put(WORKSPACE_BUCKET, late, PNG, "image/png")
    once = Reconciler(Reconciliation(shelf.pool), shelf.rows, Queue(shelf.pool), shelf.blobs, -5)
    found = {(f.kind, f.repair) for f in await once.repair(await once.compare())}
    assert found >= {("missing", "restored"), ("size", "marked"), ("orphan", "deleted")}
    await Sweep(shelf.blobs, Queue(shelf.pool), -5).once()
    assert late not in await shelf.files(WORKSPACE_BUCKET)
    restored = await shelf.item(item.id)
    assert await shelf.blobs.get(LIBRARY_BUCKET, restored.key) == b"pixels of a lighthouse"
    assert orphan not in await shelf.files(LIBRARY_BUCKET)
    await shelf.pool.execute("UPDATE workspace_assets SET expires_at = now()")
    await Expiry(shelf.rows, shelf.blobs, 0).expire()
    assert await shelf.files(WORKSPACE_BUCKET) == set()


async def test_a_backup_of_s3_is_restored_to_s3(endpoint: str, database: Any, tmp_path: Path, empty_url: str) -> None:
    shelf = Shelf(database, BlobStore.from_url(url(endpoint)), await database.user())
    made = await shelf.result(2)
    item = await shelf.item((await shelf.library.save(shelf.user, made.assets[0])).item_id)
    await back_up(database.url, shelf.blobs, tmp_path / "b", "0.0.0")
    before = await rows_at(database.url)
    used, store = BlobStore.from_url(url(endpoint)), BlobStore.from_url(url(endpoint))
    await used.put(WORKSPACE_BUCKET, "somebody/elses/1/0.png", PNG, "image/png")
    with pytest.raises(TargetNotEmpty):
        await restore(tmp_path / "b", empty_url, used)
    done = await restore(tmp_path / "b", empty_url, store)
    assert (done.missing, done.damaged, done.faults) == (0, 0, [])
    assert await rows_at(empty_url) == before
    assert await store.get(LIBRARY_BUCKET, item.key) == b"pixels of a lighthouse"
    assert await names(store, WORKSPACE_BUCKET) == await shelf.files(WORKSPACE_BUCKET)


async def test_signed_urls_of_a_file_on_s3_end(endpoint: str, database: Any, tmp_path: Path) -> None:
    async with in_process(database, tmp_path, blob_url=url(endpoint)) as server:
        data = PNG + bytes(range(256)) * 40
        key = f"{uuid4()}/j/1/0.png"
        await server.blobs.put(WORKSPACE_BUCKET, key, data, "image/png")
        anybody = await server.client()
        signer = UrlSigner(SECRET.encode(), BASE)
        shown = await anybody.get(signer.sign(WORKSPACE_BUCKET, key, 60))
        assert (shown.status_code, shown.content, shown.headers["content-type"]) == (200, data, "image/png")
        part = await anybody.get(signer.sign(WORKSPACE_BUCKET, key, 60), headers={"Range": "bytes=8-19"})
        assert (part.status_code, part.content) == (206, data[8:20])
        ended = signer.sign(WORKSPACE_BUCKET, key, 60, now=1_000_000_000)
        assert (await anybody.get(ended)).status_code == 410
        longer = ended.replace(f"expires={1_000_000_060}", "expires=9999999999")
        assert (await anybody.get(longer)).status_code == 403
        store_path = f"{server.settings.blobs().partition('?')[0].removeprefix('s3:/')}/{WORKSPACE_BUCKET}/{key}"
        assert httpx2.get(endpoint + store_path).status_code == 403, "the store itself is for the server alone"
        assert httpx2.get(endpoint + store_path, headers=SIGNED).status_code == 200
        gone = signer.sign(WORKSPACE_BUCKET, f"{uuid4()}/j/1/0.png", 60)
        assert (await anybody.get(gone)).status_code == 404


async def test_uploads_lie_under_their_user(endpoint: str, database: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    async with in_process(database, tmp_path, blob_url=url(endpoint)) as server:
        alice = await server.user("alice")
        answer = await alice.post("/v1/uploads", files={"file": ("red.png", (tmp_path / "red.png").read_bytes())})
        assert answer.status_code == 201, answer.text
        owner = await server.pool.fetchval("SELECT id::text FROM profiles WHERE username = 'alice'")
        assert {key.split("/")[0] for key in await names(server.blobs, UPLOAD_BUCKET)} == {owner}
        assert await asyncio.gather(*(names(server.blobs, bucket) for bucket in ("avatars", "system_assets"))) == [
            set(),
            set(),
        ]
        assert (await alice.get(answer.json()["url"])).status_code == 200
