"""Files by signed URL, and the secret that callbacks are signed with."""

import re
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from db.blobs import InvalidBlobName
from serve_app.api.auth import EdgeDep
from serve_app.api.problems import Problem

router = APIRouter(prefix="/v1/files", tags=["files"])

_BYTES = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*")


@router.get("/{bucket}/{key:path}", operation_id="getFile", response_class=StreamingResponse)
@router.head("/{bucket}/{key:path}", include_in_schema=False)
async def get_file(
    bucket: str,
    key: str,
    request: Request,
    edge: EdgeDep,
    expires: Annotated[int, Query(description="Unix time until which the URL works.")],
    signature: Annotated[str, Query(max_length=200)],
) -> Response:
    """A file, to whoever holds its signed URL. 403 for a wrong signature, 410 for one that has expired."""
    if not edge.signer.verify(bucket, key, expires, signature, now=0):
        raise Problem(403, "invalid_signature", "the signature does not belong to this URL")
    if not edge.signer.verify(bucket, key, expires, signature):
        raise Problem(410, "url_expired", "the URL has expired; read the job again for a new one")
    try:
        info = await edge.blobs.head(bucket, key)
    except InvalidBlobName:
        raise Problem(404, "not_found", "there is no such file") from None
    headers = {
        "Content-Length": str(info.size),
        # no longer than the URL: what was withdrawn must not stay in caches
        "Cache-Control": f"private, max-age={max(0, min(3600, expires - int(time.time())))}, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f'inline; filename="{key.rpartition("/")[2]}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Accept-Ranges": "bytes",
    }
    start, end, status = 0, None, 200
    wanted = _range(request.headers.get("range"), info.size)
    if wanted is not None:
        start, end = wanted
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{info.size}"
        headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=info.content_type)
    body = edge.blobs.stream(bucket, key, start, end)
    return StreamingResponse(body, status_code=status, headers=headers, media_type=info.content_type)


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """One byte range as (start, end), end exclusive; None for none, or one of a form that may be ignored (RFC 9110)."""
    match = _BYTES.fullmatch(header or "")
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    elif last and int(last) < int(first):
        return None
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
    if start >= end:
        raise Problem(
            416, "range_not_satisfiable", "the file has no such bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end
