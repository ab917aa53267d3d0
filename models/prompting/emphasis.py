"""Weights on words of a prompt, in Compel's notation: four named groups of words, and terms of the caller's own.

The words of each group stand in `configs/templates.yaml`. A weight is put on the words that are there; a group that
has a term of its own (`add`) gets it appended where none is there and the weight is above 1. What a weight found is
told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from models.fields import FieldError, InvalidParams
from models.prompting.notation import CONJUNCTION, closed, masked, parts, spaced, weighted

MAX_TERMS = 6
MAX_TERM_WEIGHT = 2.0

_Weight = Annotated[float, Field(ge=0.5, le=2.0, allow_inf_nan=False)]
_FreeWeight = Annotated[float, Field(ge=0.0, le=MAX_TERM_WEIGHT, allow_inf_nan=False)]

_ITEM = re.compile(r"\(\s*([^():]+?)\s*:\s*(\d+(?:\.\d+)?)\s*\)")
_MARKUP = re.compile(r"[()\"\\+:]")


class WeightedTerm(BaseModel):
    """A term of the caller's own and its weight, 0 to 2."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    term: str = Field(min_length=1, max_length=100)
    weight: _FreeWeight


class CompelWeights(BaseModel):
    """Weights by name, 1 being none: quality, detail and style 0.5 to 2, nsfw 0 to 2; and up to six terms.

    Also made from the older notation, a list "(term:1.2), (term:0.8)". Raises `InvalidParams` for what is neither;
    as a field of other parameters, what is out of range is theirs to report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quality: _Weight | None = None
    detail: _Weight | None = None
    style: _Weight | None = None
    nsfw: _FreeWeight | None = None
    terms: Annotated[tuple[WeightedTerm, ...], Field(strict=False, max_length=MAX_TERMS)] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return {"terms": _listed(value)} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _say_each_once(self) -> Self:
        terms: dict[str, float] = {}
        for item in self.terms:
            if _MARKUP.search(item.term) or not item.term.strip():
                _refuse("a term is plain words, without brackets, quotes, colons and plus signs")
            if terms.setdefault(item.term.casefold(), item.weight) != item.weight:
                _refuse("gives a term two weights", "conflict")
        return self

    @model_serializer
    def _given_only(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in _NAMES if getattr(self, name) is not None}
        terms = [{"term": item.term, "weight": item.weight} for item in self.terms]
        return named | ({"terms": terms} if terms else {})

    @property
    def wording(self) -> str:
        """The caller's own terms as text, for whoever judges what a prompt says."""
        return ", ".join(item.term for item in self.terms)

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return not self._given_only()


_NAMES = ("quality", "detail", "style", "nsfw")


@dataclass(frozen=True)
class Emphasised:
    """A prompt with the weights in it, in Compel's notation.

    `applied` says for each named weight, and for the caller's terms together, the weight, how many places it was put
    on, and whether a term was appended. `reason` says why nothing could be weighed at all.
    """

    text: str
    applied: dict[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class WordGroup:
    """Words that a named weight stands for, and the one that is added where none of them is in the prompt."""

    words: tuple[str, ...]
    add: str | None


@cache
def word_groups() -> dict[str, WordGroup]:
    """The groups by name."""
    raw = yaml.safe_load((files("configs") / "templates.yaml").read_text(encoding="utf-8"))["weighted_words"]
    return {name: WordGroup(tuple(raw[name]["words"]), raw[name]["add"]) for name in _NAMES}


def emphasise(prompt: str, weights: CompelWeights | None) -> Emphasised:
    """The prompt with these weights. What the caller weighted by hand, or put in brackets or quotes, stays as it is.

    A caller's own term goes before a group that has the same word, and a longer phrase before a shorter one.
    """
    if weights is None or weights.empty:
        return Emphasised(prompt, {})
    if CONJUNCTION.search(masked(prompt)):
        return Emphasised(prompt, {}, "the prompt blends several, which have no place for weights")
    places: dict[str, tuple[str, float]] = {}  # a word, whose weight it has, and how much
    counts: dict[str, int] = {}
    for name in _NAMES:
        weight = getattr(weights, name)
        if weight is not None:
            counts[name] = 0
            for word in word_groups()[name].words:
                places.setdefault(word.casefold(), (name, weight))
    for item in weights.terms:
        counts.setdefault("terms", 0)
        places[item.term.strip().casefold()] = ("terms", item.weight)
    found: set[str] = set()
    longest_first = sorted(places, key=lambda word: -len(word))
    pattern = re.compile(rf"(?i)(?<![\w+-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w+-])")
    text, before = "", 0
    for piece, free in parts(prompt):
        start = 0
        for match in pattern.finditer(piece) if free else ():
            word = match.group().casefold()
            if word not in places:  # the pattern takes a dotless i for an i, and folding does not
                continue
            name, weight = places[word]
            found.add(word)
            counts[name] += 1
            if weight != 1:
                written = weighted(match.group(), _number(weight))
                text = closed(spaced(text + piece[start : match.start()]) + written, prompt[before + match.end() :])
                start = match.end()
        text += piece[start:]
        before += len(piece)
    added = _missing(weights, counts, found)
    text = ", ".join([part for part in (text.rstrip(" ,"), *(written for _, written in added)) if part])
    return Emphasised(text, _account(weights, counts, [name for name, _ in added]))


def _missing(weights: CompelWeights, counts: dict[str, int], found: set[str]) -> list[tuple[str, str]]:
    """What is appended: the group, and the term with its weight."""
    added = []
    for name in _NAMES:
        weight, term = getattr(weights, name), word_groups()[name].add
        if weight is not None and weight > 1 and not counts[name] and term is not None:
            added.append((name, weighted(term, _number(weight))))
    own = {item.term.strip(): item.weight for item in weights.terms if item.term.strip().casefold() not in found}
    return added + [("terms", term if weight == 1 else weighted(term, _number(weight))) for term, weight in own.items()]


def _account(weights: CompelWeights, counts: dict[str, int], added: list[str]) -> dict[str, Any]:
    account: dict[str, Any] = {}
    for name, count in counts.items():
        weight = None if name == "terms" else getattr(weights, name)
        account[name] = {"places": count, "added": added.count(name)} | ({} if weight is None else {"weight": weight})
    return account


def _listed(text: str) -> list[dict[str, Any]]:
    """The items of "(term:1.2), (term:0.8)", each once."""
    if _ITEM.sub("", text).strip(" ,\n"):
        _refuse("must be items like (term:1.2), or an object of quality, detail, style and nsfw")
    items = dict.fromkeys((term.strip(), float(weight)) for term, weight in _ITEM.findall(text))
    if len(items) > MAX_TERMS:
        _refuse(f"takes at most {MAX_TERMS} terms", "range")
    if any(weight > MAX_TERM_WEIGHT for _, weight in items):
        _refuse(f"a weight must be between 0 and {MAX_TERM_WEIGHT:g}", "range")
    return [{"term": term, "weight": weight} for term, weight in items]


def _refuse(message: str, code: str = "type") -> None:
    raise InvalidParams([FieldError("compel_weights", message, code)])


def _number(weight: float) -> str:
    return f"{weight:.4f}".rstrip("0").rstrip(".")
