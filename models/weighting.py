"""Prompt weights for SDXL with Compel: "(word)1.3", "word++", and prompts longer than one CLIP window.

The notation "(word:1.3)" of other programs is understood too; Compel itself would take it for text.

Compel is given the text as it is and may refuse it in many ways; whatever it raises becomes `WeightingFailed`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# One window is 75 tokens. The cost of a window is small (1.3 % of a step's work at 1024x1024) but not bounded.
MAX_WINDOWS = 4

_COLON_WEIGHT = re.compile(r"\(([^():]+):\s*(\d+(?:\.\d+)?)\s*\)")


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
        try:
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
        if not torch.isfinite(result.embeds).all():
            raise WeightingFailed("the weights made embeddings that are not finite")
        dtype = self._pipeline.text_encoder_2.dtype
        tensors = {
            "prompt_embeds": result.embeds,
            "negative_prompt_embeds": result.negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        return WeightedPrompt(
            {name: None if value is None else value.to(device, dtype) for name, value in tensors.items()}
        )


def with_compel_weights(prompt: str) -> str:
    """The prompt with each "(words:1.3)" written as Compel's "(words)1.3"."""
    return _COLON_WEIGHT.sub(r"(\1)\2", prompt)


def plain_text(prompt: str) -> str:
    """The prompt without Compel's markup, in reading order: "a (red)1.3 cat++" gives "a red cat"."""
    from compel import Compel

    texts: list[str] = []
    for part in Compel.parse_prompt_string(prompt).prompts:
        flattened = getattr(part, "prompts", [part])  # a blend holds several
        texts += [_fragments_text(prompt_object.children) for prompt_object in flattened]
    return ", ".join(text for text in texts if text)


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
