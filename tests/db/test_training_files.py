"""Files of trainings: rows that know their line, and every fault told with its line and field."""

import csv
from pathlib import Path

import pytest

from db.training import EpochResult, RefusedRows, TrainingRun
from db.training_files import read_rows

JSON = """{
  "training_runs": [
    {"run_name": "a", "base_model": "sdxl"},
    {
      "run_name": "b",
      "base_model": "sdxl", "network_dim": 32
    }
  ],
  "epoch_results": [
    {"run_name": "a", "epoch_number": 1, "quantitative_metrics": {"x": [1, 2]}}
  ]
}
"""
CSV = """run_name,epoch_number,notes,quantitative_metrics,trigger_words
a,1,"two
lines","{""x"": 1}","[""ink""]"

a,2,,,
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, name: str, text: str) -> list[tuple[int, str]]:
    with pytest.raises(RefusedRows) as refused:
        read_rows(written(folder, name, text))
    assert all(bad.message for bad in refused.value.bad)
    return [(bad.line, bad.field) for bad in refused.value.bad]


def test_json_has_both_kinds(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "all.json", JSON))
    assert [(one.line, type(one.row), one.row.run_name) for one in rows] == [
        (3, TrainingRun, "a"),
        (4, TrainingRun, "b"),
        (10, EpochResult, "a"),
    ]


def test_a_list_is_of_the_kind_that_its_rows_are(tmp_path: Path) -> None:
    text = '[{"run_name": "a", "base_model": "x"},\n {"run_name": "a", "epoch_number": 0}]'
    assert [type(one.row) for one in read_rows(written(tmp_path, "l.JSON", text))] == [TrainingRun, EpochResult]


def test_csv_has_cells_of_json_and_lines_inside_of_cells(tmp_path: Path) -> None:
    first, second = read_rows(written(tmp_path, "epochs.csv", "\ufeff" + CSV))
    assert (first.line, second.line) == (2, 5)
    assert isinstance(first.row, EpochResult)
    assert (first.row.quantitative_metrics, first.row.trigger_words) == ({"x": 1}, ["ink"])
    assert second.row.given() == {"run_name": "a", "epoch_number": 2}  # an empty cell gives nothing


def test_every_fault_is_told_with_its_line_and_field(tmp_path: Path) -> None:
    text = """run_name,base_model,network_dim,quality_score
