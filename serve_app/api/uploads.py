"""/v1/uploads: pictures to be used as references."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from db.pool import as_user
from db.uploads import Uploads
from serve_app.api.auth import EdgeDep, User
from serve_app.api.kept import upload_view
from serve_app.api.problems import Problem
from serve_app.api.wire_assets import Upload, UploadList
from serve_app.uploads import delete_upload, keep_upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

TYPES = ("image/png", "image/jpeg", "image/webp", "multipart/form-data")
FIELD = "file"

_FILE: dict[str, Any] = {"type": "string", "format": "binary"}
_FORM = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: _FILE}}}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {kind: _FORM if kind.startswith("multipart") else {"schema": _FILE} for kind in TYPES},
    }
}


@router.post(
    "",
    status_code=201,
    operation_id="createUpload",
    openapi_extra=_BODY,
    responses={200: {"model": Upload, "description": "You have sent the same bytes before: this is that upload."}},
)
async def create_upload(request: Request, response: Response, edge: EdgeDep, user: User) -> Upload:
    """Store a PNG, JPEG or WebP, as the body or as the field `file` of a form. What it is shows when it is decoded; its
    name and its metadata are not stored."""
    upload, new = await keep_upload(edge, user, await _picture(request, edge.settings.max_reference_bytes))
    if not new:
        response.status_code = 200
    return upload_view(upload, edge.signer, edge.settings.signed_url_seconds)


@router.get("", operation_id="listUploads")
async def list_uploads(edge: EdgeDep, user: User) -> UploadList:
    """Your uploads, newest first."""
    async with as_user(edge.pool, user.user_id) as connection:
        rows = await Uploads(edge.pool).list(connection, user.user_id)
    seconds = edge.settings.signed_url_seconds
    return UploadList(data=[upload_view(row, edge.signer, seconds) for row in rows])


@router.get("/{upload_id}", operation_id="getUpload")
async def get_upload(upload_id: UUID, edge: EdgeDep, user: User) -> Upload:
    """One of your uploads."""
    async with as_user(edge.pool, user.user_id) as connection:
        row = await Uploads(edge.pool).read(connection, upload_id)
    if row is None or (row.user_id != user.user_id and not user.is_admin()):
        raise Problem(404, "upload_not_found", "there is no such upload", field="upload_id")
    return upload_view(row, edge.signer, edge.settings.signed_url_seconds)


@router.delete("/{upload_id}", status_code=204, operation_id="deleteUpload")
async def remove_upload(upload_id: UUID, edge: EdgeDep, user: User) -> Response:
    """Delete an upload with its file."""
    if not await delete_upload(edge, user, upload_id):
        raise Problem(404, "upload_not_found", "there is no such upload", field="upload_id")
    return Response(status_code=204)


async def _picture(request: Request, max_bytes: int) -> bytes:
    """The picture of a request; the limit of all of it is kept as it streams in."""
    kind = request.headers.get("content-type", "").lower().partition(";")[0].strip()
    if kind not in TYPES:
        raise Problem(415, "unsupported_media_type", f"send one of {', '.join(TYPES)}", field="Content-Type")
    data = await request.body()  # of a form too: what is cut off by the limit has opened no file then
    if kind == "multipart/form-data":
        data = await _of_form(request)
    if not data:
        raise Problem(422, "missing", "the picture is empty", field=FIELD)
    if len(data) > max_bytes:
        raise Problem(413, "body_too_large", f"the body may have at most {max_bytes} bytes", field=FIELD)
    return data


async def _of_form(request: Request) -> bytes:
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get(FIELD)
            if not isinstance(file, UploadFile):
                raise Problem(422, "missing", "the form must have the picture as a file", field=FIELD)
            return await file.read()
    except HTTPException:
        raise Problem(422, "invalid_form", "the form must have one file, and nothing else", field="body") from None
