"""`python -m benchmarks.language`: tokens per second of one-by-one `generate`, of static batches, and of our backend.

The contenders take turns in one run, on the tiny model and on a random Qwen2 of some size, for 1, 4 and 16 streams. A
stream is a request of its own length; a static batch is as long as its longest answer, and only tokens that somebody
asked for count. On the CPU the time is that of the process (all threads), so that a neighbour on the machine hurts
little; on a card it is the clock on the wall. Every contender writes greedy words; where they differ from `generate`'s,
the table says so. Prompts begin alike, as enhancement prompts do.

`--requests 1000` sends so many through the backend as well, and prints what that does to memory.
"""

import argparse
import gc
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers

from models.profile import ModelSpec
from models.qwen import Qwen
from models.samples.tiny import ensure_tiny
from models.writing.completions import CompletionCache
from models.writing.language import Message, Sampling

STREAMS = (1, 4, 16)
SYSTEM = "You write prompts for an image model. Rewrite the request as one prompt of a few phrases, in English. " * 3
SIZES = {
    "mid": {"vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2},
    "1.5b": {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2},
    "7b": {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip

Work = list[tuple[list[Message], int]]


def build(size: str, folder: Path, dtype: str) -> Path:
    """A checkpoint with random weights: the tiny one, or one of a real shape with the tiny tokenizer."""
    tiny = ensure_tiny("qwen", folder)
    if size == "tiny":
        return tiny
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    config = transformers.Qwen2Config(
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": True} | SIZES[size],
    )
    torch.manual_seed(0)
    target = folder / size
    transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def loaded(size: str, folder: Path, device: str, dtype: str) -> Qwen:
    """The backend on such a checkpoint. Answers end at their length, never before: noise would end them anywhere."""
    fields: dict[str, Any] = {"family": "qwen", "model_name": size, "source": "bench", "device": device, "dtype": dtype}
    fields |= {"memory_gib": 1 if device == "cuda" else 0, "disk_gib": 0, "num_gpus": 1 if device == "cuda" else 0}
    model = Qwen(ModelSpec.model_validate(fields), build(size, folder, dtype))
    model.load()
    model._model.generation_config.eos_token_id, model._ends = -1, frozenset()
    return model


def work(streams: int, longest: int, seed: int) -> Work:
    """So many requests of different lengths."""
    rng = random.Random(seed)
    return [
        (
            [Message("system", SYSTEM), Message("user", "a cat on a mat " * rng.randint(1, 5))],
            rng.randint(longest // 4, longest),
        )
        for _ in range(streams)
    ]


def one_by_one(model: Qwen, asked: Work) -> list[str]:
    """`generate` for each request."""
    return [text for request in asked for text in in_batches(model, [request])]


def in_batches(model: Qwen, asked: Work, size: int = 16) -> list[str]:
    """`generate` for a batch, padded on the left, until its longest answer is written."""
    texts = []
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        prompts = [model._encode(messages) for messages, _ in batch]
        width = max(map(len, prompts))
        pad = model._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        with torch.inference_mode():
            out = model._model.generate(ids, attention_mask=mask, max_new_tokens=max(new for _, new in batch))
        texts += [
            model._decode(row[width : width + new].tolist()).strip() for row, (_, new) in zip(out, batch, strict=True)
        ]
    return texts


def continuous(model: Qwen, asked: Work) -> list[str]:
    """The backend. It forgets the answers before, or it would give those."""
    model.completions = CompletionCache(1_000_000)
    answers = [model.submit(messages, Sampling(new)) for messages, new in asked]
    return [answer.wait().text for answer in answers]


CONTENDERS: dict[str, Callable[[Qwen, Work], list[str]]] = {
    "one by one": one_by_one,
    "static batches": in_batches,
    "continuous": continuous,
}


def seconds(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compare(model: Qwen, streams: int, longest: int, rounds: int) -> str:
    """A row of the table: the median rate of each contender, its ratio to the first, and how many answers are equal."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    equal = dict.fromkeys(CONTENDERS, 0)
    for number in range(rounds + 1):
        asked = work(streams, longest, number)
        tokens = sum(new for _, new in asked)
        said: dict[str, list[str]] = {}
        for name, contender in CONTENDERS.items():
            started = seconds(model.device)
            said[name] = contender(model, asked)
            if number:  # the first round is warm-up
                rates[name].append(tokens / (seconds(model.device) - started))
        for name, texts in said.items():
            equal[name] += sum(a == b for a, b in zip(texts, said["one by one"], strict=True)) if number else 0
    medians = {name: statistics.median(found) for name, found in rates.items()}
    first = medians["one by one"]
    cells = [f"{first:,.1f}"]
    for name in ("static batches", "continuous"):
        cells.append(f"{medians[name]:,.1f} ({medians[name] / first:.2f}x, {equal[name]}/{streams * rounds} equal)")
    return f"| {model.model_name} | {streams} | {' | '.join(cells)} |"


def endure(model: Qwen, requests: int) -> None:
    """Memory while so many requests go through, sampled and streamed."""
    process, share = psutil.Process(), max(1, requests // 5)
    print(f"\n{requests} requests of 32 tokens through the backend, {model.model_name}: resident MiB after each fifth")
    figures = []
    for part in range(5):
        answers = [
            model.submit([Message("user", f"{part} {n}")], Sampling(32, 1.0, 0.9, n), "job") for n in range(share)
        ]
        for answer in answers:
            answer.wait()
        del answers, answer
        gc.collect()
        figures.append(process.memory_info().rss / 2**20)
    print(", ".join(f"{figure:,.1f}" for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on the CPU, bfloat16 on a card")
    parser.add_argument("--sizes", nargs="+", choices=("tiny", *SIZES), default=["tiny", "mid"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=48, help="new tokens of the longest answer")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--requests", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    transformers.logging.set_verbosity_error()  # each `generate` says that answers which never end may go on
    transformers.logging.disable_progress_bar()
    dtype = chosen.dtype or ("float32" if chosen.device == "cpu" else "bfloat16")
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{chosen.rounds} rounds, {where}, {chosen.threads} thread(s), {dtype}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print("| model | streams | one by one, tokens/s | static batches | continuous |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for size in chosen.sizes:
            with closing(loaded(size, Path(folder), chosen.device, dtype)) as model:
                for streams in STREAMS:
                    print(compare(model, streams, chosen.longest, chosen.rounds), flush=True)
                if chosen.requests and size == "tiny":
                    endure(model, chosen.requests)


if __name__ == "__main__":
    sys.exit(main())
