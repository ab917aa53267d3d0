"""Checks of Postgres: reachable, new enough, migrated, without a transaction-mode pooler, with a clock like ours."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import asyncpg

from db.embedded import EmbeddedPostgresError, is_running
from db.migrate import pending
from db.pool import CONNECTION_FAULTS
from deployments.settings import Settings
from serve_app.findings import Finding, fail, ok, warn

OLDEST = 150_000  # server_version_num of Postgres 15
NOTIFY_SECONDS = 5.0
OTHERS = 4  # connections kept busy while looking for a pooler
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 2.0, 60.0  # receivers refuse callbacks that are 5 minutes off

FAULTS = (*CONNECTION_FAULTS, asyncpg.PostgresError, OSError)
DIRECT = "Give the address of Postgres itself, or a pooler's session mode (Supabase: port 5432, not 6543)."


async def check_postgres(settings: Settings) -> AsyncIterator[Finding]:
    """Everything about Postgres; after a first failure the rest is not asked. Starts the embedded one."""
    folder = settings.embedded_postgres
    started = folder is not None and not is_running(folder)
    try:
        url = await asyncio.to_thread(settings.postgres)
        connection = await asyncpg.connect(url, timeout=10, statement_cache_size=0)
    except EmbeddedPostgresError as error:
        yield fail("postgres", f"the embedded Postgres does not start: {error}", "Its log is in the state folder.")
        return
    except (*FAULTS, ValueError) as error:
        message = f"Postgres can't be reached ({type(error).__name__})"
        yield fail("postgres", message, "Check DATABASE_URL, the network and the server's log.")
        return
    try:
        number = int(connection.get_settings().server_version.split()[0].split(".")[0]) * 10_000
        which = "the database" if folder is None else "the embedded one"
        note = "; started now, `ourvidz down` stops it" if started else ""
        shown = f"Postgres {connection.get_settings().server_version}, {which}{note}"
        if number < OLDEST:
            yield fail("postgres", f"{shown}: too old", "Use Postgres 15 or later.")
            return
        yield ok("postgres", shown)
        for check in (pooler, migrations, notifications, clock):
            try:
                yield await check(url, connection)
            except FAULTS as error:
                name, problem = check.__name__, type(error).__name__
                yield fail(name, f"the check of {name} failed: {problem}", "See the server's log.")
    finally:
        await connection.close(timeout=5)


async def pooler(url: str, connection: asyncpg.Connection) -> Finding:
    """No pooler hands our connection's server to others between transactions.

    Two transactions of one connection must run in one server process. A pooler in transaction mode gives the
    process back in between; so other connections take what is idle before the second transaction begins. LISTEN,
    advisory locks and prepared statements would get lost the same way. That there is a pooler at all shows in the
    process id that was told at connect, which a pooler invents.
    """
    async with connection.transaction():
        first = await connection.fetchval("SELECT pg_backend_pid()")
    async with AsyncExitStack() as stack:
        for _ in range(OTHERS):
            try:
                other = await asyncpg.connect(url, timeout=5, statement_cache_size=0)
                stack.push_async_callback(other.close, timeout=5)
                await stack.enter_async_context(other.transaction())
                taken = await other.fetchval("SELECT pg_backend_pid()", timeout=5)
            except FAULTS:
                break  # the pool is used up; those that came through are busy enough
            if taken == first:
                return _transaction_mode()
        async with connection.transaction():
            second = await connection.fetchval("SELECT pg_backend_pid()", timeout=5)
    if second != first:
        return _transaction_mode()
    if first != connection.get_server_pid():
        return ok("pooler", "there is a pooler, and it keeps a connection's session")
    return ok("pooler", "no pooler in between")


def _transaction_mode() -> Finding:
    message = "a pooler in transaction mode is in between: sessions change between transactions"
    return fail("pooler", message, DIRECT)


async def migrations(_: str, connection: asyncpg.Connection) -> Finding:
    """Every migration of this version is applied."""
    missing = await pending(connection)
    if not missing:
        return ok("migrations", "all migrations are applied")
    return warn(
        "migrations", f"{len(missing)} migrations are pending", "Run `ourvidz migrate`; `up` does it by itself."
    )


async def notifications(url: str, connection: asyncpg.Connection) -> Finding:
    """A NOTIFY of one connection reaches the LISTEN of another."""
    channel = f"ourvidz_doctor_{uuid4().hex[:12]}"
    heard = asyncio.Event()
    listener = await asyncpg.connect(url, timeout=10, statement_cache_size=0)
    try:
        await listener.add_listener(channel, lambda *_: heard.set())
        begun = time.monotonic()
        await connection.execute(f"NOTIFY {channel}")
        await asyncio.wait_for(heard.wait(), NOTIFY_SECONDS)
        return ok("notifications", f"NOTIFY arrives, in {(time.monotonic() - begun) * 1000:.0f} ms")
    except TimeoutError:
        message = f"a NOTIFY did not arrive within {NOTIFY_SECONDS:g} s"
        return warn("notifications", message, "Jobs still start, by polling, and later. " + DIRECT)
    finally:
        await listener.close(timeout=5)


async def clock(_: str, connection: asyncpg.Connection) -> Finding:
    """This machine's clock and the database's agree, half the round trip allowed for."""
    begun = time.time()
    theirs = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
    ended = time.time()
    return skew(theirs - (begun + ended) / 2)


def skew(seconds: float) -> Finding:
    """The finding for a database clock that is `seconds` ahead of ours."""
    message = f"the clocks of this machine and of Postgres differ by {abs(seconds):.2f} s"
    advice = "Run NTP on both: signed URLs and callback signatures carry this machine's time, leases the database's."
    if abs(seconds) < CLOCK_WARN_SECONDS:
        return ok("clock", message)
    return (warn if abs(seconds) < CLOCK_FAIL_SECONDS else fail)("clock", message, advice)
