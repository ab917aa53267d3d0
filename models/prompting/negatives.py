"""Negative prompts: presets of what shall not be in a picture, put together with the caller's own words.

The presets stand in `configs/negatives.yaml`; an installation may give its own, read from its tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import yaml

from models.catalog import Family
from models.params import MAX_PROMPT_CHARACTERS, ContentMode

if TYPE_CHECKING:
    from models.prompting.prompts import TokenCounter

GenerationMode = Literal["txt2img", "i2i"]

# Presets say no more than this of a picture that is made from another one, or they work against the change.
I2I_TERMS = 3


@dataclass(frozen=True)
class NegativePreset:
    """Terms to keep out of a picture. None for family, content or generation mode fits every value.

    `family` may name what no family here is, such as an outside provider's model: then it is for that alone.
    """

    name: str
    terms: tuple[str, ...]
    priority: int
    family: str | None = None
    content_mode: ContentMode | None = None
    generation_mode: GenerationMode | None = None
    triggers: tuple[str, ...] = ()
    take: int | None = None
    required: bool = False
    description: str = ""


@cache
def builtin_negatives() -> tuple[NegativePreset, ...]:
    """The negative presets that come with the project; those without terms are for the operator to fill."""
    raw = yaml.safe_load((files("configs") / "negatives.yaml").read_text(encoding="utf-8"))
    return tuple(
        NegativePreset(
            name=entry["name"],
            terms=tuple(entry["terms"]),
            priority=entry["priority"],
            family=entry["family"],
            content_mode=entry.get("content_mode"),
            generation_mode=entry.get("generation_mode"),
            triggers=tuple(entry.get("triggers", ())),
            take=entry.get("take"),
            required=entry.get("required", False),
            description=entry["description"],
        )
        for entry in raw["presets"]
    )


def negative_prompt(
    family: Family | str,
    prompt: str,
    own: str,
    content_mode: ContentMode,
    generation_mode: GenerationMode,
    presets: Sequence[NegativePreset],
    *,
    counter: TokenCounter | None = None,
    limit: int | None = None,
) -> str:
    """The presets that apply, highest priority first, then the caller's own negative prompt, joined by commas.

    A term is said once, and a term that the prompt asks for is left out (unless its preset is required). From image to
    image, presets say at most three terms beside the required ones, those of the highest priority. With a `counter` and
    a `limit`, preset terms go, from the lowest priority up, until all fits: so the caller's own words and required
    terms are never what the model's window cuts off because of a preset. With a `limit` and nothing to count by, the
    other presets come after the caller's own words, to the same end. Nor are preset terms what makes it longer than a
    prompt may be.
    """
    terms: list[tuple[str, bool]] = []
    known: set[str] = {term.strip().casefold() for term in own.split(",")}
    for preset in sorted(presets, key=lambda preset: -preset.priority):
        if not _applies(preset, family, prompt, content_mode, generation_mode):
            continue
        for term in preset.terms[: preset.take]:
            wanted = not preset.required and _has_word(prompt, term)
            if term.casefold() not in known and not wanted:
                known.add(term.casefold())
                terms.append((term, preset.required))
    if generation_mode == "i2i":
        first = [index for index, (_, required) in enumerate(terms) if not required][:I2I_TERMS]
        terms = [entry for index, entry in enumerate(terms) if entry[1] or index in first]
    own = own.strip().strip(",").strip()
    required = [entry for entry in terms if entry[1]]

    def joined(kept: Sequence[tuple[str, bool]]) -> str:
        if limit is not None and counter is None:
            optional = [term for term, needed in kept if not needed]
            return ", ".join([*(term for term, _ in required), *([own] if own else []), *optional])
        return ", ".join([*(term for term, _ in kept), *([own] if own else [])])

    def fits(text: str) -> bool:
        if len(text) > MAX_PROMPT_CHARACTERS:
            return False
        return counter is None or limit is None or counter.count(text) <= limit

    if not fits(joined(required)):
        return joined(required)
    while not fits(joined(terms)):
        terms.pop(max(index for index, (_, needed) in enumerate(terms) if not needed))
    return joined(terms)


def _applies(
    preset: NegativePreset,
    family: Family | str,
    prompt: str,
    content_mode: ContentMode,
    generation_mode: GenerationMode,
) -> bool:
    return (
        preset.family in (None, family)
        and preset.content_mode in (None, content_mode)
        and preset.generation_mode in (None, generation_mode)
        and (not preset.triggers or any(_has_word(prompt, trigger) for trigger in preset.triggers))
    )


def _has_word(prompt: str, term: str) -> bool:
    return re.search(rf"(?i)(?<!\w){re.escape(term)}(?!\w)", prompt) is not None
