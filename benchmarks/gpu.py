"""Full-size SDXL, WAN 2.1 1.3B and Qwen2.5-7B on a card, with random weights: speed does not depend on them.

    python -m benchmarks.gpu [--only sdxl|wan|qwen] [--out FILE]     on a card; each part takes under ten minutes
    python -m benchmarks.gpu --tiny                                  the same program at tiny size on the CPU
    python -m benchmarks.gpu --plan                                  the tables without figures

It downloads nothing. Times are wall time; a ratio is to the line of the same shape without switches; "of the peak" is
the share of the matrix peak (for tokens: of the copy bandwidth) that the same card reached in the same run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import NOT_MEASURED, PART_SECONDS, Bench, Case, Setting, Shape, run_case
from models.catalog import Family
from models.origin.libraries import library_versions

SDXL, WAN, QWEN = Family.SDXL, Family.WAN, Family.QWEN
STOCK = Setting()
EXACT = Setting(
    "channels_last, fuse_qkv, compile: regions",
    (("channels_last", True), ("fuse_qkv", True), ("compile", "regions")),
)
EXACT_WAN = Setting("fuse_qkv, compile: regions", (("fuse_qkv", True), ("compile", "regions")))
GOALS = {
    "image": "≤ 1.6 s, then 1.2 s",
    "images": "≥ 0.75 images/s",
    "video": "≤ 90 s, then 60 s",
    "tokens": "≥ 100 tokens/s",
}


def settings(family: Family) -> Iterator[Setting]:
    """Each switch alone, and those that only pay together with compile."""
    yield STOCK
    for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        yield Setting(f"attention: {kernel.partition('_')[0].lower()}", attention=kernel)
    if family is SDXL:
        yield Setting("dtype: float16", dtype="float16")
        yield Setting("dtype: float32", dtype="float32")
        yield Setting("channels_last", (("channels_last", True),))
    yield Setting("fuse_qkv", (("fuse_qkv", True),))
    yield Setting("compile: regions", (("compile", "regions"),))
    yield EXACT if family is SDXL else EXACT_WAN
    yield Setting("quantize: fp8_storage", (("quantize", "fp8_storage"),))
    for kind in ("int8_weights", "int8_dynamic", "fp8_dynamic"):
        yield Setting(f"quantize: {kind}, compile: regions", (("quantize", kind), ("compile", "regions")))
    yield Setting("compile: whole", (("compile", "whole"),))


def sdxl_cases(tiny: bool) -> Iterator[Case]:
    sizes, rows = ((64,), (1, 2)) if tiny else ((512, 768, 1024), (1, 2, 4, 8, 16))
    steps, largest = (2, sizes[-1]) if tiny else (30, sizes[-1])
    for setting in (STOCK, EXACT):
        for size in sizes:
            for count in rows:
                yield _forward("SDXL UNet by size and rows", SDXL, setting, Shape(size, size, count))
    for setting in (STOCK, EXACT):
        yield _job("SDXL, a job", SDXL, setting, Shape(largest, largest, 1), steps, goal=GOALS["image"])
        yield _throughput(setting, Shape(largest, largest, 4), steps)
    for setting in settings(SDXL):
        yield _forward("SDXL UNet by switch", SDXL, setting, Shape(largest, largest, 2))
    for size in sizes:
        yield _decode("SDXL VAE", SDXL, Shape(size, size, 1))
    image = Shape(largest, largest, 1)
    yield _job("SDXL, a job", SDXL, Setting("guidance_interval: 0.2 to 0.8"), image, steps, interval=(0.2, 0.8))
    yield _job("SDXL, a job", SDXL, Setting("few_step_lora: 4 steps, no guidance"), image, 4, guidance=1.0, of=steps)
    yield _job("SDXL, a job", SDXL, Setting("offload: model", offload=True), image, steps)


def wan_cases(tiny: bool) -> Iterator[Case]:
    shape = Shape(64, 32, 1, 5) if tiny else Shape(832, 480, 1, 81)
    steps = 4 if tiny else 50
    for setting in settings(WAN):
        yield _forward("WAN transformer by switch", WAN, setting, shape, passes=2)
    yield _decode("WAN VAE", WAN, shape)
    interval = Setting(f"{EXACT_WAN.name}, guidance_interval: 0.2 to 0.8", EXACT_WAN.switches)
    cached = Setting("step_cache: 0.05", (("step_cache", {"threshold": 0.05}),))
    yield _job("WAN, a job", WAN, EXACT_WAN, shape, steps, goal=GOALS["video"], repeats=1)
    yield _job("WAN, a job", WAN, interval, shape, steps, interval=(0.2, 0.8), repeats=1)
    yield _job("WAN, a job", WAN, cached, shape, steps, repeats=1)
    yield _job("WAN, a job", WAN, STOCK, shape, steps, repeats=1)


def qwen_cases(tiny: bool) -> Iterator[Case]:
    new = 4 if tiny else 150
    for name in ("generate", "generate, static cache", "continuous batching"):
        for streams in (1, 2) if tiny else (1, 8, 32):
            goal = GOALS["tokens"] if streams == 1 else ""
            yield Case(
                "Qwen2.5-7B",
                f"{streams} stream{'s' * (streams > 1)}, 128 tokens in, {new} out",
                Setting(name),
                "tokens/s",
                lambda bench, name=name, streams=streams: _tokens(bench, name, streams, new),  # type: ignore[misc]
                goal=goal,
            )


PARTS: dict[str, Callable[[bool], Iterator[Case]]] = {"sdxl": sdxl_cases, "wan": wan_cases, "qwen": qwen_cases}


def _forward(group: str, family: Family, setting: Setting, shape: Shape, passes: int = 1) -> Case:
    return Case(
        group,
        f"{_size(shape)}, guided step" if passes == 2 else f"{_size(shape)}, {shape.rows} row{'s' * (shape.rows > 1)}",
        setting,
        "ms",
        lambda bench: passes * bench.forward_ms(family, setting, shape),
        lambda bench: passes * bench.tflop(family, shape),
    )


def _decode(group: str, family: Family, shape: Shape) -> Case:
    return Case(
        group, f"{_size(shape)}, decode", STOCK, "ms",
        lambda bench: bench.decode_ms(family, STOCK, shape),
        lambda bench: bench.decode_tflop(family, shape),
    )  # fmt: skip


def _job(
    group: str, family: Family, setting: Setting, shape: Shape, steps: int, *, guidance: float = 5.0,
    interval: tuple[float, float] | None = None, goal: str = "", repeats: int = 3, of: int | None = None,
) -> Case:  # fmt: skip
    share = 1 + (interval[1] - interval[0] if interval else float(guidance > 1))
    return Case(
        group, f"{_size(shape)}, {of or steps} steps guided, with decode", setting, "s",
        lambda bench: bench.job_seconds(family, setting, shape, steps, guidance, interval, repeats),
        None if dict(setting.switches).get("step_cache") else
        lambda bench: steps * share * bench.tflop(family, shape) + bench.decode_tflop(family, shape),
        goal,
    )  # fmt: skip


def _throughput(setting: Setting, shape: Shape, steps: int) -> Case:
    return Case(
        "SDXL, a job", f"{_size(shape)}, {steps} steps guided, {shape.rows} images a call, with decode", setting,
        "images/s",
        lambda bench: shape.rows / bench.job_seconds(SDXL, setting, shape, steps, 5.0),
        goal=GOALS["images"],
    )  # fmt: skip


def _tokens(bench: Bench, name: str, streams: int, new: int) -> float:
    """New tokens of all streams in a second, the reading of the prompts included."""
    model = bench.model(QWEN, STOCK)
    prompts = torch.randint(5, model.config.vocab_size, (streams, 128), device=bench.device)
    if name == "continuous batching":
        return streams * new / _continuous_seconds(bench, model, prompts.tolist(), new)
    options: dict[str, Any] = {"cache_implementation": "static"} if "static" in name else {}
    mask = torch.ones_like(prompts)
    ms = bench.time_ms(
        lambda: model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
        ),
        least=2,
        seconds=0.0,
    )
    return streams * new / (ms / 1000)


def _continuous_seconds(bench: Bench, model: Any, prompts: list[list[int]], new: int) -> float:
    """From the first request to the last token, median; the manager's thread is started once and not counted."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    limits = {} if bench.device == "cuda" else {"num_blocks": 64, "max_batch_tokens": 512, "page_size": 16}
    # shared blocks would spare the second round its prompts
    limits |= {"allow_block_sharing": False}
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**limits),
    ) as manager:

        def answer() -> None:
            names = set(manager.add_requests(prompts, max_new_tokens=new))
            until = time.monotonic() + 120
            while names:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    names.discard(result.request_id)
                if time.monotonic() > until:
                    raise RuntimeError("continuous batching gave no answer in two minutes")

        return bench.time_ms(answer, least=2, seconds=0.0) / 1000


