"""What goes over the wire under /v1/conversations."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from db.conversations import TITLE_CHARACTERS
from models.prompting.dialogue import MAX_MESSAGE_CHARACTERS
from serve_app.api.wire_requests import PRINTABLE
from serve_app.chat import ConversationType

Title = Annotated[str, Field(min_length=1, max_length=TITLE_CHARACTERS, pattern=PRINTABLE)]
Status = Literal["active", "archived"]


class CreateConversation(BaseModel):
    """A conversation to begin."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"title": "Storyboard"}]})

    title: Title = "New Conversation"
    conversation_type: ConversationType = Field(
        "general", description="Which system prompt is used. `admin` is for admins."
    )
    character_id: UUID | None = Field(None, description="The character that answers.")
    user_character_id: UUID | None = Field(None, description="The character that you play.")
    project_id: UUID | None = None


class ChangeConversation(BaseModel):
    """What to change of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"title": "Act two"}]})

    title: Title | None = None
    status: Status | None = None


class Conversation(BaseModel):
    """A conversation of yours."""

    id: UUID
    title: str
    conversation_type: str
    status: str
    project_id: UUID | None
    character_id: UUID | None
    user_character_id: UUID | None
    messages: int = Field(description="How many there are.")
    created_at: datetime
    updated_at: datetime = Field(description="Also of the last message.")


class ConversationPage(BaseModel):
    """Conversations, the one that was spoken in last first."""

    data: list[Conversation]
    first_id: UUID | None
    last_id: UUID | None
    has_more: bool


class ChatMessage(BaseModel):
    """A message as it is kept."""

    id: UUID
    conversation_id: UUID
    sender: Literal["user", "assistant"]
    content: str
    message_type: str
    created_at: datetime


class MessagePage(BaseModel):
    """Messages in their order."""

    data: list[ChatMessage]
    first_id: UUID | None
    last_id: UUID | None
    has_more: bool


class SendMessage(BaseModel):
    """A message to be answered. What is left out is the template's or the installation's."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"content": "What light suits a harbour at dawn?"}]}
    )

    content: str = Field(description=f"At most {MAX_MESSAGE_CHARACTERS} characters.")
    content_mode: Literal["sfw", "nsfw"] = "sfw"
    template_id: UUID | None = Field(None, description="Another system prompt for this message.")
    max_tokens: int | None = Field(None, strict=True, ge=1, le=32768, description="Of the answer.")
    temperature: float | None = Field(None, strict=True, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, strict=True, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, strict=True, ge=0, lt=2**63)


class HistoryUse(BaseModel):
    """How much of the conversation the model was given. The oldest messages are left out first."""

    used: int
    left_out: int
    counted_by: str = Field(description="`tokenizer`, or `bytes` where it is not at hand, which counts too many.")


class TemplateUse(BaseModel):
    """The system prompt that was used."""

    id: UUID
    name: str
    use_case: str
    content_mode: str
    misfit: str | None = Field(description="What does not fit about it: use_case, content_mode, or both.")
    overridden: bool
    unfilled: list[str] = Field(description="Names in it for which the conversation has nothing.")


class ChatAnswer(BaseModel):
    """Both messages as they were stored, and how the answer was made."""

    question: ChatMessage
    answer: ChatMessage
    content_mode: str
    use_case: str
    template: TemplateUse
    history: HistoryUse
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    model: str
    finish_reason: str = Field(description="`stop`, or `length` where the answer was cut at `max_tokens`.")
    prompt_tokens: int
    new_tokens: int
    cached: bool = Field(description="The same question was answered before.")
    generation_time_ms: int


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer. With `Accept: text/event-stream` in pieces: events `piece` with `text`, then one "
        "`message` with the whole answer as below, or `error` with a problem, after which nothing was stored.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
