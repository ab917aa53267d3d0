"""/v1/conversations: chats with the language model."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from uuid6 import uuid7

from db import conversations as db
from db.access import Principal
from db.conversations import Conversations, Exchange, MessageKey, NewConversation
from db.idempotency import canonical_body
from models.prompting.dialogue import clean_message
from serve_app.api.auth import EdgeDep, User
from serve_app.api.problems import DOCUMENTED, Problem
from serve_app.api.replies import replay, reply
from serve_app.api.wire_chat import (
    STREAM,
    ChangeConversation,
    ChatAnswer,
    ChatMessage,
    Conversation,
    ConversationPage,
    CreateConversation,
    MessagePage,
    SendMessage,
)
from serve_app.chat import Asked, check_title, prepare
from serve_app.edge import Edge

router = APIRouter(prefix="/v1/conversations", tags=["chat"])

OF_MODEL: dict[int | str, dict[str, Any]] = {
    502: {"model": DOCUMENTED[503]["model"], "description": "The language model failed"},
    504: {"model": DOCUMENTED[503]["model"], "description": "The answer took too long"},
}
ChatKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Repeats of a request with one key store one exchange.",
    ),
]


@router.post("", status_code=201, operation_id="createConversation")
async def create_conversation(body: CreateConversation, edge: EdgeDep, user: User, response: Response) -> Conversation:
    """Begin a conversation. The first message may also begin one, at `/functions/v1/playground-chat`."""
    kept = Conversations(edge.pool)
    check_title(edge, user, body.title)
    if body.conversation_type == "admin" and not user.is_admin():
        raise Problem(403, "admin_only", "only an admin may do this", field="conversation_type")
    await refuse_unknown(edge, user, project_id=body.project_id, character_id=body.character_id)
    await refuse_unknown(edge, user, user_character_id=body.user_character_id)
    made = await kept.create(user.user_id, NewConversation(id=uuid7(), **body.model_dump()))
    response.headers["Location"] = f"{router.prefix}/{made.id}"
    return _view(made)


@router.get("", operation_id="listConversations")
async def list_conversations(
    edge: EdgeDep,
    user: User,
    status: Literal["active", "archived"] | None = None,
    before: Annotated[UUID | None, Query(description="Spoken in before this conversation.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ConversationPage:
    """Your conversations, the one that was spoken in last first."""
    rows = await Conversations(edge.pool).list_page(user.user_id, status=status, before=before, page_size=limit + 1)
    data = [_view(row) for row in rows[:limit]]
    return ConversationPage(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


@router.get("/{conversation_id}", operation_id="getConversation")
async def get_conversation(conversation_id: UUID, edge: EdgeDep, user: User) -> Conversation:
    """One of your conversations."""
    return _view(await owned(edge, user, conversation_id))


@router.patch("/{conversation_id}", operation_id="changeConversation")
async def change_conversation(
    conversation_id: UUID, body: ChangeConversation, edge: EdgeDep, user: User
) -> Conversation:
    """Rename a conversation, or put it away."""
    if body.title is not None:
        check_title(edge, user, body.title)
    kept = Conversations(edge.pool)
    if not await kept.change(user.user_id, conversation_id, title=body.title, status=body.status):
        raise Problem(404, "conversation_not_found", "there is no such conversation")
    return _view(await owned(edge, user, conversation_id))


@router.delete("/{conversation_id}", status_code=204, operation_id="deleteConversation")
async def delete_conversation(conversation_id: UUID, edge: EdgeDep, user: User) -> None:
    """Delete a conversation with its messages, for good."""
    if not await Conversations(edge.pool).remove(user.user_id, conversation_id):
        raise Problem(404, "conversation_not_found", "there is no such conversation")


@router.get("/{conversation_id}/messages", operation_id="listMessages")
async def list_messages(
    conversation_id: UUID,
    edge: EdgeDep,
    user: User,
    before: Annotated[UUID | None, Query(description="Before this message.")] = None,
    after: Annotated[UUID | None, Query(description="After this message.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> MessagePage:
    """The latest messages of a conversation, or a page before or after one, in their order."""
    if before is not None and after is not None:
        raise Problem(422, "conflict", "is given beside before", field="after")
    await owned(edge, user, conversation_id)
    rows = await Conversations(edge.pool).messages(
        user.user_id, conversation_id, before=before, after=after, page_size=limit + 1
    )
    more = len(rows) > limit
    page = rows[:limit] if after is not None else rows[-limit:]
    data = [message_view(row) for row in page]
    return MessagePage(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.post(
    "/{conversation_id}/messages", operation_id="sendMessage", response_model=ChatAnswer, responses=STREAM | OF_MODEL
)
async def send_message(
    conversation_id: UUID, body: SendMessage, request: Request, edge: EdgeDep, user: User, key: ChatKey = None
) -> Response:
    """Say something and get the answer, as JSON or in pieces. Both messages are stored once the answer is whole."""
    conversation = await owned(edge, user, conversation_id)
    given = {"conversation_id": conversation_id} | body.model_dump(exclude_unset=True, mode="json")
    message_key = None if key is None else MessageKey(key, canonical_body(given))
    if message_key is not None:
        earlier = await Conversations(edge.pool).stored_before(user.user_id, message_key)
        if earlier is not None:
            return await replay(request, earlier, answer_view)
    asked = Asked(
        message=clean_message("content", body.content),
        conversation=conversation,
        key=message_key,
        **body.model_dump(exclude={"content"}),
    )
    return await reply(request, edge, user, await prepare(edge, user, asked), answer_view)


async def owned(edge: Edge, user: Principal, conversation_id: UUID) -> db.Conversation:
    """A conversation of the user. 404 for somebody else's as for none."""
    found = await Conversations(edge.pool).read(user.user_id, conversation_id)
    if found is None:
        raise Problem(404, "conversation_not_found", "there is no such conversation")
    return found


async def refuse_unknown(edge: Edge, user: Principal, **ids: UUID | None) -> None:
    """404 for a project that is not the user's, or a character that the user may not see; `ids` by field."""
    kept = Conversations(edge.pool)
    for field, found_by in ids.items():
        if found_by is None:
            continue
        if field == "project_id":
            if not await kept.has_project(user.user_id, found_by):
                raise Problem(404, "project_not_found", "there is no such project", field=field)
        elif await kept.character(user.user_id, found_by) is None:
            raise Problem(404, "character_not_found", "there is no such character", field=field)


def message_view(row: db.StoredMessage) -> ChatMessage:
    """A message as the API shows it."""
    return ChatMessage.model_validate(row, from_attributes=True)


def answer_view(exchange: Exchange) -> dict[str, Any]:
    """Both messages and the account, as JSON."""
    shown = ChatAnswer(
        question=message_view(exchange.question), answer=message_view(exchange.answer), **exchange.account
    )
    return shown.model_dump(mode="json")


def _view(row: db.Conversation) -> Conversation:
    return Conversation.model_validate(row, from_attributes=True)
