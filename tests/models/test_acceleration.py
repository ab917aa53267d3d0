import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, WanPipeline
from peft import LoraConfig
from pydantic import ValidationError

from models.catalog import Family, default_for
from models.denoising.acceleration import (
    EXACT,
    LOSSY,
    Acceleration,
    Applied,
    FewStepLora,
    StepCache,
    apply,
    blank_inputs,
    denoisers,
    warm,
)
from models.generation import ModelLoadFailed
from models.profile import ModelSpec, load_profile

SDXL, WAN = Family.SDXL, Family.WAN
Make = Callable[[], Any]


@pytest.fixture(scope="module")
def make(tiny_sdxl: Path, tiny_wan: Path) -> Callable[[Family], Any]:
    stock = {SDXL: StableDiffusionXLPipeline.from_pretrained(tiny_sdxl), WAN: WanPipeline.from_pretrained(tiny_wan)}
    for pipeline in stock.values():
        pipeline.set_progress_bar_config(disable=True)

    def copied(family: Family) -> Any:
        return copy.deepcopy(stock[family])

    return copied


def latents(pipeline: Any, **changes: Any) -> Any:
    size = (
        {"height": 32, "width": 32, "num_frames": 5}
        if hasattr(pipeline, "transformer")
        else {"height": 64, "width": 64}
    )
    call = (
        {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"} | size | changes
    )
    with torch.no_grad():
        return pipeline(**call, generator=torch.Generator().manual_seed(1))[0]


def difference(made: Any, expected: Any) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


def on(pipeline: Any, family: Family, **switches: Any) -> Applied:
    return apply(pipeline, Acceleration(**switches), family, "cpu", "float32")


# --- what may be asked for ------------------------------------------------------------------------------------


def test_switches_are_all_off_by_default_and_sorted_into_exact_and_lossy() -> None:
    assert Acceleration().on() == ()
    assert Applied(Acceleration()).settings() == {}
    assert {*EXACT, *LOSSY} == set(Acceleration.model_fields) - {"compile_rows"}


@pytest.mark.parametrize(
    "switches",
    [
        {"guidance_interval": (0.5, 0.5)},
        {"guidance_interval": (0, 1)},
        {"guidance_interval": (0, 1.5)},
        {"compile_rows": (1,)},
        {"compile": "regions", "compile_rows": ()},
        {"compile": "regions", "step_cache": {"threshold": 0.1}},
        {"compile": "regions", "quantize": "fp8_storage"},
        {"step_cache": {"threshold": 0}},
        {"quantise": "int8_weights"},
    ],
)
def test_switches_that_contradict_each_other_are_refused(switches: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Acceleration.model_validate(switches)


@pytest.mark.parametrize(
    ("family", "device", "dtype", "offload", "switches", "reason"),
    [
        (WAN, "cuda", "bfloat16", "none", {"channels_last": True}, "channels_last"),
        (SDXL, "cuda", "bfloat16", "none", {"step_cache": {"threshold": 0.1}}, "step_cache"),
        (WAN, "cpu", "bfloat16", "none", {"quantize": "fp8_dynamic"}, "needs a card"),
        (SDXL, "cuda", "float16", "none", {"quantize": "int8_dynamic"}, "bfloat16"),
        (WAN, "cuda", "bfloat16", "model", {"quantize": "int8_weights"}, "offload"),
        (Family.QWEN, "cuda", "bfloat16", "none", {"compile": "regions"}, "does not exist for qwen"),
    ],
)
def test_switches_that_can_take_no_effect_are_refused_by_the_profile(
    family: Family, device: str, dtype: str, offload: str, switches: dict[str, Any], reason: str
) -> None:
    assert reason in "".join(Acceleration(**switches).refusals(family, device, dtype, offload))
    entry: dict[str, Any] = {
        "family": family,
        "model_name": "m",
        "source": "a/b",
        "device": device,
        "dtype": dtype,
        "memory_gib": 1,
        "disk_gib": 1,
        "num_gpus": 0 if device == "cpu" else 1,
    }
    if family is not Family.QWEN:
        entry |= {"defaults": default_for(family), "offload": offload}
    with pytest.raises(ValidationError, match=reason):
        ModelSpec.model_validate(entry | {"acceleration": switches})
    assert ModelSpec.model_validate(entry).acceleration == Acceleration()


def test_an_attention_kernel_of_a_card_is_refused_on_the_cpu() -> None:
    entry = load_profile("laptop").models[WAN].model_dump(exclude_defaults=True)
    ModelSpec.model_validate(entry | {"device": "cpu"})
    with pytest.raises(ValidationError, match="attention kernels"):
        ModelSpec.model_validate(entry | {"device": "cpu", "attention": "cudnn"})


@pytest.mark.parametrize("name", ["gpu-24gb", "gpu-80gb"])
@pytest.mark.parametrize("family", [SDXL, WAN])
def test_gpu_profiles_switch_exact_ones_on_and_lossy_ones_off(name: str, family: Family) -> None:
    switched = set(load_profile(name).models[family].acceleration.on())
    assert not switched & set(LOSSY)
    # a fused projection would take no LoRA, so it is left to profiles without them
    assert switched == set(EXACT) - {"fuse_qkv"} - ({"channels_last"} if family is WAN else set())
    assert load_profile(name).models[family].acceleration.refuses_loras() is None


def test_loras_beside_a_switch_that_passes_them_by_are_refused_by_the_profile() -> None:
    entry = load_profile("laptop").models[SDXL].model_dump(exclude_defaults=True)
    entry |= {"loras": {"ink": {"source": "a/b", "file": "ink.safetensors"}}, "lora_cache_gib": 0.1}
    assert ModelSpec.model_validate(entry | {"acceleration": {"channels_last": True}}).loras
    with pytest.raises(ValidationError, match="loras: fuse_qkv"):
        ModelSpec.model_validate(entry | {"acceleration": {"fuse_qkv": True}})


def test_laptop_profile_has_no_switches() -> None:
    assert all(spec.acceleration == Acceleration() for spec in load_profile("laptop").models.values())


# --- the exact ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        (SDXL, {"channels_last": True}),
        (SDXL, {"fuse_qkv": True}),
        (WAN, {"fuse_qkv": True}),
        (SDXL, {"channels_last": True, "fuse_qkv": True}),
    ],
)
def test_exact_switches_change_latents_by_rounding_only(
    make: Callable[[Family], Any], family: Family, switches: dict[str, Any]
) -> None:
    pipeline = make(family)
    applied = on(pipeline, family, **switches)
    assert difference(latents(pipeline), latents(make(family))) < 1e-5
    settings = applied.settings()
    assert settings.items() >= switches.items()
    assert settings.get("fused_attentions", 0) > 0 or "fuse_qkv" not in switches


