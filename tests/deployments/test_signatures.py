"""Keys and signatures of callbacks, checked by the official libraries of Python and JavaScript."""

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from standardwebhooks import Webhook, WebhookVerificationError

from db.callbacks import Delivery, SigningKey
from deployments.signatures import CallbackSecrets
from tests import javascript

SECRETS = CallbackSecrets(b"m" * 32)
ENDPOINT = UUID("0192a5b8-1c3d-7e4f-8a9b-0c1d2e3f4a5b")
BODY = '{"text":"ü € 𝄞","n":1.50}'.encode()
DAY_SECONDS = 24 * 3600.0
EVERY = pytest.mark.parametrize("scheme", [None, "v1", "v1a"], ids=["user", "v1", "v1a"])


def key(scheme: str | None = "v1", version: int = 1, age_seconds: float | None = None) -> SigningKey:
    return SigningKey(ENDPOINT, scheme, version, age_seconds)


def signed(with_key: SigningKey, body: bytes = BODY, at: datetime | None = None) -> dict[str, str]:
    return SECRETS.sign("msg_1", body, with_key, at or datetime.now(UTC))


def verifies(verifying: str, headers: dict[str, str], body: bytes = BODY) -> bool:
    """By the official library; for ed25519, which it does not know, by the words of the specification."""
    if verifying.startswith("whpk_"):
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(verifying.removeprefix("whpk_")))
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        for each in headers["webhook-signature"].split(" "):
            version, signature = each.split(",")
            try:
                public.verify(base64.b64decode(signature), content)
            except InvalidSignature:
                continue
            return version == "v1a"
        return False
    try:
        Webhook(verifying).verify(body, headers)
    except WebhookVerificationError:
        return False
    return True


@EVERY
def test_signature_verifies_with_what_the_owner_is_given_and_with_nothing_else(scheme: str | None) -> None:
    headers = signed(key(scheme))
    (mine,) = SECRETS.verifying(key(scheme))
    (others,) = SECRETS.verifying(SigningKey(UUID(int=1), scheme, 1, None))
    (newer,) = SECRETS.verifying(key(scheme, 2))
    assert verifies(mine, headers)
    assert not verifies(others, headers)
    assert not verifies(newer, headers)


@EVERY
@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
def test_signature_covers_id_and_time(scheme: str | None, name: str) -> None:
    headers = signed(key(scheme))
    changed = "msg_2" if name == "webhook-id" else str(int(headers[name]) + 1)
    assert not verifies(SECRETS.verifying(key(scheme))[0], headers | {name: changed})


@EVERY
def test_signature_covers_every_byte_of_the_body(scheme: str | None) -> None:
    assert not verifies(SECRETS.verifying(key(scheme))[0], signed(key(scheme)), BODY.replace(b"1.50", b"1.51"))


@EVERY
@pytest.mark.parametrize(("age", "valid"), [(0.0, True), (DAY_SECONDS - 1, True), (DAY_SECONDS + 1, False)])
def test_previous_key_signs_and_is_told_for_a_day(scheme: str | None, age: float, valid: bool) -> None:
    rotated = key(scheme, 3, age)
    current, *previous = SECRETS.verifying(rotated)
    assert previous == (SECRETS.verifying(key(scheme, 2)) if valid else [])
    headers = signed(rotated)
    assert verifies(current, headers)
    assert verifies(SECRETS.verifying(key(scheme, 2))[0], headers) is valid
    assert not verifies(SECRETS.verifying(key(scheme, 1))[0], headers)


def test_first_key_has_none_before_it() -> None:
    assert len(SECRETS.verifying(key("v1", 1, 5.0))) == len(signed(key("v1", 1, 5.0))["webhook-signature"].split()) == 1


def test_derivation_of_keys_does_not_change() -> None:
    # every receiver has its key configured: another derivation would turn all of them away
    assert SECRETS.verifying(key(None)) == [SECRETS.secret(ENDPOINT, 1)]
    assert SECRETS.secret(ENDPOINT, 1) == "whsec_FsO7eVgIQh9ZgSR1UtxoOaowFg6HHsaqMXCKeDV5dGM="
    assert SECRETS.verifying(key("v1")) == ["whsec_+RTbyLlJzPEbTHfnMge9a4HKrBHn2lqZULzyCzr0hq0="]
    assert SECRETS.verifying(key("v1a")) == ["whpk_XTmFN67bl7Yy0G1+2xo8gfRZ29/La19eoa8VnBcJyLA="]


