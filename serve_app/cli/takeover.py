"""`ourvidz import-queue`: the jobs that still wait in the queues of an older system."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import asyncpg
import typer

from serve_app.cli.calls import AsJson, load_settings, run
from serve_app.cli.terminal import FAILED, USAGE, Stop, say, show, show_json
from serve_app.edge import open_edge
from serve_app.takeover import Line, Outcome, Takeover


def import_queue(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A line of JSON for each job, the oldest first.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every line but its reference image, and write nothing.")
    ] = False,
    create_users: Annotated[
        bool, typer.Option("--create-users", help="Make users who are not known here, under their own ids.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take over waiting jobs from an older system's queue, each once and under its own id.

    Run it again with the same file after whatever went wrong. Exits with 1 if any line was refused.
    """
    settings = load_settings()
    counts: Counter[Outcome] = Counter()
    refused: list[Line] = []

    async def work(lines: Iterator[bytes | None]) -> None:
        async with open_edge(settings) as edge:
            takeover = Takeover(edge, dry_run=dry_run, create_users=create_users)
            async for line in takeover.run(lines):
                counts[line.outcome] += 1
                if line.outcome is Outcome.REFUSED:
                    refused.append(line)
                    if not as_json:
                        show("\t".join((str(line.number), line.field or "", line.code or "", line.message or "")))

    try:
        opened = file.open("rb")
    except OSError as error:
        raise Stop(f"{file} can't be read: {error.strerror}", USAGE) from error
    try:
        with opened:
            run(work(lines_of(opened, settings.max_body_bytes)))
    except asyncpg.UndefinedTableError as error:
        raise Stop("the database is not migrated yet: run `ourvidz migrate`") from error
    if as_json:
        listed = [{n: v for n, v in vars(line).items() if n != "outcome"} for line in refused]
        show_json({"dry_run": dry_run} | {str(outcome): counts[outcome] for outcome in Outcome} | {"lines": listed})
    say(
        f"{counts[Outcome.TAKEN]} {'would be ' if dry_run else ''}taken, {counts[Outcome.THERE]} were there already, "
        f"{counts[Outcome.REFUSED]} refused"
    )
    if refused:
        raise Stop("the lines that were refused are still in the file; the others are safe to import again", FAILED)


def lines_of(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The lines of a file, one in memory at a time; None for one of more than `limit` bytes."""
    while line := file.readline(limit + 2):
        if len(line.rstrip(b"\r\n")) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield None
