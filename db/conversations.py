"""Conversations with the language model. An exchange, the user's message and its answer, is stored whole or not at all.

Reads go through row-level security in the user's name; writes name the user in their guard. The order of messages is
that of `seq`: two exchanges of one conversation never interleave.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

import asyncpg
from uuid6 import uuid7

from db.idempotency import KEEP_HOURS, IdempotencyConflict, IdempotencyInFlight
from db.pool import as_user, queries

TITLE_CHARACTERS = 200


class ConversationGone(LookupError):
    """The conversation was deleted while the answer was written. Nothing was stored."""

    code = "conversation_not_found"


@dataclass(frozen=True)
class Conversation:
    """A conversation of one user. `character_id` answers, `user_character_id` is who the user plays."""

    id: UUID
    user_id: UUID
    project_id: UUID | None
    title: str = field(repr=False)
    conversation_type: str
    status: str
    created_at: datetime
    updated_at: datetime
    character_id: UUID | None
    user_character_id: UUID | None
    memory_tier: str | None
    memory_data: Mapping[str, Any] | None = field(repr=False)
    current_location: str | None = field(repr=False)
    last_scene_image: str | None = field(repr=False)
    messages: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """A conversation from its row with the count of its messages."""
        return cls(**row)


@dataclass(frozen=True)
class StoredMessage:
    """A message as it is kept. `sender` is user or assistant."""

    id: UUID
    conversation_id: UUID
    sender: str
    content: str = field(repr=False)
    message_type: str
    created_at: datetime
    seq: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """A message from its row."""
        return cls(**row)


@dataclass(frozen=True)
class CharacterRow:
    """What a character is to the language model."""

    id: UUID
    name: str
    description: str
    traits: str | None
    persona: str | None
    system_prompt: str | None
    voice_tone: str | None
    mood: str | None
    gender: str | None
    content_rating: str
    voice_examples: Sequence[str]
    forbidden_phrases: Sequence[str]


@dataclass(frozen=True)
class ChatTemplateRow:
    """A system prompt for chats. `token_limit` counts the new tokens of an answer, in the language model's tokens."""

    id: UUID
    template_name: str
    use_case: str
    content_mode: str
    system_prompt: str = field(repr=False)
    token_limit: int


@dataclass(frozen=True)
class NewConversation:
    """A conversation to begin."""

    id: UUID
    title: str = field(repr=False)
    conversation_type: str
    project_id: UUID | None = None
    character_id: UUID | None = None
    user_character_id: UUID | None = None


@dataclass(frozen=True)
class Exchange:
    """Both messages, as stored, and how the answer was made."""

    question: StoredMessage
    answer: StoredMessage
    account: Mapping[str, Any]
    replayed: bool = False


class MessageKey:
    """A user's Idempotency-Key with the body that it came with."""

    def __init__(self, key: str, body: bytes) -> None:
        self.key, self.hash = key, hashlib.sha256(body).digest()


