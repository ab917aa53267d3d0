"""The promises. Each check reads a record and yields what breaks its promise, one line a violation."""

import io
from collections.abc import Iterator, Mapping

from PIL import Image

from benchmarks.chaos.cluster import SCHEDULE
from benchmarks.chaos.record import Record
from models.media import probe

TERMINAL = ("completed", "failed", "cancelled")


def accepted_once(record: Record, accepted: Mapping[int, str]) -> Iterator[str]:
    """What was acknowledged is a row, and what was asked for once is there once."""
    numbers: dict[int, list[str]] = {}
    for job_id, job in record.jobs.items():
        numbers.setdefault(job["metadata"]["number"], []).append(job_id)
    for number, job_id in accepted.items():
        if job_id not in record.jobs:
            yield f"{job_id}: acknowledged, and no row"
        elif len(numbers[number]) > 1:
            yield f"{job_id}: submitted once under one key, {len(numbers[number])} rows"
    for number in numbers.keys() - accepted.keys():
        yield f"{numbers[number][0]}: a row that was never acknowledged"


def ended(record: Record) -> Iterator[str]:
    """Every job is terminal and has left the queue."""
    for job_id, job in record.jobs.items():
        if job["status"] not in TERMINAL or job["queue_state"] is not None:
            yield f"{job_id}: is {job['status']} (queue: {job['queue_state']})"
        if job["error_code"] == "internal":
            yield f"{job_id}: failed by a fault of ours (internal)"
        if job["failures"] > job["max_attempts"]:
            yield f"{job_id}: {job['failures']} failures of {job['max_attempts']}"


def history(record: Record) -> Iterator[str]:
    """Every attempt starts once, one after the other; one end, by the last attempt; nothing after it."""
    for job_id, job in record.jobs.items():
        events = record.events.get(job_id, [])
        kinds = [event["kind"] for event in events]
        ends = [event for event in events if event["kind"] in TERMINAL]
        started = [event["attempt"] for event in events if event["kind"] == "started"]
        if [event["kind"] for event in ends] != [job["status"]] or kinds[-1] != job["status"]:
            yield f"{job_id}: is {job['status']}, its history {kinds}"
        elif ends[0]["attempt"] != job["attempts"]:
            yield f"{job_id}: ended under attempt {ends[0]['attempt']}, the row says {job['attempts']}"
        if started != list(range(1, job["attempts"] + 1)):
            yield f"{job_id}: {job['attempts']} attempts, started were {started}"
        running = 0
        for event in events:
            running += {"started": 1, "requeued": -1, "enhanced": -1}.get(event["kind"], 0)
            if running not in (0, 1):
                yield f"{job_id}: two owners at once in {kinds}"
                break


def assets(record: Record) -> Iterator[str]:
    """A completed job has all its files, of the winning attempt, and each one decodes to what its row says."""
    for job_id, job in record.jobs.items():
        rows = record.assets.get(job_id, [])
        wanted = 0 if job["status"] != "completed" else int(job["params"].get("num_images") or 1)
        if [row["asset_index"] for row in rows] != list(range(wanted)):
            yield f"{job_id}: {job['status']} with assets {[row['asset_index'] for row in rows]} of {wanted}"
        for row in rows:
            expected = f"{job['user_id']}/{job_id}/{job['attempts']}/"
            if row["attempt"] != job["attempts"] or not row["key"].startswith(expected):
                yield f"{job_id}: attempt {job['attempts']} won, asset of attempt {row['attempt']} at {row['key']}"
            for name in ("key", "thumbnail_key"):
                if row[name] not in record.files:
                    yield f"{job_id}: the file {row[name]} is not there"
                    break
            else:
                yield from _decoded(record, job_id, row)


def _decoded(record: Record, job_id: str, row: Mapping[str, object]) -> Iterator[str]:
    try:
        facts = probe((record.bucket / str(row["key"])).read_bytes())
        with Image.open(io.BytesIO((record.bucket / str(row["thumbnail_key"])).read_bytes())) as thumbnail:
            thumbnail.load()
    except Exception as error:
        yield f"{job_id}: {row['key']} does not decode: {type(error).__name__}"
        return
    said = (row["mime_type"], row["file_size_bytes"], row["width"], row["height"], row["frames"])
    if said != (facts.mime_type, facts.size_bytes, facts.width, facts.height, facts.frames):
        yield f"{job_id}: {row['key']} is {facts}, the row says {said}"


def callbacks(record: Record, receiver_fails: bool) -> Iterator[str]:
    """One event of each kind, signed, under one id; delivered, or ended by a rule."""
    for job_id, job in record.jobs.items():
        rows = record.callbacks.get(job_id, [])
        received = record.receipts.get(job_id, [])
        taken = {receipt.id for receipt in received if receipt.taken}
        if [row["event_type"] for row in rows if row["terminal"]] != [f"job.{job['status']}"]:
            yield f"{job_id}: {job['status']}, terminal callbacks {[r['event_type'] for r in rows if r['terminal']]}"
        if sum(row["event_type"] == "job.processing" for row in rows) > 1:
            yield f"{job_id}: told twice that it runs"
        for receipt in received:
            if not receipt.verified:
                yield f"{job_id}: a callback whose signature does not hold"
            if receipt.id not in {row["id"] for row in rows}:
                yield f"{job_id}: a callback under an unknown id"
        for row in rows:
            if row["state"] == "delivered" and row["id"] not in taken:
                yield f"{job_id}: {row['event_type']} said to be delivered, the receiver never took it"
            elif row["state"] == "superseded" and row["terminal"]:
                yield f"{job_id}: a terminal callback superseded"
            elif row["state"] in ("due", "sending"):
                yield f"{job_id}: {row['event_type']} is still {row['state']}"
            elif row["state"] == "dead":
                by_rule = row["last_error"] == "gone" or row["attempts"] >= len(SCHEDULE)
                if not (receiver_fails and by_rule):
                    yield f"{job_id}: {row['event_type']} given up after {row['attempts']} ({row['last_error']})"


def order(record: Record) -> Iterator[str]:
    """No progress is delivered once the end was."""
    for job_id, received in record.receipts.items():
        told_end = False
        for receipt in received:
            if told_end and receipt.status not in TERMINAL:
                yield f"{job_id}: {receipt.status} after the end"
            told_end = told_end or (receipt.taken and receipt.status in TERMINAL)


def violations(record: Record, accepted: Mapping[int, str], receiver_fails: bool) -> list[str]:
    """Everything that breaks a promise."""
    return [
        *accepted_once(record, accepted),
        *ended(record),
        *history(record),
        *assets(record),
        *callbacks(record, receiver_fails),
        *order(record),
    ]
