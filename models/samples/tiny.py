"""Tiny checkpoints with random weights in the real layout, built on the spot: nothing is downloaded.

What `ensure_tiny` writes is read by `from_pretrained` of the stock classes, tokenizers included, so the laptop
profile and the tests run the very code that loads and runs the published weights. The pictures are coloured
noise; sizes, steps, seeds, files and errors are real.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from models.catalog import Family

log = structlog.get_logger()

# Part of the folder's name: raise it when anything below changes what is built.
RECIPE = 1

Variant = Literal[
    "plain",
    "inpaint",
    "ip_adapter",
    "controlnet",
    "two_experts",
    "expanded_timesteps",
    "image_to_video",
    "image_to_video_latents",
    "first_and_last_frame",
]

_STAMP = "ourvidz-tiny.json"
_SEED = 20250727
_BOUNDARY = 0.875  # of the noise; above it the one expert works, below it the other, as in Wan2.2-T2V-A14B

# Whole-word tokens for the tokenizers, so that a prompt's token count is near that of the published vocabularies
# and their budgets (75, 175, 250) mean something here. Any other text falls back to single bytes or characters.
_WORDS = """
a an the of in on at by to from for with without and or as is are was it its his her their this that one two three
four five no not very more most over under behind near through across into between above below up down out off
man woman person people child face eyes hair hand hands body portrait model smile skin dress hat coat
cat dog horse bird fish fox wolf lion animal tree trees flower flowers forest garden field grass leaf river lake
sea ocean wave waves beach island mountain mountains valley hill snow rain storm cloud clouds sky sun sunset
sunrise moon star stars night day morning evening winter summer spring autumn fog mist fire water ice stone
sand city street road bridge house tower castle window door room kitchen table chair car train boat ship plane
market shop old new young small large big tall long short wide deep high low soft hard bright dark warm cold
light lighting shadow shadows colour color colors red green blue yellow orange purple pink white black golden
silver gray brown glass metal wood wooden paper gold photo photograph photography photorealistic realistic
painting oil watercolor drawing sketch illustration digital art artwork concept style cinematic film movie scene
shot close closeup wide angle view aerial macro lens camera bokeh depth field focus sharp blurry blur grain
background foreground composition detail details detailed highly intricate texture textures quality best masterpiece
professional studio natural dramatic beautiful elegant calm slow fast motion smooth steady moving movement
walking running standing sitting flying dancing playing looking holding flowing falling rising turning panning
tracking gentle vivid rich muted contrast exposure balanced resolution high-quality ultra 4k 8k hd
low bad worst ugly deformed distorted extra missing fingers limbs anatomy watermark text logo signature noise
artifacts jpeg cropped duplicate frame frames static flicker jitter video clip timeline continuous
""".split()  # noqa: SIM905 - a list of names would be three pages


def ensure_tiny(family: str, root: Path, variant: Variant = "plain") -> Path:
    """Return the folder of the tiny checkpoint of `family` ("sdxl", "wan" or "qwen") under `root`; build it if absent.

    Variants of SDXL: "inpaint", whose UNet takes nine channels. Of WAN: "two_experts", as WAN 2.2's 14B, and
    "expanded_timesteps", as its 5B. Beside the plain ones, for references: "ip_adapter" and "controlnet" of SDXL;
    "image_to_video", "first_and_last_frame" (WAN 2.1's two) and "image_to_video_latents" (as WAN 2.2's) of WAN.

    Safe when several processes call it at once: each builds in a folder of its own and one rename wins, so that
    a folder under its final name is always complete. Takes seconds once, then nothing.
    """
    build = _BUILDERS[Family(family)] if variant == "plain" else _VARIANTS[Family(family), variant]
    infix = "" if variant == "plain" else f"-{variant.replace('_', '-')}"
    target = root / f"{Family(family).value}-tiny{infix}-{RECIPE}"
    if (target / _STAMP).is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        _build(build, building)
        (building / _STAMP).write_text(json.dumps({"family": Family(family).value, "recipe": RECIPE}))
        building.chmod(0o755)
        try:
            os.rename(building, target)  # noqa: PTH104 - must fail on a non-empty target, as rename(2) does
        except OSError:
            if not (target / _STAMP).is_file():
                raise
        else:
            log.info("tiny_checkpoint_built", family=Family(family).value, path=str(target))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _build(build: Callable[[Path], None], folder: Path) -> None:
    import torch

    from models.origin.libraries import quiet_libraries

    quiet_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        build(folder)


def _build_sdxl(folder: Path, channels: int = 4) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, tokenizer_2 = _clip_tokenizer("<|endoftext|>"), _clip_tokenizer("!")  # padded as the published pair
    width = 32
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + width,
        cross_attention_dim=2 * width,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=64,
        scaling_factor=0.13025,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)


def _build_wan(folder: Path, *, experts: int = 1, expand_timesteps: bool = False) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _umt5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=96,
            num_layers=2,
            rope_max_seq_len=128,
        )
        for _ in range(experts)
    ]
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=_BOUNDARY if experts == 2 else None,
        expand_timesteps=expand_timesteps,
    ).save_pretrained(folder, safe_serialization=True)


def _build_qwen(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _qwen_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_beside_sdxl(what: str, folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    from models.samples.tiny_guides import build_controlnet, build_ip_adapter

    unet = UNet2DConditionModel.from_pretrained(ensure_tiny("sdxl", folder.parent), subfolder="unet")
    build = {"ip_adapter": build_ip_adapter, "controlnet": build_controlnet}[what]
    build(folder, unet)


def _build_beside_wan(folder: Path, **options: bool) -> None:
    from models.samples.tiny_guides import build_image_to_video

    build_image_to_video(folder, ensure_tiny("wan", folder.parent), **options)


_BUILDERS: dict[Family, Callable[[Path], None]] = {
    Family.SDXL: _build_sdxl,
    Family.WAN: _build_wan,
    Family.QWEN: _build_qwen,
}
_VARIANTS: dict[tuple[Family, Variant], Callable[[Path], None]] = {
    (Family.SDXL, "inpaint"): partial(_build_sdxl, channels=9),
    (Family.WAN, "two_experts"): partial(_build_wan, experts=2),
    (Family.WAN, "expanded_timesteps"): partial(_build_wan, expand_timesteps=True),
    (Family.SDXL, "ip_adapter"): partial(_build_beside_sdxl, "ip_adapter"),
    (Family.SDXL, "controlnet"): partial(_build_beside_sdxl, "controlnet"),
    (Family.WAN, "image_to_video"): _build_beside_wan,
    (Family.WAN, "image_to_video_latents"): partial(_build_beside_wan, sees=False),
    (Family.WAN, "first_and_last_frame"): partial(_build_beside_wan, both_frames=True),
}


def _byte_symbols() -> list[str]:
    """One printable character for each byte value; in code point order this is how CLIP's and GPT-2's lists begin."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _clip_tokenizer(pad_token: str) -> Any:
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    # BPE trained on the list until each of its words is one token; the ids of the bytes are CLIP's own (0 to 511)
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=1 << 14, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator((word for word in _WORDS if word.isascii() and word.isalpha()), trainer)
    merges = [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]
    symbols = _byte_symbols()
    names = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocab = {name: number for number, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)


def _umt5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -3.0) for word in dict.fromkeys(_WORDS) if len(word) > 1]
    pieces += [(chr(code), -5.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {symbol: number for number, symbol in enumerate([*_byte_symbols(), *specials])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",  # noqa: S106 - a special symbol, no secret
        pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=32768,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
