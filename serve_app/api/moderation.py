"""/v1/moderation: the reviews of what was made. /v1/published: what others may see of it."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query

from db.access import Principal
from db.library import LIBRARY_BUCKET
from db.moderation import Moderation, PublishedItem, Result
from db.pool import as_user
from serve_app.api.auth import EdgeDep, User
from serve_app.api.kept import Before, PageSize, position
from serve_app.api.problems import Problem
from serve_app.api.wire_moderation import (
    Decide,
    Decided,
    ModeratedResult,
    ModeratedResultFull,
    ModerationPage,
    ModerationStatus,
    Published,
    PublishedPage,
)
from serve_app.edge import Edge

router = APIRouter(prefix="/v1", tags=["moderation"])

URL_SECONDS = 300  # how long what was withdrawn can still be read by whoever has seen it


async def require_moderator(user: User) -> Principal:
    """The holder of the key, who must be a moderator or an admin. 403 otherwise."""
    if not user.is_admin() and "moderator" not in user.roles:
        raise Problem(403, "moderators_only", "only a moderator or an admin may do this")
    return user


Moderator = Annotated[Principal, Depends(require_moderator)]
Cursor = Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")]


@router.get("/moderation", operation_id="listModeration")
async def list_moderation(
    edge: EdgeDep,
    user: Moderator,
    status: Annotated[
        ModerationStatus | None, Query(description="Of this status; without it, what waits for a review.")
    ] = None,
    cursor: Cursor = None,
    limit: PageSize = 50,
) -> ModerationPage:
    """What waits for a review, or what has a status; the oldest first."""
    after = position(cursor, "cursor")
    async with as_user(edge.pool, user.user_id) as connection:
        rows = await Moderation(edge.pool).list_page(connection, status=status, after=after, page_size=limit + 1)
    return ModerationPage(
        data=[ModeratedResult(**_view(edge, row)) for row in rows[:limit]],
        next=str(rows[limit - 1].position) if len(rows) > limit else None,
    )


@router.get("/moderation/{asset_id}", operation_id="getModeration")
async def get_moderation(asset_id: UUID, edge: EdgeDep, user: Moderator) -> ModeratedResultFull:
    """One result, an asset of a workspace or an item of a library, and what was decided about it."""
    return await _read(edge, user, asset_id)


@router.post("/moderation/{asset_id}", operation_id="decideModeration")
async def decide_moderation(asset_id: UUID, body: Decide, edge: EdgeDep, user: Moderator) -> ModeratedResultFull:
    """Decide about a result. What is rejected or flagged is withdrawn from others at once."""
    decided = await Moderation(edge.pool).review(
        asset_id, body.status, user.user_id, reason=body.reason, notes=body.notes, expected=body.expected
    )
    if decided is None:
        raise Problem(404, "asset_not_found", "Asset not found", field="asset_id")
    if not decided[1]:
        message = f"it is {decided[0]} by now, and nothing was changed"
        raise Problem(409, "moderation_changed", message, field="expected")
    return await _read(edge, user, asset_id)


@router.get("/published", operation_id="listPublished", tags=["library"])
async def list_published(edge: EdgeDep, user: User, before: Before = None, limit: PageSize = 50) -> PublishedPage:
    """What users have made public, newest first; what is nsfw is shown to age-verified users only."""
    async with as_user(edge.pool, user.user_id) as connection:
        rows = await Moderation(edge.pool).published_page(connection, before=position(before), page_size=limit + 1)
    return PublishedPage(
        data=[_published(edge, row) for row in rows[:limit]],
        next=str(rows[limit - 1].position) if len(rows) > limit else None,
    )


@router.get("/published/{item_id}", operation_id="getPublished", tags=["library"])
async def get_published(item_id: UUID, edge: EdgeDep, user: User) -> Published:
    """One item that is public, or unlisted and known to you by its id."""
    async with as_user(edge.pool, user.user_id) as connection:
        row = await Moderation(edge.pool).published(connection, item_id)
    if row is None:
        raise Problem(404, "library_item_not_found", "Library asset not found", field="item_id")
    return _published(edge, row)


async def _read(edge: Edge, user: Principal, asset_id: UUID) -> ModeratedResultFull:
    async with as_user(edge.pool, user.user_id) as connection:
        found = await Moderation(edge.pool).read(connection, asset_id)
    if found is None:
        raise Problem(404, "asset_not_found", "Asset not found", field="asset_id")
    row, reviews = found
    decided = [Decided.model_validate(review, from_attributes=True) for review in reviews]
    return ModeratedResultFull(**_view(edge, row), reviews=decided)


def _view(edge: Edge, row: Result) -> dict[str, Any]:
    return _shown(edge, row, row.bucket) | {
        "kind": row.kind,
        "user_id": row.user_id,
        "job_id": row.job_id,
        "prompt": row.original_prompt,
        "visibility": row.visibility,
        "moderation_status": row.moderation_status,
        "moderation_reason": row.moderation_reason,
    }


def _published(edge: Edge, row: PublishedItem) -> Published:
    own = {"title": row.title, "tags": list(row.tags), "content_mode": row.content_mode}
    return Published(**_shown(edge, row, LIBRARY_BUCKET) | own | {"file_size_bytes": row.file_size_bytes})


def _shown(edge: Edge, row: Result | PublishedItem, bucket: str) -> dict[str, Any]:
    thumbnail, sign = row.thumbnail_key, edge.signer.sign
    return {
        "id": row.id,
        "type": row.asset_type,
        "url": sign(bucket, row.key, URL_SECONDS),
        "thumbnail_url": sign(bucket, thumbnail, URL_SECONDS) if thumbnail else None,
        "mime_type": row.mime_type,
        "width": row.width,
        "height": row.height,
        "duration_seconds": None if row.duration_seconds is None else float(row.duration_seconds),
        "model": row.model_used,
        "created_at": row.created_at,
    }
