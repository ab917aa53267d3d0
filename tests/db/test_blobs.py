import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from db.blobs import BlobNotFound, BlobStore, InvalidBlobName, StorageUnavailable, UrlSigner
from tests.deployments import hostile

BUCKET = "workspace-temp"
KEY = "9b2e/7a1c/1/0.png"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return BlobStore.from_url(f"file://{tmp_path}/blobs" if request.param == "file" else "memory://")


async def whole(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def keys(store: BlobStore, prefix: str = "", bucket: str = BUCKET) -> list[str]:
    return sorted([info.key async for info in store.list(bucket, prefix)])


async def test_put_then_get_gives_the_bytes(store: BlobStore) -> None:
    await store.put(BUCKET, KEY, b"pixels", "image/png")
    assert await store.get(BUCKET, KEY) == b"pixels"


async def test_put_overwrites(store: BlobStore) -> None:
    await store.put(BUCKET, KEY, b"a longer first version", "image/png")
    await store.put(BUCKET, KEY, b"second", "image/png")
    assert await store.get(BUCKET, KEY) == b"second"


async def test_empty_blob_is_a_blob(store: BlobStore) -> None:
    await store.put(BUCKET, KEY, b"", "image/png")
    assert await store.get(BUCKET, KEY) == b""
    assert await whole(store.stream(BUCKET, KEY)) == b""


async def test_head_tells_size_and_type(store: BlobStore) -> None:
    await store.put(BUCKET, "u/clip.mp4", b"1234", "video/mp4")
    info = await store.head(BUCKET, "u/clip.mp4")
    assert (info.bucket, info.key, info.size, info.content_type) == (BUCKET, "u/clip.mp4", 4, "video/mp4")


async def test_same_key_in_two_buckets_is_two_blobs(store: BlobStore) -> None:
    await store.put(BUCKET, KEY, b"one", "image/png")
    await store.put("avatars", KEY, b"two", "image/png")
    await store.delete(BUCKET, [KEY])
    assert await store.get("avatars", KEY) == b"two"


async def test_stream_gives_all_bytes_in_order(store: BlobStore) -> None:
    data = os.urandom(5 * 2**20 + 3)
    await store.put(BUCKET, KEY, data, "image/png")
    assert await whole(store.stream(BUCKET, KEY)) == data


async def test_stream_of_a_local_file_holds_little_of_it_at_once(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}/blobs")
    await store.put(BUCKET, KEY, bytes(5 * 2**20), "image/png")
    assert max([len(chunk) async for chunk in store.stream(BUCKET, KEY)]) <= 2 * 2**20


@pytest.mark.parametrize(("start", "end", "expected"), [(0, 3, b"012"), (4, None, b"456789"), (9, 10, b"9")])
async def test_stream_gives_a_range(store: BlobStore, start: int, end: int | None, expected: bytes) -> None:
    await store.put(BUCKET, KEY, b"0123456789", "image/png")
    assert await whole(store.stream(BUCKET, KEY, start, end)) == expected


@pytest.mark.parametrize(("start", "end"), [(10, None), (3, 3), (5, 4), (-1, 2), (0, 11)])
async def test_stream_refuses_a_range_outside(store: BlobStore, start: int, end: int | None) -> None:
    await store.put(BUCKET, KEY, b"0123456789", "image/png")
    with pytest.raises(ValueError):
        await whole(store.stream(BUCKET, KEY, start, end))


async def test_missing_blob_is_not_found(store: BlobStore) -> None:
    for call in (store.get(BUCKET, KEY), store.head(BUCKET, KEY), whole(store.stream(BUCKET, KEY))):
        with pytest.raises(BlobNotFound):
            await call


async def test_below_a_blob_there_is_no_blob(store: BlobStore) -> None:
    await store.put(BUCKET, "u/a.png", b"1", "image/png")
    for key in ("u/a.png/b.png", "u/a.png/b/c/d.png"):
        for call in (store.get(BUCKET, key), store.head(BUCKET, key), whole(store.stream(BUCKET, key))):
            with pytest.raises(BlobNotFound):
                await call
        with pytest.raises(BlobNotFound):
            await store.copy(BUCKET, key, BUCKET, "u/c.png")
        await store.delete(BUCKET, [key])
    assert await keys(store) == ["u/a.png"]


async def test_a_file_in_the_place_of_a_bucket_is_a_fault(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}/blobs")
    (tmp_path / "blobs" / BUCKET).write_text("")
    for call in (store.get(BUCKET, "u/a.png"), store.head(BUCKET, "a.png"), store.delete(BUCKET, ["u/a.png"])):
        with pytest.raises(StorageUnavailable):
            await call


async def test_delete_forgets_and_does_not_mind_the_missing(store: BlobStore) -> None:
    await store.put(BUCKET, "a/1.png", b"1", "image/png")
    await store.put(BUCKET, "a/2.png", b"2", "image/png")
    await store.delete(BUCKET, ["a/0.png", "a/1.png", "a/2.png"])
    await store.delete(BUCKET, [])
    assert await keys(store) == []


async def test_list_shows_what_is_below_a_folder_name(store: BlobStore) -> None:
    for key in ("u1/a.png", "u1/j/b.png", "u10/c.png", "u2/d.png"):
        await store.put(BUCKET, key, b"x", "image/png")
    assert await keys(store, "u1") == ["u1/a.png", "u1/j/b.png"]
    assert len(await keys(store)) == 4
    assert await keys(store, "u3") == []
    assert await keys(store, bucket="avatars") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "a/..",
        "./a.png",
        "a//b.png",
        "a/",
        "a\\..\\b.png",
        "a\x00.png",
        "a%2e%2e/b.png",
        ".hidden/a.png",
        "a b.png",
        "a.png#1",
        "ü.png",
        "a/" * 500 + "a.png",
        "a" * 201 + ".png",
    ],
)
async def test_name_that_we_do_not_make_is_refused_everywhere(store: BlobStore, key: str) -> None:
    for call in (
        store.put(BUCKET, key, b"x", "image/png"),
        store.get(BUCKET, key),
        store.head(BUCKET, key),
        store.delete(BUCKET, ["ok.png", key]),
        whole(store.stream(BUCKET, key)),
    ):
        with pytest.raises(InvalidBlobName):
            await call


