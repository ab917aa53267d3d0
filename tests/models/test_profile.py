import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from models.catalog import Family, default_for
from models.lora.loras import LoraSource
from models.profile import (
    Card,
    ModelSpec,
    Profile,
    fits,
    load_profile,
    profile_names,
    resolve_weights,
    weights_present,
)


def profile_of(**models: dict[str, Any]) -> Profile:
    entries = {}
    for name, changes in models.items():
        entry = {
            "model_name": name,
            "source": "a/b",
            "device": "cuda",
            "memory_gib": 10,
            "disk_gib": 1,
            "num_gpus": 0.5,
        }
        entries[name] = entry | changes
    return Profile.model_validate({"name": "test", "description": "", "models": entries})


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_parses_and_is_named_after_its_file(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.models) == {Family.SDXL, Family.WAN, Family.QWEN}
    assert profile.nsfw_allowed is False


def test_profiles_are_those_that_the_project_promises() -> None:
    assert profile_names() == ["gpu-24gb", "gpu-80gb", "laptop"]


@pytest.mark.parametrize("name", ["gpu-24gb", "gpu-80gb"])
def test_gpu_profiles_name_real_repositories_and_keep_the_specified_defaults(name: str) -> None:
    profile = load_profile(name)
    assert not profile.laptop
    sources = {spec.source for spec in profile.models.values()}
    assert "stabilityai/stable-diffusion-xl-base-1.0" in sources
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in sources
    assert any(source.startswith("Qwen/Qwen2.5-") and source.endswith("-Instruct") for source in sources)
    for family in (Family.SDXL, Family.WAN):
        assert profile.models[family].defaults == default_for(family)
        assert profile.models[family].revision == "main"


def test_gpu_profiles_fit_their_cards() -> None:
    small = fits(load_profile("gpu-24gb"), [Card("L4", 22.5, 22.3)])
    large = fits(load_profile("gpu-80gb"), [Card("A100", 79.2, 78.7)])
    assert [report.fits for report in small + large] == [True] * 6
    assert not all(report.fits for report in fits(load_profile("gpu-80gb"), [Card("L4", 22.5, 22.3)]))


def test_laptop_runs_on_the_cpu_with_small_sizes_and_the_specified_ones() -> None:
    profile = load_profile("laptop")
    assert profile.laptop
    assert all(report.fits and report.place is None for report in fits(profile, []))
    for family in (Family.SDXL, Family.WAN):
        spec = profile.models[family]
        assert spec.source == "tiny"
        assert spec.defaults is not None
        assert set(default_for(family).sizes) < set(spec.defaults.sizes)
        assert spec.defaults.size not in default_for(family).sizes
        assert spec.defaults.steps == default_for(family).steps


def test_profile_loads_from_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    model = {"model_name": "q", "source": "a/b", "device": "cpu", "memory_gib": 0, "disk_gib": 3}
    file.write_text(yaml.safe_dump({"name": "mine", "description": "d", "models": {"qwen": model}}))
    assert load_profile(file) == load_profile(str(file))
    assert load_profile(file).models[Family.QWEN].model_name == "q"


def test_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"gpu-24gb, gpu-80gb, laptop"):
        load_profile("gpu-4000gb")


@pytest.mark.parametrize("content", ["", "- a list", "name: x\nmodels: {}\ndescription: d"])
def test_file_that_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"mapping|models"):
        load_profile(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"devize": "cuda"},
        {"device": "cpu"},
        {"device": "cpu", "num_gpus": 0, "offload": "model"},
        {"device": "cpu", "num_gpus": 0, "dtype": "float16"},
        {"num_gpus": 0},
        {"num_gpus": 2},
        {"memory_gib": -1},
        {"dtype": "float8"},
        {"source": "tiny", "variant": "fp16"},
        {"defaults": {"steps": {"fast": 0}}},
        {"defaults": {"width": 123}},
    ],
)
def test_contradictory_model_is_refused(changes: dict[str, Any]) -> None:
    assert profile_of(sdxl={}).models[Family.SDXL].family is Family.SDXL
    with pytest.raises(ValidationError):
        profile_of(sdxl=changes)


