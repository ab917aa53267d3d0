"""Copies of blobs: inside of the store where that is one, compared with their source, and never older than they are."""

import os
from pathlib import Path

import pytest

from db.blobs import BlobNotFound, BlobStore, InvalidBlobName, StorageUnavailable
from tests.deployments import hostile

FROM, TO = ("workspace-temp", "u/j/1/0.png"), ("user-library", "u/saved/0.png")


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return BlobStore.from_url(f"file://{tmp_path}/blobs" if request.param == "file" else "memory://")


async def test_a_copy_is_a_blob_of_its_own(store: BlobStore) -> None:
    await store.put(*FROM, b"pixels", "image/png")
    copied = await store.copy(*FROM, *TO)
    assert (copied.bucket, copied.key, copied.size) == (*TO, 6)
    await store.put(*FROM, b"other pixels", "image/png")
    await store.delete(FROM[0], [FROM[1]])
    assert await store.get(*TO) == b"pixels"


async def test_a_copy_of_nothing_is_nothing(store: BlobStore) -> None:
    with pytest.raises(BlobNotFound):
        await store.copy(*FROM, *TO)
    with pytest.raises(BlobNotFound):
        await store.head(*TO)


async def test_a_copy_keeps_the_type(store: BlobStore) -> None:
    await store.put(*FROM, b"pixels", "image/png")
    with pytest.raises(InvalidBlobName):
        await store.copy(*FROM, "user-library", "u/saved/0.mp4")


async def test_a_folders_copy_is_as_young_as_its_copying(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}")
    await store.put(*FROM, b"pixels", "image/png")
    os.utime(tmp_path / FROM[0] / FROM[1], (0, 0))
    await store.copy(*FROM, *TO)
    assert (await store.head(*TO)).modified_at.year > 1970


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def head(size: int) -> bytes:
    return hostile.answer(200, etag='"1"', last_modified="Sat, 21 Nov 2026 10:00:00 GMT", content_length=str(size))


COPIED = hostile.answer(200, b"<CopyObjectResult><ETag>&quot;1&quot;</ETag></CopyObjectResult>")


async def test_s3_copies_on_its_own_side(keys: None) -> None:
    async with hostile.receiving(head(6), COPIED, head(6)) as endpoint:
        store = BlobStore.from_url(f"s3://media?endpoint=http://127.0.0.1:{endpoint.port}&region=local")
        assert (await store.copy(*FROM, *TO)).size == 6
    asked = [(request.method, request.target) for request in endpoint.requests]
    assert asked == [
        ("HEAD", "/media/workspace-temp/u/j/1/0.png"),
        ("PUT", "/media/user-library/u/saved/0.png"),
        ("HEAD", "/media/user-library/u/saved/0.png"),
    ]
    assert endpoint.requests[1].headers["x-amz-copy-source"] == "media/workspace-temp/u/j/1/0.png"
    assert endpoint.requests[1].body == b""


async def test_a_copy_of_another_size_is_deleted_again_and_an_error(keys: None) -> None:
    deleted = hostile.answer(200, b"<DeleteResult></DeleteResult>")
    async with hostile.receiving(head(6), COPIED, head(5), deleted) as endpoint:
        store = BlobStore.from_url(f"s3://media?endpoint=http://127.0.0.1:{endpoint.port}&region=local")
        with pytest.raises(StorageUnavailable):
            await store.copy(*FROM, *TO)
    assert (endpoint.requests[3].method, b"u/saved/0.png" in endpoint.requests[3].body) == ("POST", True)


async def test_buckets_of_their_own_are_copied_by_way_of_us(keys: None) -> None:
    whole = hostile.answer(200, b"pixels", etag='"1"', last_modified="Sat, 21 Nov 2026 10:00:00 GMT")
    async with hostile.receiving(head(6), whole, hostile.answer(200, etag='"2"'), head(6)) as endpoint:
        store = BlobStore.from_url(f"s3://?endpoint=http://127.0.0.1:{endpoint.port}&region=local")
        assert (await store.copy(*FROM, *TO)).size == 6
    asked = [(request.method, request.target, request.body) for request in endpoint.requests]
    assert asked[2] == ("PUT", "/user-library/u/saved/0.png", b"pixels")
