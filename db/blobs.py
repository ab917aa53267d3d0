"""Blobs: the bytes of images, videos and references, in a folder or an S3 bucket, and the URLs that show them.

    BlobError
    ├── InvalidBlobName      not one of our buckets, or not a name that we make
    ├── BlobNotFound
    └── StorageUnavailable   the store can't be reached, refused, or is full; another try may succeed

A blob is written whole or not at all and is durable when `put` returns. Names are made by the server; the check of
them is the last wall against a path that leads out of the store, not a service to users.
"""

import asyncio
import hashlib
import hmac
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, S3Store

if TYPE_CHECKING:  # these exist for type checkers only
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig, S3Config

T = TypeVar("T")
Store = LocalStore | MemoryStore | S3Store

BUCKETS = ("workspace-temp", "user-library", "reference_images", "system_assets", "avatars", "archive")
CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "json": "application/json",
    "gz": "application/gzip",
}
STREAM_CHUNK_BYTES = 2**20
DELETED_AT_ONCE = 500
MAX_KEY_LENGTH = 900  # S3 allows 1024 bytes, of which an operator's prefix takes some

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class BlobError(Exception):
    """Something about a blob; `code` says what."""

    code = "blob_error"


class InvalidBlobName(BlobError, ValueError):
    """The bucket is unknown, the key is not a name that this system makes, or the type is not that of the name."""

    code = "invalid_blob_name"


class BlobNotFound(BlobError):
    """There is no blob of that name."""

    code = "blob_not_found"


class StorageUnavailable(BlobError):
    """The object store can't be reached, refused us, or is full."""

    code = "storage_unavailable"


@dataclass(frozen=True)
class BlobInfo:
    """What is known of a blob without reading it; `size` in bytes."""

    bucket: str
    key: str
    size: int
    content_type: str
    modified_at: datetime
    etag: str | None


def content_type_of(key: str) -> str:
    """The media type of a blob. It belongs to the ending of the name, as not every store keeps a type of its own."""
    return CONTENT_TYPES.get(key.rpartition(".")[2], "application/octet-stream")


