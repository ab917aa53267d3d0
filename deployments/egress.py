"""The guard for every URL that a user gives: where callbacks are sent and references are fetched.

One request is one connection. The name is resolved once, every address of the answer is checked, and the
connection goes to a checked address, while the Host header, SNI and the certificate check keep the URL's name.
There are no redirects, proxies, cookies or kept-alive connections, so nothing is reached that was not checked
for this very request. A network policy of the cluster remains worth having as a second wall.
"""

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version

import httpcore2
import httpx2

from deployments.addresses import is_never_allowed, is_public
from deployments.destinations import (
    AllowedHost,
    Destination,
    EgressError,
    EgressFailed,
    EgressPolicy,
    EgressRefused,
)

__all__ = [
    "AllowedHost",
    "Answered",
    "Egress",
    "EgressError",
    "EgressFailed",
    "EgressPolicy",
    "EgressRefused",
    "Fetched",
    "Posted",
    "Resolver",
    "SystemResolver",
]

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses as text; raises OSError where the name has none."""

MAX_CONNECTION_TRIES = 4
USER_AGENT = f"ourvidz-serve/{version('ourvidz-serve')}"


@dataclass(frozen=True)
class Fetched:
    """A whole body, and its media type in lower case without parameters."""

    data: bytes = field(repr=False)
    content_type: str


@dataclass(frozen=True)
class Posted:
    """An answer of any status. Header names are in lower case; `body_excerpt` is printable text."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body_excerpt: str = field(repr=False)
    elapsed_ms: int


@dataclass(frozen=True)
class Answered:
    """An answer of any status, with its whole body. Header names are in lower case."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    data: bytes = field(repr=False)


class SystemResolver:
    """The operating system's resolver, in its order of preference.

    A lookup can't be interrupted. It has threads of its own, so that names whose servers never answer take
    none from the rest of the process.
    """

    def __init__(self, threads: int = 32) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        lookup = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, lookup)
        return [str(sockaddr[0]) for *_, sockaddr in found]


class Egress:
    """Makes the requests that `policy` permits. One may serve all tasks of a process."""

    def __init__(
        self, policy: EgressPolicy, resolve: Resolver | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        """`resolve` is the system's resolver and `tls` its trust store, unless given."""
        self._policy = policy
        self._resolve = resolve or SystemResolver()
        self._tls = tls or httpx2.create_ssl_context()

    async def check(self, url: str) -> None:
        """Refuse what can be seen without connecting, the addresses of the name included.

        Raises EgressRefused, and EgressFailed (`unresolvable`) where the name has no address now. To pass
        promises nothing about later: each request checks again.
        """
        await self._addresses(self._policy.destination(url))

    async def fetch(self, url: str, max_bytes: int, timeout_seconds: float, accept: tuple[str, ...]) -> Fetched:
        """GET a body of at most `max_bytes` (decompressed) whose media type is in `accept`.

        Only 200 is success; the time-out holds for everything together. Raises EgressRefused, EgressFailed.
        """
        headers = {"accept": ", ".join(accept)}
        async with _limited(timeout_seconds), self._answer("GET", url, headers, None) as answer:
            status = answer.status_code
            if 300 <= status < 400:
                raise EgressRefused("redirect", "the URL redirects; give the final one")
            if status != 200:
                raise EgressFailed("status", f"the URL answered with status {status}", status)
            content_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type not in accept:
                raise EgressRefused("content_type", f"the URL must give one of {', '.join(accept)}")
            data = await _read(answer, max_bytes + 1)
        if len(data) > max_bytes:
            raise EgressFailed("too_large", f"the URL gives more than {max_bytes} bytes")
        return Fetched(data, content_type)

    async def post(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        timeout_seconds: float,
        max_response_bytes: int,
    ) -> Posted:
        """POST `body` and return the answer, whatever its status, read within the time-out.

        What an answer has beyond `max_response_bytes` is not read. Raises EgressRefused, EgressFailed; an
        answer that breaks off has failed: a receiver is asked again rather than believed on half a reply.
        """
        started = time.perf_counter()
        async with _limited(timeout_seconds), self._answer("POST", url, headers, body) as answer:
            excerpt = await _read(answer, max_response_bytes)
        elapsed_ms = round((time.perf_counter() - started) * 1000)
        return Posted(answer.status_code, dict(answer.headers), _printable(excerpt), elapsed_ms)

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        max_bytes: int,
    ) -> Answered:
        """Ask an API, and return its answer, whatever its status. Raises EgressRefused, EgressFailed."""
        async with _limited(timeout_seconds), self._answer(method, url, headers, body) as answer:
            data = await _read(answer, max_bytes + 1)
        if len(data) > max_bytes:
            raise EgressFailed("too_large", f"the URL gives more than {max_bytes} bytes")
        return Answered(answer.status_code, dict(answer.headers), data)

    async def _addresses(self, destination: Destination) -> list[str]:
        try:
            async with asyncio.timeout(self._policy.resolve_timeout_seconds):
                answer = await self._resolve(destination.host, destination.port)
            addresses = [ipaddress.ip_address(text) for text in answer]
        except (OSError, ValueError):
            addresses = []
        if not addresses:
            raise EgressFailed("unresolvable", "the URL's host has no address")
        for address in addresses:
            if is_never_allowed(address) or not (destination.allowed or is_public(address)):
                raise EgressRefused("private_address", "the URL's host leads to an address that is not public")
        return [str(address) for address in dict.fromkeys(addresses)]

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[httpx2.Response]:
        destination = self._policy.destination(url)
        pinned = _PinnedBackend(await self._addresses(destination), self._policy.connect_timeout_seconds)
        connection = httpcore2.AsyncHTTPConnection(
            destination.url.origin, ssl_context=self._tls, network_backend=pinned
        )
        # compression is not asked for: what comes anyway is read with bounds
        sent = list({"user-agent": USER_AGENT, "accept-encoding": "identity", **headers}.items())
        with _faults():
            async with (
                connection,
                connection.stream(method, destination.url, headers=sent, content=body) as answer,
            ):
                yield httpx2.Response(answer.status, headers=answer.headers, stream=_Body(answer.aiter_stream()))


