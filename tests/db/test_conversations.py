"""Exchanges in Postgres: whole or not at all, in one order, once for each key."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from db.conversations import ConversationGone, Conversations, MessageKey, NewConversation
from db.idempotency import IdempotencyConflict, IdempotencyInFlight


@pytest.fixture
def kept(database: Any) -> Conversations:
    return Conversations(database.pool)


async def begun(database: Any, kept: Conversations) -> tuple[UUID, UUID]:
    """A user and a conversation."""
    user: UUID = await database.user()
    made = await kept.create(user, NewConversation(uuid4(), "talk", "general"))
    return user, made.id


async def counts(database: Any) -> tuple[int, ...]:
    """How many conversations, messages and keys there are."""
    tables = ("conversations", "messages", "message_keys")
    return tuple([await database.pool.fetchval(f"SELECT count(*) FROM {table}") for table in tables])  # noqa: S608


async def test_an_exchange_begins_its_conversation(database: Any, kept: Conversations) -> None:
    user = await database.user()
    new = NewConversation(uuid4(), "talk", "creative")
    made = await kept.store(user, new, "question", "answer", {"seed": 1})
    assert (made.question.sender, made.answer.sender, made.replayed) == ("user", "assistant", False)
    assert made.question.seq < made.answer.seq
    found = await kept.read(user, new.id)
    assert found is not None
    assert (found.conversation_type, found.messages) == ("creative", 2)


@pytest.mark.parametrize(("question", "answer"), [("question", ""), ("", "answer")])
async def test_half_an_exchange_is_never_stored(database: Any, kept: Conversations, question: str, answer: str) -> None:
    user, talk = await begun(database, kept)
    for place in (talk, NewConversation(uuid4(), "other", "general")):
        with pytest.raises(asyncpg.CheckViolationError):
            await kept.store(user, place, question, answer, {}, MessageKey("k", b"1"))
    assert await counts(database) == (1, 0, 0)


async def test_a_conversation_that_is_gone_or_anothers_takes_nothing(database: Any, kept: Conversations) -> None:
    user, talk = await begun(database, kept)
    for who, where in ((user, uuid4()), (await database.user("bob"), talk)):
        with pytest.raises(ConversationGone):
            await kept.store(who, where, "question", "answer", {})
    assert await counts(database) == (1, 0, 0)


async def test_exchanges_stored_at_once_do_not_interleave(database: Any, kept: Conversations) -> None:
    user, talk = await begun(database, kept)
    await asyncio.gather(*(kept.store(user, talk, f"q{n}", f"a{n}", {}) for n in range(8)))
    said = [message.content for message in await kept.messages(user, talk, page_size=99)]
    assert [(one[0], one[1:]) for one in said] == [
        pair for one in said[::2] for pair in (("q", one[1:]), ("a", one[1:]))
    ]


async def test_a_key_stands_for_one_body(database: Any, kept: Conversations) -> None:
    user, talk = await begun(database, kept)
    made = await kept.store(user, talk, "question", "answer", {"seed": 1}, MessageKey("k", b"1"))
    again = await kept.stored_before(user, MessageKey("k", b"1"))
    assert again is not None
    assert (again.question, again.answer, again.account, again.replayed) == (
        made.question,
        made.answer,
        {"seed": 1},
        True,
    )
    with pytest.raises(IdempotencyConflict):
        await kept.stored_before(user, MessageKey("k", b"2"))
    assert await kept.stored_before(await database.user("bob"), MessageKey("k", b"1")) is None


async def test_the_slower_of_two_with_one_key_stores_nothing(database: Any, kept: Conversations) -> None:
    user, talk = await begun(database, kept)
    await kept.store(user, talk, "question", "answer", {}, MessageKey("k", b"1"))
    with pytest.raises(IdempotencyInFlight):
        await kept.store(user, NewConversation(uuid4(), "other", "general"), "q", "a", {}, MessageKey("k", b"1"))
    assert await counts(database) == (1, 2, 1)


async def test_a_key_expires(database: Any, kept: Conversations) -> None:
    user, talk = await begun(database, kept)
    for key in ("k", "old"):
        await kept.store(user, talk, "question", "answer", {}, MessageKey(key, b"1"))
    await database.pool.execute("UPDATE message_keys SET expires_at = now()")
    assert await kept.stored_before(user, MessageKey("k", b"2")) is None
    await kept.store(user, talk, "another", "answer", {}, MessageKey("k", b"2"))
    assert await counts(database) == (1, 6, 1)  # the other expired one went along


async def test_a_character_that_is_deleted_leaves_its_conversations(database: Any, kept: Conversations) -> None:
    user = await database.user()
    ada = await database.pool.fetchval(
        "INSERT INTO characters (user_id, name, description) VALUES ($1, 'Ada', 'x') RETURNING id", user
    )
    made = await kept.create(user, NewConversation(uuid4(), "talk", "roleplay", character_id=ada))
    assert made.character_id == ada
    await database.pool.execute("DELETE FROM characters")
    found = await kept.read(user, made.id)
    assert found is not None
    assert found.character_id is None
