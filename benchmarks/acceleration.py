"""Each switch of `models.denoising.acceleration`: its speed beside the same pipeline without it, and what it changes.

    python -m benchmarks.acceleration [--size tiny|mid|full] [--device cuda] [--rounds N] [--out FILE]

Both pipelines have the same random weights and take turns in one run, so that a busy machine slows both. A time is the
process's CPU time on the CPU, and wall time on a card. Random weights show what rounding does, but not what a lossy
switch does to a trained model's pictures.
"""

import argparse
import contextlib
import copy
import importlib.util
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_models
from models.catalog import Family
from models.denoising.acceleration import EXACT, Acceleration, FewStepLora, apply, denoisers, warm
from models.denoising.guidance import guidance_interval
from models.generation import ModelLoadFailed
from models.origin.libraries import library_versions

STEPS, FEW_STEPS = 8, 4
NOT_MEASURED = "not measured"
SIZES: dict[str, dict[Family, dict[str, int]]] = {
    "tiny": {Family.SDXL: {"width": 64, "height": 64}, Family.WAN: {"width": 32, "height": 32, "num_frames": 5}},
    "mid": {Family.SDXL: {"width": 256, "height": 256}, Family.WAN: {"width": 128, "height": 128, "num_frames": 9}},
    "full": {Family.SDXL: {"width": 1024, "height": 1024}, Family.WAN: {"width": 832, "height": 480, "num_frames": 81}},
}
BUILDERS = {Family.SDXL: random_models.sdxl, Family.WAN: random_models.wan}


@dataclass(frozen=True)
class Row:
    """One line of the table. `switches` are those of `Acceleration`; the others are older fields of a profile."""

    family: Family
    name: str
    switches: dict[str, Any] = field(default_factory=dict)
    card_only: bool = False
    dtype: str | None = None
    attention: str | None = None
    offload: bool = False

    @property
    def exact(self) -> bool:
        return self.dtype is None and set(self.switches) <= {*EXACT, "compile_rows"}


@dataclass(frozen=True)
class Measured:
    before_ms: float
    after_ms: float
    ratio: float
    latents: float | None
    psnr: float | None


def rows() -> list[Row]:
    """Every switch of both families."""
    listed = []
    for family in (Family.SDXL, Family.WAN):
        graphs = {"compile_rows": (2,) if family is Family.SDXL else (1,)}
        listed += [
            Row(family, "dtype: bfloat16", dtype="bfloat16"),
            Row(family, "attention: cudnn", attention="CUDNN_ATTENTION", card_only=True),
            Row(family, "attention: flash", attention="FLASH_ATTENTION", card_only=True),
            Row(family, "offload: model", offload=True, card_only=True),
            Row(family, "fuse_qkv", {"fuse_qkv": True}),
            Row(family, "compile: regions", {"compile": "regions", **graphs}),
            Row(family, "compile: whole", {"compile": "whole", **graphs}),
            Row(family, "quantize: int8_weights", {"quantize": "int8_weights"}),
            Row(family, "quantize: int8_dynamic", {"quantize": "int8_dynamic"}),
            Row(family, "quantize: fp8_dynamic", {"quantize": "fp8_dynamic"}, card_only=True),
            Row(family, "quantize: fp8_storage", {"quantize": "fp8_storage"}),
            Row(family, "guidance_interval: 0.2 to 0.8", {"guidance_interval": (0.2, 0.8)}),
        ]
    listed += [
        Row(Family.SDXL, "channels_last", {"channels_last": True}),
        Row(Family.SDXL, f"few_step_lora: {FEW_STEPS} steps, no guidance", {"few_step_lora": {"source": "-"}}),
        Row(Family.WAN, "step_cache: 0.05", {"step_cache": {"threshold": 0.05}}),
        Row(Family.WAN, "step_cache: 0.2", {"step_cache": {"threshold": 0.2}}),
    ]
    return sorted(listed, key=lambda row: (row.family, not row.exact))


class Run:
    """One pipeline and the way in which it is called; `__call__` gives the latents of a whole run."""

    def __init__(self, pipeline: Any, size: dict[str, int], row: Row | None = None, steps: int = STEPS) -> None:
        self.pipeline, self.row, self.steps = pipeline, row, steps
        self.arguments = random_models.call_arguments(pipeline) | size
        self.arguments |= {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}

    def __call__(self) -> Any:
        own = copy.copy(self.pipeline)
        own.scheduler = copy.deepcopy(self.pipeline.scheduler)
        arguments = self.arguments | {"generator": torch.Generator("cpu").manual_seed(7)}
        interval = self.row.switches.get("guidance_interval") if self.row else None
        if interval is not None:
            arguments = guidance_interval(own, arguments, *interval)
        with torch.no_grad(), self._attention():
            return own(**arguments)[0]

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        if self.row is None or self.row.attention is None:
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self.row.attention))


