"""Dumps: a whole database in one file by pg_dump, and back by pg_restore.

The programs come from the wheel of the embedded Postgres or from PATH. A pg_dump that is older than the server refuses
it, and a pg_restore writes settings that a server older than itself does not know; so both are chosen by the server's
version, and what can't work is said before anything is touched.

    DumpError
    └── ProgramMissing    there is no pg_dump or pg_restore that fits the server
"""

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from db import embedded


class DumpError(RuntimeError):
    """pg_dump or pg_restore failed. Its last words are in the message, which never has the password."""

    code = "dump"


class ProgramMissing(DumpError):
    """No pg_dump or pg_restore on this machine fits the server's version."""

    code = "postgres_program"


@dataclass(frozen=True)
class Program:
    """One of Postgres' client programs. `major` is its version, such as 16."""

    path: Path
    major: int


async def find_program(name: str, at_least: int) -> Program:
    """The program whose major version is the lowest that is not under `at_least`. Raises `ProgramMissing`."""
    found = [program for path in _candidates(name) if (program := await _probe(path)) is not None]
    fitting = [program for program in found if program.major >= at_least]
    if not fitting:
        seen = ", ".join(str(program.major) for program in found) or "none"
        raise ProgramMissing(
            f"{name} must be of Postgres {at_least} or later for this; found on this machine: {seen}. "
            f"Install the client programs of Postgres {at_least} and put {name} on PATH."
        )
    return min(fitting, key=lambda program: program.major)


async def dump(url: str, snapshot: str, file: Path, server_major: int) -> Program:
    """Write what a snapshot shows to a new file, in the custom format. Returns the program that wrote it.

    Raises `DumpError`; what is in the file then is no dump.
    """
    program = await find_program("pg_dump", server_major)
    await _run(
        program,
        url,
        f"--snapshot={snapshot}",
        "--format=custom",
        "--no-owner",  # the user that restores will own it, whatever the name
        "--no-password",
        "--lock-wait-timeout=60s",
        f"--file={file}",
    )
    return program


async def restore(url: str, file: Path, dumped_by: int, server_major: int) -> None:
    """Fill an empty database from a dump, wholly or not at all. Raises `DumpError`.

    `dumped_by` is the major version of the pg_dump that wrote it: an older pg_restore can't read it, and an older
    server may not know what it says.
    """
    if server_major < dumped_by:
        raise DumpError(f"the dump is of Postgres {dumped_by}, and this server is an older {server_major}")
    program = await find_program("pg_restore", dumped_by)
    await _run(
        program,
        url,
        "--single-transaction",
        "--exit-on-error",
        "--no-owner",
        "--no-password",
        str(file),
    )


def _candidates(name: str) -> Iterator[Path]:
    yield embedded.program(name)
    on_path = shutil.which(name)
    if on_path is not None:
        yield Path(on_path)


async def _probe(path: Path) -> Program | None:
    with contextlib.suppress(OSError):
        process = await asyncio.create_subprocess_exec(
            str(path), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        said = (await process.communicate())[0].decode(errors="replace")
        match = re.search(r"\(PostgreSQL\) (\d+)", said)
        if process.returncode == 0 and match is not None:
            return Program(path, int(match[1]))
    return None


async def _run(program: Program, url: str, *arguments: str) -> None:
    address, environment = _without_password(url)
    process = await asyncio.create_subprocess_exec(
        str(program.path),
        f"--dbname={address}",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    try:
        said = (await process.communicate())[1].decode(errors="replace")
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        # after a row that does not fit, Postgres quotes the row, which may be a prompt
        last = next((line for line in said.splitlines() if "error:" in line), "it said nothing")
        raise DumpError(f"{program.path.name} {program.major} failed ({process.returncode}): {last}")


def _without_password(url: str) -> tuple[str, dict[str, str]]:
    """The address as an argument that everybody on the machine may read, and the password for the environment."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    password = query.pop("password", None)
    user, _, host = parts.netloc.rpartition("@")
    name, colon, written = user.partition(":")
    environment = {"PGOPTIONS": "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0"}
    if colon:
        password = unquote(written)
    if password is not None:
        environment["PGPASSWORD"] = password
    netloc = f"{name}@{host}" if user else host
    rest = f"?{urlencode(query, safe='/', quote_via=quote)}" if query else ""
    return f"{parts.scheme}://{netloc}{parts.path}{rest}", environment
