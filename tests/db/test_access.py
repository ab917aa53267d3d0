"""Users and API keys: random, shown once, kept as a hash only, ended at once."""

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.access import KEY_PREFIX, ROLES, Access, ApiKey
from db.erasures import Erasures
from db.migrate import migrate
from tests.db.test_limits import before_audit


@pytest.fixture
def access(database: Any) -> Access:
    return Access(database.pool)


async def made(access: Access, name: str = "alice", expires_at: datetime | None = None) -> ApiKey:
    return await access.create_key(await access.ensure_user(name), "laptop", expires_at)


def secret(key: ApiKey) -> str:
    assert key.secret is not None
    return key.secret


async def test_keys_are_random_and_long(access: Access) -> None:
    secrets = {secret(await made(access)) for _ in range(20)}
    assert len(secrets) == 20
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in secrets)  # 256 bits
    assert len({key[4:10] for key in secrets}) == 20


async def test_a_key_is_kept_as_its_hash_only(access: Access, database: Any) -> None:
    key = await made(access)
    row = await database.pool.fetchrow("SELECT * FROM api_keys")
    assert row["key_hash"] == hashlib.sha256(secret(key).encode()).digest()
    everything = " ".join(str(value) for value in row.values())
    assert secret(key) not in everything
    assert secret(key)[12:] not in everything
    assert row["prefix"] == secret(key)[: len(row["prefix"])]
    assert len(row["prefix"]) <= 10


async def test_a_key_is_not_shown_in_what_is_logged(access: Access) -> None:
    key = await made(access)
    assert secret(key) not in repr(key)
    assert [listed.secret for listed in await access.list_keys()] == [None]


async def test_a_key_tells_who_holds_it(access: Access) -> None:
    user = await access.ensure_user("alice", "premium_user")
    await access.ensure_user("alice", "moderator")
    key = await access.create_key(user, "laptop")
    principal = await access.authenticate(secret(key))
    assert principal is not None
    assert (principal.user_id, principal.username, principal.key_id) == (user, "alice", key.id)
    assert principal.roles == {"premium_user", "moderator"}
    assert not principal.age_verified
    assert not principal.is_admin()


@pytest.mark.parametrize(
    "wrong",
    ["", "ovz_", "x", "ovz_" + "A" * 43, "Bearer ovz_", "ovz_\0", "ovz_\ud800", "ovz_" + "é" * 60, "ovz_" * 900],
)
async def test_a_key_that_was_never_made_is_nobodys(access: Access, wrong: str) -> None:
    await made(access)
    assert await access.authenticate(wrong) is None


async def test_a_key_with_one_other_letter_is_nobodys(access: Access) -> None:
    key = secret(await made(access))
    for changed in (
        key[:-1],
        key + "A",
        key.swapcase(),
        key[4:],
        " " + key,
        key[:-1] + ("A" if key[-1] != "A" else "B"),
    ):
        assert await access.authenticate(changed) is None


async def test_a_revoked_key_ends_at_once_and_alone(access: Access) -> None:
    first, second = await made(access), await made(access)
    revoked = await access.revoke_key(first.id)
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert await access.authenticate(secret(first)) is None
    assert await access.authenticate(secret(second)) is not None


async def test_revoking_twice_changes_nothing(access: Access) -> None:
    key = await made(access)
    once, twice = [await access.revoke_key(key.id) for _ in range(2)]
    assert once == twice
    assert await access.revoke_key(uuid4()) is None


@pytest.mark.parametrize(("seconds", "valid"), [(60, True), (0, False), (-60, False)])
async def test_a_key_ends_when_it_expires(access: Access, seconds: int, valid: bool) -> None:
    key = await made(access, expires_at=datetime.now(UTC) + timedelta(seconds=seconds))
    assert (await access.authenticate(secret(key)) is not None) is valid


async def test_a_use_is_noted_once_a_minute(access: Access, database: Any) -> None:
    key = secret(await made(access))
    assert await database.pool.fetchval("SELECT last_used_at FROM api_keys") is None
    await access.authenticate(key)
    noted = await database.pool.fetchval("SELECT last_used_at FROM api_keys")
    await access.authenticate(key)
    assert await database.pool.fetchval("SELECT last_used_at FROM api_keys") == noted
    await database.pool.execute("UPDATE api_keys SET last_used_at = now() - interval '2 minutes'")
    await access.authenticate(key)
    assert await database.pool.fetchval("SELECT last_used_at > now() - interval '1 minute' FROM api_keys")


@pytest.mark.parametrize("role", ROLES)
async def test_a_user_is_made_once(access: Access, database: Any, role: str) -> None:
    ids = await asyncio.gather(*(access.ensure_user("alice", role) for _ in range(5)))
    assert len(set(ids)) == 1
    assert [tuple(row) for row in await database.pool.fetch("SELECT user_id, role::text FROM user_roles")] == [
        (ids[0], role)
    ]


