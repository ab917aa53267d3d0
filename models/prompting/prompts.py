"""Prompts as text with a budget: enhancer templates, token counts, shortening, rule-based additions.

The texts stand in `configs/templates.yaml`; an installation may give its own `Template`s, read from its tables,
to the same functions. Negative prompts are in `models.prompting.negatives`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from models.catalog import Family, Format, Quality
from models.params import ContentMode

# Tokens with start and end. CLIP's positions; what our WAN pipeline is given as the length of UMT5's input.
WINDOWS = {Family.SDXL: 77, Family.RV51: 77, Family.WAN: 512}


class NoTemplate(LookupError):
    """No template fits. An sfw request is never given an nsfw template."""

    code = "no_template_available"


@dataclass(frozen=True)
class Template:
    """A system prompt for the enhancer. `quality` or `enhanced7b` None fits every value.

    `token_limit` counts content tokens of the target model's tokenizer, `max_new_tokens` the enhancer's own.
    """

    name: str
    use_case: str
    target_model: Family
    job_type: Format
    content_mode: ContentMode
    system_prompt: str
    token_limit: int
    max_new_tokens: int
    quality: Quality | None = None
    enhanced7b: bool | None = None


@dataclass(frozen=True)
class RuleTerm:
    """A phrase that rule-based enhancement may add; `unless` are beginnings of words that make it needless."""

    term: str
    format: Format
    unless: tuple[str, ...]
    quality: Quality | None = None


# --- templates ------------------------------------------------------------------------------------------


def _read() -> Any:
    return yaml.safe_load((files("configs") / "templates.yaml").read_text(encoding="utf-8"))


@cache
def builtin_templates() -> tuple[Template, ...]:
    """The templates that come with the project, each once per content mode."""
    raw = _read()
    return tuple(
        Template(
            name=entry["name"],
            use_case=entry["use_case"],
            target_model=Family(entry["target_model"]),
            job_type=Format(entry["job_type"]),
            content_mode=mode,
            system_prompt=f"{entry['system_prompt']} {raw['mode_clauses'][mode]}",
            token_limit=entry["token_limit"],
            max_new_tokens=entry["max_new_tokens"],
            quality=Quality(entry["quality"]) if "quality" in entry else None,
            enhanced7b=entry.get("enhanced7b"),
        )
        for entry in raw["templates"]
        for mode in ("sfw", "nsfw")
    )


# --- token counts and shortening ------------------------------------------------------------------------


class TokenCounter:
    """Counts content tokens (no start, end or padding) the way the model that reads the prompt does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: Path | str, subfolder: str = "tokenizer") -> TokenCounter:
        """Reads the tokenizer of a checkpoint folder or hub repository. Raises `OSError` if there is none."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(path), subfolder=subfolder))

    @cached_property
    def specials(self) -> int:
        """How many tokens of its window the model takes for start and end."""
        return int(self._tokenizer.num_special_tokens_to_add(pair=False))

    def count(self, text: str) -> int:
        encoded = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return len(encoded["input_ids"])


@dataclass(frozen=True)
class Budget:
    """How long a prompt may be, in content tokens. `window` counts the reader's special tokens too."""

    limit: int
    window: int
    specials: int
    windows: int
    clamped: bool


def budget(template: Template, counter: TokenCounter, windows: int = 1) -> Budget:
    """The template's limit, or the room of that many windows of the model that reads the prompt, if that is less.

    `clamped` says that the template asks for more than the model reads.
    """
    window = WINDOWS[template.target_model]
    room = windows * (window - counter.specials)
    return Budget(min(template.token_limit, room), window, counter.specials, windows, room < template.token_limit)


