"""What a URL given by a user must look like before anything is looked up or connected to.

EgressError
├── EgressRefused   by rule; another try gives the same answer
└── EgressFailed    the network or the other side; another try may succeed
"""

import re
from dataclasses import dataclass
from typing import Self

import httpcore2
import httpx2

from deployments.addresses import is_public, literal_address

MAX_URL_LENGTH = 2048
MAX_HOST_LENGTH = 253  # RFC 1035, section 2.3.4

_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class EgressError(Exception):
    """A request that was not made or not answered.

    `reason` is a stable word. The message is fit for the user who gave the URL and for logs: it names neither
    the URL nor any address behind it.
    """

    code = "egress_error"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EgressRefused(EgressError):
    """The URL is not one that we call.

    Reasons: `malformed`, `too_long`, `scheme`, `userinfo`, `host`, `port`, `address_notation`,
    `private_address`, `redirect`, `content_type`.
    """

    code = "url_refused"


class EgressFailed(EgressError):
    """The URL may be called and gave nothing usable.

    Reasons: `unresolvable`, `unreachable`, `tls`, `timeout`, `protocol`, `connection_lost`, `encoding`,
    `too_large` and `status`, which alone sets `status`.
    """

    code = "url_failed"

    def __init__(self, reason: str, message: str, status: int | None = None) -> None:
        super().__init__(reason, message)
        self.status = status


@dataclass(frozen=True)
class AllowedHost:
    """One receiver that the operator trusts although it is not public or speaks plain HTTP.

    Scheme, host and port must all match. `host` is in lower case, an IPv6 address without its brackets.
    """

    host: str
    port: int
    scheme: str = "https"

    @classmethod
    def parse(cls, origin: str) -> Self:
        """From `http://127.0.0.1:9000`. Raises ValueError for what is not scheme, host and port alone."""
        try:
            url = httpx2.URL(origin)
        except httpx2.InvalidURL:
            raise ValueError("an allowed host is written as scheme://host:port") from None
        bare = url.raw_path == b"/" and not url.userinfo and not url.fragment
        if url.scheme not in _DEFAULT_PORTS or not url.raw_host or not bare:
            raise ValueError("an allowed host is written as scheme://host:port")
        return cls(url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS[url.scheme], url.scheme)


@dataclass(frozen=True)
class EgressPolicy:
    """What may be called: `https` on `ports` at public addresses, and what `allow` names."""

    allow: tuple[AllowedHost, ...] = ()
    ports: tuple[int, ...] = (443, 8443)
    resolve_timeout_seconds: float = 5.0
    connect_timeout_seconds: float = 5.0  # of each address that is tried

    def destination(self, url: str) -> "Destination":
        """Read and check `url`, without the network. Raises EgressRefused. A fragment is dropped."""
        if len(url) > MAX_URL_LENGTH:
            raise EgressRefused("too_long", f"the URL is longer than {MAX_URL_LENGTH} characters")
        authority = _AUTHORITY.match(url)
        # parsers disagree about backslashes and blanks: what one checked, the next might not call
        if authority is None or "\\" in url or any(ord(char) <= 32 or ord(char) == 127 for char in url):
            raise EgressRefused("malformed", "the URL is not an absolute one")
        try:
            parsed = httpx2.URL(url)
            host = parsed.raw_host.decode("ascii")
        except (httpx2.InvalidURL, ValueError):
            raise EgressRefused("malformed", "the URL can't be read") from None
        if parsed.scheme not in _DEFAULT_PORTS:
            raise EgressRefused("scheme", "the URL must begin with https://")
        if "@" in authority[1]:
            raise EgressRefused("userinfo", "the URL must not hold a user name or password")
        port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
        allowed = AllowedHost(host, port, parsed.scheme) in self.allow
        if not allowed:
            self._refuse(parsed.scheme, host, port)
        wire = httpcore2.URL(scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path)
        return Destination(wire, host, port, allowed)

    def _refuse(self, scheme: str, host: str, port: int) -> None:
        if scheme != "https":
            raise EgressRefused("scheme", "the URL must begin with https://")
        if port not in self.ports:
            raise EgressRefused("port", f"the URL's port must be one of {', '.join(map(str, self.ports))}")
        try:
            literal = literal_address(host)
        except ValueError:
            raise EgressRefused("address_notation", "the URL's host is an address in a rare notation") from None
        if literal is None and (len(host) > MAX_HOST_LENGTH or not _HOST_NAME.fullmatch(host)):
            raise EgressRefused("host", "the URL's host is not a host name")
        if literal is not None and not is_public(literal):
            raise EgressRefused("private_address", "the URL's address is not a public one")


@dataclass(frozen=True)
class Destination:
    """A URL that passed, in the form that goes over the wire; `allowed` where the operator named it."""

    url: httpcore2.URL
    host: str
    port: int
    allowed: bool