@pytest.mark.parametrize(
    ("family", "changes"), [("wan", {"vae": "a/b"}), ("qwen", {"offload": "model"}), ("qwen", {"attention": "flash"})]
)
def test_field_that_a_family_has_no_use_for_is_refused(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="no effect"):
        profile_of(**{family: changes})


def test_profile_changes_only_the_defaults_it_names() -> None:
    defaults = profile_of(sdxl={"defaults": {"steps": {"fast": 4}}}).models[Family.SDXL].defaults
    assert defaults is not None
    assert defaults.steps.fast == 4
    assert defaults.model_copy(update={"steps": default_for(Family.SDXL).steps}) == default_for(Family.SDXL)


def test_models_are_placed_largest_first_until_memory_ends() -> None:
    profile = profile_of(
        sdxl={"memory_gib": 8, "num_gpus": 0.3},
        wan={"memory_gib": 13, "num_gpus": 0.3},
        qwen={"memory_gib": 4, "num_gpus": 0.3},
    )
    sdxl, wan, qwen = fits(profile, [Card("a", 24, 22)])
    assert (sdxl.fits, wan.fits, qwen.fits) == (True, True, False)
    assert "needs 4 GiB" in qwen.reason
    assert "1.0 GiB" in qwen.reason
    two = fits(profile, [Card("a", 24, 22), Card("b", 24, 5)])
    assert [report.place for report in two] == [0, 0, 1]


def test_free_memory_counts_not_the_whole_card() -> None:
    profile = profile_of(sdxl={"memory_gib": 10})
    assert fits(profile, [Card("a", 24, 10)])[0].fits
    assert not fits(profile, [Card("a", 24, 9.9)])[0].fits


def test_shares_of_a_card_end_at_one() -> None:
    thirds = {"memory_gib": 1, "num_gpus": 0.6}
    reports = fits(profile_of(sdxl=thirds, wan=thirds), [Card("a", 80, 80)])
    assert sorted(report.fits for report in reports) == [False, True]
    exact = fits(profile_of(sdxl={"num_gpus": 0.1}, wan={"num_gpus": 0.2}, qwen={"num_gpus": 0.7}), [Card("a", 80, 80)])
    assert all(report.fits for report in exact)


@pytest.mark.parametrize(("device", "fitting"), [("auto", True), ("cuda", False)])
def test_without_a_card_only_models_that_need_one_fail(device: str, fitting: bool) -> None:
    report = fits(profile_of(sdxl={"device": device}), [])[0]
    assert report.fits is fitting
    assert report.place is None


def spec_of(source: str | Path, **changes: Any) -> ModelSpec:
    return profile_of(sdxl={"source": str(source)} | changes).models[Family.SDXL]


def test_tiny_weights_resolve_to_a_checkpoint_and_count_as_present(tiny_root: Path, tiny_sdxl: Path) -> None:
    spec = load_profile("laptop").models[Family.SDXL]
    assert resolve_weights(spec, tiny_root) == tiny_sdxl
    assert weights_present(spec) == "tiny"


def test_local_folder_is_present_only_when_complete(tiny_sdxl: Path, tmp_path: Path) -> None:
    assert weights_present(spec_of(tiny_sdxl)) == str(tiny_sdxl)
    assert resolve_weights(spec_of(tiny_sdxl), tmp_path) == tiny_sdxl
    assert weights_present(spec_of(tiny_sdxl, variant="fp16")) is None
    assert weights_present(spec_of(tmp_path / "absent")) is None


def test_checkpoint_file_is_present_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert weights_present(spec_of(tmp_path, single_file="model.safetensors")) is not None
    assert weights_present(spec_of(tmp_path, single_file="other.safetensors")) is None


