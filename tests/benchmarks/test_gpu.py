import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import random_models
from benchmarks.gpu import GOALS, PARTS, STOCK, main, settings, tables
from benchmarks.gpu_bench import Bench, Shape, _decode_tflop, _forward_tflop, run_case
from models.catalog import Family
from models.denoising.acceleration import Acceleration


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Bench("cpu", "tiny")
    yield made
    made.release()
    torch.set_num_threads(threads)


def test_full_size_configurations_have_the_published_numbers_of_parameters() -> None:
    assert random_models.parameters() == {
        "sdxl": pytest.approx(2.567, abs=1e-3),
        "wan": pytest.approx(1.419, abs=1e-3),
        "qwen": pytest.approx(7.616, abs=1e-3),
    }


@pytest.mark.parametrize(
    ("family", "shape", "forward", "decode"),
    [
        (Family.SDXL, Shape(1024, 1024), 6.76, 10.47),
        (Family.WAN, Shape(832, 480, 1, 81), 283.0, 275),
    ],
)
def test_full_size_forwards_cost_what_was_counted_apart(
    family: Family, shape: Shape, forward: float, decode: float
) -> None:
    assert _forward_tflop(family, "full", shape) == pytest.approx(forward, rel=2e-3)
    assert _decode_tflop(family, "full", shape) == pytest.approx(decode, rel=2e-3)


def test_work_grows_with_the_rows(bench: Bench) -> None:
    one, four = Shape(64, 64), Shape(64, 64, 4)
    assert bench.tflop(Family.SDXL, four) == pytest.approx(4 * bench.tflop(Family.SDXL, one))
    assert bench.peak_tflops > 0
    assert bench.bandwidth_gbs > 0


@pytest.mark.parametrize("part", list(PARTS))
def test_stock_cases_of_each_part_run_at_tiny_size(part: str, bench: Bench) -> None:
    stock = [case for case in PARTS[part](True) if case.setting in (STOCK,) or part == "qwen"]
    assert stock
    for case in stock:
        value, why = run_case(bench, case, deadline=float("inf"))
        assert why == ""
        assert value is not None
        assert value > 0


@pytest.mark.parametrize("part", ["sdxl", "wan"])
def test_jobs_with_an_interval_a_cache_or_few_steps_run_at_tiny_size(part: str, bench: Bench) -> None:
    wanted = re.compile(r"^(guidance_interval|step_cache|few_step_lora)")
    cases = [case for case in PARTS[part](True) if wanted.match(case.setting.name)]
    assert len(cases) == (2 if part == "sdxl" else 1)
    for case in cases:
        assert run_case(bench, case, deadline=float("inf"))[1] == ""


def test_a_table_names_the_ratio_to_the_line_without_switches(bench: Bench) -> None:
    text = tables(bench, ["sdxl"], True, "dtype: float32")
    assert re.search(r"\| 64x64, 2 rows \| `dtype: float32` \| [\d.e+]+ ms \|  \| \d+% \|", text)
    text = tables(bench, ["sdxl"], True, "none")
    assert re.search(r"`none` \| [\d.e+]+ ms \| 1\.00 \| \d+% \|", text)


def test_a_case_that_can_not_run_says_why(bench: Bench) -> None:
    quantized = next(case for case in PARTS["wan"](True) if "fp8_dynamic" in case.setting.name)
    assert run_case(bench, quantized, deadline=float("inf")) == (
        None,
        "not measured: acceleration: fp8_dynamic needs a card",
    )
    assert run_case(bench, quantized, deadline=0.0) == (None, "not measured: out of time")
    assert run_case(None, quantized, deadline=float("inf")) == (None, "not measured")


@pytest.mark.parametrize("family", [Family.SDXL, Family.WAN])
def test_settings_are_switches_that_the_family_takes(family: Family) -> None:
    for setting in settings(family):
        assert Acceleration(**dict(setting.switches)).refusals(family, "cuda", setting.dtype or "bfloat16") == []


def test_the_plan_of_the_whole_benchmark_lists_every_goal_and_measures_nothing(tmp_path: Path) -> None:
    main(["--plan", "--out", str(tmp_path / "plan.md")])
    text = (tmp_path / "plan.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line and "Shape" not in line]
    assert len(lines) > 60
    assert all("not measured" in line for line in lines)
    assert all(any(goal in line for line in lines) for goal in GOALS.values())


def test_the_page_lists_the_lines_of_the_program(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "gpu-benchmark.md").read_text(encoding="utf-8")
    main(["--plan", "--out", str(tmp_path / "plan.md")])
    for line in (tmp_path / "plan.md").read_text().splitlines():
        if line.startswith("| "):
            assert "|".join(line.split("|")[:3]) in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a card")
def test_full_size_without_a_card_is_refused() -> None:
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
