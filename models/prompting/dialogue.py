"""Chats as a model reads them: a system prompt, as much of the history as there is room for, and the new message.

The texts of the product's templates stand in `configs/templates.yaml`; an installation gives its own rows to the same
functions. Nothing here decides whether a text may be said: that is `models.policy`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import yaml

from models.fields import FieldError, InvalidParams
from models.params import ContentMode
from models.prompting.prompts import NoTemplate
from models.writing.language import Message

MAX_MESSAGE_CHARACTERS = 8000
MESSAGE_TOKENS = 14  # what a chat template puts around a message: 5, or 13 where each byte is a token
FIELD_CHARACTERS = 2000  # of each thing that a system prompt says of a character
GENERAL = "chat_general"
ROLEPLAY = "character_roleplay"
USE_CASES = (GENERAL, "chat_creative", "chat_admin", "chat_sdxl_conversion", ROLEPLAY)

_PLACE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her", "her"),
}


class Counter(Protocol):
    """Counts the tokens of a text."""

    def count(self, text: str) -> int:
        """How many tokens the language model makes of it."""


class ByteCounter:
    """For a tokenizer that can't be read: a token of a byte-level vocabulary is at least one byte, so no text has more
    tokens than bytes."""

    def count(self, text: str) -> int:
        """The bytes of the text."""
        return len(text.encode())


@dataclass(frozen=True)
class ChatTemplate:
    """A system prompt for chats. `token_limit` counts the new tokens of an answer."""

    name: str
    use_case: str
    content_mode: ContentMode
    system_prompt: str
    token_limit: int


@dataclass(frozen=True)
class Person:
    """Somebody in a conversation, by what is known of them. Empty: nothing is."""

    name: str
    description: str = ""
    personality: str = ""
    background: str = ""
    speaking_style: str = ""
    voice_tone: str = ""
    mood: str = ""
    gender: str = ""
    voice_examples: Sequence[str] = ()
    forbidden_phrases: Sequence[str] = ()
    instructions: str = ""  # the character's own system prompt


@dataclass(frozen=True)
class Cast:
    """Who is in a conversation beside the model itself: who answers, who asks, and others of the scene."""

    character: Person | None = None
    user: Person | None = None
    others: Sequence[Person] = ()
    scene: str = ""
    style: str = ""

    def texts(self) -> list[str]:
        """Everything that people wrote of the cast, for the content policy."""
        people = [person for person in (self.character, self.user, *self.others) if person is not None]
        said = [text for person in people for text in _texts(person)]
        return [text for text in (*said, self.scene, self.style) if text]


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt, and the names in its template for which the conversation has nothing."""

    text: str = field(repr=False)
    unfilled: tuple[str, ...] = ()


@cache
def _read() -> Any:
    return yaml.safe_load((files("configs") / "templates.yaml").read_text(encoding="utf-8"))


def mode_clause(mode: ContentMode) -> str:
    """The sentence on the content mode with which every one of our system prompts ends."""
    return str(_read()["chat_mode_clauses"][mode])


@cache
def builtin_chat_templates() -> tuple[ChatTemplate, ...]:
    """The chat templates that come with the project, each once per content mode."""
    modes: tuple[ContentMode, ...] = ("sfw", "nsfw")
    return tuple(
        ChatTemplate(
            name=entry["name"],
            use_case=entry["use_case"],
            content_mode=mode,
            system_prompt=f"{entry['system_prompt']} {mode_clause(mode)}",
            token_limit=entry["token_limit"],
        )
        for entry in _read()["chat_templates"]
        for mode in modes
    )


def select_chat_template(
    templates: Iterable[ChatTemplate], use_case: str, mode: ContentMode
) -> tuple[ChatTemplate, str | None]:
    """The template that fits best, and what does not fit about it: use_case, content_mode, both, or None.

    The general one stands in for any other. An sfw chat is never given an nsfw template. Raises `NoTemplate`.
    """
    ranked = [
        ((template.use_case != use_case, template.content_mode != mode), template)
        for template in templates
        if template.use_case in (use_case, GENERAL) and not (mode == "sfw" and template.content_mode == "nsfw")
    ]
    if not ranked:
        raise NoTemplate(f"no chat template for {use_case} in {mode} mode")
    (other_case, other_mode), best = min(ranked, key=lambda entry: (*entry[0], entry[1].name))
    misfit = [name for name, differs in (("use_case", other_case), ("content_mode", other_mode)) if differs]
    return best, ",".join(misfit) or None


