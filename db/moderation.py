"""Moderation: what waits for a review, what was decided, and what is published.

A result is an asset of the workspace or an item of the library. Its status is one for all copies of it: pending until
somebody or something has decided, then approved, rejected or flagged (a person should look). What others may see of it
is decided by the database, in `published_items`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Self
from uuid import UUID

import asyncpg

from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, Position
from db.pool import Connection, queries

Status = Literal["pending", "approved", "rejected", "flagged"]

_TRIES = 3  # of a review that a deadlock with somebody who clears a workspace has ended


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result as moderators see it."""

    id: UUID
    kind: Literal["workspace", "library"]
    user_id: UUID
    job_id: UUID | None
    asset_type: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    width: int | None
    height: int | None
    duration_seconds: Decimal | None
    original_prompt: str
    model_used: str
    visibility: str
    moderation_status: Status
    moderation_reason: str | None
    created_at: datetime

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The result from a row of the statements of moderation."""
        values = dict(row)
        return cls(key=values.pop("storage_path"), thumbnail_key=values.pop("thumbnail_path"), **values)

    @property
    def bucket(self) -> str:
        """Where its files are."""
        return LIBRARY_BUCKET if self.kind == "library" else WORKSPACE_BUCKET

    @property
    def position(self) -> Position:
        """Where a page that ends with it ends."""
        return Position(self.created_at, self.id)


@dataclass(frozen=True, kw_only=True)
class Review:
    """One decision about a result; `notes` are for those who decide."""

    reviewer: UUID | None
    was: Status
    status: Status
    reason: str | None
    notes: str | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class PublishedItem:
    """An item that others may see, without the words that it was made from."""

    id: UUID
    asset_type: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int | None
    height: int | None
    duration_seconds: Decimal | None
    title: str | None
    tags: Sequence[str]
    model_used: str
    content_mode: str
    visibility: str
    created_at: datetime

    @classmethod
    def from_row(cls, row: asyncpg.Record) -> Self:
        """The item from a row of `published_items`."""
        values = dict(row)
        return cls(key=values.pop("storage_path"), thumbnail_key=values.pop("thumbnail_path"), **values)

    @property
    def position(self) -> Position:
        """Where a page that ends with it ends."""
        return Position(self.created_at, self.id)


class Moderation:
    """Reading is over a connection of `as_user`, and row-level security decides what that user sees. `review` needs a
    pool that acts as the owner of the tables; who may decide is for the caller to check."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("moderation")

    async def list_page(
        self, connection: Connection, *, status: Status | None = None, after: Position | None = None, page_size: int
    ) -> list[Result]:
        """A page of the results of one status, or of those that wait for a review; the oldest first."""
        rows = self._sql.list_results(
            connection, status=status, after_at=after and after.at, after_id=after and after.id, page_size=page_size
        )
        return [Result.from_row(row) async for row in rows]

    async def read(self, connection: Connection, asset_id: UUID) -> tuple[Result, list[Review]] | None:
        """One result, and what was decided about it, the latest first."""
        row = await self._sql.result(connection, asset_id=asset_id)
        if row is None:
            return None
        reviews = [Review(**dict(review)) async for review in self._sql.reviews_of(connection, asset_id=asset_id)]
        return Result.from_row(row), reviews

    async def review(
        self,
        asset_id: UUID,
        status: Status,
        reviewer: UUID,
        *,
        reason: str | None = None,
        notes: str | None = None,
        expected: Status | None = None,
    ) -> tuple[Status, bool] | None:
        """Decide about a result and all its copies, with an audit row: the status that it had, and whether it was
        changed, which it is not when `expected` is given and is not that status. None: there is no such result."""
        values: dict[str, Any] = {"asset_id": asset_id, "status": status, "reason": reason, "notes": notes}
        for left in reversed(range(_TRIES)):
            try:
                row = await self._sql.moderate(self._pool, reviewer=reviewer, expected=expected, **values)
            except asyncpg.DeadlockDetectedError:
                if not left:
                    raise
            else:
                break
        return None if row is None else (row["was"], row["done"])

    async def published_page(
        self, connection: Connection, *, before: Position | None = None, page_size: int
    ) -> list[PublishedItem]:
        """A page of what is public, newest first."""
        rows = self._sql.list_published(
            connection, before_at=before and before.at, before_id=before and before.id, page_size=page_size
        )
        return [PublishedItem.from_row(row) async for row in rows]

    async def published(self, connection: Connection, item_id: UUID) -> PublishedItem | None:
        """One item that is public or unlisted, for whoever knows its id."""
        row = await self._sql.published(connection, item_id=item_id)
        return None if row is None else PublishedItem.from_row(row)
