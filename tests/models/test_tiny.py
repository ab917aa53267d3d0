import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from models.samples import tiny
from models.samples.tiny import ensure_tiny


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content.update(str(file.relative_to(folder)).encode())
        content.update(file.read_bytes())
    return content.hexdigest()


def test_second_call_builds_nothing(tiny_root: Path, tiny_sdxl: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_sdxl.rglob("*")}
    assert ensure_tiny("sdxl", tiny_root) == tiny_sdxl
    assert {path: path.stat().st_mtime_ns for path in tiny_sdxl.rglob("*")} == before


def test_weights_are_the_same_wherever_they_are_built(tiny_wan: Path, tmp_path: Path) -> None:
    assert digest(ensure_tiny("wan", tmp_path)) == digest(tiny_wan)


def test_variants_lie_beside_the_plain_checkpoint(tiny_root: Path, tiny_wan: Path, tiny_sdxl: Path) -> None:
    folders = {
        tiny_wan,
        tiny_sdxl,
        ensure_tiny("wan", tiny_root, "two_experts"),
        ensure_tiny("wan", tiny_root, "expanded_timesteps"),
        ensure_tiny("sdxl", tiny_root, "inpaint"),
    }
    assert len(folders) == 5
    with pytest.raises(KeyError):
        ensure_tiny("qwen", tiny_root, "inpaint")


def test_experts_are_two(tiny_root: Path) -> None:
    folder = ensure_tiny("wan", tiny_root, "two_experts")
    first, second = (next((folder / name).glob("*.safetensors")) for name in ("transformer", "transformer_2"))
    assert first.read_bytes() != second.read_bytes()


def test_building_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ensure_tiny("qwen", tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_changed_recipe_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_tiny("qwen", tmp_path)
    monkeypatch.setattr(tiny, "RECIPE", tiny.RECIPE + 1)
    second = ensure_tiny("qwen", tmp_path)
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"x")
        raise OSError("disk full")

    monkeypatch.setitem(tiny._BUILDERS, tiny.Family.QWEN, fail)
    with pytest.raises(OSError, match="disk full"):
        ensure_tiny("qwen", tmp_path)
    assert list(tmp_path.iterdir()) == []


_BUILD_ON_A_SIGN = """
import sys
from pathlib import Path
import diffusers, transformers  # imported first, so that both start building at the same time
from models.samples.tiny import ensure_tiny
print("ready", flush=True)
sys.stdin.readline()
print(ensure_tiny("wan", Path(sys.argv[1])), flush=True)
"""


def test_processes_that_build_at_once_agree(tiny_wan: Path, tmp_path: Path) -> None:
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", _BUILD_ON_A_SIGN, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for builder in builders:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "ready\n"
    outputs = []
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("go\n")
        builder.stdin.flush()
    for builder in builders:
        output, _ = builder.communicate(timeout=120)
        assert builder.returncode == 0
        outputs.append(output.splitlines()[-1])
    assert outputs == [str(tmp_path / tiny_wan.name)] * 2
    assert [path.name for path in tmp_path.iterdir()] == [tiny_wan.name]
    assert digest(tmp_path / tiny_wan.name) == digest(tiny_wan)


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        ensure_tiny("nonsense", tmp_path)


def test_stock_classes_read_the_checkpoints(tiny_root: Path, tiny_sdxl: Path, tiny_wan: Path) -> None:
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert type(DiffusionPipeline.from_pretrained(tiny_sdxl)).__name__ == "StableDiffusionXLPipeline"
    assert type(DiffusionPipeline.from_pretrained(tiny_wan)).__name__ == "WanPipeline"
    folder = ensure_tiny("qwen", tiny_root)
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "Qwen2ForCausalLM"
    assert "Qwen2Tokenizer" in type(AutoTokenizer.from_pretrained(folder)).__name__


@pytest.mark.parametrize("subfolder", ["tokenizer", "tokenizer_2"])
def test_clip_tokenizer_takes_any_text_and_knows_common_words(tiny_sdxl: Path, subfolder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_sdxl, subfolder=subfolder)
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("a photo of a cat, masterpiece").input_ids) == 2 + 7
    unusual = tokenizer("猫 зима 🙂 \x00 qzx").input_ids
    assert tokenizer.unk_token_id not in unusual[1:-1]
    assert len(tokenizer("x " * 200, truncation=True).input_ids) == 77


def test_umt5_tokenizer_takes_any_text_and_knows_common_words(tiny_wan: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_wan, subfolder="tokenizer")
    assert len(tokenizer("a smooth video of ocean waves").input_ids) <= 6 + 1 + 1
    assert tokenizer("猫 зима 🙂").input_ids[-1] == tokenizer.eos_token_id


def test_qwen_tokenizer_round_trips_bytes_and_has_a_chat_template(tiny_root: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_tiny("qwen", tiny_root))
    text = "héllo 猫\n🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer("<|im_end|>").input_ids) == 1
