from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.origin.fingerprint import checkpoint_files
from models.profile import ModelSpec, load_profile, weights_present
from models.samples.tiny import ensure_tiny
from models.samples.tiny_guides import CHARACTER_FILE, STYLE_FILE

ADAPTER = {"source": "tiny", "subfolder": "sdxl_models", "image_encoder": "models/image_encoder", "style": STYLE_FILE}


def spec_of(family: str, **changes: Any) -> ModelSpec:
    spec = next(spec for name, spec in load_profile("laptop").models.items() if name == family)
    guides = dict.fromkeys(("ip_adapter", "controlnet", "image_to_video"))
    return ModelSpec.model_validate(spec.model_dump(exclude_unset=True, exclude=set(guides)) | changes)


def test_laptop_takes_every_reference_but_the_end_frame() -> None:
    models = load_profile("laptop").models
    kinds = {kind for spec in models.values() for kind in spec.reference_methods}
    assert kinds == {"image", "style", "character", "composition", "start_frame"}


@pytest.mark.parametrize(
    ("family", "changes", "methods"),
    [
        ("sdxl", {}, {"image": "image_to_image", "composition": "image_to_image"}),
        ("sdxl", {"controlnet": {"source": "tiny"}}, {"image": "image_to_image", "composition": "controlnet"}),
        (
            "sdxl",
            {"ip_adapter": ADAPTER},
            {"image": "image_to_image", "composition": "image_to_image", "style": "ip_adapter"},
        ),
        ("wan", {}, {}),
        ("wan", {"image_to_video": {"source": "tiny"}}, {"start_frame": "image_to_video"}),
        (
            "wan",
            {"image_to_video": {"source": "tiny", "end_frame": "required"}},
            {"start_frame": "first_and_last_frame", "end_frame": "first_and_last_frame"},
        ),
        ("qwen", {}, {}),
    ],
)
def test_profile_says_how_it_runs_each_kind(family: str, changes: dict[str, Any], methods: dict[str, str]) -> None:
    assert spec_of(family, **changes).reference_methods == methods


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("wan", {"ip_adapter": ADAPTER}, "ip_adapter would have no effect"),
        ("wan", {"controlnet": {"source": "tiny"}}, "controlnet would have no effect"),
        ("sdxl", {"image_to_video": {"source": "tiny"}}, "image_to_video would have no effect"),
        ("qwen", {"controlnet": {"source": "tiny"}}, "controlnet would have no effect"),
        ("sdxl", {"controlnet": {"source": "some/net"}}, "do not go together"),
        ("sdxl", {"ip_adapter": ADAPTER, "acceleration": {"fuse_qkv": True}}, "fuse_qkv"),
        ("sdxl", {"ip_adapter": {"source": "tiny"}}, "names no file"),
    ],
)
def test_profile_with_guides_that_can_not_work_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec_of(family, **changes)


def test_image_to_video_is_refused_with_offload() -> None:
    card = {"device": "cuda", "num_gpus": 0.5, "memory_gib": 10, "source": "some/wan"}
    entry = {"source": "some/other"}
    ModelSpec.model_validate(spec_of("wan").model_dump(exclude_unset=True) | card | {"image_to_video": entry})
    with pytest.raises(ValidationError, match="offload"):
        spec_of("wan", **card, offload="model", image_to_video=entry)


def test_weights_are_not_all_here_without_the_guides(tiny_sdxl: Path, tiny_root: Path) -> None:
    adapters = ensure_tiny("sdxl", tiny_root, "ip_adapter")
    entry = ADAPTER | {"source": str(adapters), "character": CHARACTER_FILE}
    net = {"source": str(ensure_tiny("sdxl", tiny_root, "controlnet"))}
    whole = spec_of("sdxl", source=str(tiny_sdxl), ip_adapter=entry, controlnet=net)
    assert weights_present(whole) == str(tiny_sdxl)
    for absent in ({"ip_adapter": entry | {"style": "other.safetensors"}}, {"controlnet": {"source": "some/net"}}):
        assert weights_present(spec_of("sdxl", source=str(tiny_sdxl), **absent)) is None
    files, _ = checkpoint_files(whole, tiny_sdxl)
    assert f"ip_adapter:sdxl_models/{CHARACTER_FILE}" in files
    assert "controlnet:diffusion_pytorch_model.safetensors" in files