async def test_a_role_that_is_none_is_refused(access: Access, database: Any) -> None:
    with pytest.raises(ValueError, match="owner"):
        await access.ensure_user("alice", "owner")
    assert await database.pool.fetchval("SELECT count(*) FROM profiles") == 0


async def test_there_is_an_admin_once_there_is_one(access: Access) -> None:
    await access.ensure_user("alice", "moderator")
    assert not await access.has_admin()
    await access.ensure_user("root", "admin")
    assert await access.has_admin()


async def test_keys_are_listed_by_user(access: Access) -> None:
    alices, bobs = await made(access), await made(access, "bob")
    assert [key.id for key in await access.list_keys(alices.user_id)] == [alices.id]
    assert {(key.id, key.username) for key in await access.list_keys()} == {(alices.id, "alice"), (bobs.id, "bob")}


async def test_a_key_needs_a_user(access: Access) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await access.create_key(UUID(int=1), "laptop")


async def test_a_callback_secret_rotates_for_one_user(access: Access, database: Any) -> None:
    alice, bob = await access.ensure_user("alice"), await access.ensure_user("bob")
    assert await access.callback_secret(alice) == (1, False)
    await access.rotate_callback_secret(alice)
    assert await access.callback_secret(alice) == (2, True)
    assert await access.callback_secret(bob) == (1, False)
    await database.pool.execute("UPDATE profiles SET callback_secret_rotated_at = now() - interval '25 hours'")
    assert await access.callback_secret(alice) == (2, False)


# ----------------------------------------------------------------------------------------------------- tokens

FORGE = "SELECT log_user_activity($1, 'user.erased', 'user', $2, '{\"asked_by\": \"admin\", \"open_jobs\": 0}')"


@pytest.mark.parametrize("role", ["basic_user", "admin"])
async def test_nobodys_word_in_the_log_locks_anybody_out(access: Access, database: Any, role: str) -> None:
    forger, victim = await database.user("mallory", role), uuid4()
    now = datetime.now(UTC)
    async with database.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", json.dumps({"sub": str(forger)}))
        await connection.execute("SET LOCAL ROLE authenticated")
        await connection.fetchval(FORGE, forger, str(victim))
    assert await database.pool.fetchval("SELECT action FROM user_activity_log") == "client.user.erased"
    holder = await access.token_holder(victim, now - timedelta(seconds=30), now + timedelta(hours=1))
    assert holder is not None
    assert await database.pool.fetchval("SELECT token_balance FROM profiles WHERE id = $1", victim) == 100


async def test_a_token_of_before_an_erasure_opens_nothing(access: Access, database: Any) -> None:
    user, erasures, now = await database.user(), Erasures(database.pool), datetime.now(UTC)
    await erasures.request(user, "user", user)
    while await erasures.delete_some(user):
        pass
    await database.pool.execute("DELETE FROM erasures")
    assert await access.token_holder(user, now, now + timedelta(hours=1)) is None
    later = datetime.now(UTC) + timedelta(seconds=5)
    assert await access.token_holder(user, later, later + timedelta(hours=1)) is not None
    assert await database.pool.fetchval("SELECT token_balance FROM profiles WHERE id = $1", user) == 0


async def test_erasures_that_were_forged_before_are_told_apart(postgres_url: str) -> None:
    async with before_audit(postgres_url) as connection:
        for user, name in ((root := uuid4(), "root"), (mallory := uuid4(), "mallory"), (gone := uuid4(), "gone")):
            await connection.execute("INSERT INTO profiles (id, username) VALUES ($1, $2)", user, name)
        await connection.execute("INSERT INTO user_roles (user_id, role) VALUES ($1, 'admin')", root)
        real = [(root, uuid4(), "admin"), (gone, gone, "user"), (None, uuid4(), "operator"), (None, uuid4(), "auth")]
        forged = [(mallory, uuid4(), "admin"), (mallory, uuid4(), "user"), (None, uuid4(), None)]
        for actor, victim, asked_by in real + forged:
            await connection.execute(
                """INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
                   VALUES ($1, 'user.erased', 'user', $2, $3::jsonb)""",
                actor,
                str(victim),
                json.dumps({} if asked_by is None else {"asked_by": asked_by}),
            )
        await migrate(connection)
        rows = await connection.fetch("SELECT resource_id FROM user_activity_log WHERE action = 'user.erased'")
        assert {row["resource_id"] for row in rows} == {str(victim) for _, victim, _ in real}
        assert await connection.fetchval("SELECT count(*) FROM user_activity_log") == len(real + forged)
