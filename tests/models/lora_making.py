"""LoRA files as trainers write them, with random matrices for the layers of a loaded pipeline."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Style = Literal["kohya", "diffusers"]

LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "q_proj", "k_proj", "v_proj", "out_proj", "fc1")
CONVOLUTIONS = ("conv1", "conv2")
# what each style calls the parts
PREFIXES = {
    "kohya": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "diffusers": {
        "unet": "unet.",
        "text_encoder": "text_encoder.",
        "text_encoder_2": "text_encoder_2.",
        "transformer": "transformer.",
    },
}


def make_lora(
    path: Path,
    pipeline: Any,
    seed: int,
    *,
    parts: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2"),
    style: Style = "kohya",
    rank: int = 4,
    alpha: float = 2.0,
    size: float = 0.1,
    dtype: torch.dtype = torch.float32,
    within: str = "",
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a LoRA. `size` is the deviation of its numbers; far larger ones make the model amplify rounding itself.

    `within` is what the names of the layers have in them.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = dict(extra or {})
    for part in parts:
        for name, layer in layers(getattr(pipeline, part)):
            if within not in name:
                continue
            weight = layer.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * size
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * size
            if style == "kohya":
                inner = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                key = PREFIXES["kohya"][part] + inner.replace(".", "_")
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
            else:
                key = PREFIXES["diffusers"][part] + name
            halves = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
            tensors[f"{key}.{halves[0]}.weight"] = down.to(dtype)
            tensors[f"{key}.{halves[1]}.weight"] = up.to(dtype)
    save_file(tensors, path)
    return path


def layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in module.named_modules():
        linear = isinstance(layer, torch.nn.Linear) and name.endswith(LINEAR)
        if linear or (isinstance(layer, torch.nn.Conv2d) and name.endswith(CONVOLUTIONS)):
            yield name, layer
