"""Rows of the cluster's database, over one connection that is opened again after a fault of its own."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg

CONNECT_SECONDS, FETCH_SECONDS = 5.0, 20.0


class Rows:
    """Reads as the superuser, past all policies. For one thread; a connection for each look would cost more CPU than
    the look itself."""

    def __init__(self, data: Path) -> None:
        """`data` is the data folder of the embedded Postgres. Nothing is opened yet."""
        self._url = f"postgresql://postgres@/ourvidz?host={data}"
        self._loop = asyncio.new_event_loop()
        self._connection: asyncpg.Connection | None = None

    def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        """Raises what asyncpg raises, `OSError` and `TimeoutError`; the next call connects again."""
        return self._loop.run_until_complete(self._fetch(sql, arguments))

    def close(self) -> None:
        """Let go of the connection."""
        if not self._loop.is_closed():
            self._drop()
            self._loop.run_until_complete(asyncio.sleep(0))  # the transport closes in a turn of the loop
            self._loop.close()

    async def _fetch(self, sql: str, arguments: Sequence[Any]) -> list[asyncpg.Record]:
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self._url, timeout=CONNECT_SECONDS)
                await self._connection.set_type_codec(
                    "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
                )
            rows: list[asyncpg.Record] = await self._connection.fetch(sql, *arguments, timeout=FETCH_SECONDS)
        except BaseException:
            self._drop()
            raise
        return rows

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = None
