"""Acceleration: what makes a loaded diffusers pipeline faster or smaller, each a named switch of the profile.

Exact switches change the output by rounding only; lossy ones change the picture and are off unless a profile turns
them on. What each costs and gains is in docs/reference/acceleration.md. A switch either takes effect or the model does
not load: `Acceleration.refusals` says what a profile can't ask for, `apply` checks what only the machine knows.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.catalog import Family

log = structlog.get_logger()

Quantize = Literal["none", "int8_weights", "int8_dynamic", "fp8_dynamic", "fp8_storage"]
Compile = Literal["none", "regions", "whole"]

EXACT = ("channels_last", "fuse_qkv", "compile")
LOSSY = ("quantize", "few_step_lora", "guidance_interval", "step_cache")

_UNETS = (Family.SDXL, Family.RV51)
_TORCHAO = ("int8_weights", "int8_dynamic", "fp8_dynamic")
_FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with fp8 matrix units
_BLOCKS = ("transformer_blocks.", "blocks.")
# Each new combination of LoRAs, sizes and dtypes is one more graph of the same function; torch's own limit is 8,
# past which it goes on uncompiled.
_GRAPHS = 64


class FewStepLora(BaseModel):
    """A distillation LoRA (Lightning, LCM, Hyper) that is merged into the weights, so that a few steps are enough.

    `source` is a repository or a local folder or file, `weight_name` the file in it. The profile's `defaults` must
    name the steps, the guidance and the scheduler that it was made for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    weight_name: str | None = None
    scale: float = Field(default=1.0, gt=0, le=2)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"


class StepCache(BaseModel):
    """First Block Cache: where the first block's residual moved by less than `threshold` (relative, mean of absolute
    values) since the last step, the rest of the transformer is not run and its last residual is used again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(gt=0, le=1)


class Acceleration(BaseModel):
    """The switches of one model, all off by default.

    Exact: `channels_last` lays convolutions out for tensor cores; `fuse_qkv` joins the projections of attention in
    one product; `compile` the repeated blocks ("regions") or the "whole" denoiser, warmed at load for `compile_rows`
    rows. Lossy: `quantize` (weights in 8 bits, "dynamic" the activations too; "fp8_storage" saves memory, not time);
    `few_step_lora`; `guidance_interval`, the part of the steps from start to stop that are guided; `step_cache`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels_last: bool = False
    fuse_qkv: bool = False
    compile: Compile = "none"
    compile_rows: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(1, 2, 4), min_length=1)
    quantize: Quantize = "none"
    few_step_lora: FewStepLora | None = None
    guidance_interval: tuple[float, float] | None = None
    step_cache: StepCache | None = None

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.guidance_interval is not None:
            start, stop = self.guidance_interval
            if not 0 <= start < stop <= 1 or (start, stop) == (0, 1):
                raise ValueError("guidance_interval: 0 <= start < stop <= 1, and a part of the steps")
        if self.compile == "none" and "compile_rows" in self.model_fields_set:
            raise ValueError("compile_rows would have no effect without compile")
        if self.compile != "none" and self.step_cache is not None:
            raise ValueError("step_cache decides at every step what is run, which breaks the graphs of compile")
        if self.compile != "none" and self.quantize == "fp8_storage":
            raise ValueError("fp8_storage casts the weights around every layer, which breaks the graphs of compile")
        return self

    def on(self) -> tuple[str, ...]:
        """The names of the switches that are on."""
        return tuple(name for name in (*EXACT, *LOSSY) if getattr(self, name) not in (False, None, "none"))

    def refusals(self, family: Family, device: str, dtype: str, offload: str = "none") -> list[str]:
        """Why these switches can't take effect on such a model; empty where they can. `device` may be "auto"."""
        if family not in (*_UNETS, Family.WAN):
            return [f"{name} does not exist for {family.value}" for name in self.on()]
        reasons = []
        if self.channels_last and family is Family.WAN:
            reasons.append("channels_last is for convolutions, and WAN's transformer has none that count")
        if self.step_cache is not None and family in _UNETS:
            reasons.append("step_cache needs a transformer; a UNet has no cache in diffusers")
        if self.quantize == "fp8_dynamic" and device == "cpu":
            reasons.append("fp8_dynamic needs a card")
        if self.quantize in _TORCHAO and dtype == "float16":
            reasons.append(f"{self.quantize} needs bfloat16 (float32 on the CPU)")
        if self.quantize in _TORCHAO and offload != "none":
            reasons.append(f"{self.quantize} keeps its weights on the device, offload {offload} moves them")
        return reasons

    def refuses_loras(self) -> str | None:
        """Why a request's own LoRA would have no or another effect on this model, or None where it is as usual."""
        if self.fuse_qkv:
            return "fuse_qkv: LoRAs change the projections that the fused one has replaced"
        if self.quantize != "none":
            return f"quantize: LoRAs are not run on {self.quantize} weights"
        return None


