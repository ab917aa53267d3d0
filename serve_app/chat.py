"""What the language model is given for a message: a template, who is in the conversation, and the history.

The history goes in as far as the model's token budget reaches; what is left out is told in the answer. The content
policy holds for everything that people wrote, all of it as one text. System prompts of templates are the operator's.
"""

import asyncio
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import structlog
from uuid6 import uuid7

from db.access import Principal
from db.conversations import CharacterRow, ChatTemplateRow, Conversation, Conversations, MessageKey, NewConversation
from db.limits import SystemConfig
from deployments.settings import Settings
from models.catalog import Family
from models.params import ContentMode
from models.policy import NO_SIGNS, ContentRejected, check_prompt
from models.profile import ModelSpec, resolve_weights
from models.prompting.dialogue import (
    GENERAL,
    ROLEPLAY,
    ByteCounter,
    Cast,
    ChatTemplate,
    Counter,
    Person,
    conversation,
    mode_clause,
    select_chat_template,
    system_prompt,
    within_budget,
)
from models.prompting.prompts import NoTemplate, TokenCounter
from models.prompting.signs import Signs
from models.writing.language import Message, Sampling
from serve_app.admission import check_content_mode
from serve_app.api.problems import Problem
from serve_app.edge import Edge

log = structlog.get_logger()

