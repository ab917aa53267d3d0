"""The workspace and the library: rows of what jobs made, and of what users keep of it.

A row of the workspace goes after its time, or when its owner discards it; an item of the library stays until its owner
removes it. Each speaks of a file of its own, so that deleting one never touches the other. Files come before their rows
and go after them: whoever dies in between leaves a file that nothing speaks of, never a row without its file.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import Connection, queries

WORKSPACE_BUCKET, LIBRARY_BUCKET = "workspace-temp", "user-library"
EXPIRED_AT_ONCE = 500


@dataclass(frozen=True)
class Position:
    """Where a page ends: the last row's time and id. Rows that go meanwhile do not move it."""

    at: datetime
    id: UUID

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(f"{self.at.isoformat()} {self.id}".encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The position of a text that `str` made. Raises `ValueError` for any other."""
        try:
            at, _, row = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).partition(b" ")
            moment = datetime.fromisoformat(at.decode("ascii"))
            if moment.tzinfo is None:
                raise ValueError("a time without a zone")
            return cls(moment.astimezone(UTC), UUID(row.decode("ascii")))
        except (binascii.Error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError("no position") from error


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the rows of the workspace and of the library have in common. `key` is in the bucket of its kind."""

    id: UUID
    user_id: UUID
    asset_type: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int | None
    height: int | None
    duration_seconds: Decimal | None
    generation_seed: int | None
    original_prompt: str
    model_used: str
    created_at: datetime
    fault: str | None  # `missing` or `size`: what the reconciler found wrong with the file
    moderation_status: str
    moderation_reason: str | None  # a code

    @property
    def position(self) -> Position:
        """Where a page that ends with this row ends."""
        return Position(self.created_at, self.id)

    def facts(self) -> dict[str, Any]:
        """What both kinds of rows hold, as JSON."""
        names = ("asset_type", "mime_type", "file_size_bytes", "width", "height", "generation_seed", "original_prompt")
        values: dict[str, Any] = {name: getattr(self, name) for name in (*names, "model_used")}
        seconds = None if self.duration_seconds is None else str(self.duration_seconds)
        return values | {"id": str(self.id), "user_id": str(self.user_id), "duration_seconds": seconds}


@dataclass(frozen=True, kw_only=True)
class WorkspaceAsset(Kept):
    """One file of a job, with what its job says of it."""

    job_id: UUID
    asset_index: int
    frames: int | None
    fps: Decimal | None
    expires_at: datetime
    source_library_id: UUID | None
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    job_type: str
    quality: str
    model_type: str
    content_mode: str

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The asset from a row of `workspace_assets` with its job's."""
        values = _without(row, "attempt")
        values["key"] = values.pop("temp_storage_path")
        values["settings"] = values.pop("generation_settings")
        return cls(thumbnail_key=values.pop("thumbnail_path"), **values)

    def provenance(self) -> dict[str, Any]:
        """What an item of the library keeps of how it was made, for when the job is gone."""
        names = ("job_type", "quality", "model_type", "content_mode", "asset_index", "frames")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        fps = None if self.fps is None else str(self.fps)
        own = {"job_id": str(self.job_id), "fps": fps, "settings": dict(self.settings), "manifest": self.manifest}
        return values | own


@dataclass(frozen=True, kw_only=True)
class LibraryItem(Kept):
    """One file that its owner keeps."""

    source_asset_id: UUID | None
    source_job_id: UUID | None
    collection_id: UUID | None
    custom_title: str | None
    tags: Sequence[str]
    is_favorite: bool
    visibility: str
    content_category: str
    updated_at: datetime
    provenance: Mapping[str, Any]

    @property
    def content_mode(self) -> str:
        """That of the job that made it."""
        return "nsfw" if "nsfw" in (self.content_category, self.provenance.get("content_mode")) else "sfw"

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The item from a row of `user_library`. Columns that later versions add are left to those."""
        values = dict(row)
        values |= {"key": row["storage_path"], "thumbnail_key": row["thumbnail_path"]}
        values["provenance"] = row["generation_metadata"]
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Files:
    """The files of a row that is gone, to be deleted."""

    key: str
    thumbnail_key: str | None

    @property
    def keys(self) -> list[str]:
        """Both."""
        return [self.key] if self.thumbnail_key is None else [self.key, self.thumbnail_key]


def _without(row: asyncpg.Record, *names: str) -> dict[str, Any]:
    return {name: value for name, value in dict(row).items() if name not in names}


def _files(row: asyncpg.Record | None) -> Files | None:
    return None if row is None else Files(row[0], row[1])


class LibraryRows:
    """What a user is shown is read over a connection of `as_user`, by row-level security. The rest needs a pool that
    acts as the owner of the tables, and names the user; for `expire` and `kept_files` the replicas' role is enough.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("library")

    # ---------------------------------------------------------------------------------------------------- reading

    async def assets(
        self,
        connection: Connection,
        user_id: UUID,
        *,
        job_id: UUID | None = None,
        asset_type: str | None = None,
        before: Position | None = None,
        page_size: int = 50,
    ) -> list[WorkspaceAsset]:
        """A page of a workspace, newest first."""
        rows = self._sql.list_assets(
            connection,
            user_id=user_id,
            job_id=job_id,
            asset_type=asset_type,
            before_at=before and before.at,
            before_id=before and before.id,
            page_size=page_size,
        )
        return [WorkspaceAsset.from_row(row) async for row in rows]

    async def asset(self, asset_id: UUID, connection: Connection | None = None) -> WorkspaceAsset | None:
        """One asset, expired or not, until it is deleted."""
        row = await self._sql.asset(connection or self._pool, asset_id=asset_id)
        return None if row is None else WorkspaceAsset.from_row(row)

    async def asset_ids(self, user_id: UUID, job_id: UUID | None = None) -> list[UUID]:
        """All assets of a user, or those of one job."""
        return [row["id"] async for row in self._sql.asset_ids(self._pool, user_id=user_id, job_id=job_id)]

    async def was_cleared(self, user_id: UUID, job_id: UUID) -> bool:
        """Whether the library has something of this job."""
        return bool(await self._sql.was_cleared(self._pool, user_id=user_id, job_id=job_id))

    async def items(
        self,
        connection: Connection,
        user_id: UUID,
        *,
        asset_type: str | None = None,
        tag: str | None = None,
        is_favorite: bool | None = None,
        collection_id: UUID | None = None,
        before: Position | None = None,
        page_size: int = 50,
    ) -> list[LibraryItem]:
        """A page of a library, newest first."""
        rows = self._sql.list_items(
            connection,
            user_id=user_id,
            asset_type=asset_type,
            tag=tag,
            is_favorite=is_favorite,
            collection_id=collection_id,
            before_at=before and before.at,
            before_id=before and before.id,
            page_size=page_size,
        )
        return [LibraryItem.from_row(row) async for row in rows]

    async def item(self, item_id: UUID, connection: Connection | None = None) -> LibraryItem | None:
        """One item."""
        return _item(await self._sql.item(connection or self._pool, item_id=item_id))

    async def item_of(self, user_id: UUID, asset_id: UUID) -> LibraryItem | None:
        """The item that an asset was saved as, or that it is a copy of."""
        return _item(await self._sql.item_of(self._pool, user_id=user_id, asset_id=asset_id))

    async def owns_collection(self, user_id: UUID, collection_id: UUID) -> bool:
        """Whether there is such a collection of that user's."""
        return bool(await self._sql.owns_collection(self._pool, user_id=user_id, collection_id=collection_id))

    # ---------------------------------------------------------------------------------------------------- writing

    async def save(self, item_id: UUID, asset: WorkspaceAsset, key: str, thumbnail_key: str | None) -> bool:
        """Make the item of an asset whose copy is stored. False when another save of it came first."""
        facts = asset.facts() | {"job_id": str(asset.job_id), "facts": asset.provenance()}
        row = await self._sql.save(self._pool, id=item_id, storage_path=key, thumbnail_path=thumbnail_key, asset=facts)
        return row is not None

    async def refile(self, item: LibraryItem, key: str, thumbnail_key: str | None) -> bool:
        """Let an item whose file was lost speak of another copy. False when it has changed meanwhile."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await self._sql.refile(
                connection, item_id=item.id, was=item.key, storage_path=key, thumbnail_path=thumbnail_key
            )
            if row is not None:
                await self._sql.show_instead(connection, user_id=item.user_id, keys=[item.key], instead=key)
        return row is not None

    async def update(self, item_id: UUID, user_id: UUID, changes: Mapping[str, Any]) -> LibraryItem | None:
        """Change `custom_title`, `tags`, `is_favorite`, `collection_id` or `visibility`. None when it is not that
        user's, or when the collection was deleted meanwhile."""
        try:
            row = await self._sql.update_item(self._pool, item_id=item_id, user_id=user_id, changes=dict(changes))
        except asyncpg.ForeignKeyViolationError:
            return None
        return _item(row)

    async def remove(self, item_id: UUID, user_id: UUID) -> Files | None:
        """Delete an item's row; its files are the caller's to delete. None when it is not that user's.

        No character, scene or conversation shows them any more.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            item = _item(await self._sql.remove_item(connection, item_id=item_id, user_id=user_id))
            if item is None:
                return None
            files = Files(item.key, item.thumbnail_key)
            # a second statement: it sees what was placed while the first one waited for the row
            await self._sql.show_instead(connection, user_id=user_id, keys=files.keys, instead=None)
        return files

    async def discard(self, asset_id: UUID, user_id: UUID) -> Files | None:
        """Delete an asset's row; its files are the caller's to delete. None when it is not that user's."""
        return _files(await self._sql.discard(self._pool, asset_id=asset_id, user_id=user_id))

    async def clear(self, asset_id: UUID, item: LibraryItem) -> Files | None:
        """The same, but only while the item is there under the file that was looked at."""
        row = await self._sql.clear(
            self._pool, asset_id=asset_id, user_id=item.user_id, item_id=item.id, storage_path=item.key
        )
        return _files(row)

    async def copy_of(self, item_id: UUID) -> UUID | None:
        """The workspace's live copy of an item."""
        asset_id: UUID | None = await self._sql.copy_of(self._pool, item_id=item_id)
        return asset_id

    async def copy_back(
        self,
        item: LibraryItem,
        facts: Mapping[str, Any],
        *,
        asset_id: UUID,
        job_id: UUID,
        key: str,
        thumbnail_key: str | None,
    ) -> bool:
        """Make the workspace's copy of an item, whose files are stored, and its job. False when there is one."""
        try:
            await self._sql.copy_back(
                self._pool,
                asset_id=asset_id,
                job_id=job_id,
                storage_path=key,
                thumbnail_path=thumbnail_key,
                facts=dict(facts),
                item=item.facts(),
            )
        except asyncpg.UniqueViolationError:
            return False
        return True

    async def expire(self, batch: int = EXPIRED_AT_ONCE) -> list[Files]:
        """Delete the rows of a batch of assets whose time is over; their files are the caller's to delete."""
        return [Files(row[0], row[1]) async for row in self._sql.expire(self._pool, batch=batch)]

    async def kept_files(self, bucket: str, keys: Sequence[str]) -> set[str]:
        """Of these files of the library or of uploads, those that a row speaks of."""
        return {row["key"] async for row in self._sql.kept_files(self._pool, bucket=bucket, keys=list(keys))}


def _item(row: asyncpg.Record | None) -> LibraryItem | None:
    return None if row is None else LibraryItem.from_row(row)
