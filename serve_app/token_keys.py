"""The public keys of an auth service, as its JWKS document lists them (RFC 7517).

They are fetched when first needed and kept. Old ones are used while new ones are fetched, so that a slow auth service
slows nobody down; how often is bounded, so that made-up key ids can't make us a burden to it. The address is the
operator's, not a caller's, and so may be a private one.
"""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWTError

log = structlog.get_logger()

FRESH_SECONDS = 600.0  # after this long the keys are fetched again, in the background
STALE_SECONDS = 86400.0  # and after this long without success they are not believed any more
PAUSE_SECONDS = 30.0  # between two fetches
PAUSE_AFTER_FAILURE_SECONDS = 5.0
FETCH_SECONDS = 5.0
MAX_BYTES = 65536
MAX_KEYS = 32
ALGORITHMS = {("EC", "P-256"): "ES256", ("RSA", None): "RS256"}  # by kind of key, and curve
LEAST_RSA_BITS = 2048


class KeysUnavailable(Exception):
    """The keys can't be fetched, so nobody knows whether a token is right."""


class KeySet:
    """The keys at one address. `clock` counts seconds and never goes back."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._clock = url, clock
        self._keys: dict[str, PyJWK] = {}
        self._fetched: float | None = None  # when the keys came that are kept
        self._tried: float | None = None
        self._failed = False
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> PyJWK | None:
        """The key of that id; None when the auth service has none. Raises `KeysUnavailable`."""
        age = None if self._fetched is None else self._clock() - self._fetched
        if age is not None and age < STALE_SECONDS and key_id in self._keys:
            if age >= FRESH_SECONDS:
                self._fetch()
            return self._keys[key_id]
        if (fetching := self._fetch()) is not None:
            await asyncio.shield(fetching)  # others wait for it too
        if self._fetched is None or self._failed or self._clock() - self._fetched >= STALE_SECONDS:
            raise KeysUnavailable
        return self._keys.get(key_id)

    async def close(self) -> None:
        """End a fetch that is under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    def _fetch(self) -> "asyncio.Task[None] | None":
        """The fetch that is under way or begins now; None when the last one was too short a time ago."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        pause = PAUSE_AFTER_FAILURE_SECONDS if self._failed else PAUSE_SECONDS
        if self._tried is not None and self._clock() - self._tried < pause:
            return None
        self._tried = self._clock()
        self._fetching = asyncio.create_task(self._renew())
        return self._fetching

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                self._keys = read_keys(await self._document())
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, ValueError, RecursionError, OSError) as error:
            self._failed = True
            log.warning("token_keys_failed", error=type(error).__name__)
        else:
            self._failed, self._fetched = False, self._clock()
            log.info("token_keys_fetched", keys=len(self._keys))

    async def _document(self) -> Any:
        client = httpx2.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False)
        async with client, client.stream("GET", self._url, headers={"Accept": "application/json"}) as response:
            response.raise_for_status()
            body = b""
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_BYTES:
                    raise ValueError("the document is too large")
        return json.loads(body)


def read_keys(document: Any) -> dict[str, PyJWK]:
    """The keys of a JWKS document that may sign tokens: P-256, and RSA of 2048 bits and more. Others are left out,
    shared secrets above all. Raises `ValueError` when it is no such document."""
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("not a JWKS document")
    keys = {}
    for entry in listed[:MAX_KEYS]:
        if isinstance(entry, dict) and isinstance(entry.get("kid"), str) and (key := _key(entry)) is not None:
            keys[entry["kid"]] = key
    return keys


def _key(entry: dict[str, Any]) -> PyJWK | None:
    kind = entry.get("kty")
    algorithm = ALGORITHMS.get((str(kind), entry.get("crv") if kind == "EC" else None))
    if algorithm is None or entry.get("use", "sig") != "sig" or entry.get("alg", algorithm) != algorithm:
        return None
    try:
        key = PyJWK(entry, algorithm)
    except (PyJWTError, ValueError, TypeError):
        return None
    return None if isinstance(key.key, RSAPublicKey) and key.key.key_size < LEAST_RSA_BITS else key
