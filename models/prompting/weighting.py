"""Prompt weights for SDXL with Compel: "(word)1.3", "word++", and prompts longer than one CLIP window.

The notation "(word:1.3)" of other programs is understood too, and a group behind any character; Compel itself would
take them for text (`models.prompting.notation`).

Compel may refuse a text in many ways; whatever it raises becomes `WeightingFailed`. Its parser reads a group again
for each thing that the group may turn out to be, at each level of nesting, so a text is measured before it is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from models.prompting.notation import CONJUNCTION, left_over, masked, unread_weight, with_compel_weights

# One window is 75 tokens. The cost of a window is small (1.3 % of a step's work at 1024x1024) but not bounded.
MAX_WINDOWS = 4

MAX_NESTING = 2
# About a third of a millisecond of parsing each; plain text of the full length of a prompt is just within it.
MAX_PARSING = 4000
MAX_SIGNS = 6
# Far from what is still a picture; far larger ones overflow in the denoiser.
MAX_WEIGHT = 10.0

# Measured: a level of nesting makes parsing 4 to 5 times as long, and an empty group costs as much as 20 characters.
_NESTING_FACTOR = 5
_GROUP_COST = 20

_ESCAPED = re.compile(r"\\[()\"]")
_SIGNS = re.compile(rf"[+-]{{{MAX_SIGNS + 1},}}")

_WITHOUT_EFFECT = re.compile(r"(?<!\\)\.swap\s*\(|(?:use|with)Lora\s*\(")
_ONE_CONJUNCTION = re.compile(r"(?s)\s*\(.*\)\s*\.(?:and|add|blend)\s*\([^()]*\)\s*")


class WeightingFailed(Exception):
    """Compel could not encode this prompt. `reason` names the error's type, never the text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class WeightedPrompt:
    """Embeddings as keyword arguments of the SDXL pipelines. `tokens_cut` is always 0: longer prompts get windows."""

    arguments: dict[str, Any]
    tokens_cut: int = 0


class Weighting:
    """Compel around the tokenizers and text encoders of one SDXL pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def encode(self, prompt: str, negative_prompt: str | None, device: Any) -> WeightedPrompt:
        """Encodes both prompts to the same number of windows. Raises `WeightingFailed`, whatever went wrong.

        Without guidance there is no negative prompt (None). Memory that ran out is not Compel's fault and
        is raised as it is.
        """
        import torch
        from compel import CompelForSDXL

        prompt = with_compel_weights(prompt)
        negative_prompt = None if negative_prompt is None else with_compel_weights(negative_prompt)
        tokenizer = self._pipeline.tokenizer
        window = tokenizer.model_max_length
        for text in (prompt, negative_prompt or ""):
            check_parsable(text)
        try:
            for text in (prompt, negative_prompt or ""):
                _check_read(text)
            compel = CompelForSDXL(self._pipeline, device=device)
            tokens = len(tokenizer(plain_text(prompt), truncation=False, verbose=False).input_ids)
            if tokens > MAX_WINDOWS * window:
                raise WeightingFailed(f"the prompt is longer than {MAX_WINDOWS} windows")
            result = compel(prompt, negative_prompt=negative_prompt)
            pooled = _pooled(compel, prompt, device)
            negative_pooled = None if negative_prompt is None else _pooled(compel, negative_prompt, device)
        except (torch.OutOfMemoryError, WeightingFailed):
            raise
        except Exception as error:  # its parser alone raises five kinds
            raise WeightingFailed(type(error).__name__) from error
        windows = result.embeds.shape[1] // window
        if windows > MAX_WINDOWS:
            raise WeightingFailed(f"the prompt fills {windows} windows, {MAX_WINDOWS} is the most")
        dtype = self._pipeline.text_encoder_2.dtype
        encoded = {
            "prompt_embeds": result.embeds,
            "negative_prompt_embeds": result.negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        arguments = {name: None if value is None else value.to(device, dtype) for name, value in encoded.items()}
        if not all(torch.isfinite(value).all() for value in arguments.values() if value is not None):
            raise WeightingFailed("the weights made embeddings that are not finite")
        return WeightedPrompt(arguments)


def check_parsable(prompt: str) -> None:
    """Raises `WeightingFailed` for a text that Compel would parse for more than a second or two, or not sensibly.

    That is: parentheses that don't match or nest deeper than `MAX_NESTING`, more than `MAX_SIGNS` weight signs in
    a row, or too much text in groups. Takes Compel's notation; linear in the text.
    """
    text = _ESCAPED.sub("  ", prompt)
    if _SIGNS.search(text):
        raise WeightingFailed(f"more than {MAX_SIGNS} weight signs in a row")
    # How quotes pair up is the parser's business; between the first and the last one all text may be quoted.
    quoted = range(text.find('"'), text.rfind('"'))
    depth, cost = 0, 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not 0 <= depth <= MAX_NESTING:
            raise WeightingFailed(f"parentheses that don't match, or nest deeper than {MAX_NESTING}")
        cost += _NESTING_FACTOR ** (depth + (place in quoted)) + _GROUP_COST * (character == "(")
    if depth:
        raise WeightingFailed("parentheses that don't match")
    if cost > MAX_PARSING:
        raise WeightingFailed("too much text in parentheses or quotes")


def plain_text(prompt: str) -> str:
    """The prompt without Compel's markup, in reading order: "a (red)1.3 cat++" gives "a red cat"."""
    texts = [_fragments_text(fragments) for fragments in _parsed(prompt)]
    return ", ".join(text for text in texts if text)


def _parsed(prompt: str) -> list[list[Any]]:
    """The fragments of each part of the prompt."""
    from compel import Compel

    parsed: list[list[Any]] = []
    for part in Compel.parse_prompt_string(prompt).prompts:
        parsed += [flattened.children for flattened in getattr(part, "prompts", [part])]  # a blend holds several
    return parsed


def _check_read(prompt: str) -> None:
    """Raises `WeightingFailed` where Compel would take a weight for text or leave something out, without saying so."""
    hidden = masked(prompt)
    if _WITHOUT_EFFECT.search(hidden):
        raise WeightingFailed("swap, useLora and withLora have no effect here")
    joined = len(CONJUNCTION.findall(hidden))
    if joined > 1 or (joined and not _ONE_CONJUNCTION.fullmatch(hidden)):
        raise WeightingFailed("a blend or conjunction has to be the whole prompt")
    if unread_weight(prompt):
        raise WeightingFailed("a weight behind a colon that can't be read")
    fragments = [fragment for part in _parsed(hidden) for fragment in part]
    if any(left_over(fragment.text) for fragment in fragments):
        raise WeightingFailed("a weight that can't be read")
    if any(abs(fragment.weight) > MAX_WEIGHT for fragment in fragments):
        raise WeightingFailed(f"a weight above {MAX_WEIGHT:g}")


def _fragments_text(fragments: list[Any]) -> str:
    words: list[str] = []
    for fragment in fragments:
        # "cat.swap(dog)" is encoded as its original
        nested = getattr(fragment, "original", None)
        words.append(_fragments_text(nested) if nested is not None else fragment.text)
    return " ".join(" ".join(words).split())


def _pooled(compel: Any, prompt: str, device: Any) -> Any:
    # CompelForSDXL computes the pooled vector from the text with its markup in it
    provider = compel.compel_2.conditioning_provider
    return provider.get_pooled_embeddings([plain_text(prompt)], device=device)
