"""/v1/library: what users keep."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Response

from db.access import Principal
from db.library import LIBRARY_BUCKET, LibraryRows
from db.library import LibraryItem as ItemRow
from db.pool import as_user
from serve_app.api.auth import EdgeDep, User
from serve_app.api.kept import (
    Before,
    PageSize,
    Thumbnail,
    UrlSeconds,
    asset_view,
    item_view,
    library_of,
    position,
    problems,
    signed,
)
from serve_app.api.problems import Problem
from serve_app.api.wire_assets import PRINTABLE, ChangeItem, LibraryItem, LibraryPage, SignedUrl, WorkspaceAsset
from serve_app.edge import Edge

router = APIRouter(prefix="/v1/library", tags=["library"])


@router.get("", operation_id="listLibrary")
async def list_library(
    edge: EdgeDep,
    user: User,
    asset_type: Annotated[Literal["image", "video"] | None, Query(alias="type")] = None,
    tag: Annotated[str | None, Query(min_length=1, max_length=100, pattern=PRINTABLE)] = None,
    is_favorite: bool | None = None,
    collection_id: UUID | None = None,
    before: Before = None,
    limit: PageSize = 50,
) -> LibraryPage:
    """Your library, newest first."""
    async with as_user(edge.pool, user.user_id) as connection:
        rows = await LibraryRows(edge.pool).items(
            connection,
            user.user_id,
            asset_type=asset_type,
            tag=tag,
            is_favorite=is_favorite,
            collection_id=collection_id,
            before=position(before),
            page_size=limit + 1,
        )
    seconds = edge.settings.signed_url_seconds
    data = [item_view(row, edge.signer, seconds) for row in rows[:limit]]
    return LibraryPage(data=data, next=str(rows[limit - 1].position) if len(rows) > limit else None)


@router.get("/{item_id}", operation_id="getLibraryItem")
async def get_item(item_id: UUID, edge: EdgeDep, user: User) -> LibraryItem:
    """One item of your library."""
    return item_view(await _owned(edge, user, item_id), edge.signer, edge.settings.signed_url_seconds)


@router.patch("/{item_id}", operation_id="changeLibraryItem")
async def change_item(item_id: UUID, body: ChangeItem, edge: EdgeDep, user: User) -> LibraryItem:
    """Change what the body names of an item, and nothing else."""
    changes = body.model_dump(mode="json", exclude_unset=True)
    if "title" in changes:
        changes["custom_title"] = changes.pop("title")
    with problems():
        item = await library_of(edge).update(user.user_id, item_id, changes)
    return item_view(item, edge.signer, edge.settings.signed_url_seconds)


@router.delete("/{item_id}", status_code=204, operation_id="removeLibraryItem")
async def remove_item(item_id: UUID, edge: EdgeDep, user: User) -> Response:
    """Delete an item with its file, for good. A copy of it in the workspace stays there."""
    if not await library_of(edge).remove(user.user_id, item_id):
        raise Problem(404, "library_item_not_found", "Library asset not found", field="item_id")
    return Response(status_code=204)


@router.get("/{item_id}/url", operation_id="signLibraryItem")
async def sign_item(
    item_id: UUID, edge: EdgeDep, user: User, seconds: UrlSeconds = None, thumbnail: Thumbnail = False
) -> SignedUrl:
    """A URL by which anybody may read the file for a while."""
    return signed(edge, LIBRARY_BUCKET, await _owned(edge, user, item_id), seconds, thumbnail)


@router.post("/{item_id}/copy", operation_id="copyLibraryItem")
async def copy_item(item_id: UUID, edge: EdgeDep, user: User) -> WorkspaceAsset:
    """Copy an item to your workspace, where it expires like the rest. While a copy is there, it is that one."""
    with problems(asset="item_id"):
        copied = await library_of(edge).copy_back(user.user_id, item_id)
    row = await LibraryRows(edge.pool).asset(copied.item_id)
    if row is None:
        raise Problem(404, "asset_not_found", "Asset not found", field="item_id")
    return asset_view(row, edge.signer, edge.settings.signed_url_seconds)


async def _owned(edge: Edge, user: Principal, item_id: UUID) -> ItemRow:
    """An item of the caller's own. 404 for anybody else's: that it exists is not theirs to know."""
    async with as_user(edge.pool, user.user_id) as connection:
        row = await LibraryRows(edge.pool).item(item_id, connection)
    if row is None or (row.user_id != user.user_id and not user.is_admin()):
        raise Problem(404, "library_item_not_found", "Library asset not found", field="item_id")
    return row