class BlobStore:
    """Our buckets over one object store. May be shared by all tasks of a process.

    The store's own asyncio interface is not used: it completes on threads of its runtime that may still hold Python
    objects while the interpreter ends, which aborts the process (seen with obstore 0.12.1 after local writes).
    """

    def __init__(self, stores: dict[str, tuple[Store, str]], folder: Path | None = None, threads: int = 16) -> None:
        """`stores` gives each bucket a store and a prefix in it; `folder` is the root of a local store."""
        self._stores = stores
        self._folder = folder
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="blobs")

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `file:///folder`, `memory://` or `s3://name/prefix?endpoint=…&region=…`.

        With `s3://name` our buckets are prefixes in the bucket `name`; with `s3://?endpoint=…` they are buckets of
        their own, as on Supabase. Credentials come from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` or from the
        machine's role, never from the URL. Raises ValueError.
        """
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        if parts.scheme == "memory" and not (parts.netloc or parts.path.strip("/") or options):
            memory = MemoryStore()
            return cls({bucket: (memory, f"{bucket}/") for bucket in BUCKETS})
        if parts.scheme == "file" and parts.path.startswith("/") and not (parts.netloc or options):
            folder = Path(unquote(parts.path))
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            local = LocalStore(folder, automatic_cleanup=True)
            return cls({bucket: (local, f"{bucket}/") for bucket in BUCKETS}, folder.resolve())
        if parts.scheme == "s3" and "@" not in parts.netloc and not options.keys() - {"endpoint", "region"}:
            return cls._from_s3(parts.netloc, parts.path.strip("/"), options)
        raise ValueError("a blob store is written as file:///folder, memory:// or s3://name/prefix?endpoint=…&region=…")

    @classmethod
    def _from_s3(cls, name: str, prefix: str, options: dict[str, str]) -> Self:
        config: S3Config = {}
        if "endpoint" in options:
            config["endpoint"] = options["endpoint"]
        if "region" in options:
            config["region"] = options["region"]
        # the limit of a whole request must let a long video through a slow line; silence is noticed much sooner
        client: ClientConfig = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "10m"}
        client["allow_http"] = options.get("endpoint", "").startswith("http://")
        retry: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}

        def open_bucket(name: str) -> S3Store:
            return S3Store(name, prefix=prefix or None, config=config, client_options=client, retry_config=retry)

        if name:
            shared = open_bucket(name)
            return cls({bucket: (shared, f"{bucket}/") for bucket in BUCKETS})
        return cls({bucket: (open_bucket(bucket), "") for bucket in BUCKETS})

    async def put(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        """Write a blob over whatever has its name. `content_type` must be that of the key's ending.

        Raises InvalidBlobName, StorageUnavailable.
        """
        store, path = self._find(bucket, key)
        if content_type != content_type_of(key):
            raise InvalidBlobName(f"a blob of type {content_type} needs a name that says so")
        attributes = None if isinstance(store, LocalStore) else {"Content-Type": content_type}
        try:
            await self._run(lambda: store.put(path, data, attributes=attributes))
        except BlobNotFound:  # the bucket itself is not there
            raise StorageUnavailable("the object store has no such bucket") from None
        if self._folder is not None:
            folder = self._folder
            await self._run(lambda: _sync_to_disk(folder / path, folder))

    async def get(self, bucket: str, key: str) -> bytes:
        """The whole blob. Raises InvalidBlobName, BlobNotFound, StorageUnavailable."""
        store, path = self._find(bucket, key)
        return await self._run(lambda: bytes(store.get(path).bytes()), path)

    async def copy(self, bucket: str, key: str, to_bucket: str, to_key: str) -> BlobInfo:
        """Copy a blob to a new name, inside of the store where that is one; its ending stays the same.

        The copy is a file of its own, as durable and as new as one that was put, and is there with the size of its
        source when this returns. Raises InvalidBlobName, BlobNotFound, StorageUnavailable.
        """
        (store, path), (to_store, to_path) = self._find(bucket, key), self._find(to_bucket, to_key)
        if content_type_of(key) != content_type_of(to_key):
            raise InvalidBlobName("a copy has the type of its source")
        size = (await self.head(bucket, key)).size
        # a folder's own copy is a second name of the same file, with its age: the sweep would take it for an old one
        if store is to_store and not isinstance(store, LocalStore):
            await self._run(lambda: store.copy(path, to_path))
        else:
            await self.put(to_bucket, to_key, await self.get(bucket, key), content_type_of(key))
        copied = await self.head(to_bucket, to_key)
        if copied.size != size:
            await self.delete(to_bucket, [to_key])
            raise StorageUnavailable(f"a copy has {copied.size} bytes, its source {size}")
        return copied

    async def stream(self, bucket: str, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes `start` to `end` (exclusive; None: to the last) in chunks of about 1 MiB.

        Raises like `get`, at the first chunk or at a later one, and ValueError for a range outside of the blob.
        """
        store, path = self._find(bucket, key)
        options: GetOptions = {}
        if start != 0 or end is not None:
            size = (await self.head(bucket, key)).size
            end = size if end is None else end
            if not 0 <= start < end <= size:
                raise ValueError(f"the range {start} to {end} is not inside of the {size} bytes")
            options["range"] = (start, end)

        def begin() -> Iterator[bytes]:
            return iter(store.get(path, options=options).stream(min_chunk_size=STREAM_CHUNK_BYTES))

        chunks = await self._run(begin, path)
        while (chunk := await self._run(lambda: next(chunks, None))) is not None:
            yield bytes(chunk)

    async def head(self, bucket: str, key: str) -> BlobInfo:
        """Raises InvalidBlobName, BlobNotFound, StorageUnavailable."""
        store, path = self._find(bucket, key)
        return self._info(bucket, await self._run(lambda: store.head(path), path))

    async def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete blobs; those that are gone already are no error. Raises InvalidBlobName, StorageUnavailable.

        After a failure some may be deleted and some not: call again.
        """
        if not keys:
            return
        store = self._find(bucket, keys[0])[0]
        await self._delete(store, [self._find(bucket, key)[1] for key in keys])

    async def delete_below(self, bucket: str, prefix: str) -> int:
        """Delete all blobs below a prefix, whoever named them; returns how many. Raises as `delete` and `list` do."""
        deleted = 0
        root = self._root(bucket)[1]
        keys = [info.key async for info in self.list(bucket, prefix)]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            page = keys[start : start + DELETED_AT_ONCE]
            await self._delete(self._stores[bucket][0], [root + key for key in page])
            deleted += len(page)
        return deleted

    async def _delete(self, store: Store, paths: Sequence[str]) -> None:
        def each() -> None:
            for path in paths:
                try:
                    store.delete(path)
                except FileNotFoundError:
                    continue
                except BaseError:
                    if not self._is_below_a_file(path):
                        raise

        # S3 deletes many in one request and does not mind the missing; a folder stops at the first missing one
        await self._run(each if isinstance(store, LocalStore) else lambda: store.delete(paths))

    async def list(self, bucket: str, prefix: str = "") -> AsyncIterator[BlobInfo]:
        """The blobs below `prefix`, which ends where a folder name ends; all of the bucket without one. In no order."""
        store, path = self._find(bucket, prefix) if prefix else self._root(bucket)
        pages = await self._run(lambda: iter(store.list(path)))
        while (page := await self._run(lambda: next(pages, None))) is not None:
            for meta in page:
                yield self._info(bucket, meta)

    def _root(self, bucket: str) -> tuple[Store, str]:
        try:
            return self._stores[bucket]
        except KeyError:
            raise InvalidBlobName("no such bucket") from None

    def _find(self, bucket: str, key: str) -> tuple[Store, str]:
        store, prefix = self._root(bucket)
        if len(key) > MAX_KEY_LENGTH or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
            raise InvalidBlobName("not a name of a blob")
        return store, prefix + key

    def _info(self, bucket: str, meta: Any) -> BlobInfo:
        key = str(meta["path"]).removeprefix(self._stores[bucket][1])
        return BlobInfo(bucket, key, meta["size"], content_type_of(key), meta["last_modified"], meta["e_tag"])

    async def _run(self, work: Callable[[], T], path: str | None = None) -> T:
        """Do the work on a thread, its faults typed. `path` is that of the blob which it reads."""

        def typed() -> T:
            try:
                return work()
            except FileNotFoundError:
                raise BlobNotFound("no such blob") from None
            except (BaseError, OSError) as fault:
                if path is not None and self._is_below_a_file(path):
                    raise BlobNotFound("no such blob") from None
                raise StorageUnavailable(f"the object store failed: {type(fault).__name__}") from fault

        return await asyncio.get_running_loop().run_in_executor(self._threads, typed)

    def _is_below_a_file(self, path: str) -> bool:
        """Whether a folder's store has a blob where the path has a folder: so nothing is there, as on S3.

        A file in the place of a bucket is a fault of the store.
        """
        if self._folder is None:
            return False
        bucket, *folders = path.split("/")[:-1]
        place = self._folder / bucket
        return any((place := place / folder).is_file() for folder in folders)


def _sync_to_disk(path: Path, root: Path) -> None:
    """The store writes aside and renames; bytes and names survive a power cut only once they are flushed as well."""
    for entry in (path, *path.parents):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if entry == root:
            return


class UrlSigner:
    """Signs the URLs by which anyone who holds one may read a blob for a while, whatever the store is."""

    def __init__(self, secret: bytes, base_url: str) -> None:
        """`base_url` is what clients reach the API by. Raises ValueError for a secret of less than 32 bytes."""
        if len(secret) < 32:
            raise ValueError("the secret of signed URLs must have at least 32 bytes")
        self._secret = secret
        self._base_url = base_url.rstrip("/")

    def sign(self, bucket: str, key: str, expires_in_seconds: int, now: float | None = None) -> str:
        """The URL of a blob; `now` is in seconds since 1970 and the clock's time unless given."""
        expires = int(time.time() if now is None else now) + expires_in_seconds
        path = f"/v1/files/{bucket}/{key}"
        return f"{self._base_url}{path}?expires={expires}&signature={self._signature(path, expires)}"

    def verify(self, bucket: str, key: str, expires: int, signature: str, now: float | None = None) -> bool:
        """Whether we signed just this and it has not expired. Takes the same time whatever differs."""
        expected = self._signature(f"/v1/files/{bucket}/{key}", expires)
        genuine = hmac.compare_digest(expected.encode(), signature.encode("utf-8", "surrogatepass"))
        return genuine and (time.time() if now is None else now) < expires

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"GET\n{path}\n{expires}".encode(), hashlib.sha256).hexdigest()
