"""A small pooler: it gives a client a server for one transaction at a time, as PgBouncer does, or for its session."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PORT_IN_SOCKET = 5432
IDLE = b"I"


class Pooler:
    """Speaks protocol 3 to both sides and understands only what it must: startup, message lengths, ReadyForQuery."""

    def __init__(self, socket_path: str, database: str, session: bool) -> None:
        self._path, self._database, self._session = socket_path, database, session
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._greeting = b""
        self._open: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self._path)
        self._open.append(writer)
        settings = b"user\0postgres\0database\0" + self._database.encode() + b"\0\0"
        writer.write(struct.pack("!II", len(settings) + 8, 196608) + settings)
        greeting = b""
        while True:
            kind, body = await message(reader)
            if kind == b"S":
                greeting += framed(kind, body)
            if kind == b"Z":
                self._greeting = greeting
                return reader, writer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it goes."""
        self._open.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._welcome(reader, writer)
            server = None
            while True:
                first = await message(reader)
                if first[0] == b"X":
                    break
                if server is None:
                    server = self._idle.pop() if self._idle else await self.connect()
                await self._transaction(first, reader, writer, server)
                if not self._session:
                    self._idle.append(server)
                    server = None
        writer.close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            (code,) = struct.unpack("!I", (await reader.readexactly(length - 4))[:4])
            if code == 196608:
                break
            writer.write(b"N")  # no TLS
        if not self._greeting:
            self._idle.append(await self.connect())
        writer.write(framed(b"R", struct.pack("!I", 0)) + self._greeting)
        writer.write(framed(b"K", struct.pack("!II", 1, 1)))  # an invented process id, as poolers tell
        writer.write(framed(b"Z", IDLE))

    async def _transaction(
        self,
        first: tuple[bytes, bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        answers, requests = server
        kind, body = first
        while True:
            requests.write(framed(kind, body))
            if kind in (b"Q", b"S"):  # what a ReadyForQuery answers
                state = await self._pass_answers(answers, writer)
                if state == IDLE:
                    return
            elif kind == b"H":
                await self._pass_flushed(answers, writer)
            kind, body = await message(reader)

    async def _pass_answers(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        while True:
            kind, body = await message(answers)
            writer.write(framed(kind, body))
            if kind == b"Z":
                return body

    async def _pass_flushed(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:  # a description or an error ends what a Flush asks for
            kind, body = await message(answers)
            writer.write(framed(kind, body))
            if kind in (b"T", b"n", b"E"):
                return

    def close(self) -> None:
        """Drop every connection."""
        for writer in self._open:
            writer.close()


async def message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind = await reader.readexactly(1)
    (length,) = struct.unpack("!I", await reader.readexactly(4))
    return kind, await reader.readexactly(length - 4)


def framed(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


@contextlib.asynccontextmanager
async def pooled(url: str, *, session: bool) -> AsyncIterator[str]:
    """The URL of a pooler before an embedded server's database; in transaction mode, unless it keeps the session."""
    parts = urlsplit(url)
    folder = Path(parse_qs(parts.query)["host"][0])
    pooler = Pooler(str(folder / f".s.PGSQL.{PORT_IN_SOCKET}"), parts.path.strip("/"), session)
    server = await asyncio.start_server(pooler.serve, "127.0.0.1", 0)
    try:
        async with server:
            port = server.sockets[0].getsockname()[1]
            yield f"postgresql://postgres@127.0.0.1:{port}{parts.path}"
            pooler.close()
    finally:
        pooler.close()
