import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from models.origin.fingerprint import CONFIGURATION, Hashes, checkpoint_files, fingerprint, sample
from models.profile import ModelSpec


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def spec_of(**changes: object) -> ModelSpec:
    values = {"family": "sdxl", "model_name": "x", "source": "x", "memory_gib": 0, "disk_gib": 0, "device": "cpu"}
    return ModelSpec.model_validate(_with_defaults(values | changes))


def _with_defaults(values: dict[str, object]) -> dict[str, object]:
    from models.catalog import Family, default_for

    return values | {"defaults": default_for(Family.SDXL)}


@pytest.fixture
def hashes(tmp_path: Path) -> Hashes:
    return Hashes(tmp_path / "state" / "fingerprints.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder as diffusers writes it, with two variants of one component and one of the other."""
    folder = tmp_path / "checkpoint"
    files = {
        "model_index.json": json.dumps({"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}),
        "README.md": "no part of it",
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "plain",
        "unet/diffusion_pytorch_model.fp16.safetensors": "half",
        "unet/diffusion_pytorch_model.bin": "older",
        "vae/config.json": "{}",
        "vae/diffusion_pytorch_model.safetensors": "vae",
        "unused/diffusion_pytorch_model.safetensors": "not in the index",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_tiny_checkpoint_has_the_hash_of_every_weight(tiny_sdxl: Path, sdxl_spec: ModelSpec, hashes: Hashes) -> None:
    found = fingerprint(sdxl_spec, tiny_sdxl, hashes)
    weights = {path.relative_to(tiny_sdxl).as_posix(): path for path in tiny_sdxl.rglob("*.safetensors")}
    assert len(weights) >= 4
    assert found.files == {name: sha256(path.read_bytes()) for name, path in weights.items()} | {
        CONFIGURATION: found.files[CONFIGURATION]
    }
    assert (found.revision, found.error) == (None, None)


def test_the_files_are_those_that_a_loader_reads(checkpoint: Path) -> None:
    unet, vae = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model.safetensors"
    rest = {"model_index.json", "unet/config.json", "vae/config.json", vae}
    plain, _ = checkpoint_files(spec_of(), checkpoint)
    half, _ = checkpoint_files(spec_of(variant="fp16"), checkpoint)
    assert set(plain) == rest | {f"{unet}.safetensors"}
    assert set(half) == rest | {f"{unet}.fp16.safetensors"}, "a component without the variant falls back"


def test_shards_of_a_variant_are_told_from_the_others(checkpoint: Path) -> None:
    shards = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in shards:
        (checkpoint / "vae" / name).write_text(name)
    half, _ = checkpoint_files(spec_of(variant="fp16"), checkpoint)
    assert [name for name in half if name.startswith("vae/d")] == [f"vae/{name}" for name in shards]


def test_older_formats_are_read_only_where_there_is_no_newer_one(checkpoint: Path) -> None:
    (checkpoint / "unet/diffusion_pytorch_model.safetensors").unlink()
    files, _ = checkpoint_files(spec_of(), checkpoint)
    assert "unet/diffusion_pytorch_model.bin" in files


def test_another_vae_stands_in_for_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "diffusion_pytorch_model.safetensors").write_text("other")
    files, _ = checkpoint_files(spec_of(vae=str(other)), checkpoint)
    assert [name for name in files if "vae" in name] == [
        "vae:config.json",
        "vae:diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("inside", [True, False])
def test_a_single_file_is_the_whole_checkpoint(tmp_path: Path, hashes: Hashes, inside: bool) -> None:
    path = tmp_path / "big" / "sd_xl_base_1.0.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    found = fingerprint(spec_of(single_file=path.name if inside else None), path.parent if inside else path, hashes)
    assert found.files == {path.name: sha256(b"weights")}


def test_a_repository_tells_its_commit(
    tmp_path: Path, hashes: Hashes, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cache = "c" * 40, tmp_path / "cache"
    snapshot = cache / "models--someone--paint" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = fingerprint(spec_of(source="someone/paint"), "someone/paint", hashes)
    assert found.revision == commit
    assert found.files["unet/diffusion_pytorch_model.safetensors"] == sha256(b"plain")


def test_one_changed_weight_changes_its_hash_alone(checkpoint: Path, hashes: Hashes) -> None:
    before = fingerprint(spec_of(), checkpoint, hashes)
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").write_text("another")
    after = fingerprint(spec_of(), checkpoint, hashes)
    assert [name for name in after.files if after.files[name] != before.files[name]] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]


def test_one_changed_configuration_changes_the_hash_of_all_of_them(checkpoint: Path, hashes: Hashes) -> None:
    before = fingerprint(spec_of(), checkpoint, hashes)
    (checkpoint / "vae/config.json").write_text('{"scaling": 2}')
    after = fingerprint(spec_of(), checkpoint, hashes)
    assert [name for name in after.files if after.files[name] != before.files[name]] == [CONFIGURATION]


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path, hashes: Hashes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first, state = hashes.of({"w": path}), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Hashes(tmp_path / "state" / "fingerprints.json").of({"w": path}) == first == {"w": sha256(b"one")}
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert hashes.of({"w": path}) == {"w": sha256(b"two")}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"/x": 3}', "\0"])
def test_a_broken_memory_costs_a_hashing_and_nothing_else(tmp_path: Path, hashes: Hashes, content: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "fingerprints.json").write_text(content)
    assert hashes.of({"w": path}) == {"w": sha256(b"one")}
    assert str(path) in json.loads((tmp_path / "state" / "fingerprints.json").read_text())


def test_weights_that_are_gone_are_told_and_not_raised(tmp_path: Path, hashes: Hashes) -> None:
    found = fingerprint(spec_of(), tmp_path / "nothing", hashes)
    assert found.files == {}
    assert found.error is not None


def test_a_merged_lora_is_part_of_the_checkpoint(checkpoint: Path, hashes: Hashes, tmp_path: Path) -> None:
    file = tmp_path / "few.safetensors"
    file.write_text("four steps")
    for lora in ({"source": str(file)}, {"source": str(tmp_path), "weight_name": file.name}):
        spec = spec_of(acceleration={"few_step_lora": lora})
        assert fingerprint(spec, checkpoint, hashes).files["few_step_lora:few.safetensors"] == sha256(b"four steps")
    assert "few_step_lora:few.safetensors" not in fingerprint(spec_of(), checkpoint, hashes).files


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_a_sample_is_of_the_content_wherever_it_lies(checkpoint: Path, tmp_path: Path, place: int) -> None:
    path = checkpoint / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(bytes(1_000_000))
    before = sample(spec_of(), checkpoint)
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert sample(spec_of(), tmp_path / "elsewhere") == before
    path.write_bytes(bytes(place) + b"x" + bytes(999_999 - place))
    assert sample(spec_of(), checkpoint) != before
