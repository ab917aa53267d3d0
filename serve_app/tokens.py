"""Tokens of an auth service, as Supabase issues them: JSON Web Tokens (RFC 7519) that name a user for an hour or so.

A token is believed when it is signed by the shared secret (HS256) or by a listed public key (ES256, RS256), is in its
time, is for `authenticated`, and names a user. Which key may check it follows from its algorithm, so a public key is
never taken for a shared secret. What else it claims, roles above all, is not read.

    TokenError
    ├── InvalidToken        anything about it is wrong
    ├── TokenExpired        it was right until it ended
    ├── AnonymousToken      the public key of a project, or somebody who signed in as nobody
    └── ServiceToken        the all-powerful key of a project, which stands for no user
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import jwt

from deployments.settings import Settings
from serve_app.token_keys import KeySet

AUDIENCE = "authenticated"
LEEWAY_SECONDS = 10  # how far clocks may differ
MAX_LENGTH = 8192
SHAPE = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
SHARED, PUBLIC = "HS256", ("ES256", "RS256")


class TokenError(Exception):
    """A token that opens nothing. The message names what is wrong, and nothing of what is in it."""


class InvalidToken(TokenError):
    """Anything about it is wrong."""


class TokenExpired(TokenError):
    """It was right until it ended."""


class AnonymousToken(TokenError):
    """The public key of a project, or somebody who signed in as nobody."""


class ServiceToken(TokenError):
    """The all-powerful key of a project. It stands for no user, and here everything is somebody's."""


@dataclass(frozen=True)
class Holder:
    """Whom a token names, and its time."""

    user_id: UUID
    issued_at: datetime
    expires_at: datetime


class Tokens:
    """Checks tokens. Without a secret and keys it believes none."""

    def __init__(self, secret: bytes | None = None, keys: KeySet | None = None, issuer: str | None = None) -> None:
        self._secret, self._keys, self._issuer = secret, keys, issuer

    @classmethod
    def of(cls, settings: Settings) -> "Tokens":
        """By the settings. Raises `SettingsError` for a secret that is none."""
        keys = KeySet(settings.jwks_url) if settings.jwks_url else None
        return cls(settings.token_secret(), keys, settings.jwt_issuer)

    async def close(self) -> None:
        """End what is under way."""
        if self._keys is not None:
            await self._keys.close()

    async def read(self, token: str) -> Holder:
        """Whom a token names. Raises a `TokenError`, or `KeysUnavailable` when that can't be known now."""
        if len(token) > MAX_LENGTH or not SHAPE.fullmatch(token):
            raise InvalidToken("it is no JSON Web Token")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise InvalidToken("its header can't be read") from None
        algorithm, key = await self._key(header)
        return self._holder(_claims(token, key, algorithm))

    async def _key(self, header: Mapping[str, Any]) -> tuple[str, Any]:
        """The one algorithm and key that may check a token with this header."""
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm == SHARED and self._secret is not None:
            return SHARED, self._secret
        if algorithm in PUBLIC and self._keys is not None and isinstance(key_id, str):
            key = await self._keys.find(key_id)
            if key is None:
                raise InvalidToken("its key is unknown")
            if key.algorithm_name == algorithm:
                return algorithm, key.key
        raise InvalidToken("its algorithm is not accepted")

    def _holder(self, claims: Mapping[str, Any]) -> Holder:
        role = claims.get("role")
        if role == "anon" or claims.get("is_anonymous") not in (None, False):
            raise AnonymousToken("it names nobody")
        if role == "service_role":
            raise ServiceToken("it stands for no user")
        if role != "authenticated":
            raise InvalidToken("its role is not accepted")
        audience = claims.get("aud")
        if audience != AUDIENCE and not (isinstance(audience, list) and AUDIENCE in audience):
            raise InvalidToken("it is for another audience")
        if self._issuer is not None and claims.get("iss") != self._issuer:
            raise InvalidToken("it is of another issuer")
        try:
            user_id = UUID(claims["sub"])
            issued, expires = (datetime.fromtimestamp(int(claims[name]), UTC) for name in ("iat", "exp"))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError):
            raise InvalidToken("it names no user") from None
        return Holder(user_id, issued, expires)


def _claims(token: str, key: Any, algorithm: str) -> dict[str, Any]:
    """What a token says, when the signature and its time are right."""
    try:
        # who it is for is asked after its role: the keys of a project have no audience
        options: jwt.types.Options = {
            "require": ["exp", "iat"],
            "verify_aud": False,
            "verify_sub": False,
            "verify_jti": False,
            "enforce_minimum_key_length": True,
        }
        claims: dict[str, Any] = jwt.decode(token, key, [algorithm], options, leeway=LEEWAY_SECONDS)
    except jwt.ExpiredSignatureError:
        raise TokenExpired("it has expired") from None
    except jwt.ImmatureSignatureError:
        raise InvalidToken("its time has not begun") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
        raise InvalidToken("its signature or its form is wrong") from None
    return claims
