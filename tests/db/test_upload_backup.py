"""Uploads in backups: of the database as it is, and of one from before there were any."""

from pathlib import Path
from typing import Any
from uuid import uuid4

from db.backup import back_up
from db.blobs import BlobStore
from db.uploads import UPLOAD_BUCKET, Uploads


async def test_a_backup_holds_the_files_of_uploads(database: Any, tmp_path: Path) -> None:
    blobs, user = BlobStore.from_url(f"file://{tmp_path}/blobs"), await database.user()
    key = f"{user}/uploads/{uuid4()}.png"
    await blobs.put(UPLOAD_BUCKET, key, b"pixels", "image/png")
    facts: dict[str, Any] = {"mime_type": "image/png", "file_size_bytes": 6, "size": (2, 3), "sha256": b"x" * 32}
    made = await Uploads(database.pool).add(uuid4(), user, key=key, **facts)
    assert made is not None
    manifest = await back_up(database.url, blobs, tmp_path / "b", "0.0.0")
    assert (manifest.files, manifest.missing, manifest.damaged) == (1, 0, 0)
    assert (tmp_path / "b" / "files" / UPLOAD_BUCKET / key).read_bytes() == b"pixels"


async def test_a_database_without_the_table_is_backed_up(database: Any, tmp_path: Path) -> None:
    await database.pool.execute("DROP TABLE reference_uploads")
    manifest = await back_up(database.url, BlobStore.from_url(f"file://{tmp_path}/blobs"), tmp_path / "b", "0.0.0")
    assert manifest.files == 0