a,sdxl,32,8
b,,zero,8
c,sdxl,-1,11
a,sdxl,32,8
"""
    assert faults(tmp_path, "runs.csv", text) == [
        (3, "base_model"),
        (3, "network_dim"),
        (4, "network_dim"),
        (4, "quality_score"),
        (5, "run_name"),
    ]


def test_faults_of_json_are_told_with_the_line_where_the_row_begins(tmp_path: Path) -> None:
    text = JSON.replace('"network_dim": 32', '"network_dim": 32, "rank": 3').replace(
        '"epoch_number": 1', '"epoch_number": -1'
    )
    assert faults(tmp_path, "all.json", text) == [(4, "rank"), (10, "epoch_number")]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.json", '{"training_runs": [\n{"run_name": "a",}]}', (2, "")),
        ("a.json", '{"training_runs": []\n} x', (2, "")),
        ("a.json", '{"training_runs": [1]}', (1, "")),
        ("a.json", '{"runs": []}', (1, "runs")),
        ("a.json", '{"training_runs": {}}', (1, "")),
        ("a.json", '"text"', (1, "")),
        ("a.json", "", (1, "")),
        ("a.json", "[]", (1, "")),
        ("a.csv", "run_name,base_model\na\n", (2, "")),
        ("a.csv", "run_name,run_name\na,b\n", (1, "run_name")),
        ("a.csv", 'run_name,base_model\n"a"b,c\n', (2, "")),
        ("a.csv", "run_name,rank\na,3\n", (2, "base_model")),
        ("a.csv", "run_name,base_model\n", (1, "")),
        ("a.csv", "run_name,epoch_number,quantitative_metrics\na,1,{x}\n", (2, "quantitative_metrics")),
        ("a.txt", "x", (1, "")),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str, text: str, fault: tuple[int, str]) -> None:
    assert faults(tmp_path, name, text)[0] == fault


DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000


def metrics(value: str) -> str:
    return f'[{{"run_name": "a", "epoch_number": 0}},\n {{"run_name": "a", "epoch_number": 1, {value}}}]'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (metrics(f'"quantitative_metrics": {DEEP}'), (2, "", "deeper than 64")),
        (metrics(f'"quantitative_metrics": {{"a": {DIGITS}}}'), (2, "quantitative_metrics", "a: an integer of 5000")),
        (metrics('"quantitative_metrics": {"loss": NaN}'), (2, "quantitative_metrics", "loss: NaN is no number")),
        (metrics('"diagnosed_issues": [0, -Infinity]'), (2, "diagnosed_issues", "1: -Infinity is no number")),
        (metrics('"quantitative_metrics": {"loss": 1e400}'), (2, "quantitative_metrics", "loss: 1e400 is beyond")),
        (metrics('"quantitative_metrics": {"a": [-1.5e400]}'), (2, "quantitative_metrics", "a: 0: -1.5e400 is beyond")),
        (metrics('"quantitative_metrics": {"a": 0.1e-400}'), (2, "quantitative_metrics", "a: 0.1e-400 is beyond")),
        (metrics('"training_loss": 1e400'), (2, "training_loss", "1e400 is beyond")),
        (metrics(f'"checkpoint_file_size_mb": {DIGITS}'), (2, "checkpoint_file_size_mb", "an integer of 5000")),
        (metrics(f'"diagnosed_issues": {"[" * 65 + "]" * 65}'), (2, "diagnosed_issues", "deeper than 64")),
        (metrics('"quantitative_metrics": {"a": "\\ud800"}'), (2, "quantitative_metrics", "can't be stored")),
        (metrics('"quantitative_metrics": {"\\u0000": 1}'), (2, "quantitative_metrics", "can't be stored")),
        (metrics('"notes": "\\udfff"'), (2, "notes", "can't be stored")),
        (metrics('"notes": "a", "notes": "b"'), (2, "", "notes stands in it twice")),
        (metrics(f'"{"x" * 500}": 1'), (2, "x" * 100, "not permitted")),
        ("{[1]: []}", (1, "", "expected a name")),
        ('{"training_runs": [],\n {}: []}', (2, "", "expected a name")),
        ('{"\\ud800": []}', (1, "\\ud800", "is none of")),
        (f'{{{DIGITS}: []}}', (1, "", "expected a name")),
        (f'{{"training_runs": [],\n "epoch_results": {DIGITS}}}', (2, "", "expected '['")),
        (f"[{DIGITS}]", (1, "", "an integer of 5000")),
        (DEEP, (1, "", "deeper than 64")),
    ],
    ids=range(22),
)  # fmt: skip
def test_what_json_can_not_be_kept_is_refused_by_name(tmp_path: Path, text: str, fault: tuple[int, str, str]) -> None:
    assert faults(tmp_path, "a.json", text) == [fault[:2]]
    with pytest.raises(RefusedRows) as refused:
        read_rows(tmp_path / "a.json")
    assert fault[2] in refused.value.bad[0].message
    assert len(refused.value.bad[0].message) < 200


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (DEEP, "deeper than 64"),
        (f'{{""a"": {DEEP}}}', "deeper than 64"),
        (DIGITS, "an integer of 5000 digits"),
        (f'{{""loss"": {DIGITS}}}', "loss: an integer of 5000 digits"),
        ('{""loss"": NaN}', "loss: NaN is no number"),
        ('{""loss"": 1e400}', "loss: 1e400 is beyond"),
        ('{""a"": 1, ""a"": 2}', "a stands in it twice"),
    ],
    ids=range(7),
)
def test_a_cell_that_can_not_be_kept_is_refused_by_name(tmp_path: Path, cell: str, message: str) -> None:
    text = f'run_name,epoch_number,quantitative_metrics\na,1,\na,2,"{cell}"\n'
    if len(cell) > csv.field_size_limit():
        assert faults(tmp_path, "a.csv", text) == [(3, "")]
        return
    assert faults(tmp_path, "a.csv", text) == [(3, "quantitative_metrics")]
    with pytest.raises(RefusedRows) as refused:
        read_rows(tmp_path / "a.csv")
    assert message in refused.value.bad[0].message


def test_numbers_of_every_kept_size_are_kept(tmp_path: Path) -> None:
    text = metrics(
        f'"quantitative_metrics": {{"a": 1e308, "b": 0.0e-400, "c": {"9" * 4000}, "d": {"[" * 63 + "]" * 63}}}'
    )
    row = read_rows(written(tmp_path, "a.json", text))[1].row
    assert isinstance(row, EpochResult)
    assert row.quantitative_metrics is not None
    assert (row.quantitative_metrics["a"], row.quantitative_metrics["b"]) == (1e308, 0)
    assert row.quantitative_metrics["c"] == 10**4000 - 1


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"run_name,base_model\n\xff,b\n")
    with pytest.raises(RefusedRows, match="1 faults"):
        read_rows(path)
