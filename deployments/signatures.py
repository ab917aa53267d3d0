"""Signatures of callbacks by the Standard Webhooks specification 1.0.0, and the keys that make them."""

import base64
import hashlib
import hmac
from datetime import datetime
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from standardwebhooks import Webhook

from db.callbacks import Delivery, SigningKey

SECRET_OVERLAP_SECONDS = 24 * 3600.0
"""For how long after a rotation the key before it signs as well."""


class CallbackSecrets:
    """The signing keys of all users and endpoints, derived from the operator's one: none is stored.

    Another key is another version of it; another master changes all of them at once.
    """

    def __init__(self, master: bytes) -> None:
        """Raises ValueError for a master of less than 32 bytes."""
        if len(master) < 32:
            raise ValueError("the master secret of callbacks must have at least 32 bytes")
        # HKDF, RFC 5869: extract once, expand per key to one block
        self._key = hmac.new(b"ourvidz-serve callback secrets", master, hashlib.sha256).digest()

    def secret(self, user_id: UUID, secret_version: int) -> str:
        """A user's key in the form that receivers configure: `whsec_` and 32 bytes in base64."""
        return _text("whsec_", self._derive(SigningKey(user_id, None, secret_version, None), secret_version))

    def verifying(self, key: SigningKey) -> list[str]:
        """What a receiver configures, the current one first; for a day after a rotation the previous one follows.

        `whsec_` and the shared secret; for ed25519 `whpk_` and the public key, since nobody is told the other half.
        """
        if key.scheme == "v1a":
            return [_text("whpk_", self._private(key, v).public_key().public_bytes_raw()) for v in versions(key)]
        return [_text("whsec_", self._derive(key, version)) for version in versions(key)]

    def headers(self, delivery: Delivery, at: datetime) -> dict[str, str]:
        """The headers of a try at `at` (UTC)."""
        return self.sign(delivery.id, delivery.body, delivery.key, at)

    def sign(self, message_id: str, body: bytes, key: SigningKey, at: datetime) -> dict[str, str]:
        """The headers of a message sent at `at` (UTC); for a day after a rotation the previous key signs as well."""
        return {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(self._signature(message_id, body, key, v, at) for v in versions(key)),
        }

    def _signature(self, message_id: str, body: bytes, key: SigningKey, version: int, at: datetime) -> str:
        if key.scheme == "v1a":
            signed = f"{message_id}.{int(at.timestamp())}.".encode() + body
            return _text("v1a,", self._private(key, version).sign(signed))
        return str(Webhook(self._derive(key, version)).sign(message_id, at, body.decode("utf-8")))

    def _private(self, key: SigningKey, version: int) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._derive(key, version))

    def _derive(self, key: SigningKey, version: int) -> bytes:
        # a user's and an endpoint's differ in length, so that neither can be taken for the other
        info = key.owner_id.bytes + version.to_bytes(8, "big") + (key.scheme or "").encode("ascii")
        return hmac.new(self._key, info + b"\x01", hashlib.sha256).digest()


def versions(key: SigningKey) -> list[int]:
    """The versions of a key that sign now, the current one first."""
    rotated = key.age_seconds is not None and key.age_seconds < SECRET_OVERLAP_SECONDS and key.version > 1
    return [key.version, key.version - 1] if rotated else [key.version]


def _text(prefix: str, value: bytes) -> str:
    return prefix + base64.b64encode(value).decode("ascii")