def hub_cache(root: Path, repository: str, files: dict[str, str]) -> None:
    """The layout of the Hugging Face cache with one snapshot."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    for name, content in files.items():
        path = folder / "snapshots" / ("a" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


INDEX = json.dumps(
    {
        "_class_name": "StableDiffusionXLPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
)


@pytest.mark.parametrize(
    ("files", "present"),
    [
        ({}, False),
        ({"unet/diffusion_pytorch_model.fp16.safetensors": ""}, False),
        (
            {
                "unet/diffusion_pytorch_model.fp16.safetensors": "",
                "vae/diffusion_pytorch_model.fp16.safetensors": "",
            },
            True,
        ),
    ],
)
def test_cached_repository_is_present_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], present: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, "some/model", {"model_index.json": INDEX} | files)
    spec = spec_of("some/model", variant="fp16", revision="main")
    assert (weights_present(spec) is not None) is present
    assert weights_present(spec_of("some/other")) is None
    assert resolve_weights(spec, tmp_path) == "some/model"


def test_cached_shards_must_all_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shards = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config.json": "{}", "model.safetensors.index.json": shards, "model-1.safetensors": ""}
    hub_cache(tmp_path, "some/language", files)
    spec = profile_of(qwen={"source": "some/language"}).models[Family.QWEN]
    assert weights_present(spec) is None
    snapshot = tmp_path / "models--some--language" / "snapshots" / ("a" * 40)
    (snapshot / "model-2.safetensors").write_text("")
    assert weights_present(spec) == str(snapshot)


def test_a_model_has_the_loras_of_its_profile() -> None:
    entry = {"source": "someone/ink-lora", "file": "ink.safetensors", "trigger_words": ["inkstyle"]}
    spec = profile_of(sdxl={"loras": {"ink": entry}, "lora_cache_gib": 2}).models[Family.SDXL]
    assert spec.loras["ink"] == LoraSource(
        source="someone/ink-lora", file="ink.safetensors", trigger_words=("inkstyle",)
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sdxl", {"loras": {"ink": {"source": "a/b"}}}, "need lora_cache_gib"),
        ("sdxl", {"loras": {"ink": {"source": "a/b"}}, "lora_cache_gib": 10}, "part of memory_gib"),
        ("qwen", {"loras": {"ink": {"source": "a/b"}}, "lora_cache_gib": 1}, "would have no effect"),
        ("sdxl", {"loras": {"../ink": {"source": "a/b"}}, "lora_cache_gib": 1}, "pattern"),
        ("sdxl", {"loras": {"ink": {"source": "a/b", "file": "ink.bin"}}, "lora_cache_gib": 1}, "pattern"),
        ("sdxl", {"loras": {"ink": {"source": "a/b", "rank": 8}}, "lora_cache_gib": 1}, "extra"),
        ("sdxl", {"mix_loras": False}, "without lora_cache_gib"),
        (
            "sdxl",
            {"loras": {"ink": {"source": "a/b"}}, "lora_cache_gib": 1, "acceleration": {"fuse_qkv": True}},
            "fuse_qkv",
        ),
    ],
)
def test_loras_that_a_profile_can_not_have_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        profile_of(**{family: changes})


@pytest.mark.parametrize("field", [{"backend": "transformers"}, {"sequences": 8}, {"cache_tokens": 4096}])
def test_the_fields_of_the_language_model_are_refused_elsewhere(field: dict[str, object]) -> None:
    tiny = {"model_name": "m", "source": "tiny", "device": "cpu", "memory_gib": 0, "disk_gib": 0}
    raw = {"name": "p", "description": "d", "models": {"qwen": tiny | field}}
    Profile.model_validate(raw)
    with pytest.raises(ValueError, match="would have no effect"):
        Profile.model_validate(raw | {"models": {"sdxl": tiny | field}})


def test_vllm_needs_a_card_and_real_weights() -> None:
    card = {"device": "cuda", "num_gpus": 1, "memory_gib": 20, "disk_gib": 15, "model_name": "q", "backend": "vllm"}
    raw = {"name": "p", "description": "d", "models": {"qwen": card | {"source": "Qwen/Qwen2.5-7B-Instruct"}}}
    assert Profile.model_validate(raw).models[Family.QWEN].backend == "vllm"
    for wrong in ({"source": "tiny"}, {"source": "q/q", "device": "cpu", "num_gpus": 0, "memory_gib": 0}):
        with pytest.raises(ValueError, match="needs a card and real weights"):
            Profile.model_validate(raw | {"models": {"qwen": card | wrong}})
