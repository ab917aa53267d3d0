"""Results of jobs with real files, for tests of what becomes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from db.blobs import BlobStore
from db.jobs import Jobs, Status
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, LibraryItem, LibraryRows
from db.queue import Queue, Settlement
from deployments.library import Library
from deployments.storing import attempt_prefix
from tests.db.test_queue import asset, new_job


@dataclass(frozen=True)
class Result:
    """A completed job and its assets."""

    job_id: UUID
    assets: Sequence[UUID]
    keys: Sequence[str]


class Shelf:
    """A user's workspace and library over a store of the test's own."""

    def __init__(self, database: Any, blobs: BlobStore, user: UUID) -> None:
        self.pool, self.worker_pool, self.blobs, self.user = database.pool, database.worker_pool, blobs, user
        self.rows = LibraryRows(database.pool)
        self.library = Library(self.rows, blobs)

    async def result(self, count: int = 1, data: bytes = b"pixels of a lighthouse", user: UUID | None = None) -> Result:
        """A job of `count` images with thumbnails, all of the same prompt, seed and model."""
        owner = user or self.user
        job = new_job(owner, callback_url=None)
        await Jobs(self.pool).accept(job)
        await Queue(self.worker_pool).claim("sdxl", uuid4(), 1)
        prefix = attempt_prefix(owner, job.id, 1)
        made = [
            replace(
                asset(job.id, 1, index),
                key=f"{prefix}{index}.png",
                thumbnail_key=f"{prefix}{index}.thumb.webp",
                file_size_bytes=len(data) + index,
                settings={"steps": 4},
            )
            for index in range(count)
        ]
        for index, one in enumerate(made):
            assert one.thumbnail_key is not None
            await self.blobs.put(WORKSPACE_BUCKET, one.key, data + b"." * index, "image/png")
            await self.blobs.put(WORKSPACE_BUCKET, one.thumbnail_key, b"small", "image/webp")
        done = Settlement(job_id=job.id, attempt=1, status=Status.COMPLETED, assets=made)
        assert await Queue(self.worker_pool).settle([done])
        return Result(job.id, [one.id for one in made], [one.key for one in made])

    async def item(self, item_id: UUID) -> LibraryItem:
        """An item that must be there."""
        item = await self.rows.item(item_id)
        assert item is not None
        return item

    async def files(self, bucket: str) -> set[str]:
        """Every file of a bucket."""
        return {info.key async for info in self.blobs.list(bucket)}

    async def readable(self, asset_id: UUID) -> list[bytes]:
        """What the user can still read of an asset: by its row in the workspace, and by its item."""
        found = []
        if (here := await self.rows.asset(asset_id)) is not None:
            found.append(await self.blobs.get(WORKSPACE_BUCKET, here.key))
        if (kept := await self.rows.item_of(self.user, asset_id)) is not None:
            found.append(await self.blobs.get(LIBRARY_BUCKET, kept.key))
        return found
