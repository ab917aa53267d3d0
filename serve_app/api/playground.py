"""/functions/v1/playground-chat: a message of an existing client, answered. The conversation is the one that the body
names, or a new one. What `/v1/conversations` does for its own clients happens here; only the wire differs.

The client's choice of provider and model is told back rather than followed: one language model answers here. So is
every other field that has no effect.
"""

import json
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response

from db.conversations import Conversations, Exchange, MessageKey
from db.idempotency import canonical_body
from models.fields import cleaned
from models.params import ContentMode
from models.prompting.dialogue import FIELD_CHARACTERS, Person, clean_message
from serve_app.api.auth import EdgeDep, User
from serve_app.api.bodies import AMOUNT, CARRIED, SWITCH, TEXT, dialect, json_object, one_of
from serve_app.api.conversations import OF_MODEL, ChatKey, owned, refuse_unknown
from serve_app.api.fields import is_number
from serve_app.api.problems import Problem
from serve_app.api.replies import replay, reply
from serve_app.api.wire_chat import STREAM
from serve_app.chat import USE_CASES, Asked, prepare

router = APIRouter(prefix="/functions/v1", tags=["functions"])

PROVIDERS = ("local", "chat_worker")  # names for the model that answers here
LENGTHS = {"short": 1 / 3, "medium": 1.0, "long": 2.0}  # of the template's own length
KINDS = {name: name for name in USE_CASES} | {use_case: name for name, use_case in USE_CASES.items()}
MOST_PARTICIPANTS = 10
MOST_TEMPERATURE = 2  # as in /v1
MOST_UNREAD = 20
# what fields of /v1 are called here
NAMES = {"template_id": "prompt_template_id", "content_mode": "content_tier", "conversation_type": "context_type"}
SETTINGS: dict[str, Any] = {
    "responseStyle": TEXT,
    "responseLength": {"type": "string", "enum": list(LENGTHS)},
    "enhancementModel": TEXT,
}
PARTICIPANT: dict[str, Any] = {"name": TEXT, "description": TEXT}
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("message", "conversation_id", "project_id", "character_id", "prompt_template_id"), TEXT),
    **dict.fromkeys(("context_type", "system_prompt_override", "model_provider", "model_variant"), TEXT),
    "content_tier": {"type": "string", "enum": ["sfw", "nsfw"]},
    "long_response": SWITCH,
    "temperature": AMOUNT | {"minimum": 0, "maximum": MOST_TEMPERATURE},
    "roleplay_settings": CARRIED | {"properties": SETTINGS},
    "participants": {"type": "array", "items": CARRIED | {"properties": PARTICIPANT}},
}
BODY = one_of(dialect("message", ("message",), **FIELDS))


@router.post(
    "/playground-chat",
    operation_id="playgroundChat",
    openapi_extra=BODY,
    responses=STREAM | OF_MODEL,
    response_model=None,
)
async def playground_chat(request: Request, edge: EdgeDep, user: User, key: ChatKey = None) -> Response:
    """Answer a message, as JSON or in pieces. Both messages are stored once the answer is whole."""
    body = await json_object(request)
    message = clean_message("message", body.get("message") or "")
    adjustments = _adjustments(body)

    def view(exchange: Exchange) -> dict[str, Any]:
        return answer_view(exchange, adjustments)

    message_key = None if key is None else MessageKey(key, canonical_body(body))
    if message_key is not None:
        earlier = await Conversations(edge.pool).stored_before(user.user_id, message_key)
        if earlier is not None:
            return await replay(request, earlier, view)
    conversation_id = _id(body, "conversation_id")
    conversation = None if conversation_id is None else await owned(edge, user, conversation_id)
    project_id, character_id = _id(body, "project_id"), _id(body, "character_id")
    if conversation is not None:
        _agree("project_id", project_id, conversation.project_id)
        _agree("character_id", character_id, conversation.character_id)
    await refuse_unknown(edge, user, project_id=project_id)
    own = _text(body, "system_prompt_override")
    settings = _settings(body)
    asked = Asked(
        message=message,
        content_mode=_tier(body),
        conversation=conversation,
        project_id=project_id,
        conversation_type=_kind(body),
        character_id=character_id,
        template_id=_id(body, "prompt_template_id"),
        instead_of_template=clean_message("system_prompt_override", own) if own else None,
        others=_participants(body),
        style=_short("roleplay_settings.responseStyle", settings.get("responseStyle"), 200),
        length_factor=_length(body, settings),
        temperature=_temperature(body),
        key=message_key,
    )
    try:
        turn = await prepare(edge, user, asked)
    except Problem as problem:
        problem.errors = [one.model_copy(update={"field": NAMES.get(one.field, one.field)}) for one in problem.errors]
        raise
    return await reply(request, edge, user, turn, view)