async def test_unknown_bucket_is_refused(store: BlobStore) -> None:
    with pytest.raises(InvalidBlobName):
        await store.get("elsewhere", KEY)
    with pytest.raises(InvalidBlobName):
        await keys(store, bucket="elsewhere")


async def test_put_refuses_a_type_that_the_name_denies(store: BlobStore) -> None:
    with pytest.raises(InvalidBlobName):
        await store.put(BUCKET, "page.png", b"<html>", "text/html")
    assert await keys(store) == []


async def test_local_write_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}/blobs")
    versions = [bytes([letter]) * size for letter, size in ((97, 3_000_000), (98, 10), (99, 1_000_000))]
    await store.put(BUCKET, KEY, versions[0], "image/png")
    writing = asyncio.ensure_future(rewrite(store, versions * 10))
    seen = 0
    while not writing.done():
        assert await store.get(BUCKET, KEY) in versions
        seen += 1
    await writing
    assert seen > 0


async def rewrite(store: BlobStore, versions: list[bytes]) -> None:
    for version in versions:
        await store.put(BUCKET, KEY, version, "image/png")


async def test_local_store_outlives_its_process_and_is_private(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/my%20blobs"
    await BlobStore.from_url(url).put(BUCKET, KEY, b"kept", "image/png")
    assert await BlobStore.from_url(url).get(BUCKET, KEY) == b"kept"
    assert (tmp_path / "my blobs" / BUCKET / KEY).read_bytes() == b"kept"
    assert stat.S_IMODE((tmp_path / "my blobs").stat().st_mode) == 0o700


async def test_local_store_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}/blobs")
    await store.put(BUCKET, KEY, b"x", "image/png")
    await store.delete(BUCKET, [KEY])
    assert list((tmp_path / "blobs").rglob("*.png")) == []
    assert not (tmp_path / "blobs" / BUCKET / "9b2e").exists()


