"""/functions/v1/workspace-actions and delete-workspace-item: the workspace and the library as older clients call them.

Every action may be repeated: what is saved is found again by the asset that it came from, and what is gone is gone.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import TypeAdapter, ValidationError

from db.access import Principal
from deployments.library import Cleared, Library
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import TEXT, dialect, json_object, one_of
from serve_app.api.kept import library_of, problems
from serve_app.api.problems import Problem
from serve_app.api.wire_assets import ItemDeleted, Tags, Title, WorkspaceAnswer

router = APIRouter(prefix="/functions/v1", tags=["functions"])

_SAVING = {"assetId", "customTitle", "collectionId", "tags"}
FIELDS: Mapping[str, set[str]] = {
    "save_to_library": _SAVING,
    "clear_asset": _SAVING,
    "discard_asset": {"assetId"},
    "clear_job": {"jobId"},
    "clear_workspace": set(),
    "copy_to_workspace": {"libraryAssetId"},
}
_TITLE: TypeAdapter[str] = TypeAdapter(Title)
_TAGS: TypeAdapter[list[str]] = TypeAdapter(Tags)

_ID = TEXT | {"format": "uuid"}
_KEEPING = {"customTitle": TEXT, "collectionId": _ID, "tags": {"type": "array", "items": TEXT}}
_ACTIONS = one_of(
    *(
        dialect(
            action,
            ("action", *sorted(fields - set(_KEEPING))),
            action={"type": "string", "const": action},
            **{name: _KEEPING.get(name, _ID) for name in sorted(fields)},
        )
        for action, fields in FIELDS.items()
    )
)


@router.post(
    "/workspace-actions",
    operation_id="workspaceActions",
    response_model_exclude_none=True,
    openapi_extra=_ACTIONS,
    responses={410: {"description": "The asset's row is there, and its file is not."}},
)
async def workspace_actions(request: Request, edge: EdgeDep, user: User) -> WorkspaceAnswer:
    """Save to the library, discard, or copy back: one asset, the assets of a job, or the whole workspace."""
    body = await json_object(request)
    action = body.get("action")
    if not isinstance(action, str) or action not in FIELDS:
        raise Problem(400, "choice", "Invalid action", field="action")
    for name in body.keys() - FIELDS[action] - {"action"}:
        field = name if name.isprintable() and len(name) <= 100 else "body"
        raise Problem(400, "unknown", f"{action} has no such field", field=field)
    library = library_of(edge)
    with problems("assetId", "libraryAssetId", "collectionId", "customTitle"):
        match action:
            case "save_to_library":
                saved = await library.save(user.user_id, _uuid(body, "assetId"), _labels(body))
                return WorkspaceAnswer(libraryAssetId=saved.item_id, message="Asset saved to library")
            case "clear_asset":
                saved = await library.clear(user.user_id, _uuid(body, "assetId"), _labels(body))
                message = "Asset saved to library and removed from workspace"
                return WorkspaceAnswer(libraryAssetId=saved.item_id, message=message)
            case "discard_asset":
                gone = await library.discard(user.user_id, _uuid(body, "assetId"))
                return WorkspaceAnswer(message="Asset discarded" if gone else "Asset was gone already")
            case "copy_to_workspace":
                copied = await library.copy_back(user.user_id, _uuid(body, "libraryAssetId"))
                return WorkspaceAnswer(workspaceAssetId=copied.item_id, message="Asset copied to workspace")
            case "clear_job":
                return await _clear_job(edge, library, user, _uuid(body, "jobId"))
            case _:
                return _cleared(await library.clear_all(user.user_id))


@router.post(
    "/delete-workspace-item",
    operation_id="deleteWorkspaceItem",
    openapi_extra=one_of(dialect("delete-workspace-item", ("item_id",), item_id=_ID, user_id=_ID)),
)
async def delete_workspace_item(request: Request, edge: EdgeDep, user: User) -> ItemDeleted:
    """Discard an asset of your workspace; 200 too when it is gone already. `user_id` may be left out, and is yours."""
    body = await json_object(request)
    for name in body.keys() - {"item_id", "user_id"}:
        field = name if name.isprintable() and len(name) <= 100 else "body"
        raise Problem(400, "unknown", "there is no such field", field=field)
    item_id = _uuid(body, "item_id")
    if body.get("user_id") is not None and _uuid(body, "user_id") != user.user_id:
        raise Problem(403, "CROSS_USER_ITEM", "an item of somebody else's can't be deleted", field="user_id")
    await library_of(edge).discard(user.user_id, item_id)
    return ItemDeleted(deleted_item_id=item_id, timestamp=datetime.now(UTC))


async def _clear_job(edge: Any, library: Library, user: Principal, job_id: UUID) -> WorkspaceAnswer:
    done = await library.clear_all(user.user_id, job_id)
    if not done.processed and not done.errors and not await library.was_cleared(user.user_id, job_id):
        raise Problem(404, "no_assets", "No assets found for job", field="jobId")
    return _cleared(done)


def _cleared(done: Cleared) -> WorkspaceAnswer:
    return WorkspaceAnswer(
        assetsProcessed=done.processed,
        newSaves=done.new_saves,
        errors=[{"assetId": str(asset_id), "error": code} for asset_id, code in done.errors] or None,
        message=f"{done.processed} assets cleared"
        + (f", {len(done.errors)} left where they are" if done.errors else ""),
    )


def _uuid(body: Mapping[str, Any], name: str) -> UUID:
    value = body.get(name)
    if value is None:
        raise Problem(400, "missing", "is required", field=name)
    try:
        if not isinstance(value, str):
            raise ValueError("no text")
        return UUID(value)
    except ValueError:
        raise Problem(400, "type", "must be a UUID", field=name) from None


def _labels(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller says of an item. Null is as good as nothing: those clients send both."""
    labels: dict[str, Any] = {}
    adapters = (("customTitle", "custom_title", _TITLE), ("tags", "tags", _TAGS))
    for name, column, adapter in adapters:
        if body.get(name) is not None:
            try:
                labels[column] = adapter.validate_python(body[name], strict=True)
            except ValidationError as error:
                raise Problem(400, "type", error.errors()[0]["msg"], field=name) from None
    if body.get("collectionId") is not None:
        labels["collection_id"] = str(_uuid(body, "collectionId"))
    return labels