class Conversations:
    """Conversations in Postgres. Needs a pool that acts as the owner of the tables."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("conversations")

    async def create(self, user_id: UUID, new: NewConversation) -> Conversation:
        """Begin a conversation. Durable on return."""
        async with self._pool.acquire() as connection, connection.transaction():
            await self._create(connection, user_id, new)
            return Conversation.from_row(await self._sql.read(connection, user_id=user_id, conversation_id=new.id))

    async def list_page(
        self, user_id: UUID, *, status: str | None, before: UUID | None, page_size: int
    ) -> list[Conversation]:
        """A user's conversations, the one that was spoken in last first."""
        async with as_user(self._pool, user_id) as connection:
            rows = self._sql.list_page(connection, user_id=user_id, status=status, before=before, page_size=page_size)
            return [Conversation.from_row(row) async for row in rows]

    async def read(self, user_id: UUID, conversation_id: UUID) -> Conversation | None:
        """A user's own conversation; None for somebody else's as for none."""
        async with as_user(self._pool, user_id) as connection:
            row = await self._sql.read(connection, user_id=user_id, conversation_id=conversation_id)
        return None if row is None else Conversation.from_row(row)

    async def messages(
        self,
        user_id: UUID,
        conversation_id: UUID,
        *,
        before: UUID | None = None,
        after: UUID | None = None,
        page_size: int,
    ) -> list[StoredMessage]:
        """Messages in their order: the latest ones, the latest before one, or the first after one."""
        async with as_user(self._pool, user_id) as connection:
            rows = self._sql.list_messages(
                connection, conversation_id=conversation_id, before=before, after=after, page_size=page_size
            )
            return [StoredMessage.from_row(row) async for row in rows]

    async def change(self, user_id: UUID, conversation_id: UUID, *, title: str | None, status: str | None) -> bool:
        """Change what is given. False where the user has no such conversation."""
        changed = await self._sql.change(
            self._pool, user_id=user_id, conversation_id=conversation_id, title=title, status=status
        )
        return changed is not None

    async def remove(self, user_id: UUID, conversation_id: UUID) -> bool:
        """Delete a conversation with its messages. False where the user has no such conversation."""
        return await self._sql.remove(self._pool, user_id=user_id, conversation_id=conversation_id) is not None

    async def store(
        self,
        user_id: UUID,
        conversation: UUID | NewConversation,
        question: str,
        answer: str,
        account: Mapping[str, Any],
        key: MessageKey | None = None,
    ) -> Exchange:
        """Both messages, a conversation that begins with them, and the key, in one transaction.

        Raises `ConversationGone`, and `IdempotencyInFlight` where another request with the key was faster.
        """
        question_id, answer_id = uuid7(), uuid7()
        async with self._pool.acquire() as connection, connection.transaction():
            if isinstance(conversation, NewConversation):
                conversation_id = conversation.id
                await self._create(connection, user_id, conversation)
            else:
                conversation_id = conversation
                if await self._sql.hold(connection, user_id=user_id, conversation_id=conversation_id) is None:
                    raise ConversationGone(str(conversation_id))
            rows = self._sql.add(
                connection,
                conversation_id=conversation_id,
                question_id=question_id,
                question=question,
                answer_id=answer_id,
                answer=answer,
            )
            said = {row["id"]: StoredMessage.from_row(row) async for row in rows}
            if key is not None:
                await self._store_key(connection, user_id, key, said[question_id], said[answer_id], account)
        return Exchange(said[question_id], said[answer_id], account)

    async def stored_before(self, user_id: UUID, key: MessageKey) -> Exchange | None:
        """What an earlier request with this key stored. Raises `IdempotencyConflict` for another body."""
        row = await self._sql.find_key(self._pool, user_id=user_id, key=key.key)
        if row is None:
            return None
        if row["body_hash"] != key.hash:
            raise IdempotencyConflict(key.key)
        rows = self._sql.find_messages(self._pool, user_id=user_id, ids=[row["question_id"], row["answer_id"]])
        said = [StoredMessage.from_row(found) async for found in rows]
        if len(said) != 2:
            return None
        return Exchange(said[0], said[1], row["account"], replayed=True)

    async def character(self, user_id: UUID, character_id: UUID) -> CharacterRow | None:
        """A character that the user may see: the own ones and, by their rating, public ones."""
        async with as_user(self._pool, user_id) as connection:
            row = await self._sql.read_character(connection, character_id=character_id)
        return None if row is None else CharacterRow(**row)

    async def has_project(self, user_id: UUID, project_id: UUID) -> bool:
        """Whether a project is a user's own."""
        return bool(await self._sql.has_project(self._pool, user_id=user_id, project_id=project_id))

    async def templates(self, use_cases: Sequence[str]) -> list[ChatTemplateRow]:
        """The active templates of these use cases."""
        rows = self._sql.list_chat_templates(self._pool, use_cases=list(use_cases))
        return [ChatTemplateRow(**row) async for row in rows]

    async def template(self, template_id: UUID) -> ChatTemplateRow | None:
        """One active template of chat."""
        row = await self._sql.read_chat_template(self._pool, template_id=template_id)
        return None if row is None else ChatTemplateRow(**row)

    async def _create(self, connection: Any, user_id: UUID, new: NewConversation) -> None:
        await self._sql.create(
            connection,
            id=new.id,
            user_id=user_id,
            title=new.title,
            conversation_type=new.conversation_type,
            project_id=new.project_id,
            character_id=new.character_id,
            user_character_id=new.user_character_id,
        )

    async def _store_key(
        self,
        connection: Any,
        user_id: UUID,
        key: MessageKey,
        question: StoredMessage,
        answer: StoredMessage,
        account: Mapping[str, Any],
    ) -> None:
        stored = await self._sql.store_key(
            connection,
            user_id=user_id,
            key=key.key,
            body_hash=key.hash,
            conversation_id=question.conversation_id,
            question_id=question.id,
            answer_id=answer.id,
            account=dict(account),
            hours=KEEP_HOURS,
        )
        if stored is None:
            raise IdempotencyInFlight(key.key)
