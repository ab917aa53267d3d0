"""API keys, and the secret that a user's callbacks are signed with."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from fastapi import APIRouter

from serve_app.api.auth import Admin, EdgeDep, User
from serve_app.api.problems import Problem
from serve_app.api.views import key_view
from serve_app.api.wire import CallbackSecret, CreateKey, Key, KeyList
from serve_app.edge import Edge

router = APIRouter(prefix="/v1", tags=["access"])


@router.post("/keys", status_code=201, operation_id="createKey")
async def create_key(body: CreateKey, edge: EdgeDep, admin: Admin) -> Key:
    """Make a key for a user, who is made when new. The key itself is in this answer and nowhere else."""
    expires = datetime.now(UTC) + timedelta(days=body.expires_in_days) if body.expires_in_days else None
    user_id = await edge.access.ensure_user(body.username, body.role, admin.user_id)
    made = key_view(await edge.access.create_key(user_id, body.name, expires, admin.user_id))
    return made.model_copy(update={"username": body.username})


@router.get("/keys", operation_id="listKeys")
async def list_keys(edge: EdgeDep, user: User, all: bool = False) -> KeyList:
    """Your keys; with `all`, everybody's, for an admin."""
    if all and not user.is_admin():
        raise Problem(403, "admin_only", "only an admin may see everybody's keys", field="all")
    keys = await edge.access.list_keys(None if all else user.user_id)
    return KeyList(data=[key_view(key) for key in keys])


@router.delete("/keys/{key_id}", operation_id="revokeKey")
async def revoke_key(key_id: UUID, edge: EdgeDep, user: User) -> Key:
    """End a key at once: your own, or as an admin anybody's."""
    own = {key.id for key in await edge.access.list_keys(user.user_id)}
    key = await edge.access.revoke_key(key_id, user.user_id) if key_id in own or user.is_admin() else None
    if key is None:
        raise Problem(404, "key_not_found", "there is no such key")
    return key_view(key)


@router.get("/callbacks/secret", operation_id="getCallbackSecret")
async def callback_secret(edge: EdgeDep, user: User) -> CallbackSecret:
    """The secret that verifies your callbacks, for any Standard Webhooks library."""
    return await _secret(edge, user.user_id)


@router.post("/callbacks/secret/rotate", operation_id="rotateCallbackSecret")
async def rotate_callback_secret(edge: EdgeDep, user: User) -> CallbackSecret:
    """Make a new secret. Callbacks carry the old signature beside the new one for 24 hours."""
    await edge.access.rotate_callback_secret(user.user_id)
    return await _secret(edge, user.user_id)


async def _secret(edge: Edge, user_id: UUID) -> CallbackSecret:
    version, rotating = await edge.access.callback_secret(user_id)
    return CallbackSecret(
        secret=edge.callback_secrets.secret(user_id, version),
        version=version,
        previous=edge.callback_secrets.secret(user_id, version - 1) if rotating else None,
    )
