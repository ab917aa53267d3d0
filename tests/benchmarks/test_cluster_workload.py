import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cluster.fixed_step import fix_step_time
from benchmarks.cluster.workload import MIX, Lap, Tally, Work, drive, equal, mixed


def test_mixed_works_have_the_shares_of_the_mix_exactly() -> None:
    works = mixed(100, 40, seed=1)
    assert Counter(work.steps for work in works) == {steps: round(share * 40) for steps, share in MIX}
    assert [work.number for work in works] == list(range(100, 140))


@pytest.mark.parametrize("count", [1, 7, 19, 20])
def test_mixed_works_are_as_many_as_were_asked_for(count: int) -> None:
    assert len(mixed(0, count, seed=1)) == count


def test_mixed_works_come_in_an_order_of_their_seed() -> None:
    assert mixed(0, 40, seed=1) == mixed(0, 40, seed=1)
    assert mixed(0, 40, seed=1) != mixed(0, 40, seed=2)


def test_works_of_a_run_have_prompts_of_their_own() -> None:
    assert len({work.prompt for work in equal(0, 5) + equal(5, 5)}) == 10


def test_driving_does_each_work_once_by_so_many_callers_at_a_time() -> None:
    done: list[int] = []
    everybody = threading.Barrier(3)

    def one(work: Work) -> None:
        everybody.wait(30)  # three are under way, or this breaks
        done.append(work.number)

    assert drive(equal(0, 9), one, callers=3) > 0
    assert sorted(done) == list(range(9))


def test_driving_tells_of_a_work_that_failed() -> None:
    def one(work: Work) -> None:
        if work.number == 2:
            raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        drive(equal(0, 9), one, callers=2)


def test_a_lap_says_how_busy_the_denoiser_was_and_with_how_many_images() -> None:
    lap = Lap(images=8, seconds=2.0, forwards=20, rows=120)
    assert lap.rate == 4
    assert lap.busy(0.05) == pytest.approx(0.5)
    assert lap.images_together == 3
    assert Lap(8, 2.0).images_together == 0


def test_a_fixed_step_scales_its_sample_takes_its_time_and_is_counted(tmp_path: Path) -> None:
    path, denoiser = tmp_path / "tally", SimpleNamespace()
    fix_step_time(denoiser, 0.01, path)
    denoiser.forward(torch.ones(8, 1))
    tally = Tally(path)
    sample = torch.ones(2, 4, 3, 3)
    started = time.perf_counter()
    (made,) = denoiser.forward(sample, 3, encoder_hidden_states=None, return_dict=False)
    assert time.perf_counter() - started >= 0.01
    denoiser.forward(torch.ones(6, 1))
    assert torch.equal(made, sample * 0.1)
    assert tally.lap(4, 1.0) == Lap(4, 1.0, forwards=2, rows=8)


def test_nothing_counted_is_a_lap_without_forwards(tmp_path: Path) -> None:
    assert Tally(tmp_path / "never").lap(3, 1.5) == Lap(3, 1.5)
