"""An API with two users, their pictures, and bodies of queue-job, for the tests of what it reads."""

import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
from PIL import Image

from db.library import LIBRARY_BUCKET, WORKSPACE_BUCKET
from db.uploads import UPLOAD_BUCKET
from tests.serve_app.conftest import InProcess, in_process

QUEUE = "/functions/v1/queue-job"

STEERED = """
name: steered
description: a laptop that takes every kind of reference
laptop: true
nsfw_allowed: true
models:
  sdxl: {model_name: tiny-sdxl, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
         ip_adapter: {source: tiny, style: style.safetensors, character: character.safetensors},
         controlnet: {source: tiny},
         defaults: {sizes: [[128, 128]], width: 128, height: 128}}
  wan: {model_name: tiny-wan, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
        image_to_video: {source: tiny, end_frame: optional},
        defaults: {sizes: [[96, 160]], width: 96, height: 160, frames: 33}}
"""

PLAIN = """
name: plain
description: a laptop whose models start from an image and take no other reference
laptop: true
models:
  sdxl: {model_name: tiny-sdxl, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
         defaults: {sizes: [[128, 128]], width: 128, height: 128}}
  wan: {model_name: tiny-wan, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
        defaults: {sizes: [[96, 160]], width: 96, height: 160, frames: 33}}
"""


def png(colour: str = "teal", size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Gallery:
    """`path`, `upload_id` and `signed` name one upload of alice's; `foreign` is bob's. `kept` and `made` are files of
    hers in the library and in the workspace that no row speaks of, as another system leaves them."""

    server: InProcess
    alice: httpx2.AsyncClient
    bob: httpx2.AsyncClient
    alice_id: str
    bob_id: str
    path: str
    upload_id: str
    signed: str
    kept: str
    made: str
    foreign: str
    foreign_id: str

    async def queue(self, **body: Any) -> dict[str, Any]:
        """The answer to a body that is accepted."""
        answer = await self.alice.post(QUEUE, json=body)
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        return said

    async def row(self, said: dict[str, Any]) -> dict[str, Any]:
        row = await self.server.pool.fetchrow("SELECT * FROM jobs WHERE id = $1", UUID(said["jobId"]))
        return dict(row)

    async def bytes_of(self, reference: dict[str, Any]) -> bytes:
        return await self.server.blobs.get(reference["bucket"], reference["key"])


def notes(said: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What was adjusted: given and used by field."""
    return {note["field"]: (note["given"], note["used"]) for note in said["adjustments"]}


async def send(client: httpx2.AsyncClient, data: bytes) -> dict[str, Any]:
    answer = await client.post("/v1/uploads", content=data, headers={"Content-Type": "image/png"})
    upload: dict[str, Any] = answer.json()
    return upload


@contextlib.asynccontextmanager
async def gallery(database: Any, folder: Path, state_dir: Path, **changes: Any) -> AsyncIterator[Gallery]:
    """The API of a laptop, unless `changes` say otherwise, with the pictures stored."""
    limits = {"max_reference_bytes": 20_000, "max_reference_pixels": 40_000}
    async with in_process(database, folder, state_dir=state_dir, **limits, **changes) as server:
        alice, bob = await server.user("alice"), await server.user("bob")
        ids = dict(await server.pool.fetch("SELECT username, id::text FROM profiles"))
        upload, foreign = await send(alice, png()), await send(bob, png("red"))
        kept, made = f"{ids['alice']}/j_c.png", f"{ids['alice']}/{UUID(int=7)}/1/0.png"
        await server.blobs.put(LIBRARY_BUCKET, kept, png("navy"), "image/png")
        await server.blobs.put(WORKSPACE_BUCKET, made, png("olive"), "image/png")
        yield Gallery(
            server,
            alice,
            bob,
            ids["alice"],
            ids["bob"],
            upload["storage_path"],
            upload["id"],
            upload["url"],
            f"{LIBRARY_BUCKET}/{kept}",
            f"{WORKSPACE_BUCKET}/{made}",
            f"{UPLOAD_BUCKET}/{foreign['key']}",
            foreign["id"],
        )