def system_prompt(template: str, cast: Cast) -> SystemPrompt:
    """A template with its names filled in. Lines of which nothing is known are left out; a template that names no
    character gets a paragraph on the one there is."""
    known = _known(cast)
    named = set(_PLACE.findall(template))
    kept = [line for line in template.splitlines() if not _says_nothing(line, known)]
    text = re.sub(r"\n{3,}", "\n\n", _PLACE.sub(lambda place: known.get(place[1], ""), "\n".join(kept))).strip()
    if cast.character is not None and not any(name.startswith("character_") for name in named):
        text = f"{text}\n\n{_introduction(cast.character)}"
    notes = []
    if cast.character is not None and cast.character.instructions:
        notes.append(cast.character.instructions)
    if cast.character is not None and cast.character.forbidden_phrases:
        notes.append(f"Never say: {'; '.join(cast.character.forbidden_phrases)}")
    if cast.user is not None and cast.user.description and "user_description" not in named:
        notes.append(f"{cast.user.name}, who speaks to you: {cast.user.description}")
    notes += [f"Also there, {person.name}: {person.description}".rstrip(": ") for person in cast.others]
    if cast.scene and "scene_context" not in named:
        notes.append(f"The scene: {cast.scene}")
    if cast.style:
        notes.append(f"Style of your answers: {cast.style}")
    unfilled = tuple(sorted(name for name in named if not known.get(name)))
    return SystemPrompt("\n\n".join([text, *(note[:FIELD_CHARACTERS] for note in notes)]), unfilled)


def _says_nothing(line: str, known: Mapping[str, str]) -> bool:
    names = _PLACE.findall(line)
    return bool(names) and not any(known.get(name) for name in names)


def _texts(person: Person) -> list[str]:
    return [
        person.name,
        person.description,
        person.personality,
        person.background,
        person.speaking_style,
        person.voice_tone,
        person.mood,
        *person.voice_examples,
        *person.forbidden_phrases,
        person.instructions,
    ]


def _introduction(person: Person) -> str:
    facts = (person.description, person.personality, person.background, person.speaking_style, person.mood)
    known = " ".join(fact[:FIELD_CHARACTERS] for fact in facts if fact)
    return f"You speak as {person.name}. {known}".rstrip()


def _known(cast: Cast) -> dict[str, str]:
    """What the names in templates stand for."""
    character, user = cast.character, cast.user or Person("the user")
    subject, object_, possessive = _PRONOUNS.get(user.gender, ("they", "them", "their"))
    values = {
        "user_name": user.name,
        "user_description": user.description,
        "user_gender": user.gender,
        "user_pronoun_subject": subject,
        "user_pronoun_object": object_,
        "user_pronoun_possessive": possessive,
        "scene_context": cast.scene,
    }
    if character is not None:
        values |= {
            "character_name": character.name,
            "character_description": character.description,
            "character_personality": character.personality,
            "character_background": character.background,
            "character_speaking_style": character.speaking_style,
            "voice_tone": character.voice_tone,
            "mood": character.mood,
            "voice_examples": " / ".join(character.voice_examples),
        }
    # a name in a character's own words is not filled in again
    return {name: _PLACE.sub("", value)[:FIELD_CHARACTERS] for name, value in values.items()}


def within_budget(
    counter: Counter, system: str, history: Sequence[Message], message: str, budget: int
) -> tuple[list[Message], int] | None:
    """The messages for the model in at most `budget` tokens, and how many of the history are in them.

    The oldest are left out first, an exchange at a time, so that what is kept begins with the user. None where not even
    the system prompt and the new message fit.
    """
    room = budget - sum(counter.count(text) + MESSAGE_TOKENS for text in (system, message)) - MESSAGE_TOKENS
    if room < 0:
        return None
    kept = 0
    for index in range(len(history) - 1, -1, -1):
        room -= counter.count(history[index].content) + MESSAGE_TOKENS
        if room < 0:
            break
        if history[index].role == "user":
            kept = len(history) - index
    return conversation(system, history[len(history) - kept :], message), kept


def conversation(system: str, history: Sequence[Message], message: str) -> list[Message]:
    """The messages in the order in which a model reads them."""
    return [Message("system", system), *history, Message("user", message)]


def clean_message(field_name: str, text: object, most: int = MAX_MESSAGE_CHARACTERS) -> str:
    """A message as it may be stored: line breaks and tabs stay, the space around it goes. Raises `InvalidParams`.

    Refused: what is no string, other control characters and surrogates, too long a text, and one that shows nothing.
    """
    if not isinstance(text, str):
        raise InvalidParams([FieldError(field_name, "must be a string", "type")])
    plain = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    categories = {unicodedata.category(character) for character in plain if character not in "\n\t"}
    if categories & {"Cc", "Cs"}:
        raise InvalidParams([FieldError(field_name, "contains control characters", "characters")])
    if len(plain) > most:
        raise InvalidParams([FieldError(field_name, f"may have at most {most} characters", "length")])
    if not any(category != "Cf" and category[0] not in "ZM" for category in categories):
        raise InvalidParams([FieldError(field_name, "is required", "missing")])
    return plain
