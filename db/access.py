"""Users and API keys. A key is random, shown once, and kept only as its SHA-256."""

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import queries

KEY_PREFIX = "ovz_"
ROLES = ("admin", "moderator", "premium_user", "basic_user", "guest")


@dataclass(frozen=True)
class Principal:
    """Who is asking: a user and the roles that the user has. `key_id` is the API key that was shown; `expires_at` the
    end of a token, where it was one."""

    user_id: UUID
    username: str | None
    roles: frozenset[str]
    age_verified: bool
    key_id: UUID | None = None
    expires_at: datetime | None = None

    def is_admin(self) -> bool:
        """May read and do everything."""
        return "admin" in self.roles


@dataclass(frozen=True)
class ApiKey:
    """A key as it may be shown: never the key itself, except in `secret` right after it was made."""

    id: UUID
    user_id: UUID
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    username: str | None = None
    secret: str | None = field(default=None, repr=False)

    @classmethod
    def from_row(cls, row: asyncpg.Record, secret: str | None = None) -> Self:
        """A key from a row of `api_keys`, with the owner's name where the statement joined it."""
        values: dict[str, Any] = dict(row)
        return cls(**values, secret=secret)


class Access:
    """Users and keys in Postgres. Needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("access")

    async def authenticate(self, key: str) -> Principal | None:
        """The holder of a key, or None when it is unknown, revoked or expired."""
        if not key.startswith(KEY_PREFIX) or len(key) > 200 or not key.isascii():
            return None
        row = await self._sql.find_key(self._pool, key_hash=_digest(key))
        if row is None:
            return None
        if row["stale"]:
            await self._sql.note_use(self._pool, key_id=row["key_id"])
        return Principal(row["user_id"], row["username"], frozenset(row["roles"]), row["age_verified"], row["key_id"])

    async def keys_that_hold(self, key_ids: set[UUID]) -> set[UUID]:
        """Of these keys, which were authenticated before, those that are still neither revoked nor expired."""
        return {row["id"] async for row in self._sql.keys_that_hold(self._pool, key_ids=list(key_ids))}

    async def principal(self, user_id: UUID) -> Principal | None:
        """A user as whoever acts in the user's name sees it; None when there is none."""
        row = await self._sql.find_user(self._pool, user_id=user_id)
        return (
            None if row is None else Principal(user_id, row["username"], frozenset(row["roles"]), row["age_verified"])
        )

    async def token_holder(self, user_id: UUID, issued_at: datetime, expires_at: datetime) -> Principal | None:
        """The user whom a token names, made with the role basic_user when new. Roles are ours, never the token's.

        None for a user who is being erased, or was erased since the token was issued.
        """
        row = await self._sql.find_token_holder(self._pool, user_id=user_id)
        if row is None:
            await self._sql.admit_user(self._pool, user_id=user_id, issued_at=issued_at)
            row = await self._sql.find_token_holder(self._pool, user_id=user_id)
        if row is None:
            return None
        return Principal(user_id, row["username"], frozenset(row["roles"]), row["age_verified"], expires_at=expires_at)

    async def adopt_user(self, user_id: UUID, role: str = "basic_user") -> bool:
        """Make a user under an id from elsewhere, without a name. False when there was one."""
        async with self._pool.acquire() as connection, connection.transaction():
            if await self._sql.adopt_user(connection, user_id=user_id) is None:
                return False
            await self._sql.ensure_role(connection, user_id=user_id, role=role, actor=None)
        return True

    async def abandon_user(self, user_id: UUID) -> None:
        """Take back `adopt_user`, unless the user has come to own something since."""
        await self._sql.abandon_user(self._pool, user_id=user_id)

    async def ensure_user(self, username: str, role: str = "basic_user", actor: UUID | None = None) -> UUID:
        """The user of that name with that role, made where new. Durable on return. `actor` is whose act it is."""
        if role not in ROLES:
            raise ValueError(f"no such role: {role}")
        async with self._pool.acquire() as connection, connection.transaction():
            user_id: UUID = await self._sql.ensure_user(connection, username=username)
            await self._sql.ensure_role(connection, user_id=user_id, role=role, actor=actor)
        return user_id

    async def create_key(
        self, user_id: UUID, name: str, expires_at: datetime | None = None, actor: UUID | None = None
    ) -> ApiKey:
        """A new key of 256 random bits. `secret` is in this answer and nowhere else."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = await self._sql.create_key(
            self._pool,
            user_id=user_id,
            name=name,
            prefix=secret[: len(KEY_PREFIX) + 6],
            key_hash=_digest(secret),
            expires_at=expires_at,
            actor=actor,
        )
        return ApiKey.from_row(row, secret)

    async def list_keys(self, user_id: UUID | None = None) -> list[ApiKey]:
        """The keys of a user, or of all users."""
        return [ApiKey.from_row(row) async for row in self._sql.list_keys(self._pool, user_id=user_id)]

    async def revoke_key(self, key_id: UUID, actor: UUID | None = None) -> ApiKey | None:
        """End a key at once. Repeating it changes nothing; None when there is no such key."""
        row = await self._sql.revoke_key(self._pool, key_id=key_id, actor=actor)
        return None if row is None else ApiKey.from_row(row)

    async def note_request(
        self, user_id: UUID, operation: str, resource: tuple[str, str | None], metadata: dict[str, str]
    ) -> None:
        """Write into the audit log what an admin asks for. `resource` is its collection and its id."""
        await self._sql.note_request(
            self._pool,
            user_id=user_id,
            operation=operation,
            resource_type=resource[0],
            resource_id=resource[1],
            metadata=metadata,
        )

    async def has_admin(self) -> bool:
        """Whether anybody can administer this system yet."""
        return bool(await self._sql.count_admins(self._pool))

    async def callback_secret(self, user_id: UUID) -> tuple[int, bool]:
        """The version of a user's callback secret, and whether the one before still signs beside it."""
        row = await self._sql.callback_secret(self._pool, user_id=user_id)
        return row["version"], bool(row["rotating"])

    async def rotate_callback_secret(self, user_id: UUID) -> None:
        """Move a user on to the next version of the callback secret."""
        await self._sql.rotate_callback_secret(self._pool, user_id=user_id)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