def measure(row: Row, base: Any, size: str, device: str, rounds: int, dtype: str) -> Measured | str:
    """The row's figures, or why there are none."""
    if row.card_only and device == "cpu":
        return f"{NOT_MEASURED}: needs a card"
    if str(row.switches.get("quantize")).startswith("int8") and importlib.util.find_spec("torchao") is None:
        return f"{NOT_MEASURED}: torchao is not installed"
    shape = SIZES[size][row.family]
    stock = Run(base, shape)
    try:
        other = _switched(row, base, shape, device, dtype)
    except ModelLoadFailed as failure:
        return f"{NOT_MEASURED}: {failure.message}"
    expected, made = stock(), other()  # warm, and compared
    # with a LoRA of random weights, other steps and no guidance there is nothing to compare
    compared = "few_step_lora" not in row.switches
    befores, afters = [], []
    for turn in range(rounds):
        for run, times in ((stock, befores), (other, afters)) if turn % 2 else ((other, afters), (stock, befores)):
            times.append(_timed(run, device))
    pairs = [after / before for before, after in zip(befores, afters, strict=True)]
    return Measured(
        before_ms=statistics.median(befores) / stock.steps,
        after_ms=statistics.median(afters) / other.steps,
        ratio=statistics.median(pairs),
        latents=float((made - expected).abs().max() / expected.abs().max()) if compared else None,
        psnr=_psnr(base, made, expected) if compared else None,
    )


def _switched(row: Row, base: Any, shape: dict[str, int], device: str, dtype: str) -> Run:
    pipeline = copy.deepcopy(base)
    if row.dtype is not None:
        for denoiser in denoisers(pipeline):
            denoiser.to(getattr(torch, row.dtype))
            if row.family is Family.WAN:
                random_models.keep_in_float32(denoiser)
    with tempfile.TemporaryDirectory() as folder:
        switches = dict(row.switches)
        if "few_step_lora" in switches:
            switches["few_step_lora"] = FewStepLora(source=str(_random_lora(base, Path(folder))))
        applied = apply(pipeline, Acceleration(**switches), row.family, device, dtype)
    frames = shape.get("num_frames", 1)
    warm(pipeline, applied, [(shape["width"], shape["height"])], frames)
    if row.offload:
        pipeline.enable_model_cpu_offload(device=device)
    run = Run(pipeline, shape, row, FEW_STEPS if "few_step_lora" in row.switches else STEPS)
    if "few_step_lora" in row.switches:
        run.arguments["guidance_scale"] = 1.0
    return run


def _random_lora(base: Any, folder: Path) -> Path:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = copy.deepcopy(base.unet)
    unet.add_adapter(LoraConfig(r=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    base.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def _timed(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run: of this process on the CPU, by the clock on a card."""
    if device == "cpu":
        started = time.process_time()
        run()
        return (time.process_time() - started) * 1000
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def _psnr(pipeline: Any, made: Any, expected: Any) -> float:
    """Of the decoded pixels in 0..1, in dB; infinite where they are equal."""
    first, second = (_pixels(pipeline, latents) for latents in (made, expected))
    error = float((first - second).square().mean())
    return math.inf if error == 0 else 10 * math.log10(1 / error)


def _pixels(pipeline: Any, latents: Any) -> Any:
    vae = pipeline.vae
    latents = latents.to(next(vae.parameters()))
    if hasattr(vae.config, "latents_mean") and vae.config.latents_mean is not None:
        shape = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(vae.config[name]).view(shape).to(latents) for name in ("latents_mean", "latents_std"))
        latents = latents * std + mean
    else:
        latents = latents / vae.config.scaling_factor
    with torch.no_grad():
        pixels = vae.decode(latents, return_dict=False)[0]
    return (pixels / 2 + 0.5).clamp(0, 1).float()


def table(results: list[tuple[Row, Measured | str]]) -> str:
    """The markdown of all rows."""
    lines = [
        "| Model | Switch | Kind | ms a step, without | with | time of a run | change of latents | PSNR, dB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, result in results:
        kind = "exact" if row.exact else "lossy"
        cells = [row.family.value, f"`{row.name}`", kind]
        if isinstance(result, str):
            cells += [result, "", "", "", ""]
        else:
            psnr = "" if result.psnr is None else "equal" if math.isinf(result.psnr) else f"{result.psnr:.0f}"
            change = "needs a trained LoRA" if result.latents is None else f"{result.latents:.1e}"
            cells += [f"{result.before_ms:.1f}", f"{result.after_ms:.1f}", f"{result.ratio:.2f}", change, psnr]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=tuple(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="a part of the names of the switches to measure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    if options.device == "cpu":
        torch.set_num_threads(1)
    results: list[tuple[Row, Measured | str]] = []
    bases: dict[Family, Any] = {}
    for row in rows():
        if options.only and options.only not in row.name:
            continue
        if row.family not in bases:
            bases = {row.family: BUILDERS[row.family](options.size, options.device, getattr(torch, dtype))}
        result = measure(row, bases[row.family], options.size, options.device, options.rounds, dtype)
        print(row.family.value, row.name, result, flush=True)
        results.append((row, result))
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, one thread"
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    told = f"{device}, {dtype}, size {options.size}, {STEPS} steps, {options.rounds} rounds; {versions}"
    text = f"{told}\n\n{table(results)}\n"
    print(f"\n{text}")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