def _size(shape: Shape) -> str:
    return f"{shape.width}x{shape.height}" + (f"x{shape.frames}" if shape.frames > 1 else "")


def tables(bench: Bench | None, parts: list[str], tiny: bool, match: str = "") -> str:
    """Measures all parts, or lists what would be measured where there is no device; the markdown of both."""
    text = ""
    for part in parts:
        deadline = time.monotonic() + PART_SECONDS
        results = []
        for case in PARTS[part](tiny):
            if match not in case.setting.name:
                continue
            value, why = run_case(bench, case, deadline)
            results.append((case, value, why))
            print(f"{case.group}: {case.what}: {case.setting.name}: {why or f'{value:.4g} {case.unit}'}", flush=True)
        text += _table(bench, results)
        if bench is not None:
            bench.release()
    return text.rstrip() + "\n"


def _table(bench: Bench | None, results: list[tuple[Case, float | None, str]]) -> str:
    text = ""
    for group in dict.fromkeys(case.group for case, _, _ in results):
        text += f"## {group}\n\n| Shape | Switch | Measured | Ratio | Of the peak | Goal |\n"
        text += "| --- | --- | --- | --- | --- | --- |\n"
        for case, value, why in results:
            if case.group == group:
                base = next((v for other, v, _ in results if _is_base(other, case) and v is not None), None)
                text += _line(bench, case, value, why, base)
        text += "\n"
    return text


