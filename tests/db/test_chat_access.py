"""Row-level security of conversations: the owner's, and nobody else's, staff included; for each way of access."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from db.access import Access
from db.conversations import Conversations, MessageKey, NewConversation

pytestmark = pytest.mark.asyncio(loop_scope="module")

SELECT = "SELECT * FROM {table}"
READS = [SELECT.format(table=table) for table in ("conversations", "messages")]


@dataclass
class People:
    """Two users with a conversation each, and staff."""

    pool: asyncpg.Pool
    worker_pool: asyncpg.Pool
    ids: dict[str, UUID]
    talks: dict[str, UUID]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def people(shared_database: Any) -> People:
    access, kept = Access(shared_database.pool), Conversations(shared_database.pool)
    roles = {"alice": "basic_user", "bob": "basic_user", "mod": "moderator", "root": "admin"}
    ids = {name: await access.ensure_user(name, role) for name, role in roles.items()}
    talks = {}
    for name in ("alice", "bob"):
        talks[name] = uuid4()
        new = NewConversation(talks[name], f"of {name}", "general")
        await kept.store(ids[name], new, "question", "answer", {}, MessageKey("k", b"1"))
    return People(shared_database.pool, shared_database.worker_pool, ids, talks)


@asynccontextmanager
async def acting(pool: asyncpg.Pool, role: str, user: UUID | None = None) -> AsyncIterator[Any]:
    """A transaction under a role, rolled back at its end."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            claims = json.dumps({"sub": str(user), "role": role} if user else {})
            await connection.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
            await connection.execute(f"SET LOCAL ROLE {role}")
            yield connection
        finally:
            await transaction.rollback()


@pytest.mark.parametrize("read", READS)
async def test_the_owner_sees_the_own_rows(people: People, read: str) -> None:
    for name in ("alice", "bob"):
        async with acting(people.pool, "authenticated", people.ids[name]) as connection:
            rows = await connection.fetch(read)
        assert {row.get("conversation_id", row["id"]) for row in rows} == {people.talks[name]}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["mod", "root", None])
async def test_nobody_else_sees_them(people: People, read: str, name: str | None) -> None:
    async with acting(people.pool, "authenticated", people.ids[name] if name else None) as connection:
        assert await connection.fetch(read) == []


@pytest.mark.parametrize("table", ["conversations", "messages", "message_keys"])
@pytest.mark.parametrize(
    "statement", ["SELECT 1 FROM {}", "INSERT INTO {} DEFAULT VALUES", "UPDATE {} SET {} = {}", "DELETE FROM {}"]
)
@pytest.mark.parametrize("role", ["anon", "ourvidz_worker"])
async def test_the_anonymous_and_replicas_reach_nothing(people: People, table: str, statement: str, role: str) -> None:
    column = "key" if table == "message_keys" else "id"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with acting(people.pool, role, people.ids["alice"]) as connection:
            await connection.execute(statement.format(table, column, column))


@pytest.mark.parametrize(
    "statement", ["SELECT 1 FROM message_keys", "DELETE FROM message_keys", "UPDATE message_keys SET key = key"]
)
async def test_users_do_not_reach_the_keys(people: People, statement: str) -> None:
    for name in ("alice", "root"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with acting(people.pool, "authenticated", people.ids[name]) as connection:
                await connection.execute(statement)


async def test_the_owner_writes_the_own_conversations(people: People) -> None:
    alice = people.ids["alice"]
    async with acting(people.pool, "authenticated", alice) as connection:
        assert await connection.execute("INSERT INTO conversations (user_id, title) VALUES ($1, 'x')", alice)
        assert await connection.execute("UPDATE conversations SET title = 'renamed'") == "UPDATE 2"
        assert await connection.execute("DELETE FROM conversations") == "DELETE 2"
        assert await connection.fetch("SELECT FROM messages") == []
    async with acting(people.pool, "authenticated", people.ids["bob"]) as connection:
        assert await connection.fetchval("SELECT title FROM conversations") == "of bob"


@pytest.mark.parametrize("name", ["bob", "mod", "root"])
async def test_nobody_else_changes_or_deletes_one(people: People, name: str) -> None:
    talk = people.talks["alice"]
    async with acting(people.pool, "authenticated", people.ids[name]) as connection:
        assert await connection.execute("UPDATE conversations SET title = 'mine' WHERE id = $1", talk) == "UPDATE 0"
        assert await connection.execute("DELETE FROM conversations WHERE id = $1", talk) == "DELETE 0"


@pytest.mark.parametrize("name", ["bob", "mod", "root", None])
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO conversations (user_id) SELECT $1::uuid WHERE $2::uuid IS NOT NULL",
        """INSERT INTO messages (conversation_id, sender, content)
           SELECT $2::uuid, 'user', 'x' WHERE $1::uuid IS NOT NULL""",
    ],
)
async def test_nobody_speaks_or_begins_in_anothers_name(people: People, name: str | None, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with acting(people.pool, "authenticated", people.ids[name] if name else None) as connection:
            await connection.execute(statement, people.ids["alice"], people.talks["alice"])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE conversations SET user_id = user_id",
        "UPDATE conversations SET id = id",
        "UPDATE conversations SET created_at = now()",
        "UPDATE messages SET content = 'other'",
        "DELETE FROM messages",
        "INSERT INTO messages (conversation_id, sender, content) SELECT id, 'assistant', 'I agree' FROM conversations",
        """INSERT INTO messages (conversation_id, sender, content, created_at)
           SELECT id, 'user', 'x', now() FROM conversations""",
    ],
)
async def test_not_even_the_owner_may(people: People, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with acting(people.pool, "authenticated", people.ids["alice"]) as connection:
            await connection.execute(statement)


async def test_a_message_of_the_owner_touches_the_conversation(people: People) -> None:
    talk = people.talks["alice"]
    # what came long ago, as the owner of the tables alone can say
    async with people.pool.acquire() as connection:
        await connection.execute("ALTER TABLE conversations DISABLE TRIGGER conversations_touch")
        await connection.execute("UPDATE conversations SET updated_at = '2026-01-01' WHERE id = $1", talk)
        await connection.execute("ALTER TABLE conversations ENABLE TRIGGER conversations_touch")
    async with acting(people.pool, "authenticated", people.ids["alice"]) as connection:
        await connection.execute(
            "INSERT INTO messages (conversation_id, sender, content) VALUES ($1, 'user', 'x')", talk
        )
        assert await connection.fetchval("SELECT updated_at = now() FROM conversations WHERE id = $1", talk)


async def test_a_user_who_goes_takes_all_of_it_along(people: People) -> None:
    carol = await Access(people.pool).ensure_user("carol")
    await Conversations(people.pool).store(
        carol, NewConversation(uuid4(), "t", "general"), "q", "a", {}, MessageKey("k", b"1")
    )
    await people.pool.execute("DELETE FROM profiles WHERE id = $1", carol)
    for table in ("conversations", "message_keys"):
        assert await people.pool.fetchval(f"SELECT count(*) FROM {table} WHERE user_id = $1", carol) == 0  # noqa: S608
    assert await people.pool.fetchval("SELECT count(*) FROM messages") == 4
