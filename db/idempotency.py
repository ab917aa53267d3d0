"""Idempotency keys: repeats of a request with one key make one job. A key stands for the body that came with it."""

import hashlib
import json
from collections.abc import Sequence
from uuid import UUID

import asyncpg

from db.pool import Connection, queries

KEEP_HOURS = 48


class IdempotencyConflict(ValueError):
    """The key was used for another body."""

    code = "idempotency_key_reused"


class IdempotencyInFlight(ValueError):
    """A request with the same key is being accepted right now."""

    code = "idempotency_key_in_flight"


class IdempotencyKey:
    """A user's key with the body that it came with, and how many jobs the request makes."""

    def __init__(self, user_id: UUID, key: str, body: bytes, jobs: int = 1) -> None:
        self._user_id, self._key, self._hash = user_id, key, hashlib.sha256(body).digest()
        # one row for each job; the separator can't be in the header that a key comes from
        self._rows = [key, *(f"{key}\x1f{n}" for n in range(1, jobs))]
        self._sql = queries("idempotency")

    async def find(self, connection: Connection | asyncpg.Pool) -> list[UUID] | None:
        """The jobs that an earlier request with this key made, in their order. Raises `IdempotencyConflict`."""
        rows = self._sql.find(connection, user_id=self._user_id, keys=self._rows)
        found = {row["key"]: row async for row in rows}
        if not found:
            return None
        if len(found) != len(self._rows) or any(row["body_hash"] != self._hash for row in found.values()):
            raise IdempotencyConflict(self._key)
        return [found[key]["job_id"] for key in self._rows]

    async def begin(self, connection: Connection) -> list[UUID] | None:
        """The same, with the key locked until the transaction ends. Raises `IdempotencyInFlight` as well."""
        if not await self._sql.lock(connection, user_id=self._user_id, key=self._key):
            raise IdempotencyInFlight(self._key)
        return await self.find(connection)

    async def store(self, connection: Connection, job_ids: Sequence[UUID], keep_hours: int = KEEP_HOURS) -> None:
        """Remember what the request made."""
        await self._sql.store(
            connection,
            user_id=self._user_id,
            keys=self._rows,
            job_ids=list(job_ids),
            body_hash=self._hash,
            hours=keep_hours,
        )


def canonical_body(value: object) -> bytes:
    """The bytes of a request that its idempotency key stands for: equal JSON gives equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()
