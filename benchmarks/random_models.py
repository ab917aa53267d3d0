"""Pipelines of the published shapes with random weights, built where they run: speed does not depend on the weights.

Configurations: those of stabilityai/stable-diffusion-xl-base-1.0, Wan-AI/Wan2.1-T2V-1.3B-Diffusers and
Qwen/Qwen2.5-7B-Instruct. "mid" and "tiny" have the same parts, smaller. Text encoders are left out: the calls get
embeddings.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,  # as the VAE that the GPU profiles name
}
WAN_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
WAN_VAE: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
QWEN: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}

_SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"unet": {}, "vae": {}, "transformer": {}, "wan_vae": {}, "qwen": {}},
    "mid": {
        "unet": {
            "block_out_channels": (64, 128, 256),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 256,
        },
        "vae": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
        "transformer": {
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "ffn_dim": 1024,
            "num_layers": 6,
            "text_dim": 256,
        },
        "wan_vae": {"base_dim": 8, "num_res_blocks": 1, "dim_mult": [1, 1, 2, 2]},
        "qwen": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4096},
    },
    "tiny": {
        "unet": {
            "block_out_channels": (16, 32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8},
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "ffn_dim": 96,
            "num_layers": 3,
            "text_dim": 32,
            "freq_dim": 32,
        },
        "wan_vae": {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 1, 2, 2]},
        "qwen": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
    },
}  # fmt: skip


def sdxl(size: str, device: str, dtype: Any) -> Any:
    """A `StableDiffusionXLPipeline` without text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    smaller = _SMALLER[size]
    with _built_on(device, dtype):
        unet = UNet2DConditionModel(**SDXL_UNET | smaller["unet"])
        vae = AutoencoderKL(**SDXL_VAE | smaller["vae"])
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return _ready(StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=scheduler, add_watermarker=False, **parts))


def wan(size: str, device: str, dtype: Any) -> Any:
    """A `WanPipeline` without its text encoder; the VAE in float32, as the profiles run it."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    smaller = _SMALLER[size]
    with _built_on(device, dtype):
        transformer = WanTransformer3DModel(**WAN_TRANSFORMER | smaller["transformer"])
    keep_in_float32(transformer)
    with _built_on(device, torch.float32):
        vae = AutoencoderKLWan(**WAN_VAE | smaller["wan_vae"])
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    return _ready(WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer))


def qwen(size: str, device: str, dtype: Any) -> Any:
    """A `Qwen2ForCausalLM` that ends at no token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with _built_on(device, dtype):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN | _SMALLER[size]["qwen"]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def keep_in_float32(transformer: Any) -> None:
    """What `from_pretrained` keeps in float32 whatever type is asked for."""
    kept = tuple(transformer._keep_in_fp32_modules)
    for name, part in transformer.named_modules():
        if name.rpartition(".")[2] in kept:
            part.float()
    for name, weight in transformer.named_parameters():
        if name.rpartition(".")[2] in kept:
            weight.data = weight.data.float()


def call_arguments(pipeline: Any, images: int = 1, seed: int = 0) -> dict[str, Any]:
    """Random embeddings of both prompts, as a call of the pipeline takes them."""
    noise = torch.Generator().manual_seed(seed)

    def embeds(like: Any, *shape: int) -> Any:
        return torch.randn(shape, generator=noise).to(next(like.parameters()).device, like.dtype)

    if hasattr(pipeline, "transformer"):
        width = pipeline.transformer.config.text_dim
        names = ("prompt_embeds", "negative_prompt_embeds")
        return {name: embeds(pipeline.transformer, 1, 512, width) for name in names}
    config = pipeline.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "prompt_embeds": embeds(pipeline.unet, 1, 77, config.cross_attention_dim),
        "negative_prompt_embeds": embeds(pipeline.unet, 1, 77, config.cross_attention_dim),
        "pooled_prompt_embeds": embeds(pipeline.unet, 1, pooled),
        "negative_pooled_prompt_embeds": embeds(pipeline.unet, 1, pooled),
        "num_images_per_prompt": images,
    }


def parameters() -> dict[str, float]:
    """Billions of parameters of the full-size denoisers and of Qwen, counted without any memory."""
    from diffusers import UNet2DConditionModel, WanTransformer3DModel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        models = {
            "sdxl": UNet2DConditionModel(**SDXL_UNET),
            "wan": WanTransformer3DModel(**WAN_TRANSFORMER),
            "qwen": Qwen2ForCausalLM(Qwen2Config(**QWEN)),
        }
    return {name: sum(weight.numel() for weight in model.parameters()) / 1e9 for name, model in models.items()}


@contextlib.contextmanager
def _built_on(device: str, dtype: Any) -> Iterator[None]:
    """Weights come into being on the device and in their type, so that nothing is moved or cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def _ready(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline
