"""Markdown for the generated parts of the reference."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table. None is an empty cell."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns)]
    lines += [
        ["" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: object) -> str:
    """Inline code; nothing for an empty text."""
    return f"`{text}`" if str(text) else ""


def sentence(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def number(value: float) -> str:
    """A number without an exponent, and without a fraction that is zero."""
    return str(int(value)) if float(value).is_integer() else str(value)


def bounds(schema: Mapping[str, Any]) -> str:
    """The numeric range of a JSON schema."""
    low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    parts = ("at least", low), ("more than", above), ("at most", high)
    return ", ".join(f"{words} {number(limit)}" for words, limit in parts if limit is not None)