def answer_view(exchange: Exchange, adjustments: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer with the names that clients of this function read. `generation_time` is in milliseconds."""
    account, answer = exchange.account, exchange.answer
    return {
        "success": True,
        "response": answer.content,
        "content": answer.content,
        "message_id": str(answer.id),
        "user_message_id": str(exchange.question.id),
        "conversation_id": str(answer.conversation_id),
        "generation_time": account["generation_time_ms"],
        "context_type": account["use_case"],
        "content_tier": account["content_mode"],
        "nsfw_enforce": account["content_mode"] == "nsfw",
        "template_meta": account["template"],
        "prompt_template_name": account["template"]["name"],
        # the answer is the model's, word for word: nothing is rewritten, and no refusal is taken out
        "enforcement_diagnostics": {"rewritten": False, "sentences_removed": 0, "policy": "passed"},
        "model_provider": PROVIDERS[0],
        "model_used": account["model"],
        "finish_reason": account["finish_reason"],
        "usage": {name: account[name] for name in ("prompt_tokens", "new_tokens", "max_tokens")},
        "history": account["history"],
        "adjustments": adjustments,
    }


def _adjustments(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What is told of another model than the one that answers, and of what is no field at all."""
    given = {
        "model_provider": _text(body, "model_provider"),
        "model_variant": _text(body, "model_variant"),
        "roleplay_settings.enhancementModel": _text(_settings(body), "enhancementModel", "roleplay_settings."),
    }
    reason = "the installation's own language model answers"
    told = [
        {"field": name, "given": cleaned(name, value)[:100], "used": PROVIDERS[0], "reason": reason}
        for name, value in given.items()
        if value and value not in PROVIDERS
    ]
    return told + [
        {"field": name, "given": _kind_of(value), "used": "none", "reason": "is no field of this function"}
        for name, value in _unread(body)[:MOST_UNREAD]
    ]


def _unread(body: dict[str, Any]) -> list[tuple[str, Any]]:
    """The fields that nobody reads, by names that an answer may repeat, with their values. A null says nothing."""
    people = body.get("participants")
    parts = [("", body, FIELDS), ("roleplay_settings.", _settings(body), SETTINGS)]
    parts += [
        (f"participants.{number}.", one, PARTICIPANT)
        for number, one in enumerate(people if isinstance(people, list) else [])
        if isinstance(one, dict)
    ]
    return [
        (prefix + name, value)
        for prefix, part, known in parts
        for name, value in part.items()
        if name not in known and value is not None and name.isprintable() and len(name) <= 100
    ]


def _kind_of(value: Any) -> str:
    """What may be said of a value without repeating what somebody wrote."""
    if isinstance(value, str):
        return f"{len(value)} characters"
    if isinstance(value, list | dict):
        return f"{len(value)} entries"
    return json.dumps(value)[:100]


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    settings = {} if body.get("roleplay_settings") is None else body["roleplay_settings"]
    if not isinstance(settings, dict):
        raise Problem(400, "type", "must be an object", field="roleplay_settings")
    return settings


def _text(body: dict[str, Any], name: str, prefix: str = "") -> str | None:
    value = body.get(name)
    if value is None or isinstance(value, str):
        return value
    raise Problem(400, "type", "must be a string", field=prefix + name)


def _id(body: dict[str, Any], name: str) -> UUID | None:
    value = _text(body, name)
    if not value:
        return None
    try:
        return UUID(value)
    except ValueError:
        raise Problem(400, "type", "must be a UUID", field=name) from None


def _agree(name: str, given: UUID | None, own: UUID | None) -> None:
    if given is not None and own is not None and given != own:
        raise Problem(400, "conflict", "is another one in this conversation", field=name)


def _tier(body: dict[str, Any]) -> ContentMode:
    value = body.get("content_tier") or "sfw"
    if value not in ("sfw", "nsfw"):
        raise Problem(400, "choice", "must be sfw or nsfw", field="content_tier")
    return "nsfw" if value == "nsfw" else "sfw"


def _kind(body: dict[str, Any]) -> str | None:
    value = _text(body, "context_type")
    if value and value not in KINDS:
        raise Problem(400, "choice", f"must be one of {', '.join(KINDS)}", field="context_type")
    return KINDS[value] if value else None


def _short(field: str, value: Any, most: int) -> str:
    return "" if value is None or value == "" else " ".join(clean_message(field, value, most).split())


def _length(body: dict[str, Any], settings: dict[str, Any]) -> float:
    longer, length = body.get("long_response"), settings.get("responseLength")
    if not isinstance(longer, bool | None):
        raise Problem(400, "type", "must be true or false", field="long_response")
    if length is not None and (not isinstance(length, str) or length not in LENGTHS):
        raise Problem(400, "choice", f"must be one of {', '.join(LENGTHS)}", field="roleplay_settings.responseLength")
    if longer and length == "short":
        raise Problem(400, "conflict", "is given beside a short responseLength", field="long_response")
    return LENGTHS["long"] if longer else LENGTHS[length or "medium"]


def _temperature(body: dict[str, Any]) -> float | None:
    value = body.get("temperature")
    if value is None:
        return None
    if not is_number(value) or not 0 <= value <= MOST_TEMPERATURE:
        raise Problem(400, "range", f"must be between 0 and {MOST_TEMPERATURE}", field="temperature")
    return float(value)


def _participants(body: dict[str, Any]) -> list[Person]:
    given = body.get("participants")
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise Problem(400, "type", "must be a list of objects", field="participants")
    if len(given) > MOST_PARTICIPANTS:
        raise Problem(400, "length", f"may have at most {MOST_PARTICIPANTS} entries", field="participants")
    people = []
    for number, one in enumerate(given):
        name = clean_message(f"participants.{number}.name", one.get("name") or "", 100)
        about = _short(f"participants.{number}.description", one.get("description"), FIELD_CHARACTERS)
        people.append(Person(name=" ".join(name.split()), description=about))
    return people