HISTORY_MESSAGES = 100  # the latest ones are looked at; how many of them go in is a matter of tokens
TITLE_FROM = 60  # characters of the first message
TEMPERATURE, TOP_P = 0.8, 0.95
CHAT_ADMIN = "chat_admin"
USE_CASES = {
    "general": GENERAL,
    "creative": "chat_creative",
    "admin": CHAT_ADMIN,
    "sdxl_conversion": "chat_sdxl_conversion",
    "roleplay": ROLEPLAY,
}
ConversationType = Literal["general", "creative", "admin", "sdxl_conversion", "roleplay"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A message, and how it is to be answered. Without a conversation a new one begins with it."""

    message: str = field(repr=False)
    content_mode: ContentMode = "sfw"
    conversation: Conversation | None = None
    project_id: UUID | None = None
    conversation_type: str | None = None
    character_id: UUID | None = None
    template_id: UUID | None = None
    instead_of_template: str | None = field(default=None, repr=False)
    others: Sequence[Person] = field(default=(), repr=False)
    style: str = field(default="", repr=False)
    max_tokens: int | None = None
    length_factor: float = 1.0  # of the template's own length
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    key: MessageKey | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Everything that the answer to a message needs. `account` says how it was put together, without any text."""

    message: str = field(repr=False)
    mode: ContentMode
    system: str = field(repr=False)
    history: Sequence[Message] = field(repr=False)
    written_by_people: Sequence[str] = field(repr=False)  # beside the history and the message
    sampling: Sampling
    store_in: UUID | NewConversation
    key: MessageKey | None
    account: dict[str, Any]

    def messages(self) -> list[Message]:
        """What the model reads."""
        return conversation(self.system, self.history, self.message)

    def shorter(self) -> "Turn | None":
        """The same with half of the history; None where there is none."""
        if not self.history:
            return None
        kept = list(self.history[(len(self.history) + 1) // 2 :])
        while kept and kept[0].role != "user":
            kept.pop(0)
        told = self.account["history"]
        history = told | {"used": len(kept), "left_out": told["left_out"] + len(self.history) - len(kept)}
        return replace(self, history=kept, account=self.account | {"history": history})


async def prepare(edge: Edge, user: Principal, asked: Asked) -> Turn:
    """Put together what the model is given. Stores nothing. Raises `Problem`."""
    if not user.is_admin():
        await SystemConfig(edge.pool).admit_request(user.user_id)
    check_content_mode(edge, user, asked.content_mode, with_upload=False)
    await asyncio.to_thread(check_text, asked.message, asked.content_mode)
    spec = edge.settings.loaded_profile.models.get(Family.QWEN)
    if spec is None or edge.enhancer is None:
        raise Problem(503, "language_model_unavailable", "no language model is running here", headers=RETRY)
    kept = Conversations(edge.pool)
    known = asked.conversation
    character_id = asked.character_id or (known.character_id if known else None)
    character = await _character(kept, user, character_id, asked.content_mode)
    played = await _character(kept, user, known.user_character_id if known else None, asked.content_mode)
    kind = asked.conversation_type or (known.conversation_type if known else None) or "general"
    use_case = ROLEPLAY if character and kind == "general" else USE_CASES.get(kind, GENERAL)
    template, meta = await _template(kept, user, asked, use_case)
    cast = Cast(
        character=_person(character),
        user=_person(played),
        others=asked.others,
        scene=(known.current_location if known else None) or "",
        style=asked.style,
    )
    system = system_prompt(template.system_prompt, cast)
    sampling = _sampling(asked, template, spec)
    total = known.messages if known else 0
    history = await _history(kept, user, known) if known else []
    counter, counted_by = await asyncio.to_thread(_counter, edge.settings, spec)
    budget = spec.cache_tokens - sampling.max_new_tokens
    fitting = await asyncio.to_thread(within_budget, counter, system.text, history, asked.message, budget)
    if fitting is None:
        raise too_long()
    used = history[len(history) - fitting[1] :]
    people = [*cast.texts(), *([asked.instead_of_template] if asked.instead_of_template else [])]
    await asyncio.to_thread(
        check_text, "\n".join([*people, *(message.content for message in used), asked.message]), asked.content_mode
    )
    store_in = known.id if known else _new(asked, kind if use_case != ROLEPLAY else "roleplay")
    account = {
        "content_mode": asked.content_mode,
        "use_case": use_case,
        "template": meta | {"unfilled": list(system.unfilled)},
        "history": {"used": len(used), "left_out": total - len(used), "counted_by": counted_by},
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    return Turn(
        message=asked.message,
        mode=asked.content_mode,
        system=system.text,
        history=used,
        written_by_people=people,
        sampling=sampling,
        store_in=store_in,
        key=asked.key,
        account=account,
    )


RETRY = {"Retry-After": "5"}


def check_text(text: str, mode: ContentMode, field: str = "message", beside: Signs = NO_SIGNS) -> None:
    """The content policy, as a problem of that field; `beside` are the signs of what goes with it. Raises `Problem`."""
    try:
        check_prompt(text, mode, beside)
    except ContentRejected as error:
        raise Problem(422, error.code, error.message, field=field) from None


def check_title(edge: Edge, user: Principal, title: str) -> None:
    """A title may be what any message of this user may be. Raises `Problem`."""
    adult = user.age_verified and edge.settings.loaded_profile.nsfw_allowed
    try:
        check_text(title, "sfw", "title")
    except Problem:
        if not adult:
            raise
        check_text(title, "nsfw", "title")


def too_long() -> Problem:
    """The message and its system prompt alone are more than the model can read."""
    return Problem(422, "message_too_long", "leaves the language model no room for an answer", field="message")


async def _character(
    kept: Conversations, user: Principal, character_id: UUID | None, mode: ContentMode
) -> CharacterRow | None:
    if character_id is None:
        return None
    row = await kept.character(user.user_id, character_id)
    if row is None:
        raise Problem(404, "character_not_found", "there is no such character", field="character_id")
    if row.content_rating == "nsfw" and mode != "nsfw":
        raise Problem(422, "conflict", "is a character for content mode nsfw only", field="character_id")
    return row


def _person(row: CharacterRow | None) -> Person | None:
    if row is None:
        return None
    return Person(
        name=row.name,
        description=row.description,
        personality=row.traits or "",
        background=row.persona or "",
        speaking_style=row.voice_tone or "",
        voice_tone=row.voice_tone or "",
        mood=row.mood or "",
        gender=row.gender or "",
        voice_examples=tuple(row.voice_examples),
        forbidden_phrases=tuple(row.forbidden_phrases),
        instructions=row.system_prompt or "",
    )


async def _template(
    kept: Conversations, user: Principal, asked: Asked, use_case: str
) -> tuple[ChatTemplate, dict[str, Any]]:
    """The system prompt to fill in, and where it comes from."""
    row: ChatTemplateRow | None = None
    if asked.template_id is not None:
        row = await kept.template(asked.template_id)
        if row is None:
            raise Problem(404, "template_not_found", "there is no such chat template", field="template_id")
        if row.content_mode == "nsfw" and asked.content_mode != "nsfw":
            raise Problem(422, "conflict", "is a template for content mode nsfw only", field="template_id")
        template, misfit = _as_template(row), None
    else:
        rows = await kept.templates([use_case, GENERAL])
        try:
            template, misfit = select_chat_template(map(_as_template, rows), use_case, asked.content_mode)
        except NoTemplate as error:
            raise Problem(503, error.code, str(error)) from None
        row = next(row for row in rows if _as_template(row) == template)
        if misfit is not None:
            log.info("template_fell_back", template=template.name, misfit=misfit)
    if CHAT_ADMIN in (use_case, template.use_case) and not user.is_admin():
        raise Problem(403, "admin_only", "only an admin may do this", field="conversation_type")
    meta = {
        "id": str(row.id),
        "name": template.name,
        "use_case": template.use_case,
        "content_mode": template.content_mode,
        "misfit": misfit,
        "overridden": asked.instead_of_template is not None,
    }
    if asked.instead_of_template is not None:
        own = f"{asked.instead_of_template}\n\n{mode_clause(asked.content_mode)}"
        return replace(template, system_prompt=own), meta
    return template, meta


def _as_template(row: ChatTemplateRow) -> ChatTemplate:
    mode: ContentMode = "nsfw" if row.content_mode == "nsfw" else "sfw"
    return ChatTemplate(row.template_name, row.use_case, mode, row.system_prompt, row.token_limit)


def _sampling(asked: Asked, template: ChatTemplate, spec: ModelSpec) -> Sampling:
    """How words are chosen. At most half of the model's room is for the answer, so that something is left to answer."""
    most = spec.cache_tokens // 2
    if asked.max_tokens is not None and asked.max_tokens > most:
        raise Problem(422, "range", f"must be between 1 and {most}", field="max_tokens")
    return Sampling(
        max_new_tokens=asked.max_tokens or min(max(1, round(template.token_limit * asked.length_factor)), most),
        temperature=TEMPERATURE if asked.temperature is None else asked.temperature,
        top_p=TOP_P if asked.top_p is None else asked.top_p,
        seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
    )


async def _history(kept: Conversations, user: Principal, known: Conversation) -> list[Message]:
    rows = await kept.messages(user.user_id, known.id, page_size=HISTORY_MESSAGES)
    return [Message("user" if row.sender == "user" else "assistant", row.content) for row in rows]


def _new(asked: Asked, kind: str) -> NewConversation:
    title = " ".join(asked.message.split())
    if len(title) > TITLE_FROM:
        title = title[: TITLE_FROM - 1].rstrip() + "…"
    return NewConversation(uuid7(), title, kind, asked.project_id, asked.character_id)


class _Locked:
    """A counter for several threads: a fast tokenizer must not be used by two at a time."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter, self._lock = counter, threading.Lock()

    def count(self, text: str) -> int:
        """How many tokens the language model makes of a text."""
        with self._lock:
            return self._counter.count(text)


@cache
def _tokenizer(weights: Path | str) -> _Locked:
    return _Locked(TokenCounter.from_pretrained(weights, subfolder=""))


def _counter(settings: Settings, spec: ModelSpec) -> tuple[Counter, str]:
    """What counts tokens, and its name. Bytes stand in for a tokenizer that is not here: they are never too few."""
    try:
        return _tokenizer(resolve_weights(spec, settings.state_dir / "weights")), "tokenizer"
    except (OSError, ValueError) as error:
        log.warning("tokenizer_away", model=spec.model_name, error=type(error).__name__)
        return ByteCounter(), "bytes"
