import torch

from benchmarks import random_models
from benchmarks.acceleration import Measured, Row, measure, rows, table
from models.catalog import Family
from models.denoising.acceleration import EXACT, LOSSY, Acceleration


def test_rows_cover_every_switch_and_say_which_are_exact() -> None:
    listed = rows()
    assert {name for row in listed for name in row.switches} - {"compile_rows"} == {*EXACT, *LOSSY}
    for row in listed:
        if row.switches and "few_step_lora" not in row.switches:
            on = set(Acceleration(**row.switches).on())
            assert row.exact == (on <= set(EXACT))
            assert Acceleration(**row.switches).refusals(row.family, "cuda", "bfloat16") == []


def test_a_row_is_measured_beside_the_same_pipeline_without_it() -> None:
    base = random_models.wan("tiny", "cpu", torch.float32)
    fused = next(row for row in rows() if row.name == "fuse_qkv" and row.family is Family.WAN)
    result = measure(fused, base, "tiny", "cpu", rounds=1, dtype="float32")
    assert isinstance(result, Measured)
    assert min(result.before_ms, result.after_ms, result.ratio) > 0
    assert result.latents is not None
    assert result.latents < 1e-5
    assert result.psnr is not None
    assert result.psnr > 80


def test_a_lossy_row_shows_its_change() -> None:
    base = random_models.sdxl("tiny", "cpu", torch.float32)
    interval = next(row for row in rows() if "guidance_interval" in row.name and row.family is Family.SDXL)
    result = measure(interval, base, "tiny", "cpu", rounds=1, dtype="float32")
    assert isinstance(result, Measured)
    assert result.latents is not None
    assert result.latents > 1e-5


def test_what_needs_a_card_is_not_measured_without_one() -> None:
    row = Row(Family.SDXL, "attention: cudnn", attention="CUDNN_ATTENTION", card_only=True)
    result = measure(row, None, "tiny", "cpu", rounds=1, dtype="float32")
    assert result == "not measured: needs a card"
    assert "| sdxl | `attention: cudnn` | exact | not measured: needs a card |" in table([(row, result)])
