"""How the GPU benchmark measures: a device with its measured peaks, one model at a time, and cases within a limit."""

import contextlib
import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import random_models
from models.catalog import Family
from models.denoising.acceleration import Acceleration, apply, blank_inputs, denoisers
from models.denoising.guidance import guidance_interval
from models.generation import ModelLoadFailed

NOT_MEASURED = "not measured"
PART_SECONDS = 540  # a part of the benchmark starts nothing new after it
BUILDERS = {Family.SDXL: random_models.sdxl, Family.WAN: random_models.wan, Family.QWEN: random_models.qwen}


@dataclass(frozen=True)
class Shape:
    """What one forward or one job is about: pixels, frames and rows (or images)."""

    width: int
    height: int
    rows: int = 1
    frames: int = 1


@dataclass(frozen=True)
class Setting:
    """How a model is set up: its switches, and the fields that a profile has beside them."""

    name: str = "none"
    switches: tuple[tuple[str, Any], ...] = ()
    attention: str | None = None
    dtype: str | None = None
    offload: bool = False


@dataclass(frozen=True)
class Case:
    """One line of the tables. `run` gives the figure in `unit`; `tflop` the work behind a second or a millisecond."""

    group: str
    what: str
    setting: Setting
    unit: str
    run: Callable[["Bench"], float]
    tflop: Callable[["Bench"], float] | None = None
    goal: str = ""


