"""Files of trainings: rows that know their line, and every fault told with its line and field."""

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


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"run_name,base_model\n\xff,b\n")
    with pytest.raises(RefusedRows, match="1 faults"):
        read_rows(path)