def _is_base(other: Case, case: Case) -> bool:
    plain = other.setting in (STOCK, Setting("generate"))
    return plain and (other.group, other.what) == (case.group, case.what)


def _line(bench: Bench | None, case: Case, value: float | None, why: str, base: float | None) -> str:
    measured, ratio, peak = why, "", ""
    if value is not None and bench is not None:
        measured = f"{value:.4g} {case.unit}"
        ratio = "" if base is None else f"{value / base:.2f}"
        if case.tflop is not None:
            seconds = value / 1000 if case.unit == "ms" else value
            peak = f"{case.tflop(bench) / seconds / bench.peak_tflops:.0%}"
        elif case.unit == "tokens/s" and case.what.startswith("1 "):
            weights = sum(weight.nbytes for weight in bench.model(QWEN, STOCK).parameters())
            peak = f"{weights * value / 1e9 / bench.bandwidth_gbs:.0%} (bandwidth)"
    return f"| {case.what} | `{case.setting.name}` | {measured} | {ratio} | {peak} | {case.goal} |\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=tuple(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU unless --device cuda is given")
    parser.add_argument("--plan", action="store_true", help="measure nothing")
    parser.add_argument("--match", default="", help="only switches with this in their names")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = "cpu" if options.tiny and not torch.cuda.is_available() else options.device
    if device == "cpu" and not options.tiny and not options.plan:
        parser.error("full-size models need a card; --tiny runs on the CPU, --plan measures nothing")
    if device == "cuda" and not torch.cuda.is_available() and not options.plan:
        parser.error("there is no CUDA device here")
    bench = None if options.plan else Bench(device, "tiny" if options.tiny else "full")
    told = NOT_MEASURED if bench is None else bench.describe()
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    parts = [options.only] if options.only else list(PARTS)
    text = f"{told}; {versions}\n\n{tables(bench, parts, options.tiny, options.match)}"
    print(f"\n{text}")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