def test_channels_last_reaches_the_convolutions_of_the_unet_and_the_vae(make: Callable[[Family], Any]) -> None:
    pipeline = make(SDXL)
    on(pipeline, SDXL, channels_last=True)
    for part in (pipeline.unet, pipeline.vae):
        kernels = [weight for weight in part.parameters() if weight.ndim == 4 and weight.shape[2] > 1]
        assert kernels
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


def test_fused_projections_pass_a_lora_by_and_the_switch_says_so(make: Callable[[Family], Any], lora: Path) -> None:
    apart, fused = make(SDXL), make(SDXL)
    applied = on(fused, SDXL, fuse_qkv=True)
    apart.load_lora_weights(lora)
    fused.load_lora_weights(lora)
    assert difference(latents(fused), latents(apart)) > 1e-3
    assert "LoRA" in (applied.acceleration.refuses_loras() or "")
    assert Acceleration(channels_last=True, compile="regions").refuses_loras() is None
    assert Acceleration(quantize="fp8_storage").refuses_loras() is not None


@pytest.mark.parametrize(
    ("family", "switches", "size"),
    [
        (WAN, {"compile": "regions", "compile_rows": (1,)}, (32, 32)),
        (SDXL, {"compile": "regions", "compile_rows": (2,), "channels_last": True}, (64, 64)),
    ],
)
def test_compiled_regions_are_warm_after_load_and_change_latents_by_rounding_only(
    make: Callable[[Family], Any], family: Family, switches: dict[str, Any], size: tuple[int, int]
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    pipeline = make(family)
    applied = on(pipeline, family, **switches)
    warmed = warm(pipeline, applied, [size], frames=5)
    assert warmed.compiled_graphs > 0
    assert warmed.settings() == applied.settings() == {name: on for name, on in switches.items() if name in EXACT}
    graphs = counters["stats"]["unique_graphs"]
    longest = {"max_sequence_length": 512} if family is WAN else {}
    made = latents(pipeline, **longest)
    assert counters["stats"]["unique_graphs"] == graphs
    assert difference(made, latents(make(family), **longest)) < 1e-5


def test_warming_without_compile_does_nothing(make: Callable[[Family], Any]) -> None:
    applied = Applied(Acceleration(channels_last=True))
    assert warm(make(SDXL), applied, [(64, 64)]) is applied


@pytest.mark.parametrize(("family", "shape"), [(SDXL, (3, 4, 8, 12)), (WAN, (3, 16, 2, 8, 12))])
def test_blank_inputs_have_the_shapes_that_the_denoiser_takes(
    make: Callable[[Family], Any], family: Family, shape: tuple[int, ...]
) -> None:
    pipeline = make(family)
    (denoiser,) = denoisers(pipeline)
    with torch.no_grad():
        (made,) = denoiser(**blank_inputs(pipeline, denoiser, 3, 96, 64, frames=5), return_dict=False)
    assert tuple(made.shape) == shape


# --- the lossy ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [SDXL, WAN])
def test_fp8_storage_halves_the_blocks_and_changes_latents_a_little(
    make: Callable[[Family], Any], family: Family
) -> None:
    pipeline = make(family)
    applied = on(pipeline, family, quantize="fp8_storage")
    assert applied.settings()["quantized_layers"] > 0
    assert 1e-5 < difference(latents(pipeline), latents(make(family))) < 0.5


@pytest.mark.parametrize("kind", ["int8_weights", "int8_dynamic"])
@pytest.mark.parametrize("family", [SDXL, WAN])
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is an optional extra")
def test_int8_weights_take_effect(make: Callable[[Family], Any], family: Family, kind: str) -> None:
    pipeline = make(family)
    assert on(pipeline, family, quantize=kind).settings()["quantized_layers"] > 0
    assert 1e-5 < difference(latents(pipeline), latents(make(family))) < 0.5


def test_int8_without_torchao_fails_the_load(make: Callable[[Family], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadFailed, match="torchao"):
        on(make(WAN), WAN, quantize="int8_weights")


def test_compile_without_a_compiler_fails_the_load(
    make: Callable[[Family], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelLoadFailed, match="compiler"):
        on(make(WAN), WAN, compile="regions")


def test_a_device_that_shows_only_at_load_is_checked_there(make: Callable[[Family], Any]) -> None:
    with pytest.raises(ModelLoadFailed, match="needs a card"):
        on(make(WAN), WAN, quantize="fp8_dynamic")


@pytest.fixture(scope="module")
def lora(make: Callable[[Family], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random weights for the tiny UNet."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet = make(SDXL).unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        unet.add_adapter(
            LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        )
    folder = tmp_path_factory.mktemp("lora")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def test_few_step_lora_is_merged_and_equals_the_unmerged_one(make: Callable[[Family], Any], lora: Path) -> None:
    beside, merged = make(SDXL), make(SDXL)
    beside.load_lora_weights(lora, adapter_name="beside")
    beside.set_adapters("beside", 0.5)
    beside.scheduler = type(beside.scheduler).from_config(beside.scheduler.config, timestep_spacing="trailing")
    applied = on(merged, SDXL, few_step_lora=FewStepLora(source=str(lora), scale=0.5))
    assert applied.settings()["few_step_lora_layers"] > 0
    assert difference(latents(merged), latents(beside)) < 1e-5
    assert merged.scheduler.config.timestep_spacing == "trailing"
    assert not any("lora" in name for name, _ in merged.unet.named_parameters())
    assert difference(latents(merged), latents(make(SDXL))) > 1e-3


def test_few_step_lora_before_fused_projections_is_part_of_them(make: Callable[[Family], Any], lora: Path) -> None:
    apart, fused = make(SDXL), make(SDXL)
    wanted = FewStepLora(source=str(lora))
    on(apart, SDXL, few_step_lora=wanted)
    on(fused, SDXL, few_step_lora=wanted, fuse_qkv=True)
    assert difference(latents(fused), latents(apart)) < 1e-5


def test_few_step_lora_that_is_not_there_or_not_for_the_model_fails_the_load(
    make: Callable[[Family], Any], lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadFailed, match="few_step_lora"):
        on(make(SDXL), SDXL, few_step_lora=FewStepLora(source=str(tmp_path / "missing.safetensors")))
    with pytest.raises(ModelLoadFailed, match="few_step_lora"):
        on(make(WAN), WAN, few_step_lora=FewStepLora(source=str(lora)))


def test_step_cache_skips_blocks_and_a_tighter_one_changes_less(make: Callable[[Family], Any]) -> None:
    expected = latents(make(WAN), num_inference_steps=8)
    far, near = make(WAN), make(WAN)
    on(far, WAN, step_cache=StepCache(threshold=0.5))
    on(near, WAN, step_cache=StepCache(threshold=1e-9))
    assert difference(latents(near, num_inference_steps=8), expected) < 1e-5
    assert difference(latents(far, num_inference_steps=8), expected) > 1e-5


def test_step_cache_keeps_requests_apart_by_context_names(make: Callable[[Family], Any]) -> None:
    pipeline = make(WAN)
    on(pipeline, WAN, step_cache=StepCache(threshold=0.5))
    (transformer,) = denoisers(pipeline)
    inputs = []
    for seed in (1, 2):
        noise = torch.Generator().manual_seed(seed)
        blank = blank_inputs(pipeline, transformer, 1, 32, 32, 5)
        inputs.append({name: torch.randn(value.shape, generator=noise) for name, value in blank.items()})

    def step(request: int, number: int, context: str) -> Any:
        with torch.no_grad(), transformer.cache_context(context):
            given = inputs[request] | {"timestep": torch.tensor([900.0 - 50 * number])}
            return transformer(**given, return_dict=False)[0]

    alone = []
    for request in (0, 1):
        alone.append([step(request, number, "alone") for number in range(3)])
        transformer._reset_stateful_cache()
    order = [(request, number) for number in range(3) for request in (0, 1)]
    own = [step(request, number, f"{request}:cond") for request, number in order]
    transformer._reset_stateful_cache()
    shared = [step(request, number, "cond") for request, number in order]
    expected = [alone[request][number] for request, number in order]
    assert all(torch.equal(made, wanted) for made, wanted in zip(own, expected, strict=True))
    assert not all(torch.equal(made, wanted) for made, wanted in zip(shared, expected, strict=True))
