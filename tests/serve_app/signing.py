"""An auth service's side: keys, the tokens that it signs, and its JWKS document on a real socket."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.deployments import hostile

JWT_SECRET = "an auth service's secret that is long enough for each of its algorithms"
ISSUER = "https://auth.test/auth/v1"


def claims(user: UUID | str, **changes: Any) -> dict[str, Any]:
    """What Supabase says of a user who has signed in; a change to None leaves a claim out."""
    now = int(time.time())
    said = {
        "iss": ISSUER,
        "sub": str(user),
        "aud": "authenticated",
        "role": "authenticated",
        "iat": now,
        "exp": now + 3600,
        "email": "a@example.com",
        "app_metadata": {"provider": "email", "roles": ["admin"]},
        "user_metadata": {},
        "is_anonymous": False,
        "session_id": "0d4c3c5e-8f6b-4a57-93c6-90a3b5a8b3c1",
    } | changes
    return {name: value for name, value in said.items() if value is not None}


def shared(said: dict[str, Any], secret: str = JWT_SECRET, algorithm: str = "HS256") -> str:
    """A token that is signed by a shared secret."""
    return jwt.encode(said, secret, algorithm)


class Signer:
    """A pair of keys under an id: ES256 on P-256, RS256 on RSA."""

    def __init__(self, key_id: str, algorithm: str = "ES256", bits: int = 2048) -> None:
        self.key_id, self.algorithm = key_id, algorithm
        elliptic = algorithm == "ES256"
        self.private: Any = (
            ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(65537, bits)
        )

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """The public key as a JWKS document lists it."""
        kind = jwt.get_algorithm_by_name(self.algorithm)
        listed = json.loads(kind.to_jwk(self.private.public_key()))
        listed.pop("key_ops", None)
        return listed | {"kid": self.key_id, "alg": self.algorithm, "use": "sig"} | changes

    def sign(self, said: dict[str, Any], **header: Any) -> str:
        """A token that is signed by the private key."""
        return jwt.encode(said, self.private, self.algorithm, {"kid": self.key_id} | header)


class KeyServer:
    """A JWKS document that changes with `keys`; `status` is what it answers, `asked` counts how often it was asked."""

    def __init__(self) -> None:
        self.url, self.keys, self.status, self.asked = "", [], 200, 0  # type: ignore[var-annotated]
        self.body: bytes | None = None

    async def __call__(self, reader: Any, writer: Any) -> None:
        self.asked += 1
        document = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        writer.write(hostile.answer(self.status, document, content_type="application/json", connection="close"))
        await writer.drain()


@contextlib.asynccontextmanager
async def key_server(*keys: dict[str, Any]) -> AsyncIterator[KeyServer]:
    """A server on loopback that lists those keys."""
    server = KeyServer()
    server.keys = list(keys)
    async with hostile.receiving(server) as receiver:
        server.url = receiver.url
        yield server
