"""Jobs that come from another system's queue, each with the id that it had there, each once.

An import is begun, then its job is accepted, then it is ended. Whoever dies in between leaves it begun, and the next
import of the same message sees by the job itself whether it was accepted.
"""

import hashlib
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from db.pool import queries


@dataclass(frozen=True)
class Import:
    """What was noted of a job. `same` says that it was this very message; `taken`, that the import was ended."""

    same: bool
    taken: bool


class Imports:
    """The notes, over a pool that acts as the owner."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("imports")

    async def find(self, job_id: UUID, message: bytes) -> Import | None:
        """What is known of a job and this message; None when it was never imported."""
        row = await self._sql.find_import(self._pool, job_id=job_id)
        return None if row is None else Import(row["body_hash"] == _digest(message), row["taken"])

    async def begin(self, job_id: UUID, message: bytes) -> bool:
        """Note that the job is about to be accepted. False when another message has begun under its id."""
        return bool(await self._sql.begin_import(self._pool, job_id=job_id, body_hash=_digest(message)))

    async def end(self, job_id: UUID, message: bytes) -> None:
        """The job is accepted. From here on the message is never taken in again, whatever becomes of the job."""
        await self._sql.end_import(self._pool, job_id=job_id, body_hash=_digest(message))

    async def drop(self, job_id: UUID) -> None:
        """The job was refused: forget that it was begun."""
        await self._sql.drop_import(self._pool, job_id=job_id)


def _digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()
