"""The prompt of a picture that is made from another one by a stated change: put together from texts, without a model.

What is to change comes first, because CLIP's window cuts the end; then what the reference was made from, so that what
nobody wants changed is still described. `Composition` says whether anything had to be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models.prompting.prompts import fit

if TYPE_CHECKING:
    from models.prompting.prompts import TokenCounter

ModifyStrategy = Literal["reference_modify_with_prompt", "reference_modify_base_only"]

MODIFY_TEMPLATE = "modify_flow"
# Stands for the description of a reference that nobody described.
SAME_SUBJECT = "same subject, same framing"

_ENDS = " ,;.\n"


@dataclass(frozen=True)
class Composition:
    """A composed prompt. `shortened`: the description was left out in part or whole, or the change itself was cut."""

    text: str
    strategy: ModifyStrategy
    shortened: bool


def compose_modification(base_prompt: str | None, instruction: str | None) -> str:
    """The change, then what the reference shows; without a change just the latter. Empty only where both are.

    A change that the description holds already is not said twice.
    """
    change, base = _trimmed(instruction), _trimmed(base_prompt)
    if not change:
        return base
    if change.casefold() == base.casefold():
        return base
    return f"{change}, {base or SAME_SUBJECT}"


def modify_strategy(instruction: str | None) -> ModifyStrategy:
    """What the composition was made from."""
    return "reference_modify_with_prompt" if _trimmed(instruction) else "reference_modify_base_only"


def compose_within(base_prompt: str | None, instruction: str | None, counter: TokenCounter, limit: int) -> Composition:
    """The same in at most `limit` content tokens of its reader: the description gives way to the change."""
    strategy = modify_strategy(instruction)
    whole = compose_modification(base_prompt, instruction)
    if counter.count(whole) <= limit:
        return Composition(whole, strategy, False)
    change, base = _trimmed(instruction), _trimmed(base_prompt)
    if not change or change.casefold() == base.casefold():
        return Composition(fit(base, counter, limit)[0], strategy, True)
    room = limit - counter.count(f"{change},")
    # A tokenizer may count the joined text a little higher than its parts.
    while room > 0 and base:
        text = compose_modification(fit(base, counter, room)[0], change)
        if counter.count(text) <= limit:
            return Composition(text, strategy, True)
        room -= 1
    return Composition(fit(change, counter, limit)[0], strategy, True)


def _trimmed(text: str | None) -> str:
    return " ".join((text or "").split()).strip(_ENDS)
