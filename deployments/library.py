"""Keeping results: saving them to the library, discarding them, and copying them back to the workspace.

Every step leaves things so that a crash loses nothing: the copy is stored and its size compared before a row speaks of
it, and a source goes only while the library's row, under the file that was looked at, is held. Everything may be
repeated. What a crash leaves is a copy without a row, which the sweep finds.

    LibraryError
    ├── AssetNotFound
    ├── ItemNotFound
    ├── CollectionNotFound
    ├── AssetFileMissing     the row is there and its file is not
    ├── LabelRefused         a title or a tag breaks the content policy
    └── NotPublishable       moderation has rejected it
"""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import structlog
from uuid6 import uuid7

from db.blobs import BlobError, BlobNotFound, BlobStore, StorageUnavailable
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, Files, Kept, LibraryItem, LibraryRows, WorkspaceAsset
from deployments.storing import attempt_prefix
from models.params import ContentMode
from models.policy import ContentRejected, check_prompt

log = structlog.get_logger()

SAVED = "saved"  # the folder of a user's in the library's bucket that is ours: nobody else's files are swept


class LibraryError(Exception):
    """What was asked for can't be done; `code` says why."""

    code = "library_error"


class AssetNotFound(LibraryError):
    """The user has no such asset in the workspace, and has saved none of that id."""

    code = "asset_not_found"


class ItemNotFound(LibraryError):
    """The user has no such item in the library."""

    code = "library_item_not_found"


class CollectionNotFound(LibraryError):
    """The user has no such collection."""

    code = "collection_not_found"


class AssetFileMissing(LibraryError):
    """The file is gone from the store, or is not the one that its row speaks of. The reconciler tells more."""

    code = "asset_file_missing"


class LabelRefused(LibraryError):
    """A title or a tag breaks the content policy; `label` is its column, and `code` that of the policy."""

    def __init__(self, label: str, code: str, message: str) -> None:
        super().__init__(message)
        self.label, self.code = label, code


class NotPublishable(LibraryError):
    """Moderation has rejected the item, so that nobody else may see it."""

    code = "not_publishable"


@dataclass(frozen=True)
class Saved:
    """An item of the library, and whether this call made it."""

    item_id: UUID
    new: bool


@dataclass
class Cleared:
    """What became of many assets. `errors` are the ids and codes of those that stayed where they were."""

    processed: int = 0
    new_saves: int = 0
    errors: list[tuple[UUID, str]] = field(default_factory=list)