async def test_fault_of_the_store_is_typed(tmp_path: Path) -> None:
    store = BlobStore.from_url(f"file://{tmp_path}/blobs")
    await store.put(BUCKET, "a.png", b"x", "image/png")
    with pytest.raises(StorageUnavailable):
        await store.put(BUCKET, "a.png/b.png", b"x", "image/png")  # a file stands where a folder is needed


async def test_dead_s3_endpoint_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = BlobStore.from_url("s3://media/prefix?endpoint=http://127.0.0.1:1&region=local")
    with pytest.raises(StorageUnavailable) as fault:
        await store.get(BUCKET, KEY)
    assert "127.0.0.1" not in str(fault.value)


@pytest.mark.parametrize(
    ("name", "path"),
    [("media/prefix", f"/media/prefix/{BUCKET}/{KEY}"), ("media", f"/media/{BUCKET}/{KEY}"), ("", f"/{BUCKET}/{KEY}")],
)
async def test_s3_put_names_bucket_prefix_and_type(monkeypatch: pytest.MonkeyPatch, name: str, path: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with hostile.receiving(hostile.answer(200, etag='"1"')) as endpoint:
        store = BlobStore.from_url(f"s3://{name}?endpoint=http://127.0.0.1:{endpoint.port}&region=local")
        await store.put(BUCKET, KEY, b"pixels", "image/png")
    sent = endpoint.requests[0]
    assert (sent.method, sent.target, sent.body) == ("PUT", path, b"pixels")
    assert sent.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "blobs",
        "file://blobs",
        "file://host/blobs",
        "file:///blobs?x=1",
        "memory://name",
        "http://host/blobs",
        "s3://key:secret@name",
        "s3://name?secret=x",
    ],
)
def test_unknown_kind_of_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        BlobStore.from_url(url)


# ----------------------------------------------------------------------------------------------- signed URLs

SIGNER = UrlSigner(b"s" * 32, "https://media.example.com/")


def parts(url: str) -> tuple[str, int, str]:
    split = urlsplit(url)
    query = parse_qs(split.query)
    return f"{split.scheme}://{split.netloc}{split.path}", int(query["expires"][0]), query["signature"][0]


def test_signed_url_names_the_blob_and_verifies() -> None:
    address, expires, signature = parts(SIGNER.sign(BUCKET, KEY, 60, now=1000))
    assert address == f"https://media.example.com/v1/files/{BUCKET}/{KEY}"
    assert expires == 1060
    assert SIGNER.verify(BUCKET, KEY, expires, signature, now=1000)


@pytest.mark.parametrize(("now", "valid"), [(1059, True), (1059.9, True), (1060, False), (1061, False)])
def test_signed_url_ends_at_its_second(now: float, valid: bool) -> None:
    _, expires, signature = parts(SIGNER.sign(BUCKET, KEY, 60, now=1000))
    assert SIGNER.verify(BUCKET, KEY, expires, signature, now=now) is valid


def test_signature_holds_for_nothing_else() -> None:
    _, expires, signature = parts(SIGNER.sign(BUCKET, KEY, 60, now=1000))
    assert not SIGNER.verify("user-library", KEY, expires, signature, now=1000)
    assert not SIGNER.verify(BUCKET, KEY.replace("0.png", "1.png"), expires, signature, now=1000)
    assert not SIGNER.verify(BUCKET, KEY, expires + 1, signature, now=1000)
    assert not UrlSigner(b"t" * 32, "").verify(BUCKET, KEY, expires, signature, now=1000)


@pytest.mark.parametrize("signature", ["", "0" * 64, "é", "\ud800", "x" * 10_000])
def test_bad_signature_is_false_and_no_error(signature: str) -> None:
    assert not SIGNER.verify(BUCKET, KEY, 1060, signature, now=1000)


def test_short_secret_is_refused() -> None:
    with pytest.raises(ValueError):
        UrlSigner(b"short", "https://media.example.com")
