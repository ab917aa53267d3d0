"""What the routes of the workspace and the library share: errors as problems, pages, and rows as clients see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Query

from db.blobs import UrlSigner
from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET, Kept, LibraryRows, Position
from db.library import LibraryItem as ItemRow
from db.library import WorkspaceAsset as AssetRow
from db.uploads import UPLOAD_BUCKET
from db.uploads import Upload as UploadRow
from deployments.library import (
    AssetFileMissing,
    AssetNotFound,
    CollectionNotFound,
    ItemNotFound,
    LabelRefused,
    Library,
    NotPublishable,
)
from serve_app.api.problems import Problem
from serve_app.api.wire_assets import LibraryItem, SignedUrl, Upload, WorkspaceAsset
from serve_app.edge import Edge

LONGEST_URL_SECONDS = 7 * 86400

Before = Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")]
PageSize = Annotated[int, Query(ge=1, le=200)]
UrlSeconds = Annotated[
    int | None, Query(ge=60, le=LONGEST_URL_SECONDS, description="How long it works; else as every URL of a file.")
]
Thumbnail = Annotated[bool, Query(description="The thumbnail's URL instead.")]


def library_of(edge: Edge) -> Library:
    """What users do with their results."""
    return Library(LibraryRows(edge.pool), edge.blobs)


@contextmanager
def problems(
    asset: str = "asset_id", item: str = "item_id", collection: str = "collection_id", title: str = "title"
) -> Iterator[None]:
    """Answer what can't be done as a problem that names the field which the caller gave."""
    try:
        yield
    except AssetNotFound:
        raise Problem(404, "asset_not_found", "Asset not found", field=asset) from None
    except ItemNotFound:
        raise Problem(404, "library_item_not_found", "Library asset not found", field=item) from None
    except CollectionNotFound:
        raise Problem(404, "collection_not_found", "there is no such collection", field=collection) from None
    except AssetFileMissing:
        message = "the file is gone from the store, or is not the one that was stored"
        raise Problem(410, "asset_file_missing", message, field=asset) from None
    except LabelRefused as error:
        field = title if error.label == "custom_title" else error.label
        raise Problem(422, error.code, str(error), field=field) from None
    except NotPublishable:
        raise Problem(409, "not_publishable", "moderation has rejected it", field="visibility") from None


def position(before: str | None, field: str = "before") -> Position | None:
    """Where a page begins. 422 for what no page gave."""
    try:
        return None if before is None else Position.parse(before)
    except ValueError:
        raise Problem(422, "choice", "must be the `next` of a page", field=field) from None


def asset_view(row: AssetRow, signer: UrlSigner, seconds: int) -> WorkspaceAsset:
    """An asset of the workspace."""
    return WorkspaceAsset(
        **_result(row, WORKSPACE_BUCKET, signer, seconds),
        job_id=row.job_id,
        index=row.asset_index,
        frames=row.frames,
        fps=None if row.fps is None else float(row.fps),
        expires_at=row.expires_at,
        library_id=row.source_library_id,
    )


def item_view(row: ItemRow, signer: UrlSigner, seconds: int) -> LibraryItem:
    """An item of the library."""
    return LibraryItem(
        **_result(row, LIBRARY_BUCKET, signer, seconds),
        asset_id=row.source_asset_id,
        job_id=row.source_job_id,
        title=row.custom_title,
        tags=list(row.tags),
        is_favorite=row.is_favorite,
        collection_id=row.collection_id,
        visibility=row.visibility,  # type: ignore[arg-type]  # the column's CHECK has the same values
        updated_at=row.updated_at,
    )


def _result(row: Kept, bucket: str, signer: UrlSigner, seconds: int) -> dict[str, Any]:
    thumbnail = row.thumbnail_key
    return {
        "id": row.id,
        "type": row.asset_type,
        "url": signer.sign(bucket, row.key, seconds) if row.fault is None else None,
        "thumbnail_url": signer.sign(bucket, thumbnail, seconds) if thumbnail else None,
        "bucket": bucket,
        "key": row.key,
        "thumbnail_key": thumbnail,
        "mime_type": row.mime_type,
        "file_size_bytes": row.file_size_bytes,
        "width": row.width,
        "height": row.height,
        "duration_seconds": None if row.duration_seconds is None else float(row.duration_seconds),
        "seed": row.generation_seed,
        "model": row.model_used,
        "prompt": row.original_prompt,
        "created_at": row.created_at,
        "fault": row.fault,
        "moderation_status": row.moderation_status,
        "moderation_reason": row.moderation_reason,
    }


def upload_view(row: UploadRow, signer: UrlSigner, seconds: int) -> Upload:
    """An upload."""
    return Upload(
        id=row.id,
        bucket=UPLOAD_BUCKET,
        key=row.key,
        storage_path=f"{UPLOAD_BUCKET}/{row.key}",
        url=signer.sign(UPLOAD_BUCKET, row.key, seconds) if row.fault is None else None,
        mime_type=row.mime_type,
        file_size_bytes=row.file_size_bytes,
        width=row.width,
        height=row.height,
        fault=row.fault,  # type: ignore[arg-type]  # the column's CHECK has the same values
        created_at=row.created_at,
    )


def signed(edge: Edge, bucket: str, row: Kept, seconds: int | None, thumbnail: bool) -> SignedUrl:
    """A URL of a row's file. 404 where it has no thumbnail, 410 where its file is known to be gone."""
    key = row.thumbnail_key if thumbnail else row.key
    if key is None:
        raise Problem(404, "no_thumbnail", "it has no thumbnail", field="thumbnail")
    if row.fault is not None and not thumbnail:
        raise Problem(410, "asset_file_missing", "the file is gone from the store, or is not the one that was stored")
    lasts = seconds or edge.settings.signed_url_seconds
    now = int(datetime.now(UTC).timestamp())
    url = edge.signer.sign(bucket, key, lasts, now)
    return SignedUrl(url=url, expires_at=datetime.fromtimestamp(now, UTC) + timedelta(seconds=lasts))