@dataclass(frozen=True)
class Applied:
    """What `apply` and `warm` did: `changed` counts layers by switch, `compiled_graphs` the graphs that are warm."""

    acceleration: Acceleration
    changed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    compiled_graphs: int = 0

    def settings(self) -> dict[str, Any]:
        """For the settings of each result: the switches that are on, with their values and counts. Two replicas of one
        profile say the same."""
        return self.acceleration.model_dump(mode="json", include=set(self.acceleration.on())) | dict(self.changed)


def apply(pipeline: Any, acceleration: Acceleration, family: Family, device: str, dtype: str) -> Applied:
    """Changes the pipeline in place. Its weights are on their device, or still on the CPU where it will be offloaded.

    Raises `models.generation.ModelLoadFailed` with the reason where a switch can't take effect here.
    """
    if reasons := acceleration.refusals(family, device, dtype):
        raise _refused("; ".join(reasons))
    _check_machine(acceleration, device)
    changed: dict[str, int] = {}
    if acceleration.few_step_lora is not None:
        changed["few_step_lora_layers"] = _merge_lora(pipeline, acceleration.few_step_lora)
    for denoiser in denoisers(pipeline):
        if acceleration.fuse_qkv:
            denoiser.fuse_qkv_projections()
            _add(changed, "fused_attentions", _fused(denoiser))
        if acceleration.quantize != "none":
            _add(changed, "quantized_layers", _quantize(denoiser, acceleration.quantize, dtype))
        if acceleration.channels_last:
            _channels_last(denoiser)
        if acceleration.step_cache is not None:
            _enable_cache(denoiser, acceleration.step_cache)
        if acceleration.compile != "none":
            _compile(denoiser, acceleration.compile)
    if acceleration.channels_last:
        _channels_last(pipeline.vae)
    for name, count in changed.items():
        if not count:
            raise _refused(f"{name} is 0: the switch found nothing to change")
    return Applied(acceleration, MappingProxyType(changed))


def warm(pipeline: Any, applied: Applied, sizes: Sequence[tuple[int, int]], frames: int = 1) -> Applied:
    """Compiles for every row count of `compile_rows`, before the model takes jobs; does nothing without compile.

    `sizes` are (width, height) in pixels: two of them are enough for graphs that take any size. SDXL is warmed for
    prompts of one and of two windows of tokens. Call it with the gradients and kernels set as for jobs, since graphs
    are made for these too. Returns `applied` with the number of graphs.
    """
    if applied.acceleration.compile == "none":
        return applied
    import torch
    from torch._dynamo.utils import counters

    before, started = counters["stats"]["unique_graphs"], time.perf_counter()
    with torch.no_grad():
        for denoiser in denoisers(pipeline):
            windows = (77, 154) if hasattr(pipeline, "unet") else (77,)
            shapes = [(size, 77) for size in sizes] + [(sizes[0], tokens) for tokens in windows[1:]]
            for (width, height), tokens in shapes:
                for rows in applied.acceleration.compile_rows:
                    inputs = blank_inputs(pipeline, denoiser, rows, width, height, frames, tokens)
                    denoiser(**inputs, return_dict=False)
                    if applied.acceleration.compile == "whole" and hasattr(pipeline, "unet"):
                        # a request that runs alone gives the UNet one timestep for all of its rows
                        denoiser(**inputs | {"timestep": inputs["timestep"][0]}, return_dict=False)
    graphs = counters["stats"]["unique_graphs"] - before
    if not graphs:
        raise _refused("compile made no graph")
    log.info("denoiser_compiled", graphs=graphs, seconds=round(time.perf_counter() - started, 1))
    return replace(applied, compiled_graphs=graphs)


