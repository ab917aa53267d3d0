"""The registry of a profile: where names lead, and which files are let through."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.lora.files import LoraInvalid, LoraUnavailable, ProfileLoras
from models.lora.loras import LoraSource

PAIR = {"unet.to_q.lora_A.weight": torch.ones(2, 8), "unet.to_q.lora_B.weight": torch.ones(8, 2)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_name_leads_to_a_file_in_a_folder_or_by_itself(tmp_path: Path) -> None:
    path = saved(tmp_path / "ink.safetensors", PAIR)
    registry = ProfileLoras(
        {"a": LoraSource(source=str(tmp_path), file="ink.safetensors"), "b": LoraSource(source=str(path))}
    )
    assert set(registry.names()) == {"a", "b"}
    for name in ("a", "b"):
        file = registry.file(name)
        assert (file.path, file.sha256, file.numbers) == (path, digest(path), 32)


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "ink.safetensors", PAIR)
    right = ProfileLoras({"ink": LoraSource(source=str(path), sha256=digest(path))})
    assert right.file("ink").sha256 == digest(path)
    wrong = ProfileLoras({"ink": LoraSource(source=str(path), sha256="0" * 64)})
    with pytest.raises(LoraInvalid, match=f"ink: the file has the SHA-256 {digest(path)}"):
        wrong.file("ink")


def test_a_file_that_was_replaced_is_checked_anew(tmp_path: Path) -> None:
    path = saved(tmp_path / "ink.safetensors", PAIR)
    registry = ProfileLoras({"ink": LoraSource(source=str(path))})
    before = registry.file("ink")
    assert registry.file("ink") is before
    saved(path, PAIR | {"unet.to_k.lora_A.weight": torch.ones(2, 8), "unet.to_k.lora_B.weight": torch.ones(8, 2)})
    after = registry.file("ink")
    assert (after.numbers, after.sha256) == (64, digest(path))
    assert after.sha256 != before.sha256


@pytest.mark.parametrize(
    "source",
    [
        LoraSource(source="/nowhere/ink.safetensors"),
        LoraSource(source="/nowhere", file="ink.safetensors"),
        LoraSource(source="~/no-such-folder-here/ink", file="ink.safetensors"),
    ],
    ids=["file", "folder", "home"],
)
def test_a_file_that_is_not_there_may_come_back(source: LoraSource) -> None:
    with pytest.raises(LoraUnavailable) as failure:
        ProfileLoras({"ink": source}).file("ink")
    assert failure.value.retryable
    assert failure.value.message.startswith("ink: ")
    assert "nowhere" not in failure.value.message  # the folders of the server are nobody's business


def test_a_file_is_not_sought_outside_of_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(LoraUnavailable):
        ProfileLoras({"ink": LoraSource(source=str(tmp_path), file="ink.safetensors")}).file("ink")


@pytest.mark.parametrize(
    "key",
    ["unet.to_q.dora_scale", "unet.to_q.lokr_w1", "unet.to_q.hada_w1_a", "unet.to_q.lora_mid.weight", "unet.to_q.diff"],
)
def test_kinds_that_would_be_half_obeyed_are_refused(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "other.safetensors", PAIR | {key: torch.ones(3)})
    with pytest.raises(LoraInvalid, match="no part of a plain LoRA"):
        ProfileLoras({"other": LoraSource(source=str(path))}).file("other")


def test_a_file_of_half_a_pair_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "half.safetensors", {"unet.to_q.lora_A.weight": torch.ones(2, 8)})
    with pytest.raises(LoraInvalid, match="no pairs"):
        ProfileLoras({"half": LoraSource(source=str(path))}).file("half")


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("nothing of the kind")
    with pytest.raises(LoraInvalid, match="damaged"):
        ProfileLoras({"text": LoraSource(source=str(path))}).file("text")


def test_what_is_registered_later_can_be_loaded_and_hides_nothing_of_the_profile(tmp_path: Path) -> None:
    ink = saved(tmp_path / "ink.safetensors", PAIR)
    oil = saved(tmp_path / "oil.safetensors", PAIR)
    registry = ProfileLoras({"ink": LoraSource(source=str(ink))})
    registry.renew({"oil": LoraSource(source=str(oil)), "ink": LoraSource(source="/elsewhere.safetensors")})
    assert set(registry.names()) == {"ink", "oil"}
    assert registry.file("oil").path == oil
    assert registry.file("ink").path == ink
    registry.renew({})
    with pytest.raises(LoraInvalid, match="no longer"):
        registry.file("oil")
