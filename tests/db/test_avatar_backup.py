"""Avatars in backups: of the database as it is, and of one from before there were any."""

from pathlib import Path
from typing import Any

from db.backup import back_up
from db.blobs import BlobStore


async def test_a_backup_holds_the_avatars_of_characters(database: Any, tmp_path: Path) -> None:
    blobs = BlobStore.from_url(f"file://{tmp_path}/blobs")
    await blobs.put("avatars", "characters/ada.png", b"pixels", "image/png")
    await database.pool.execute(
        """INSERT INTO characters (name, description, image_url)
           VALUES ('Ada', 'd', 'avatars/characters/ada.png'), ('Bob', 'd', 'https://elsewhere.example/bob.png')"""
    )
    manifest = await back_up(database.url, blobs, tmp_path / "b", "0.0.0")
    assert (manifest.files, manifest.missing, manifest.damaged) == (1, 0, 0)
    assert (tmp_path / "b" / "files" / "avatars" / "characters" / "ada.png").read_bytes() == b"pixels"
    await database.pool.execute("DROP TABLE job_destinations")
    older = await back_up(database.url, blobs, tmp_path / "older", "0.0.0")
    assert older.files == 0
