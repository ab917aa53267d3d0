from benchmarks.cluster.table import BARE, SYSTEM, ratio, table, verdict
from benchmarks.cluster.workload import Lap

LAPS = {
    BARE: [Lap(80, 10.0, 160, 1280), Lap(80, 20.0, 160, 1280), Lap(80, 16.0, 160, 1280)],
    SYSTEM: [Lap(80, 12.5, 200, 1280), Lap(80, 20.0, 200, 1280), Lap(80, 16.0, 200, 1280)],
}


def test_ratios_are_taken_within_a_round() -> None:
    assert ratio(LAPS, SYSTEM) == 1.0
    assert ratio({BARE: LAPS[BARE][:1], SYSTEM: LAPS[SYSTEM][:1]}, SYSTEM) == 0.8


def test_a_row_has_the_rates_the_ratio_and_where_the_time_went() -> None:
    head, rule, bare, system, absent = table(LAPS, 0.05, ["LitServe"])
    assert bare == "| bare loop | 5.00 | 4.00 | 8.00 | 1.00 | 50% | 4.00 |"
    assert system == "| whole system | 5.00 | 4.00 | 6.40 | 1.00 | 62% | 3.20 |"
    assert absent == "| LitServe | not run |  |  |  |  |  |"
    assert head.count("|") == rule.count("|") == absent.count("|") == system.count("|")


def test_forwards_are_left_out_where_nobody_counts_them() -> None:
    assert table(LAPS, None)[2] == "| bare loop | 5.00 | 4.00 | 8.00 | 1.00 |  |  |"


def test_the_verdict_falls_with_the_bar() -> None:
    met, sentence = verdict(LAPS)
    assert met
    assert sentence == "whole system / bare loop: 1.00, at least 0.9 wanted: met"
    met, sentence = verdict({BARE: LAPS[BARE], SYSTEM: [Lap(80, 1.2 * lap.seconds) for lap in LAPS[BARE]]})
    assert not met
    assert sentence.endswith("MISSED")
