"""Connections to Postgres, and in whose name they act."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias
from uuid import UUID

import aiosql
import asyncpg
from asyncpg.pool import PoolConnectionProxy
from pydantic_core import from_json

Connection: TypeAlias = asyncpg.Connection | PoolConnectionProxy

WORKER_ROLE = "ourvidz_worker"


class DatabaseUnavailable(RuntimeError):
    """Postgres can't be reached or refuses connections. Nothing was changed; try again."""

    code = "database_unavailable"


# What a database says that can't do now what is right: it is away, shuts down, recovers, is full (of connections, of
# rows), is a standby after a failover, or gave up for somebody else's lock. The same may work later, on another
# connection. Whether it was done is not always known. Anything else is a fault of ours or of the data.
CONNECTION_FAULTS = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.InsufficientResourcesError,  # too many connections, disk full, out of memory
    asyncpg.exceptions.OperatorInterventionError,  # shutdown, crash, starting up, a statement's time-out
    asyncpg.exceptions.TransactionRollbackError,  # a deadlock
    asyncpg.exceptions.PostgresSystemError,  # a failing disk
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection that is cut in the middle of an answer may end in
    ConnectionError,
    OSError,
    TimeoutError,
)

# whatever a database may answer to a statement that is right; for loops that must outlive it
DATABASE_FAULTS = (*CONNECTION_FAULTS, asyncpg.PostgresError)

# A connection keeps its plans, and makes many of them while a new database is empty: then the cheapest way to find a
# row is to read the whole table, and it would go on doing so while the table grows. All our statements find their rows
# by an index, so the planner is told to, and that there is one plan for all values: planning the claim costs as much as
# a claim.
PLANNER = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}


# For the length of a transaction: who asks, with whose rights. Plans are made by what is asked for: a page of a user's
# jobs with a filter may need another one than a page without.
BECOME = """SELECT set_config('request.jwt.claims', $1, true), set_config('role', 'authenticated', true),
                   set_config('plan_cache_mode', 'auto', true)"""


@cache
def queries(name: str) -> Any:
    """The statements of `queries/<name>.sql`, as coroutines that take a connection first and named arguments."""
    return aiosql.from_str(files("db").joinpath("queries", f"{name}.sql").read_text(encoding="utf-8"), "asyncpg")


async def open_pool(
    url: str, *, role: str | None = None, min_size: int = 1, max_size: int = 10, name: str = "ourvidz"
) -> asyncpg.Pool:
    """A pool whose connections act as `role` from the first statement on, or as the URL's own user.

    JSON comes and goes as Python values. Raises `DatabaseUnavailable`.
    """
    settings = {
        "application_name": name,
        "statement_timeout": "30s",
        "timezone": "UTC",
        "search_path": "public",
        **PLANNER,
    }
    if role is not None:
        settings["role"] = role
    try:
        return await asyncpg.create_pool(
            url,
            min_size=min_size,
            max_size=max_size,
            server_settings=settings,
            init=_prepare,
            reset=_reset,
            timeout=10,
            command_timeout=60,
            max_inactive_connection_lifetime=300,
        )
    except CONNECTION_FAULTS as error:
        raise DatabaseUnavailable(f"can't connect to Postgres: {type(error).__name__}") from error


@asynccontextmanager
async def as_user(pool: asyncpg.Pool, user_id: UUID) -> AsyncIterator[Connection]:
    """A transaction in a user's name: row-level security shows and hides what it does for that user.

    The identity ends with the transaction, so a connection can't carry it into the pool.
    """
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        claims = json.dumps({"sub": str(user_id), "role": "authenticated"})
        await connection.execute(BECOME, claims)
        yield connection


async def _prepare(connection: asyncpg.Connection) -> None:
    for kind in ("json", "jsonb"):
        await connection.set_type_codec(kind, schema="pg_catalog", encoder=_encode, decoder=_decode, format="text")


async def _reset(connection: asyncpg.Connection) -> None:
    """What a pool does with a connection that comes back, after asyncpg has rolled back what was open on it.

    Nothing that we set outlives its transaction, so nothing is reset: it would be a round trip after every statement.
    A connection to a standby goes, or a pool that was filled during a failover would stay with the old primary.
    """
    told = connection.get_settings()
    if "on" in (getattr(told, "in_hot_standby", "off"), getattr(told, "default_transaction_read_only", "off")):
        connection.terminate()


def _decode(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:  # nested deeper than it reads
        return json.loads(text)


def _encode(value: object) -> str:
    # NaN and infinity are no JSON; Postgres would refuse them with a less clear message
    return json.dumps(value, default=str, allow_nan=False)
