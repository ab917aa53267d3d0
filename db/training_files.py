"""Runs and epochs in files: JSON or CSV, read into rows that know their line.

JSON is `{"training_runs": [...], "epoch_results": [...]}`, either of which may be missing, or a list of rows of one
kind. CSV has a heading with the names of the fields, and rows of one kind; an empty cell is a field that is not given,
and objects and lists stand in a cell as JSON. Rows with an `epoch_number` are epochs; their `run_name` says of what.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from db.training import MAX_DEPTH, BadRow, EpochResult, Numbered, RefusedRows, TrainingRun, Unreadable, readable

MAX_BYTES = 64 * 2**20
_SECTIONS: dict[str, type[TrainingRun | EpochResult]] = {"training_runs": TrainingRun, "epoch_results": EpochResult}
_SPACE = " \t\r\n"
_STRUCTURED = {"training_config", "quantitative_metrics", "diagnosed_issues", "trigger_words"}
Raw = tuple[int, type[TrainingRun | EpochResult] | None, Any]


def read_rows(path: Path) -> list[Numbered]:
    """The rows of a file whose name ends in .json or .csv.

    Raises `RefusedRows` with every fault that there is, and `OSError` when the file can't be read.
    """
    if path.stat().st_size > MAX_BYTES:
        raise RefusedRows([BadRow(1, "", f"the file is larger than {MAX_BYTES // 2**20} MiB")])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedRows([BadRow(1, "", "the file is not UTF-8")]) from error
    if path.suffix.lower() not in (".json", ".csv"):
        raise RefusedRows([BadRow(1, "", "the name of the file ends in neither .json nor .csv")])
    rows, bad = [], []
    for line, kind, raw in _csv(text) if path.suffix.lower() == ".csv" else _Json(text).rows():
        if not isinstance(raw, dict):
            bad.append(BadRow(line, "", raw.why if isinstance(raw, Unreadable) else "is not an object"))
            continue
        try:
            rows.append(Numbered(line, (kind or _kind(raw)).model_validate(raw)))
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_context=False, include_input=False):
                bad.append(BadRow(line, ".".join(readable(part) for part in fault["loc"]), fault["msg"]))
    bad += _twice(rows)
    if bad:
        raise RefusedRows(sorted(bad, key=lambda one: one.line))
    if not rows:
        raise RefusedRows([BadRow(1, "", "there is no row in the file")])
    return rows


def _kind(raw: dict[str, Any]) -> type[TrainingRun | EpochResult]:
    return EpochResult if "epoch_number" in raw else TrainingRun


def _twice(rows: list[Numbered]) -> Iterator[BadRow]:
    first: dict[tuple[Any, ...], int] = {}
    for numbered in rows:
        row = numbered.row
        epoch = row.epoch_number if isinstance(row, EpochResult) else None
        earlier = first.setdefault((row.run_name, epoch), numbered.line)
        if earlier != numbered.line:
            field = "run_name" if epoch is None else "epoch_number"
            yield BadRow(numbered.line, field, f"is there already, in line {earlier}")


def _integer(text: str) -> int | Unreadable:
    try:
        return int(text)
    except ValueError:  # Python reads no more than some thousands of digits
        return Unreadable(f"an integer of {len(text.lstrip('-'))} digits is too long")


def _float(text: str) -> float | Unreadable:
    value = float(text)
    lost = not value and any(digit in "123456789" for digit in text.lower().partition("e")[0])
    return Unreadable(f"{readable(text)} is beyond what a number can be") if lost or math.isinf(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    read = dict(pairs)
    if len(read) == len(pairs):
        return read
    names = Counter(name for name, _ in pairs)
    return Unreadable(f"{readable(names.most_common(1)[0][0])} stands in it twice")


_DECODER = json.JSONDecoder(
    parse_int=_integer,
    parse_float=_float,
    parse_constant=lambda name: Unreadable(f"{name} is no number"),
    object_pairs_hook=_object,
)
_TOO_DEEP = Unreadable(f"is nested deeper than {MAX_DEPTH}")


def _csv(text: str) -> Iterator[Raw]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        heading = next(reader, [])
        repeated = sorted(name for name, times in Counter(heading).items() if times > 1)
        if repeated:
            raise RefusedRows([BadRow(1, readable(repeated[0]), "stands in the heading twice")])
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not any(cells):
                continue
            if len(cells) != len(heading):
                raise RefusedRows([BadRow(line, "", f"has {len(cells)} cells, the heading {len(heading)}")])
            kind = EpochResult if "epoch_number" in heading else TrainingRun
            yield line, kind, {name: _cell(name, cell) for name, cell in zip(heading, cells, strict=True) if cell}
    except csv.Error as error:
        raise RefusedRows([BadRow(line, "", f"is no CSV: {error}")]) from error


def _cell(name: str, text: str) -> Any:
    if name not in _STRUCTURED:
        return text
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        return text  # refused by the row, under its name
    except RecursionError:
        return _TOO_DEEP


class _Json:
    """A walk over the outer brackets of a document, since the library's reader tells no lines of what it has read."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._counted, self._lines = 0, 1  # up to where lines were counted, and how many they were

    def rows(self) -> Iterator[Raw]:
        try:
            if self._next() == "[":
                yield from self._list(None)
            else:
                yield from self._sections()
            if self._next():
                raise self._fault("there is more after the end")
        except json.JSONDecodeError as error:
            raise RefusedRows([BadRow(error.lineno, "", f"is no JSON: {error.msg}")]) from error

    def _sections(self) -> Iterator[Raw]:
        self._take("{")
        while self._next() != "}":
            if self._next() != '"':
                raise self._fault("expected a name")
            name = self._value()
            self._take(":")
            if name not in _SECTIONS:
                raise RefusedRows([BadRow(self._line(), readable(name), f"is none of {', '.join(_SECTIONS)}")])
            yield from self._list(_SECTIONS[name])
            if self._next() != "}":
                self._take(",")
        self._take("}")

    def _list(self, kind: type[TrainingRun | EpochResult] | None) -> Iterator[Raw]:
        self._take("[")
        while self._next() != "]":
            line = self._line()
            yield line, kind, self._value()
            if self._next() != "]":
                self._take(",")
        self._take("]")

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while self._at < len(self._text) and self._text[self._at] in _SPACE:
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _take(self, wanted: str) -> None:
        if self._next() != wanted:
            raise self._fault(f"expected {wanted!r}")
        self._at += 1

    def _value(self) -> Any:
        self._next()
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except RecursionError as error:  # where it ends is not known, so there is no going on
            raise RefusedRows([BadRow(self._line(), "", _TOO_DEEP.why)]) from error
        return value

    def _line(self) -> int:
        self._lines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._lines

    def _fault(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)
