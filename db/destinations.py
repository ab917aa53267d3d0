"""Results that are to be somewhere beside the workspace: in a scene, or as a character's portrait or avatar.

A job says so in its metadata (`destination`, with `scene_id`, `character_id`, `conversation_id`). What it says is taken
down in the transaction that completes it; upkeep then copies the file and lets the row speak of it. Either may be
repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from db.pool import queries

KINDS = ("roleplay_scene", "character_portrait", "character_avatar")


@dataclass(frozen=True)
class Due:
    """A completed job's picture that is not placed yet. `target` is None where there is nothing that the job's user may
    change; `key` is in the bucket `workspace-temp`, and None where the asset is gone."""

    job_id: UUID
    kind: str
    user_id: UUID
    character_id: str | None
    avatar: str | None
    target: UUID | None
    key: str | None
    thumbnail_key: str | None
    asset_type: str | None
    file_size_bytes: int | None


@dataclass(frozen=True)
class Drawn:
    """What a character looks like, as far as its row says."""

    id: UUID
    name: str
    description: str
    appearance_tags: Sequence[str]
    base_prompt: str | None
    image_url: str | None


class Destinations:
    """The rows of `job_destinations`. For `due`, `place` and `refuse` the replicas' role is enough."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("destinations")

    async def due(self, page_size: int = 100) -> list[Due]:
        """What is to be placed, oldest first."""
        return [Due(**dict(row)) async for row in self._sql.due(self._pool, page_size=page_size)]

    async def place(self, job_id: UUID, key: str, thumbnail_key: str | None) -> str | None:
        """Let the target speak of a stored copy: the path that it speaks of now, or None where it is gone."""
        path: str | None = await self._sql.place(self._pool, job_id=job_id, key=key, thumbnail_key=thumbnail_key)
        return path

    async def refuse(self, job_id: UUID, reason: str) -> None:
        """Give up, for a reason that another try can't change."""
        await self._sql.refuse(self._pool, job_id=job_id, reason=reason)

    async def target(self, user_id: UUID, metadata: Mapping[str, Any]) -> UUID | None:
        """The scene or character that a job with this metadata would change, if its user may."""
        target: UUID | None = await self._sql.target(self._pool, user_id=user_id, metadata=dict(metadata))
        return target

    async def characters_to_draw(self, names: Sequence[str] | None, most: int) -> list[Drawn]:
        """The characters of these names; without names, the installation's own ones that have no picture."""
        rows = self._sql.characters_to_draw(self._pool, names=None if names is None else list(names), most=most)
        return [Drawn(**dict(row)) async for row in rows]

    async def avatars_taken(self, paths: Sequence[str]) -> dict[str, UUID]:
        """Whose picture each of these paths is already."""
        return {row["path"]: row["id"] async for row in self._sql.avatars_taken(self._pool, keys=list(paths))}