class _PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the checked addresses, whatever name it is asked for."""

    def __init__(self, addresses: Sequence[str], timeout_seconds: float) -> None:
        self._addresses = addresses[:MAX_CONNECTION_TRIES]
        self._timeout_seconds = timeout_seconds
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  the signature is the library's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        fault: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            try:
                return await self._network.connect_tcp(
                    address, port, self._timeout_seconds, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                fault = error
        raise fault


class _Body(httpx2.AsyncByteStream):
    """Lets the library's decoders read what comes from a connection that is not its own."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks


async def _read(answer: httpx2.Response, limit: int) -> bytes:
    """The first `limit` bytes; decompressed in pieces of 1 MiB, so that a bomb costs no more than one."""
    data = bytearray()
    async with contextlib.aclosing(answer.aiter_bytes()) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) >= limit:
                break
    return bytes(data[:limit])


@contextlib.asynccontextmanager
async def _limited(timeout_seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_seconds):
            yield
    except TimeoutError:
        raise EgressFailed("timeout", f"no whole answer within {timeout_seconds:g} s") from None


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as fault:
        if isinstance(fault.__cause__, ssl.SSLError):
            raise EgressFailed("tls", "the URL's host has no certificate that we trust for its name") from None
        raise EgressFailed("unreachable", "no connection to the URL's host") from None
    except httpcore2.ProtocolError:
        raise EgressFailed("protocol", "the URL's host broke off or does not speak HTTP") from None
    except httpx2.DecodingError:
        raise EgressFailed("encoding", "the answer's content encoding is damaged") from None
    except (httpcore2.NetworkError, OSError):
        raise EgressFailed("connection_lost", "the connection to the URL's host was lost") from None


def _printable(data: bytes) -> str:
    text = data.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
