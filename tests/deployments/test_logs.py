"""Logs: what may stand in a line, and what may not."""

import asyncio
import json
import subprocess
import sys
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from uuid6 import uuid7

from deployments.logs import without_message
from tests.db.test_queue import new_job

SECRET = "a prompt that nobody else should read"
PROGRAM = """
import structlog
from deployments.logs import configure_logs
configure_logs("info")
try:
    raise ValueError({secret!r})
except ValueError:
    structlog.get_logger().exception("job_escaped", attempt=2)
"""


def test_an_exception_is_logged_by_type_and_place_without_its_text() -> None:
    command = [sys.executable, "-c", PROGRAM.format(secret=SECRET)]
    written = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    line = json.loads(written.stderr.splitlines()[-1])
    assert (line["event"], line["attempt"], line["exception"]) == ("job_escaped", 2, "ValueError")
    assert line["places"] == ["<string>:6 <module>"]
    assert SECRET not in written.stderr + written.stdout


async def test_the_row_that_postgres_quotes_stays_out(database: Any) -> None:
    from db.jobs import Jobs

    job = new_job(await database.user(), id=UUID(int=uuid7().int), format="nonsense", original_prompt=SECRET)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await asyncio.wait_for(Jobs(database.pool).accept(job), 30)
    assert SECRET in str(caught.value)  # this is why
    event = without_message(None, "error", {"event": "x", "exc_info": caught.value})
    assert SECRET not in json.dumps(event)
    assert event["exception"] == "CheckViolationError"
