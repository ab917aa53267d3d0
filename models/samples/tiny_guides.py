"""Tiny weights for the references, in the published layouts: image prompt adapters, a ControlNet, image-to-video.

Random like the rest of `models.samples.tiny`, and made for its checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SIZE = 32  # of what the image encoders look at
VISION_WIDTH = 32

STYLE_FILE = "ip-adapter_sdxl_vit-h.safetensors"
CHARACTER_FILE = "ip-adapter-plus-face_sdxl_vit-h.safetensors"


def build_ip_adapter(folder: Path, unet: Any) -> None:
    """An image encoder and two adapters in their published file formats: one of the whole picture's embedding, and one
    ("plus") that reads its patches."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(_vision()).save_pretrained(folder / "models" / "image_encoder")
    text = unet.config.cross_attention_dim
    layers = [
        {f"{number}.to_k_ip.weight": _random(width, text), f"{number}.to_v_ip.weight": _random(width, text)}
        for number, width in _cross_attentions(unet)
    ]
    attention = {f"ip_adapter.{name}": tensor for layer in layers for name, tensor in layer.items()}
    whole = {
        "proj.weight": _random(4 * text, VISION_WIDTH),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    target = folder / "sdxl_models"
    target.mkdir(parents=True)
    for file, projection in ((STYLE_FILE, whole), (CHARACTER_FILE, _resampler(text))):
        named = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
        scattered = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in attention.items()}
        save_file(named | scattered, target / file)


def build_controlnet(folder: Path, unet: Any) -> None:
    """A ControlNet of the UNet. The published ones begin with zeros in the layers that join it to the UNet; after a
    training these are something else, and so they are here."""
    import torch
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 16))
    joining = (net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block, *net.controlnet_down_blocks)
    for layer in joining:
        torch.nn.init.normal_(layer.weight, std=0.2)
    net.save_pretrained(folder, safe_serialization=True)


def build_image_to_video(folder: Path, checkpoint: Path, *, both_frames: bool = False, sees: bool = True) -> None:
    """An image-to-video checkpoint with the text encoder and VAE of the tiny one for text.

    As WAN 2.1's, with an image encoder if it `sees`; `both_frames` as its one for first and last frames. The one that
    does not see is as WAN 2.2's: it has the frames in its latents only.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionModel

    text = WanPipeline.from_pretrained(checkpoint)
    patches = (IMAGE_SIZE // 8) ** 2 + 1
    seeing: dict[str, Any] = {"image_dim": VISION_WIDTH, "added_kv_proj_dim": 48} if sees else {}
    if both_frames:
        seeing["pos_embed_seq_len"] = 2 * patches
    config = {name: value for name, value in text.transformer.config.items() if not name.startswith("_")}
    transformer = WanTransformer3DModel.from_config(config | {"in_channels": 36} | seeing)
    WanImageToVideoPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.text_encoder,
        vae=text.vae,
        scheduler=text.scheduler,
        transformer=transformer,
        image_encoder=CLIPVisionModel(_vision()) if sees else None,
        image_processor=CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE) if sees else None,
    ).save_pretrained(folder, safe_serialization=True)


def _vision() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=VISION_WIDTH,
    )


def _cross_attentions(unet: Any) -> list[tuple[int, int]]:
    """Number in the file format and width of each layer that attends to text; every other one, from 1 on."""
    widths = []
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            widths.append(unet.get_submodule(name.removesuffix(".processor")).to_q.out_features)
    return [(1 + 2 * place, width) for place, width in enumerate(widths)]


def _resampler(text: int, width: int = 64, tokens: int = 4, layers: int = 4) -> dict[str, Any]:
    """The perceiver of a "plus" adapter: its heads are 64 wide."""
    import torch

    tensors = {"latents": torch.randn(1, tokens, width) / width**0.5}
    for name, (out, given) in {"proj_in": (width, VISION_WIDTH), "proj_out": (text, width)}.items():
        tensors |= {f"{name}.weight": _random(out, given), f"{name}.bias": torch.zeros(out)}
    norms = ["norm_out"]
    for layer in range(layers):
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        tensors[f"{attention}.to_q.weight"] = _random(width, width)
        tensors[f"{attention}.to_kv.weight"] = _random(2 * width, width)
        tensors[f"{attention}.to_out.weight"] = _random(width, width)
        tensors[f"{forward}.1.weight"] = _random(4 * width, width)
        tensors[f"{forward}.3.weight"] = _random(width, 4 * width)
        norms += [f"{attention}.norm1", f"{attention}.norm2", f"{forward}.0"]
    for name in norms:
        size = text if name == "norm_out" else width
        tensors |= {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.zeros(size)}
    return tensors


def _random(out: int, given: int) -> Any:
    import torch

    return torch.randn(out, given) / given**0.5