class Library:
    """What users do with their results, each call in the name of one user. `rows` acts as the owner of the tables."""

    def __init__(self, rows: LibraryRows, blobs: BlobStore) -> None:
        self._rows, self._blobs = rows, blobs

    async def save(self, user_id: UUID, asset_id: UUID, labels: Mapping[str, Any] | None = None) -> Saved:
        """Copy an asset to the library; its row and file in the workspace stay. One that is saved already, or is a copy
        of an item, is that item. `labels` (as `LibraryRows.update` takes them) are written either way.

        Raises `LibraryError`, `StorageUnavailable`.
        """
        await self._check_collection(user_id, labels)
        source = await self._rows.asset(asset_id) or await self._rows.item_of(user_id, asset_id)
        check_labels(labels or {}, source.content_mode if source is not None else "sfw")
        item, new = await self._saved(user_id, asset_id)
        if labels and await self._rows.update(item.id, user_id, labels) is None:
            raise AssetNotFound("the item was removed meanwhile")
        return Saved(item.id, new)

    async def clear(self, user_id: UUID, asset_id: UUID, labels: Mapping[str, Any] | None = None) -> Saved:
        """Save an asset, then discard it: but only when its copy is in the store, whole. Raises as `save` does."""
        saved = await self.save(user_id, asset_id, labels)
        item = await self._rows.item(saved.item_id)
        if item is None:
            raise AssetNotFound("the item was removed meanwhile")
        if not await self._is_whole(item, LIBRARY_BUCKET):
            raise AssetFileMissing("the copy in the library is not whole; nothing was discarded")
        await self._delete(WORKSPACE_BUCKET, await self._rows.clear(asset_id, item))
        return saved

    async def clear_all(self, user_id: UUID, job_id: UUID | None = None) -> Cleared:
        """Clear a whole workspace, or one job's part of it. One asset that fails stays, and delays no other."""
        done = Cleared()
        for asset_id in await self._rows.asset_ids(user_id, job_id):
            try:
                done.new_saves += (await self.clear(user_id, asset_id)).new
                done.processed += 1
            except (LibraryError, BlobError) as error:
                log.warning("clear_failed", asset_id=str(asset_id), error=error.code)
                done.errors.append((asset_id, error.code))
        return done

    async def was_cleared(self, user_id: UUID, job_id: UUID) -> bool:
        """Whether the library has something of this job."""
        return await self._rows.was_cleared(user_id, job_id)

    async def discard(self, user_id: UUID, asset_id: UUID) -> bool:
        """Delete an asset of the workspace with its file, saved or not. False when the user has none of that id."""
        files = await self._rows.discard(asset_id, user_id)
        await self._delete(WORKSPACE_BUCKET, files)
        return files is not None

    async def remove(self, user_id: UUID, item_id: UUID) -> bool:
        """Delete an item of the library with its file. False when the user has none of that id."""
        files = await self._rows.remove(item_id, user_id)
        if files is None:
            return False
        # an older system's rows may share a file
        shared = await self._rows.kept_files(LIBRARY_BUCKET, files.keys)
        await self._delete(LIBRARY_BUCKET, files, shared)
        return True

    async def update(self, user_id: UUID, item_id: UUID, changes: Mapping[str, Any]) -> LibraryItem:
        """Change an item's title, tags, collection, visibility, or whether it is a favorite. Raises `LibraryError`."""
        await self._check_collection(user_id, changes)
        item = await self._rows.item(item_id)
        if item is not None and item.user_id == user_id:
            check_labels(changes, item.content_mode)
            # one that is rejected from now on is withdrawn by the database, whatever its visibility
            if changes.get("visibility", "private") != "private" and item.moderation_status == "rejected":
                raise NotPublishable("moderation has rejected it")
        item = await self._rows.update(item_id, user_id, changes)
        if item is None:
            raise ItemNotFound("there is no such item in the library")
        return item

    async def copy_back(self, user_id: UUID, item_id: UUID) -> Saved:
        """Copy an item to the workspace, for its time there; while a copy of it is there, it is that one.

        Raises `LibraryError`, `StorageUnavailable`.
        """
        item = await self._rows.item(item_id)
        if item is None or item.user_id != user_id:
            raise ItemNotFound("there is no such item in the library")
        if (there := await self._rows.copy_of(item_id)) is not None:
            return Saved(there, new=False)
        asset_id, job_id = uuid4(), UUID(int=uuid7().int)
        files = await self._copy(item, LIBRARY_BUCKET, WORKSPACE_BUCKET, f"{attempt_prefix(user_id, job_id, 1)}0")
        made = await self._rows.copy_back(
            item, _origin(item), asset_id=asset_id, job_id=job_id, key=files.key, thumbnail_key=files.thumbnail_key
        )
        if made:
            return Saved(asset_id, new=True)
        await self._delete(WORKSPACE_BUCKET, files)
        return await self.copy_back(user_id, item_id)

    async def restore(self, item: LibraryItem) -> bool:
        """Copy an item whose file was lost anew, from the workspace. False where nothing whole is left there.

        Raises `StorageUnavailable`.
        """
        if item.source_asset_id is None:
            return False
        source = await self._rows.asset(item.source_asset_id)
        if source is None or source.user_id != item.user_id:
            return False
        try:
            return await self._refile(item, source)
        except AssetFileMissing:
            return False

    async def _check_collection(self, user_id: UUID, labels: Mapping[str, Any] | None) -> None:
        collection = (labels or {}).get("collection_id")
        if collection is not None and not await self._rows.owns_collection(user_id, UUID(collection)):
            raise CollectionNotFound("there is no such collection")

    async def _saved(self, user_id: UUID, asset_id: UUID) -> tuple[LibraryItem, bool]:
        asset = await self._rows.asset(asset_id)
        item = await self._rows.item_of(user_id, asset_id)
        if asset is None or asset.user_id != user_id:
            if item is None:
                raise AssetNotFound("there is no such asset in the workspace")
            return item, False  # it was cleared before
        if item is not None:
            if not await self._is_whole(item, LIBRARY_BUCKET):
                await self._refile(item, asset)
            return item, False
        item_id = uuid4()
        files = await self._copy(asset, WORKSPACE_BUCKET, LIBRARY_BUCKET, f"{user_id}/{SAVED}/{item_id}")
        new = await self._rows.save(item_id, asset, files.key, files.thumbnail_key)
        if not new:
            await self._delete(LIBRARY_BUCKET, files)
        item = await self._rows.item_of(user_id, asset_id)
        if item is None:
            raise AssetNotFound("the item was removed meanwhile")
        return item, new

    async def _refile(self, item: LibraryItem, source: WorkspaceAsset) -> bool:
        """Store the copy of an item anew, under a name of its own, and let the item speak of it."""
        key = f"{item.user_id}/{SAVED}/{uuid4()}"
        files = await self._copy(source, WORKSPACE_BUCKET, LIBRARY_BUCKET, key)
        if await self._rows.refile(item, files.key, files.thumbnail_key):
            log.warning("library_file_restored", item_id=str(item.id))
            return True
        await self._delete(LIBRARY_BUCKET, files)
        return False

    async def _is_whole(self, row: Kept, bucket: str) -> bool:
        try:
            return (await self._blobs.head(bucket, row.key)).size == row.file_size_bytes
        except BlobNotFound:
            return False

    async def _copy(self, row: Kept, bucket: str, to_bucket: str, stem: str) -> Files:
        """Copy a row's files, the ending of each added to `stem`. Raises `AssetFileMissing`, `StorageUnavailable`."""
        key = f"{stem}.{row.key.rpartition('.')[2]}"
        try:
            copied = await self._blobs.copy(bucket, row.key, to_bucket, key)
        except BlobNotFound:
            raise AssetFileMissing("the file is gone from the store") from None
        if copied.size != row.file_size_bytes:
            await self._delete(to_bucket, Files(key, None))
            raise AssetFileMissing(f"the file has {copied.size} bytes, and its row speaks of {row.file_size_bytes}")
        if row.thumbnail_key is None:
            return Files(key, None)
        thumbnail = f"{stem}.thumb.{row.thumbnail_key.rpartition('.')[2]}"
        try:
            await self._blobs.copy(bucket, row.thumbnail_key, to_bucket, thumbnail)
        except BlobNotFound:  # the picture is what counts
            return Files(key, None)
        return Files(key, thumbnail)

    async def _delete(self, bucket: str, files: Files | None, spared: Collection[str] = ()) -> None:
        """Delete files that no row speaks of any more. Where the store is away, the sweep does it."""
        if files is not None:
            with contextlib.suppress(StorageUnavailable):
                await self._blobs.delete(bucket, [key for key in files.keys if key not in spared])


