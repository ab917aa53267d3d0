"""The checks of the fault matrix: a sound record passes, and each broken promise is found."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.chaos.checks import violations
from benchmarks.chaos.receiver import Receipt
from benchmarks.chaos.record import Record

JOB, USER = "01a1fc46-33dd-78f8-83af-ac62a7e49c4b", "11111111-1111-4111-8111-111111111111"
ACCEPTED = {0: JOB}


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A job that lost its lease once and was completed by attempt 2."""
    key, thumbnail_key = f"{USER}/{JOB}/2/0.png", f"{USER}/{JOB}/2/0.thumb.webp"
    for name, data in ((key, picture("PNG")), (thumbnail_key, picture("WEBP"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    job = {
        "id": JOB,
        "user_id": USER,
        "status": "completed",
        "error_code": None,
        "attempts": 2,
        "failures": 1,
        "max_attempts": 3,
        "metadata": {"number": 0},
        "params": {"num_images": 1},
        "queue_state": None,
    }
    kinds = (("queued", 0), ("started", 1), ("requeued", 1), ("started", 2), ("completed", 2))
    asset = {
        "attempt": 2,
        "asset_index": 0,
        "key": key,
        "thumbnail_key": thumbnail_key,
        "mime_type": "image/png",
        "file_size_bytes": len(picture("PNG")),
        "width": 16,
        "height": 16,
        "frames": None,
    }
    common = {"attempts": 1, "last_status": 204, "last_error": None, "state": "delivered"}
    callbacks = [
        {"id": "msg_1", "event_type": "job.processing", "terminal": False, **common},
        {"id": "msg_2", "event_type": "job.completed", "terminal": True, **common},
    ]
    receipts = [Receipt(1.0, "msg_1", JOB, "processing", True, 204), Receipt(2.0, "msg_2", JOB, "completed", True, 204)]
    return Record(
        jobs={JOB: job},
        events={JOB: [{"attempt": attempt, "kind": kind, "data": {}} for kind, attempt in kinds]},
        assets={JOB: [asset]},
        callbacks={JOB: callbacks},
        receipts={JOB: receipts},
        bucket=tmp_path,
        files=frozenset((key, thumbnail_key)),
    )


def changed(record: Record, part: str, index: int | None = None, **values: Any) -> Record:
    """The record with a row's values changed, or, without values, with the row gone."""
    rows = getattr(record, part)[JOB]
    if index is None:
        return replace(record, **{part: {JOB: rows | values}})
    kept = [row | values if n == index else row for n, row in enumerate(rows) if values or n != index]
    return replace(record, **{part: {JOB: kept}})


def repeated(record: Record, part: str, order: list[int]) -> Record:
    """The record with the rows of a part in another order, or more than once."""
    rows = getattr(record, part)[JOB]
    return replace(record, **{part: {JOB: [rows[n] for n in order]}})


BROKEN: dict[str, Callable[[Record], Record]] = {
    "lost": lambda r: replace(r, jobs={}, receipts={}),
    "not terminal": lambda r: changed(r, "jobs", status="processing", queue_state="running"),
    "left in the queue": lambda r: changed(r, "jobs", queue_state="ready"),
    "our own fault": lambda r: changed(r, "jobs", error_code="internal"),
    "completed twice": lambda r: repeated(r, "events", [0, 1, 2, 3, 4, 4]),
    "ended by a late attempt": lambda r: changed(r, "events", 4, attempt=1),
    "two owners": lambda r: repeated(r, "events", [0, 1, 3, 4]),
    "an attempt not told": lambda r: repeated(r, "events", [0, 3, 4]),
    "an asset of the loser": lambda r: changed(r, "assets", 0, attempt=1, key=f"{USER}/{JOB}/1/0.png"),
    "an asset missing": lambda r: changed(r, "assets", 0),
    "a file missing": lambda r: replace(r, files=frozenset()),
    "a file of another size": lambda r: changed(r, "assets", 0, width=17),
    "no terminal callback": lambda r: changed(r, "callbacks", 1),
    "a callback never sent": lambda r: replace(r, receipts={}),
    "a callback given up": lambda r: changed(r, "callbacks", 1, state="dead", last_error="status"),
    "a terminal one superseded": lambda r: changed(r, "callbacks", 1, state="superseded"),
    "a callback still due": lambda r: changed(r, "callbacks", 1, state="due"),
    "another id": lambda r: changed(r, "callbacks", 1, id="msg_3"),
    "progress after the end": lambda r: repeated(r, "receipts", [1, 0]),
}


def test_checks_find_nothing_in_a_sound_record(record: Record) -> None:
    assert violations(record, ACCEPTED, receiver_fails=False) == []


@pytest.mark.parametrize("broken", BROKEN)
def test_checks_find(record: Record, broken: str) -> None:
    assert violations(BROKEN[broken](record), ACCEPTED, receiver_fails=False) != []


def test_checks_find_an_unsigned_callback(record: Record) -> None:
    unsigned = replace(record.receipts[JOB][1], verified=False)
    assert violations(replace(record, receipts={JOB: [record.receipts[JOB][0], unsigned]}), ACCEPTED, False) != []


def test_checks_let_a_failing_receiver_lose_a_callback_by_rule(record: Record) -> None:
    gone = changed(record, "callbacks", 1, state="dead", last_error="gone", attempts=1)
    assert violations(gone, ACCEPTED, receiver_fails=True) == []


def test_orphans_are_the_files_that_no_row_speaks_of(record: Record) -> None:
    loser = f"{USER}/{JOB}/1/0.png"
    assert replace(record, files=record.files | {loser}).orphans() == {loser}