def test_derivation_is_hkdf_of_another_library() -> None:
    def derived(scheme: bytes) -> bytes:
        info = ENDPOINT.bytes + (1).to_bytes(8, "big") + scheme
        return HKDF(SHA256(), 32, b"ourvidz-serve callback secrets", info).derive(b"m" * 32)

    assert SECRETS.verifying(key("v1")) == ["whsec_" + base64.b64encode(derived(b"v1")).decode()]
    public = Ed25519PrivateKey.from_private_bytes(derived(b"v1a")).public_key().public_bytes_raw()
    assert SECRETS.verifying(key("v1a")) == ["whpk_" + base64.b64encode(public).decode()]


def test_keys_differ_by_owner_kind_version_and_master() -> None:
    other = CallbackSecrets(b"n" * 32)
    keys = [SECRETS.verifying(key(scheme, version))[0] for scheme in (None, "v1", "v1a") for version in (1, 2)]
    keys += [other.verifying(key(scheme))[0] for scheme in (None, "v1", "v1a")]
    keys.append(SECRETS.verifying(SigningKey(UUID(int=1), "v1", 1, None))[0])
    assert len({each.split("_")[1] for each in keys}) == 10


def test_nobody_is_given_the_half_that_signs_with_ed25519() -> None:
    (told,) = SECRETS.verifying(key("v1a"))
    prefix, value = told.split("_")
    raw = base64.b64decode(value)
    assert (prefix, len(raw)) == ("whpk", 32)
    assert raw != SECRETS._derive(key("v1a"), 1)


def test_delivery_is_signed_with_the_key_of_its_receiver() -> None:
    values: dict[str, Any] = {
        "id": "msg_1",
        "job_id": UUID(int=1),
        "user_id": UUID(int=2),
        "url": "https://example.com/hook",
        "body": BODY,
        "event_type": "job.completed",
        "attempts": 1,
        "lease_no": 1,
        "secret_version": 1,
        "secret_age_seconds": None,
    }
    now = datetime.now(UTC)
    to_url, to_endpoint = Delivery(**values), Delivery(**values, endpoint_id=ENDPOINT, signature="v1a")
    assert verifies(SECRETS.secret(UUID(int=2), 1), SECRETS.headers(to_url, now))
    assert verifies(SECRETS.verifying(key("v1a"))[0], SECRETS.headers(to_endpoint, now))


def test_short_master_is_refused() -> None:
    with pytest.raises(ValueError):
        CallbackSecrets(b"m" * 31)


# --------------------------------------------------------------------------------------------------- JavaScript


def by_javascript(folder: Path, verifying: str, headers: dict[str, str], body: bytes = BODY) -> tuple[Any, str]:
    """What the library made of the message, and what it complained about."""
    message = {"key": verifying, "headers": headers, "body": body.decode()}
    done = javascript.run(folder, Path(__file__).with_name("verify.js"), message)
    return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr


@EVERY
def test_official_javascript_library_takes_our_signature_and_no_other(node_folder: Path, scheme: str | None) -> None:
    rotated = key(scheme, 2, 60.0)
    headers = signed(rotated)
    for verifying in SECRETS.verifying(rotated):
        assert by_javascript(node_folder, verifying, headers) == (json.loads(BODY), "")
    wrong = SECRETS.verifying(key(scheme, 3))[0], headers, BODY
    tampered = SECRETS.verifying(rotated)[0], headers, BODY.replace(b"1.50", b"1.51")
    renamed = SECRETS.verifying(rotated)[0], headers | {"webhook-id": "msg_2"}, BODY
    for refused in (wrong, tampered, renamed):
        value, complaint = by_javascript(node_folder, *refused)
        assert value is None
        assert "No matching signature found" in complaint


@pytest.mark.parametrize("seconds", [-301, 301])
def test_official_javascript_library_refuses_another_time(node_folder: Path, seconds: int) -> None:
    headers = signed(key(), at=datetime.now(UTC) + timedelta(seconds=seconds + (2 if seconds > 0 else 0)))
    value, complaint = by_javascript(node_folder, SECRETS.verifying(key())[0], headers)
    assert value is None
    assert "timestamp too" in complaint