class Bench:
    """One device, and the model that is on it now; a case that wants another one replaces it."""

    def __init__(self, device: str, size: str) -> None:
        self.device, self.size = device, size
        self.dtype = "bfloat16" if device == "cuda" else "float32"
        self._model: tuple[Any, Any] | None = None
        self.peak_tflops, self.bandwidth_gbs = self._peaks()

    def describe(self) -> str:
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"
        return (
            f"{name}, {self.dtype}, size {self.size}; measured peaks: "
            f"{self.peak_tflops:.3g} TFLOP/s of matrix products, {self.bandwidth_gbs:.3g} GB/s of copies"
        )

    def model(self, family: Family, setting: Setting) -> Any:
        """The model so set up, built on the device; the last one is kept."""
        key = (family, setting.switches, setting.dtype, setting.offload)
        if self._model is None or self._model[0] != key:
            self.release()
            dtype = setting.dtype or self.dtype
            model = BUILDERS[family](self.size, "cpu" if setting.offload else self.device, getattr(torch, dtype))
            if setting.switches:
                apply(model, Acceleration(**dict(setting.switches)), family, self.device, dtype)
            if setting.offload:
                model.enable_model_cpu_offload(device=self.device)
            self._model = (key, model)
        return self._model[1]

    def release(self) -> None:
        self._model = None
        gc.collect()
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def forward_ms(self, family: Family, setting: Setting, shape: Shape) -> float:
        """One forward of the denoiser, median, with random inputs: a card runs zeros faster than numbers."""
        pipeline = self.model(family, setting)
        (denoiser,) = denoisers(pipeline)
        blank = blank_inputs(pipeline, denoiser, shape.rows, shape.width, shape.height, shape.frames)
        inputs = {name: _noise(value) for name, value in blank.items() if name != "timestep"}
        with _attention(setting):
            return self.time_ms(lambda: denoiser(**inputs, timestep=blank["timestep"], return_dict=False))

    def decode_ms(self, family: Family, setting: Setting, shape: Shape) -> float:
        """The VAE's decoding of `rows` pictures or one clip."""
        pipeline = self.model(family, setting)
        weight = next(pipeline.vae.parameters())
        latents = torch.randn(_latent_shape(pipeline, shape), device=weight.device, dtype=weight.dtype)
        return self.time_ms(lambda: pipeline.vae.decode(latents, return_dict=False))

    def job_seconds(
        self, family: Family, setting: Setting, shape: Shape, steps: int, guidance: float,
        interval: tuple[float, float] | None = None, repeats: int = 3,
    ) -> float:  # fmt: skip
        """A whole stock call from embeddings to decoded pixels on the host, median after two steps of warming up."""
        pipeline = self.model(family, setting)
        arguments = random_models.call_arguments(pipeline, shape.rows)
        arguments |= {"width": shape.width, "height": shape.height, "guidance_scale": guidance, "output_type": "np"}
        if family is Family.WAN:
            arguments |= {"num_frames": shape.frames}

        def call(count: int) -> None:
            own = copy.copy(pipeline)
            own.scheduler = copy.deepcopy(pipeline.scheduler)
            full = arguments | {"num_inference_steps": count, "generator": torch.Generator("cpu").manual_seed(0)}
            own(**(guidance_interval(own, full, *interval) if interval and count == steps else full))

        with _attention(setting), torch.no_grad():
            call(2)
            return statistics.median(self._clock(lambda: call(steps)) for _ in range(repeats))

    def time_ms(self, work: Callable[[], Any], least: int = 3, seconds: float = 1.0) -> float:
        """Median milliseconds after two calls of warming up, which also compile."""
        with torch.no_grad():
            for _ in range(2):
                work()
            times, started = [], time.perf_counter()
            while len(times) < least or (time.perf_counter() - started < seconds and len(times) < 50):
                times.append(self._clock(work) * 1000)
        return statistics.median(times)

    def tflop(self, family: Family, shape: Shape) -> float:
        """Of one forward, counted on meta tensors; a multiplication and its addition are two."""
        return _forward_tflop(family, self.size, Shape(shape.width, shape.height, 1, shape.frames)) * shape.rows

    def decode_tflop(self, family: Family, shape: Shape) -> float:
        return _decode_tflop(family, self.size, Shape(shape.width, shape.height, 1, shape.frames)) * shape.rows

    def _clock(self, work: Callable[[], Any]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _peaks(self) -> tuple[float, float]:
        """TFLOP/s of a large matrix product in the dtype, and GB/s of a copy, reading and writing."""
        side = 8192 if self.device == "cuda" else 512
        first, second = (torch.randn(side, side, device=self.device, dtype=getattr(torch, self.dtype)) for _ in "ab")
        product = self.time_ms(lambda: first @ second, least=10)
        block = torch.empty(2**30 if self.device == "cuda" else 2**24, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(block)
        copied = self.time_ms(lambda: target.copy_(block), least=10)
        return 2 * side**3 / product / 1e9, 2 * block.numel() / copied / 1e6


def run_case(bench: Bench | None, case: Case, deadline: float) -> tuple[float | None, str]:
    """The figure, or None and why there is none."""
    if bench is None:
        return None, NOT_MEASURED
    if time.monotonic() > deadline:
        return None, f"{NOT_MEASURED}: out of time"
    try:
        return case.run(bench), ""
    except ModelLoadFailed as failure:
        return None, f"{NOT_MEASURED}: {failure.message}"
    except (RuntimeError, NotImplementedError, ImportError) as error:  # a kernel that the card has not, or no memory
        bench.release()
        return None, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


@cache
def _forward_tflop(family: Family, size: str, shape: Shape) -> float:
    pipeline = BUILDERS[family](size, "meta", torch.bfloat16)
    (denoiser,) = denoisers(pipeline)
    inputs = blank_inputs(pipeline, denoiser, 1, shape.width, shape.height, shape.frames)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**inputs, return_dict=False)
    return counter.get_total_flops() / 1e12


@cache
def _decode_tflop(family: Family, size: str, shape: Shape) -> float:
    pipeline = BUILDERS[family](size, "meta", torch.bfloat16)
    weight = next(pipeline.vae.parameters())
    latents = torch.empty(_latent_shape(pipeline, shape), device="meta", dtype=weight.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipeline.vae.decode(latents, return_dict=False)
    return counter.get_total_flops() / 1e12


def _latent_shape(pipeline: Any, shape: Shape) -> tuple[int, ...]:
    if hasattr(pipeline, "unet"):
        scale = pipeline.vae_scale_factor
        return (shape.rows, pipeline.vae.config.latent_channels, shape.height // scale, shape.width // scale)
    scale, every = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    return (1, pipeline.vae.config.z_dim, (shape.frames - 1) // every + 1, shape.height // scale, shape.width // scale)


def _noise(value: Any) -> Any:
    return (
        {name: _noise(inner) for name, inner in value.items()} if isinstance(value, dict) else torch.randn_like(value)
    )


@contextlib.contextmanager
def _attention(setting: Setting) -> Iterator[None]:
    if setting.attention is None:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, setting.attention)):
        yield