def check_labels(labels: Mapping[str, Any], content_mode: str) -> None:
    """Titles and tags are seen by others once their item is published: the content policy holds for all of them, as one
    text. Raises `LabelRefused`."""
    mode: ContentMode = "nsfw" if content_mode == "nsfw" else "sfw"
    title, tags = labels.get("custom_title") or "", " \n".join(labels.get("tags") or ())
    for label, text in (("custom_title", title), ("tags", tags), ("tags", f"{title}\n{tags}")):
        try:
            check_prompt(text, mode)
        except ContentRejected as error:
            raise LabelRefused(label, error.code, error.message) from None


def _origin(item: LibraryItem) -> dict[str, Any]:
    """What the job of a copy says of where it comes from. An item that an older system saved does not tell how it was
    made; its copy's job has the plainest type of its kind, and says that this was assumed."""
    known = "job_type" in item.provenance
    video = item.asset_type == "video"
    facts = {
        "job_type": "video_high" if video else "sdxl_image_high",
        "quality": "high",
        "model_type": "wan" if video else "sdxl",
        "content_mode": item.content_mode,
    }
    facts |= {name: value for name, value in item.provenance.items() if name in (*facts, "frames", "fps")}
    metadata = {"source": "library_copy", "library_id": str(item.id)}
    if not known:
        metadata["assumed"] = "job_type, quality, model_type, content_mode"
    own = {"settings": item.provenance.get("settings"), "manifest": item.provenance.get("manifest")}
    return facts | own | {"metadata": metadata}
