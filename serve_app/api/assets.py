"""/v1/assets: the workspace. What jobs made is here until it expires, is saved to the library, or is discarded."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Response

from db.access import Principal
from db.library import WORKSPACE_BUCKET, LibraryRows
from db.library import WorkspaceAsset as AssetRow
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
from serve_app.api.wire_assets import LibraryItem, SaveAsset, SignedUrl, WorkspaceAsset, WorkspacePage
from serve_app.edge import Edge

router = APIRouter(prefix="/v1/assets", tags=["assets"])


@router.get("", operation_id="listAssets")
async def list_assets(
    edge: EdgeDep,
    user: User,
    job_id: Annotated[UUID | None, Query(description="Of this job only.")] = None,
    asset_type: Annotated[Literal["image", "video"] | None, Query(alias="type")] = None,
    before: Before = None,
    limit: PageSize = 50,
) -> WorkspacePage:
    """Your workspace, newest first."""
    async with as_user(edge.pool, user.user_id) as connection:
        rows = await LibraryRows(edge.pool).assets(
            connection,
            user.user_id,
            job_id=job_id,
            asset_type=asset_type,
            before=position(before),
            page_size=limit + 1,
        )
    seconds = edge.settings.signed_url_seconds
    data = [asset_view(row, edge.signer, seconds) for row in rows[:limit]]
    return WorkspacePage(data=data, next=str(rows[limit - 1].position) if len(rows) > limit else None)


@router.get("/{asset_id}", operation_id="getAsset")
async def get_asset(asset_id: UUID, edge: EdgeDep, user: User) -> WorkspaceAsset:
    """One asset of your workspace."""
    return asset_view(await _owned(edge, user, asset_id), edge.signer, edge.settings.signed_url_seconds)


@router.delete("/{asset_id}", status_code=204, operation_id="discardAsset")
async def discard_asset(asset_id: UUID, edge: EdgeDep, user: User) -> Response:
    """Delete an asset with its file, saved or not. What was saved of it stays in the library."""
    if not await library_of(edge).discard(user.user_id, asset_id):
        raise Problem(404, "asset_not_found", "Asset not found", field="asset_id")
    return Response(status_code=204)


@router.post("/{asset_id}/save", operation_id="saveAsset")
async def save_asset(asset_id: UUID, body: SaveAsset, edge: EdgeDep, user: User) -> LibraryItem:
    """Copy an asset to your library. It stays in the workspace too; saving it again gives the same item, and changes
    what the body names."""
    labels = body.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if "title" in labels:
        labels["custom_title"] = labels.pop("title")
    with problems():
        saved = await library_of(edge).save(user.user_id, asset_id, labels)
    item = await LibraryRows(edge.pool).item(saved.item_id)
    if item is None:
        raise Problem(404, "asset_not_found", "Asset not found", field="asset_id")
    return item_view(item, edge.signer, edge.settings.signed_url_seconds)


@router.get("/{asset_id}/url", operation_id="signAsset")
async def sign_asset(
    asset_id: UUID, edge: EdgeDep, user: User, seconds: UrlSeconds = None, thumbnail: Thumbnail = False
) -> SignedUrl:
    """A URL by which anybody may read the file for a while."""
    return signed(edge, WORKSPACE_BUCKET, await _owned(edge, user, asset_id), seconds, thumbnail)


async def _owned(edge: Edge, user: Principal, asset_id: UUID) -> AssetRow:
    """An asset of the caller's own. 404 for anybody else's: that it exists is not theirs to know."""
    async with as_user(edge.pool, user.user_id) as connection:
        row = await LibraryRows(edge.pool).asset(asset_id, connection)
    if row is None or (row.user_id != user.user_id and not user.is_admin()):
        raise Problem(404, "asset_not_found", "Asset not found", field="asset_id")
    return row
