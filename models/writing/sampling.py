"""Sampling for a batch in which every row has its own temperature, nucleus and seed.

The noise of a row is a function of its seed, of the position in its sequence and of the token, and of nothing else: not
of who is in the batch, of how often an answer was interrupted, or of any global generator. Adding Gumbel noise to
log-probabilities and taking the maximum draws from the distribution (the Gumbel-max trick).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A nucleus is looked for among this many likeliest tokens, and only where it is larger among all: sorting a vocabulary
# of 150,000 for every word costs more than everything else here.
_CANDIDATES = 1024


def noise_key(seed: int, position: int) -> int:
    """64 bits, signed, that stand for the next word at this position of a sequence."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel_noise(keys: Any, tokens: Any) -> Any:
    """Standard Gumbel noise, float32, shape (rows, n), for `tokens` (rows, n) under `keys` (rows, 1); both int64.

    The counter is mixed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014); the upper 24 bits are the uniform
    number. Integers wrap alike on every device, so the noise does too, up to the rounding of two logarithms.
    """
    bits = keys + tokens * -7046029254386353131
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    bits = bits ^ ((bits >> 31) & 0x1FFFFFFFF)
    uniform = (((bits >> 40) & 0xFFFFFF).float() + 0.5) / 0x1000000
    return -(-uniform.log()).log()


def sampled_tokens(scores: Any, temperatures: Any, top_ps: Any, keys: Any) -> Any:
    """One token for each row of `scores` (rows, vocabulary); temperature, nucleus and key have shape (rows, 1)."""
    scaled = scores / temperatures
    total = scaled.logsumexp(-1, keepdim=True)
    likeliest, tokens = scaled.topk(min(_CANDIDATES, scaled.shape[-1]), dim=-1)
    masses = (likeliest - total).exp().cumsum(-1)
    if bool((masses[:, -1:] < top_ps).any()):
        likeliest, tokens = scaled.sort(dim=-1, descending=True)
        masses = (likeliest - total).exp().cumsum(-1)
    before = masses - (likeliest - total).exp()
    # the likeliest token is always kept, and with a nucleus of 1 all are, whatever the sum was rounded to
    outside = (before >= top_ps) & (top_ps < 1)
    outside[:, 0] = False
    noisy = (likeliest + gumbel_noise(keys, tokens)).masked_fill(outside, float("-inf"))
    return tokens.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True)
class Row:
    """How the next token of one sequence is chosen; `history` are its tokens where a processor looks back."""

    temperature: float
    top_p: float
    key: int
    history: list[int] | None


class SeededSampling:
    """Stands where transformers' continuous batching has its list of logits processors: the same calls, by duck type.

    `before` are the processors that the checkpoint's own generation config asks for (a repetition penalty, mostly);
    they see one row at a time, with its whole history, as in `generate`. After the call the likeliest token is the
    chosen one. Rows are noted when a batch is prepared and used when it runs, which is right as long as the two
    alternate: without asynchronous batching and without captured graphs.
    """

    tensors_required = 0  # nothing travels with the batch
    do_processing = True

    def __init__(self, before: Any) -> None:
        self._before = before
        self._rows: list[Row] = []

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Everything was checked when the request came."""

    def fill_defaults(self, arguments: Any) -> None:
        """There are no arguments."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Any) -> Any:
        """Note how each row that gets a token is to be sampled."""
        self._rows = [self._row(request.state) for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def _row(self, state: Any) -> Row:
        asked = state.logit_processor_kwargs
        return Row(
            temperature=asked["temperature"],
            top_p=asked["top_p"],
            # what has been read of the sequence when this step is done; a restart does not change it
            key=noise_key(asked["seed"], state.position_offset),
            history=state.initial_tokens + state.generated_tokens if len(self._before) else None,
        )

    def __call__(self, input_ids: Any, scores: Any, arguments: Any) -> Any:
        """The scores (rows, vocabulary) with the chosen token on top."""
        import torch

        rows, device = self._rows, scores.device
        if len(self._before):
            histories = [torch.tensor([row.history], device=device) for row in rows]
            processed = [
                self._before(history, score[None])
                for history, score in zip(histories, scores[: len(rows)], strict=True)
            ]
            scores = torch.cat(processed)
        chosen = [number for number, row in enumerate(rows) if row.temperature > 0]
        if not chosen:
            return scores
        where = torch.tensor(chosen, device=device)
        column = {"device": device, "dtype": torch.float32}
        tokens = sampled_tokens(
            scores[where],
            torch.tensor([[rows[number].temperature] for number in chosen], **column),
            torch.tensor([[rows[number].top_p] for number in chosen], **column),
            torch.tensor([[rows[number].key] for number in chosen], device=device),
        )
        scores = scores.clone()
        scores[where, tokens] = float("inf")
        return scores