def fit(text: str, counter: TokenCounter, limit: int) -> tuple[str, bool]:
    """`text` in at most `limit` tokens, and whether anything was left out.

    The first phrase stays, then phrases with quality terms in up to a quarter of the room, then the others in
    their order up to the first that does not fit; only where much room is left, shorter ones from further
    on as well. Words are cut only when the first phrase alone is too long. The result never counts more
    than `limit`.
    """
    if counter.count(text) <= limit:
        return text, False
    phrases = _phrases(text)
    if not phrases or counter.count(_joined(phrases[:1])) > limit:
        return _first_words(text, counter, limit), True
    kept = {0}

    def keep(candidates: Iterable[int], room: int, *, skip: bool) -> None:
        for index in candidates:
            attempt = [phrases[i] for i in sorted({*kept, index})]
            if counter.count(_joined(attempt)) <= room:
                kept.add(index)
            elif not skip:
                return

    first = counter.count(_joined(phrases[:1]))
    keep(
        (i for i, phrase in enumerate(phrases) if i and _QUALITY.search(phrase)),
        min(limit, first + limit // 4),
        skip=True,
    )
    keep((i for i in range(len(phrases)) if i not in kept), limit, skip=False)
    if counter.count(_joined(phrases[i] for i in sorted(kept))) < limit * 2 // 3:
        keep((i for i in range(len(phrases)) if i not in kept), limit, skip=True)
    return _joined(phrases[i] for i in sorted(kept)), True


def _phrases(text: str) -> list[str]:
    """Phrases with the mark and the space that end them, not split inside brackets (a weighted phrase is one)."""
    phrases: list[str] = []
    start = 0
    for end in (*(match.end() for match in _BORDER.finditer(text)), len(text)):
        phrase = text[start:end]
        if phrase.count("(") == phrase.count(")") or end == len(text):
            phrases.append(phrase)
            start = end
    return [phrase for phrase in phrases if phrase.strip(_MARKS)]


def _joined(phrases: Iterable[str]) -> str:
    return "".join(phrases).strip(_MARKS)


def _first_words(text: str, counter: TokenCounter, limit: int) -> str:
    words = text.split()
    best = _longest(len(words), lambda size: " ".join(words[:size]), counter, limit)
    if best:
        return best
    return _longest(len(text), lambda size: text[:size], counter, limit)


def _longest(size: int, cut: Callable[[int], str], counter: TokenCounter, limit: int) -> str:
    """The longest cut within the limit, found by halving and then made sure of step by step."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if counter.count(cut(middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    # A tokenizer's count need not grow with every character.
    while low and counter.count(cut(low).strip(_MARKS)) > limit:
        low -= 1
    return cut(low).strip(_MARKS)


_MARKS = " ,;.、，。；\n"
_BORDER = re.compile(r"[,;.]\s+|[、，。；\n]\s*")


@cache
def _rule_data() -> tuple[tuple[str, ...], tuple[RuleTerm, ...]]:
    raw = _read()
    terms = tuple(
        RuleTerm(
            term=entry["term"],
            format=Format(entry["format"]),
            unless=tuple(entry["unless"]),
            quality=Quality(entry["quality"]) if "quality" in entry else None,
        )
        for entry in raw["rule_terms"]
    )
    return tuple(raw["quality_terms"]), terms


_QUALITY = re.compile(rf"(?i)\b(?:{'|'.join(map(re.escape, _rule_data()[0]))})\b")


def add_rule_terms(
    prompt: str, format: Format, quality: Quality, counter: TokenCounter, limit: int
) -> tuple[str, bool]:
    """Enhancement without a model: the caller's words first, then terms for light, composition or motion.

    Deterministic. Returns the text, at most `limit` tokens, and whether the caller's own words were shortened.
    """
    text, compressed = fit(prompt, counter, limit)
    if compressed:
        return text, True
    for rule in _rule_data()[1]:
        if rule.format is not format or rule.quality not in (None, quality):
            continue
        beginnings = "|".join(map(re.escape, rule.unless))
        if re.search(rf"(?i)\b(?:{beginnings})", prompt):
            continue
        longer = f"{text.rstrip(_MARKS)}, {rule.term}"
        if counter.count(longer) <= limit:
            text = longer
    return text, False
