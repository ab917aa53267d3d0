"""The verdict of a soak: what grows is found, what only steps or warms up is not."""

import pytest

from benchmarks.meter import BYTES, MEMORY, MIB, NUMBER, Sample, bound_of, flat, floors, second_half, slope_per_hour

HALF = 900.0


def test_slope_is_the_growth_of_an_hour() -> None:
    assert slope_per_hour([0, 60, 120, 180], [5, 6, 7, 8]) == pytest.approx(60)


def test_a_sawtooth_is_flat() -> None:
    times = [30.0 * n for n in range(31)]
    teeth = [float(n % 5) * 2 * MIB for n in range(31)]
    assert flat(MEMORY, slope_per_hour(times, teeth), times[-1])


def test_second_half_leaves_out_the_warm_up() -> None:
    samples = [Sample(at, {}) for at in (0.0, 30.0, 60.0, 90.0, 120.0)]
    assert [sample.at for sample in second_half(samples)] == [60.0, 90.0, 120.0]


def test_a_leak_is_not_flat() -> None:
    assert not flat(MEMORY, slope=40 * MIB, seconds=HALF)
    assert not flat(BYTES, slope=2 * MIB, seconds=HALF)
    assert not flat(NUMBER, slope=60, seconds=HALF)


def test_a_slope_below_the_bound_is_flat_and_so_is_one_step_of_growth() -> None:
    assert flat(MEMORY, slope=8 * MIB, seconds=HALF)
    assert flat(MEMORY, slope=80 * MIB, seconds=90)  # 2 MiB in all
    assert flat(NUMBER, slope=-100, seconds=HALF)


@pytest.mark.parametrize("name", ["job_queue", "outbox, live part", "fair_shares", "memory sdxl", "memory postgres",
                                  "files api", "connections"])  # fmt: skip
def test_what_is_held_for_open_work_is_judged(name: str) -> None:
    assert bound_of(name) is not None


@pytest.mark.parametrize("name", ["history jobs", "ended", "dead rows job_queue", "memory ray"])
def test_history_and_counts_are_only_shown(name: str) -> None:
    assert bound_of(name) is None


def test_floors_pass_over_what_large_jobs_take_for_a_while() -> None:
    times = [30.0 * n for n in range(30)]
    values = [200.0 * MIB + (500.0 * MIB if n % 4 == 1 else 0) for n in range(30)]
    at, lowest = floors(times, values)
    assert lowest == [200.0 * MIB] * 6
    assert at == sorted(at)


def test_floors_rise_with_a_leak_under_the_peaks() -> None:
    times = [30.0 * n for n in range(30)]
    leaking = [n * MIB + (500.0 * MIB if n % 4 == 1 else 0) for n in range(30)]
    assert slope_per_hour(*floors(times, leaking)) == pytest.approx(120 * MIB, rel=0.1)


def test_floors_of_few_samples_are_the_samples() -> None:
    assert floors([0.0, 1.0, 2.0], [3.0, 5.0, 4.0]) == ([0.0, 1.0, 2.0], [3.0, 5.0, 4.0])
