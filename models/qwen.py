"""Qwen, the language model that rewrites prompts: messages in, one completion out.

Sampling uses a random generator of its own, so that a seed gives the same words on the same device whatever
else runs in the process. Control tokens written in a message ("<|im_end|>") stay plain text: a prompt
can't start a system message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.engine import (
    GenerationError,
    InvalidInput,
    ModelLoadFailed,
    as_generation_error,
    release_device_memory,
)

if TYPE_CHECKING:
    from models.profile import ModelSpec

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Role
    content: str


@dataclass(frozen=True)
class Completion:
    """What the model wrote, special tokens left out.

    `finish_reason`: "stop" where the model ended its answer, "length" at `max_new_tokens`, "cancelled" where the
    caller stopped it (`text` is then what was written so far). `seconds` is the time on the model, without waiting.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: FinishReason


def _never() -> bool:
    return False


class Qwen:
    """One causal language model with its tokenizer. Threads may share it; completions run one at a time.

    `weights` is a folder or the name of a repository; see `models.profile.resolve_weights`.
    """

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        self.spec = spec
        self.weights = weights
        self.model_name = spec.model_name
        self.revision = spec.revision
        self.device: str = spec.device
        self.loaded = False
        self._tokenizer: Any = None
        self._model: Any = None
        self._one_at_a_time = threading.Lock()

    def load(self) -> None:
        """Loads tokenizer and weights, downloading them if they are not here. Raises `ModelLoadFailed`."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelLoadFailed(f"{self.model_name}: the profile asks for a CUDA device and there is none")
        if isinstance(self.weights, Path) and not self.weights.exists():
            raise ModelLoadFailed(f"{self.model_name}: there is nothing at {self.weights}")
        source, revision = str(self.weights), self.revision
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=getattr(torch, self.spec.dtype)
            )
            model = model.to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadFailed(f"{self.model_name}: {type(error).__name__}: {error}") from error
        except RuntimeError as error:
            release_device_memory()
            raise ModelLoadFailed(f"{self.model_name}: {as_generation_error(error).message}") from error
        if not tokenizer.chat_template:
            raise ModelLoadFailed(f"{self.model_name}: the tokenizer has no chat template")
        # Sampling is done by _SeededChoice; the checkpoint's own sampling settings would only contradict it.
        defaults = model.generation_config
        defaults.do_sample = False
        defaults.temperature = defaults.top_p = defaults.top_k = None
        if defaults.pad_token_id is None:
            defaults.pad_token_id = tokenizer.pad_token_id
        self._tokenizer, self._model = tokenizer, model
        self.loaded = True

    def warm_up(self) -> None:
        """A completion of one token, so that the first caller does not pay for lazy initialisation."""
        self.complete([Message("user", "warm up")], max_new_tokens=1, temperature=0, top_p=1, seed=0)

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        should_stop: Callable[[], bool] = _never,
    ) -> Completion:
        """One answer to the messages. `temperature` 0 always takes the likeliest token.

        `should_stop` is asked before the first token and after each, from the calling thread. Raises `InvalidInput`
        for values out of range and messages that leave no room in the context, other `GenerationError`s for faults.
        """
        if not self.loaded:
            raise ModelLoadFailed(f"{self.model_name} is not loaded")
        if not (max_new_tokens >= 1 and 0 <= temperature <= 2 and 0 < top_p <= 1 and 0 <= seed < 2**63):
            raise InvalidInput("max_new_tokens >= 1, temperature 0 to 2, top_p above 0 to 1, seed 0 to 2**63-1")
        encoded = self._tokenizer.apply_chat_template(
            [asdict(message) for message in messages],
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_tensors="pt",
            return_dict=True,
        )
        prompt_tokens = int(encoded["input_ids"].shape[1])
        context = int(self._model.config.max_position_embeddings)
        if prompt_tokens + max_new_tokens > context:
            raise InvalidInput(f"{prompt_tokens} + {max_new_tokens} tokens don't fit the context of {context}")
        with self._one_at_a_time:
            if should_stop():
                return Completion("", prompt_tokens, 0, 0.0, "cancelled")
            started = time.perf_counter()
            try:
                new_ids, cancelled = self._generate(encoded, max_new_tokens, temperature, top_p, seed, should_stop)
            except GenerationError:
                raise
            except Exception as error:
                failure = as_generation_error(error)
                release_device_memory()
                raise failure from error
            seconds = time.perf_counter() - started
        ends = self._model.generation_config.eos_token_id
        ended = bool(new_ids) and new_ids[-1] in (ends if isinstance(ends, list) else [ends])
        return Completion(
            text=self._tokenizer.decode(new_ids, skip_special_tokens=True).strip(),
            prompt_tokens=prompt_tokens,
            new_tokens=len(new_ids),
            seconds=seconds,
            finish_reason="cancelled" if cancelled else "stop" if ended else "length",
        )

    def _generate(
        self,
        encoded: Any,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        should_stop: Callable[[], bool],
    ) -> tuple[list[int], bool]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        stop = _AskedToStop(should_stop)
        choice = [] if temperature == 0 else [_SeededChoice(temperature, top_p, seed)]
        with torch.inference_mode():
            ids = self._model.generate(
                **encoded.to(self.device),
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList(choice),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        new_ids = ids[0, encoded["input_ids"].shape[1] :].tolist()
        return new_ids, stop.stopped


class _AskedToStop:
    """A stopping criterion of transformers: ends the loop as soon as the caller says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self.stopped = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.stopped = self.stopped or self._should_stop()
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device, dtype=torch.bool)


class _SeededChoice:
    """A logits processor after which the likeliest token is a sample with temperature and nucleus.

    Adding Gumbel noise to log-probabilities and taking the maximum draws from the distribution (the Gumbel-max
    trick), which needs no global random state; the noise is drawn on the CPU, so a seed means the same on any device.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        import torch
        from transformers.generation import TopPLogitsWarper

        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        kept = self._nucleus(input_ids, scores / self._temperature)
        exponential = torch.empty(kept.shape, dtype=torch.float32).exponential_(generator=self._generator)
        return kept - exponential.clamp_(min=1e-30).log_().to(kept.device)
