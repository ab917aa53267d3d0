"""Uploads of references: looked at, written anew from their pixels, and stored.

Nothing of what was sent is stored but its pixels and its colour profile: no EXIF, so no place where a photo was taken,
and no bytes that a picture's format would let pass. PNG and WebP keep every pixel; JPEG is written anew at quality 95.
"""

import asyncio
import contextlib
import hashlib
import io
from dataclasses import dataclass
from uuid import UUID, uuid4

import structlog

from db.access import Principal
from db.blobs import BlobNotFound, StorageUnavailable
from db.limits import LimitReached
from db.uploads import MOST_UPLOADS, UPLOAD_BUCKET, TooManyUploads, Upload, Uploads
from deployments.expiry import UPLOADED
from models.engine import InvalidInput
from models.media import open_reference
from serve_app.api.problems import Problem
from serve_app.edge import Edge

log = structlog.get_logger()

JPEG_QUALITY = 95
ENDINGS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
# decoding a large picture takes a second and hundreds of megabytes: off the event loop, and few at a time
_decoding = asyncio.Semaphore(2)


@dataclass(frozen=True)
class Cleaned:
    """A picture as it is stored."""

    data: bytes
    ending: str
    width: int
    height: int

    @property
    def mime_type(self) -> str:
        """By the ending."""
        return f"image/{self.ending}"


def clean(data: bytes, max_pixels: int, max_bytes: int) -> Cleaned:
    """The same picture upright, from its pixels alone. Blocking. Raises `InvalidInput`."""
    from PIL import Image, ImageOps

    open_reference(data, max_pixels, max_bytes, name="upload")  # all that a job would refuse it for, and no more
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
        kind = "JPEG" if opened.format == "MPO" else opened.format or ""
        picture = ImageOps.exif_transpose(opened)
    profile = picture.info.get("icc_profile")
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    elif picture.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        picture, profile = picture.convert("RGB"), None
    elif "transparency" in picture.info:
        picture = picture.convert("RGBA")
    picture.info = {}
    options = {"PNG": {}, "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0}}.get(
        kind, {"lossless": True, "method": 1}
    )
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, icc_profile=profile, **options)
    if buffer.tell() > max_bytes:
        raise InvalidInput(f"the upload is larger than {max_bytes} bytes when it is written without losses")
    return Cleaned(buffer.getvalue(), ENDINGS[kind], picture.width, picture.height)


async def keep_upload(edge: Edge, user: Principal, data: bytes) -> tuple[Upload, bool]:
    """Store a picture for its sender; the same bytes again are the same upload. The upload, and whether it is new.

    Raises `Problem`, `StorageUnavailable`.
    """
    uploads, settings = Uploads(edge.pool), edge.settings
    digest = hashlib.sha256(data).digest()
    earlier = await uploads.find(user.user_id, digest)
    if earlier is not None and await _is_stored(edge, earlier):
        return earlier, False
    async with _decoding:
        try:
            cleaned = await asyncio.to_thread(clean, data, settings.max_reference_pixels, settings.max_reference_bytes)
        except InvalidInput as error:
            raise Problem(422, error.code, error.message, field="file") from None
    if earlier is not None:  # its file was lost; here it is again
        await edge.blobs.put(UPLOAD_BUCKET, earlier.key, cleaned.data, earlier.mime_type)
        return earlier, False
    upload_id = uuid4()
    key = f"{user.user_id}/{UPLOADED}/{upload_id}.{cleaned.ending}"
    await edge.blobs.put(UPLOAD_BUCKET, key, cleaned.data, cleaned.mime_type)
    try:
        made = await uploads.add(
            upload_id,
            user.user_id,
            key=key,
            mime_type=cleaned.mime_type,
            file_size_bytes=len(cleaned.data),
            size=(cleaned.width, cleaned.height),
            sha256=digest,
        )
    except LimitReached:
        await _forget(edge, key)
        raise
    except TooManyUploads:
        await _forget(edge, key)
        message = f"a user may have {MOST_UPLOADS} uploads; delete some"
        raise Problem(409, "too_many_uploads", message, field="file") from None
    if made is not None:
        return made, True
    await _forget(edge, key)
    there = await uploads.find(user.user_id, digest)  # the same bytes, sent twice at once
    if there is None:
        raise Problem(409, "upload_conflict", "the upload was deleted while it was sent again", field="file")
    return there, False


async def delete_upload(edge: Edge, user: Principal, upload_id: UUID) -> bool:
    """Delete an upload with its file. False when the user has none of that id."""
    gone = await Uploads(edge.pool).remove(upload_id, user.user_id)
    if gone is None:
        return False
    await _forget(edge, gone.key)
    return True


async def _is_stored(edge: Edge, upload: Upload) -> bool:
    try:
        return (await edge.blobs.head(UPLOAD_BUCKET, upload.key)).size == upload.file_size_bytes
    except BlobNotFound:
        return False


async def _forget(edge: Edge, key: str) -> None:
    """Delete a file that no row speaks of. Where the store is away, the sweep does it."""
    with contextlib.suppress(StorageUnavailable):
        await edge.blobs.delete(UPLOAD_BUCKET, [key])