def denoisers(pipeline: Any) -> list[Any]:
    """The modules that run at every step: the UNet, or the transformers."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if part is not None]


def blank_inputs(
    pipeline: Any, denoiser: Any, rows: int, width: int, height: int, frames: int = 1, tokens: int = 77
) -> dict[str, Any]:
    """Zeros of the shapes with which a pipeline calls its denoiser; width and height in pixels."""
    import torch

    config, weight = denoiser.config, next(denoiser.parameters())
    floats: dict[str, Any] = {"dtype": denoiser.dtype, "device": weight.device}
    timestep = torch.full((rows,), 500.0, device=weight.device)
    if hasattr(config, "cross_attention_dim"):
        scale = pipeline.vae_scale_factor
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {
            "text_embeds": torch.zeros(rows, pooled, **floats),
            "time_ids": torch.zeros(rows, 6, **floats),
        }
        latents = torch.zeros(rows, config.in_channels, height // scale, width // scale, **floats)
        text = torch.zeros(rows, tokens, config.cross_attention_dim, **floats)
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": text, "added_cond_kwargs": added}
    scale, every = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    shape = (rows, config.in_channels, (frames - 1) // every + 1, height // scale, width // scale)
    text = torch.zeros(rows, 512, config.text_dim, **floats)
    if pipeline.config.expand_timesteps:  # one for each token, of which there is one for every four cells
        timestep = timestep[:, None].expand(rows, shape[2] * (shape[3] // 2) * (shape[4] // 2))
    return {"hidden_states": torch.zeros(shape, **floats), "timestep": timestep, "encoder_hidden_states": text}


# --- the switches -----------------------------------------------------------------------------------------------


def _check_machine(acceleration: Acceleration, device: str) -> None:
    import torch

    if acceleration.quantize in _TORCHAO and importlib.util.find_spec("torchao") is None:
        raise _refused(f"{acceleration.quantize} needs torchao, which is not installed (extra: quantize)")
    if acceleration.quantize == "fp8_dynamic":
        capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else (0, 0)
        if capability < _FP8_CAPABILITY:
            raise _refused(f"fp8_dynamic needs a card of compute capability 8.9, this is {capability}")
    if acceleration.compile != "none":
        needs = "triton" if device.startswith("cuda") else "a C++ compiler"
        has = importlib.util.find_spec("triton") if device.startswith("cuda") else _any_of(("g++", "c++", "clang++"))
        if not has:
            raise _refused(f"compile needs {needs}, which is not there")


def _any_of(programs: Iterable[str]) -> bool:
    return any(shutil.which(program) for program in programs)


def _merge_lora(pipeline: Any, lora: FewStepLora) -> int:
    """Adds the LoRA to the weights and gives the number of layers that it changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(pipeline, "transformer_2", None) is not None:
        raise _refused("few_step_lora: this checkpoint has two transformers, and one LoRA is for one of them")
    source = str(Path(lora.source).expanduser()) if Path(lora.source).expanduser().exists() else lora.source
    try:
        pipeline.load_lora_weights(source, weight_name=lora.weight_name, adapter_name="few_step")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _refused(f"few_step_lora: {type(error).__name__}: {error}") from error
    layers = sum(isinstance(part, BaseTunerLayer) for whole in denoisers(pipeline) for part in whole.modules())
    if layers:
        pipeline.fuse_lora(lora_scale=lora.scale, adapter_names=["few_step"])
    pipeline.unload_lora_weights()
    # the models build each request's scheduler from this one's configuration
    config = {**pipeline.scheduler.config, "timestep_spacing": lora.timestep_spacing}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    return layers


def _fused(denoiser: Any) -> int:
    return sum(hasattr(part, "to_qkv") or hasattr(part, "to_kv") for part in denoiser.modules())


def _quantize(denoiser: Any, kind: Quantize, dtype: str) -> int:
    """Quantises the linear layers of the repeated blocks; what goes in and comes out keeps its precision."""
    import torch

    if kind == "fp8_storage":
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=getattr(torch, dtype))
        return sum(part.dtype is torch.float8_e4m3fn for part in denoiser.parameters())
    quantization = importlib.import_module("torchao.quantization")
    config = {
        "int8_weights": "Int8WeightOnlyConfig",
        "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
        "fp8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
    }[kind]

    def wanted(part: Any, name: str) -> bool:
        inside = any(block in name for block in _BLOCKS)
        # the matrix units take multiples of 16
        return inside and isinstance(part, torch.nn.Linear) and not (part.in_features % 16 or part.out_features % 16)

    count = sum(wanted(part, name) for name, part in denoiser.named_modules())
    quantization.quantize_(denoiser, getattr(quantization, config)(), filter_fn=wanted)
    return count


def _channels_last(module: Any) -> None:
    import torch

    module.to(memory_format=torch.channels_last)


def _enable_cache(denoiser: Any, cache: StepCache) -> None:
    from diffusers import FirstBlockCacheConfig

    denoiser.enable_cache(FirstBlockCacheConfig(threshold=cache.threshold))


def _compile(denoiser: Any, kind: Compile) -> None:
    import torch

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _GRAPHS)
    # in place, so that the module keeps its class and signature
    if kind == "regions":
        denoiser.compile_repeated_blocks()
    else:
        denoiser.compile()


def _add(changed: dict[str, int], name: str, count: int) -> None:
    changed[name] = changed.get(name, 0) + count


def _refused(reason: str) -> Exception:
    from models.generation import ModelLoadFailed  # late: profiles are read without it

    return ModelLoadFailed(f"acceleration: {reason}")
