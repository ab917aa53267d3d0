"""What is left of the jobs of one fault: their rows, their files and what the receiver got."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.receiver import Receipt
from benchmarks.chaos.rows import Rows

BUCKET = "workspace-temp"

JOBS = """
  SELECT j.id::text, j.user_id::text, j.status, j.error_code, j.attempts, j.failures, j.max_attempts, j.metadata,
         j.params, j.format, q.state::text AS queue_state
  FROM jobs j LEFT JOIN job_queue q ON q.job_id = j.id WHERE j.metadata->>'fault' = $1"""
EVENTS = """
  SELECT e.job_id::text, e.attempt, e.kind, e.data
  FROM job_events e JOIN jobs j ON j.id = e.job_id WHERE j.metadata->>'fault' = $1 ORDER BY e.id"""
ASSETS = """
  SELECT a.job_id::text, a.attempt, a.asset_index, a.temp_storage_path AS key, a.thumbnail_path AS thumbnail_key,
         a.mime_type, a.file_size_bytes, a.width, a.height, a.frames
  FROM workspace_assets a JOIN jobs j ON j.id = a.job_id WHERE j.metadata->>'fault' = $1 ORDER BY a.asset_index"""
CALLBACKS = """
  SELECT o.id, o.job_id::text, o.event_type, o.terminal, o.state, o.attempts, o.last_status, o.last_error
  FROM callback_outbox o JOIN jobs j ON j.id = o.job_id WHERE j.metadata->>'fault' = $1 ORDER BY o.seq"""
OPEN = """
  SELECT (SELECT count(*) FROM job_queue q JOIN jobs j ON j.id = q.job_id WHERE j.metadata->>'fault' = $1)
       + (SELECT count(*) FROM callback_outbox o JOIN jobs j ON j.id = o.job_id
          WHERE j.metadata->>'fault' = $1 AND o.state IN ('due', 'sending'))"""
KNOWN = "SELECT unnest(ARRAY[temp_storage_path, thumbnail_path]) AS key FROM workspace_assets"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """Rows by job id, in their own order; `files` are the keys in the bucket of results."""

    jobs: Mapping[str, Row]
    events: Mapping[str, Sequence[Row]]
    assets: Mapping[str, Sequence[Row]]
    callbacks: Mapping[str, Sequence[Row]]
    receipts: Mapping[str, Sequence[Receipt]]
    bucket: Path
    files: frozenset[str]

    def orphans(self) -> set[str]:
        """Files of these jobs that no row speaks of."""
        known = {asset[name] for rows in self.assets.values() for asset in rows for name in ("key", "thumbnail_key")}
        return set(self.files) - known


def open_things(rows: Rows, fault: str) -> int:
    """How many jobs and callbacks of a fault have not come to their end."""
    return int(rows.fetch(OPEN, fault)[0][0])


def orphans(rows: Rows, bucket: Path) -> set[str]:
    """Files of any job that no row speaks of now. The files are looked up first: a row comes after its files."""
    files = _keys(bucket)
    return files - {row["key"] for row in rows.fetch(KNOWN)}


def read_record(rows: Rows, bucket: Path, fault: str, receipts: Sequence[Receipt]) -> Record:
    """Everything about the jobs of a fault, as it is now."""
    jobs = {row["id"]: dict(row) for row in rows.fetch(JOBS, fault)}
    by_job: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        by_job.setdefault(receipt.job_id, []).append(receipt)
    return Record(
        jobs=jobs,
        events=_by_job(rows.fetch(EVENTS, fault)),
        assets=_by_job(rows.fetch(ASSETS, fault)),
        callbacks=_by_job(rows.fetch(CALLBACKS, fault)),
        receipts={job_id: received for job_id, received in by_job.items() if job_id in jobs},
        bucket=bucket,
        files=frozenset(key for key in _keys(bucket) if key.split("/")[1] in jobs),
    )


def _keys(bucket: Path) -> set[str]:
    return {path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()}


def _by_job(rows: Iterable[Any]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["job_id"], []).append(dict(row))
    return found
