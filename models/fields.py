"""What can be wrong with a field of a request, and the check that every text field goes through."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from models.catalog import RequestRefused

MAX_PROMPT_CHARACTERS = 4000


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with one field. `code`: missing, type, unknown, range, choice, length, characters,
    unsupported or conflict. The message never repeats the value of a text field."""

    field: str
    message: str
    code: str


class InvalidParams(RequestRefused):
    """At least one parameter is wrong; `errors` names each of them."""

    def __init__(self, errors: list[FieldError]) -> None:
        super().__init__("invalid_params", "; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = tuple(errors)


def clean_prompt(field: str, text: object) -> str:
    """The text of a required prompt with single spaces. Raises `InvalidParams`, naming `field`.

    Refused: what is no string, control characters and surrogates, what is too long, and text that shows nothing, such
    as only spaces or zero-width characters.
    """
    if not isinstance(text, str):
        raise InvalidParams([FieldError(field, "must be a string", "type")])
    shown = cleaned(field, text)
    if not shown:
        raise InvalidParams([FieldError(field, "is required", "missing")])
    return shown


def cleaned(field: str, text: str) -> str:
    """The text with single spaces, "" where it shows nothing. Raises `InvalidParams`."""
    spaced = " ".join(text.split())
    categories = {unicodedata.category(character) for character in spaced}
    if categories & {"Cc", "Cs"}:
        raise InvalidParams([FieldError(field, "contains control characters", "characters")])
    if is_too_long(spaced):
        message = f"may have at most {MAX_PROMPT_CHARACTERS} characters"
        if len(spaced) <= MAX_PROMPT_CHARACTERS:
            message += ", ligatures and other compatibility characters written out"
        raise InvalidParams([FieldError(field, message, "length")])
    # Format characters, separators and marks alone draw nothing on a page.
    shown = any(category != "Cf" and category[0] not in "ZM" for category in categories)
    return spaced if shown else ""


def is_too_long(text: str) -> bool:
    """Whether a text has more than `MAX_PROMPT_CHARACTERS`, as it stands or with compatibility characters written out:
    U+FDFA is 18 letters, and whoever reads the text reads all of them."""
    return len(text) > MAX_PROMPT_CHARACTERS or len(unicodedata.normalize("NFKC", text)) > MAX_PROMPT_CHARACTERS


def field_error(detail: dict[str, Any]) -> FieldError:
    """A pydantic error detail as ours; its message is kept, its input is not."""
    field = ".".join(str(part) for part in detail["loc"]) or "body"
    kind: str = detail["type"]
    if kind == "extra_forbidden":
        return FieldError(field, "is not a parameter", "unknown")
    message: str = detail["msg"]
    code = {"missing": "missing", "literal_error": "choice", "string_too_short": "length"}.get(kind)
    if code is None:
        code = "range" if kind in ("greater_than_equal", "less_than_equal", "finite_number") else "type"
    return FieldError(field, message, code)
