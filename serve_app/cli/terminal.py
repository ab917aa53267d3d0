"""What goes to the terminal: data to stdout, progress and messages to stderr, and the exit codes."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FAILED = 1  # the job failed, a check failed, or the API refused
USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Stop(Exception):
    """Ends the command with a message on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def errors() -> Console:
    """The console of messages. Made when needed, so that it follows whatever stderr is then."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """A message for a person, on stderr."""
    for line in message.splitlines():
        errors().print(Text(clean(line)))


def show(text: str) -> None:
    """A line of data, on stdout, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """A document, on stdout."""
    show(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows on stdout: a table on a terminal, else lines of tab-separated values below one line of names."""
    cells = [["" if cell is None else clean(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in ([column.lower() for column in columns], *cells):
            show("\t".join(line))
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for line in cells:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in line))
    Console(highlight=False).print(table)


def show_facts(facts: Mapping[str, object]) -> None:
    """Names and values on stdout, one a line; those without a value are left out."""
    width = max(map(len, facts), default=0) + 2
    for name, value in facts.items():
        if value not in (None, ""):
            show(f"{name + ':':<{width}}{clean(str(value))}")


STYLES = {
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
    "completed": "green",
    "processing": "cyan",
    "failed": "bold red",
    "cancelled": "yellow",
}


def clean(text: str) -> str:
    """Text without control characters, so that what a user or server wrote can't steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
