"""Tokens of an auth service: what is believed, what opens nothing, and where the keys come from."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from deployments.settings import Settings, SettingsError
from serve_app import token_keys
from serve_app.token_keys import KeySet, KeysUnavailable, read_keys
from serve_app.tokens import AnonymousToken, InvalidToken, ServiceToken, TokenError, TokenExpired, Tokens
from tests.serve_app.signing import ISSUER, JWT_SECRET, KeyServer, Signer, claims, key_server, shared

USER = UUID("7f3e1c52-8f0e-4d7c-9a51-2d1b6c0f4e11")
TOKENS = Tokens(JWT_SECRET.encode(), issuer=ISSUER)


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer("one")


@pytest.fixture(scope="module")
def rsa_signer() -> Signer:
    return Signer("two", "RS256")


@pytest.fixture
async def keys(signer: Signer, rsa_signer: Signer) -> AsyncIterator[KeyServer]:
    async with key_server(signer.jwk(), rsa_signer.jwk()) as server:
        yield server


def unsigned(said: dict[str, Any], header: dict[str, Any], signature: str = "") -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, said)]
    return ".".join([*parts, signature])


# ------------------------------------------------------------------------------------------------ what is believed


async def test_a_token_names_its_user_and_its_time() -> None:
    said = claims(USER)
    holder = await TOKENS.read(shared(said))
    assert holder.user_id == USER
    assert (holder.issued_at.timestamp(), holder.expires_at.timestamp()) == (said["iat"], said["exp"])


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["other", "authenticated"]},
        {"is_anonymous": None},
        {"exp": -1},
        {"nbf": 5},
        {"iat": 5},
        {"jti": 7},
    ],
    ids=["audiences", "older", "ended just now", "begins right now", "clock ahead", "number as id"],
)
async def test_what_differs_by_a_little_is_believed(changes: dict[str, Any]) -> None:
    now = int(time.time())
    changes = {name: now + value if name in ("exp", "nbf", "iat") else value for name, value in changes.items()}
    assert (await TOKENS.read(shared(claims(USER, **changes)))).user_id == USER


HOUR = 3600
REFUSED: dict[str, tuple[dict[str, Any], type[TokenError]]] = {
    "expired": ({"exp": int(time.time()) - HOUR}, TokenExpired),
    "without an end": ({"exp": None}, InvalidToken),
    "without a beginning": ({"iat": None}, InvalidToken),
    "not yet": ({"nbf": int(time.time()) + 2 * HOUR}, InvalidToken),
    "from the future": ({"iat": int(time.time()) + 2 * HOUR}, InvalidToken),
    "an end beyond time": ({"exp": 10**18}, InvalidToken),
    "an end that is no number": ({"exp": "soon"}, InvalidToken),
    "for another audience": ({"aud": "other"}, InvalidToken),
    "for no audience": ({"aud": None}, InvalidToken),
    "a part of the audience": ({"aud": "authenticated-not"}, InvalidToken),
    "of another issuer": ({"iss": "https://other.test/auth/v1"}, InvalidToken),
    "of no issuer": ({"iss": None}, InvalidToken),
    "no user": ({"sub": None}, InvalidToken),
    "a user that is no uuid": ({"sub": "admin"}, InvalidToken),
    "a user that is a number": ({"sub": 7}, InvalidToken),
    "no role": ({"role": None}, InvalidToken),
    "a role of ours": ({"role": "admin"}, InvalidToken),
    "a role of the database": ({"role": "postgres"}, InvalidToken),
    "several roles": ({"role": ["authenticated"]}, InvalidToken),
    "the public key": ({"role": "anon", "sub": None, "aud": None, "iss": "supabase"}, AnonymousToken),
    "signed in as nobody": ({"is_anonymous": True}, AnonymousToken),
    "the service key": ({"role": "service_role", "sub": None, "aud": None, "iss": "supabase"}, ServiceToken),
    "the service key of a user": ({"role": "service_role"}, ServiceToken),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_signed_token_that_is_not_right_is_refused(name: str) -> None:
    changes, expected = REFUSED[name]
    with pytest.raises(expected) as refused:
        await TOKENS.read(shared(claims(USER, **changes)))
    assert type(refused.value) is expected


@pytest.mark.parametrize(
    "token",
    [
        "a.b.c",
        "..",
        "",
        "ä.b.c",
        shared(claims(USER)) + "x",
        shared(claims(USER), "another secret of at least forty characters"),
        shared(claims(USER), algorithm="HS512"),
        shared(claims(USER) | {"padding": "x" * 9000}),
        unsigned(claims(USER), {"alg": "none", "typ": "JWT"}),
        unsigned(claims(USER), {"alg": "None", "typ": "JWT"}, "e30"),
        unsigned(claims(USER), {"alg": None}, "e30"),
        unsigned(claims(USER), {"alg": ["HS256"]}, "e30"),
        unsigned(claims(USER), {"alg": "RS256", "kid": "two"}, "e30"),
        unsigned(claims(USER), {}, "e30"),
        unsigned({}, [], "e30"),  # type: ignore[arg-type]
        shared(claims(USER)).rsplit(".", 1)[0] + ".",
    ],
    ids=lambda token: f"{len(token)} characters",
)
async def test_what_is_not_signed_by_the_secret_is_refused(token: str) -> None:
    with pytest.raises(InvalidToken):
        await TOKENS.read(token)


async def test_without_settings_no_token_is_believed() -> None:
    for token in (shared(claims(USER)), shared(claims(USER), " " * 40)):
        with pytest.raises(InvalidToken):
            await Tokens().read(token)


async def test_what_is_refused_is_never_repeated() -> None:
    with pytest.raises(TokenError) as refused:
        await TOKENS.read(shared(claims(USER, aud="hush")))
    shown = refused.value
    assert "hush" not in f"{shown}{shown.__cause__}{shown.args}"
    assert shown.__suppress_context__ or shown.__context__ is None


# ------------------------------------------------------------------------------------------------------ public keys


async def test_tokens_of_listed_keys_are_believed_and_the_keys_kept(
    keys: KeyServer, signer: Signer, rsa_signer: Signer
) -> None:
    tokens = Tokens(keys=KeySet(keys.url))
    for one in (signer, rsa_signer, signer):
        assert (await tokens.read(one.sign(claims(USER)))).user_id == USER
    assert keys.asked == 1


async def test_many_first_tokens_ask_for_the_keys_once(keys: KeyServer, signer: Signer) -> None:
    tokens = Tokens(keys=KeySet(keys.url))
    read = await asyncio.gather(*(tokens.read(signer.sign(claims(USER))) for _ in range(20)))
    assert ({one.user_id for one in read}, keys.asked) == ({USER}, 1)


async def test_a_public_key_is_no_shared_secret(keys: KeyServer, signer: Signer, rsa_signer: Signer) -> None:
    import hmac
    from hashlib import sha256

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    both = Tokens(JWT_SECRET.encode(), KeySet(keys.url))
    for one in (signer, rsa_signer):
        pem = one.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        bare = unsigned(claims(USER), {"alg": "HS256", "kid": one.key_id}).rstrip(".")
        mac = base64.urlsafe_b64encode(hmac.digest(pem, bare.encode(), sha256)).rstrip(b"=").decode()
        for tokens in (both, Tokens(keys=KeySet(keys.url))):
            with pytest.raises(InvalidToken):
                await tokens.read(f"{bare}.{mac}")


@pytest.mark.parametrize(
    "forged", [{"alg": "RS256"}, {"alg": "ES384"}, {"kid": "three"}, {"kid": None}, {"kid": ["one"]}]
)
async def test_a_key_checks_its_own_algorithm_under_its_own_id(
    keys: KeyServer, signer: Signer, forged: dict[str, Any]
) -> None:
    signed = signer.sign(claims(USER))
    token = unsigned(claims(USER), {"alg": "ES256", "kid": "one"} | forged, signed.rsplit(".", 1)[1])
    with pytest.raises(InvalidToken):
        await Tokens(keys=KeySet(keys.url)).read(token)


async def test_the_key_of_another_signer_under_a_known_id_is_refused(keys: KeyServer) -> None:
    with pytest.raises(InvalidToken):
        await Tokens(keys=KeySet(keys.url)).read(Signer("one").sign(claims(USER)))


async def test_keys_that_must_not_sign_are_left_out(signer: Signer) -> None:
    weak = Signer("weak", "RS256", 1024)
    listed = [
        signer.jwk(),
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0", "alg": "HS256"},
        weak.jwk(),
        signer.jwk(kid="for encryption", use="enc"),
        signer.jwk(kid="other algorithm", alg="ES384"),
        signer.jwk(kid="other curve", crv="P-384"),
        signer.jwk(kid="broken", x="!"),
        {"kty": "EC", "crv": "P-256", "kid": "empty"},
        signer.jwk(kid=7),
        "no key",
    ]
    assert list(read_keys({"keys": listed})) == ["one"]


async def test_a_new_key_is_fetched_when_a_token_names_it_but_not_too_often(keys: KeyServer, signer: Signer) -> None:
    clock, new = Clock(), Signer("new")
    tokens = Tokens(keys=KeySet(keys.url, clock))
    await tokens.read(signer.sign(claims(USER)))
    keys.keys.append(new.jwk())
    for _ in range(50):
        with pytest.raises(InvalidToken):
            await tokens.read(new.sign(claims(USER)))
    assert keys.asked == 1
    clock.now += token_keys.PAUSE_SECONDS
    await tokens.read(new.sign(claims(USER)))
    assert keys.asked == 2


async def test_a_key_that_is_withdrawn_ends(keys: KeyServer, signer: Signer) -> None:
    clock = Clock()
    kept = KeySet(keys.url, clock)
    assert await kept.find("one") is not None
    keys.keys = [key for key in keys.keys if key["kid"] != "one"]
    clock.now += token_keys.FRESH_SECONDS
    assert await kept.find("one") is not None  # and the fetch has begun
    assert await kept.find("another") is None  # waits for it
    assert await kept.find("one") is None


async def test_keys_outlive_an_auth_service_that_is_away_for_a_day(keys: KeyServer) -> None:
    clock = Clock()
    kept = KeySet(keys.url, clock)
    await kept.find("one")
    keys.status = 503
    clock.now += token_keys.STALE_SECONDS - 1
    assert await kept.find("one") is not None
    with pytest.raises(KeysUnavailable):
        await kept.find("unknown")  # it may be a new one; nobody can tell
    clock.now += 1
    with pytest.raises(KeysUnavailable):
        await kept.find("one")
    keys.status = 200
    clock.now += token_keys.PAUSE_AFTER_FAILURE_SECONDS
    assert await kept.find("one") is not None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"not json"),
        (200, b"[]"),
        (200, b'{"keys": 1}'),
        (200, b" " * 70000 + b'{"keys": []}'),
        (302, b""),
        (404, b""),
    ],
    ids=["text", "list", "number", "large", "redirect", "missing"],
)
async def test_a_document_that_is_none_leaves_the_keys_unknown(keys: KeyServer, status: int, body: bytes) -> None:
    keys.status, keys.body = status, body
    with pytest.raises(KeysUnavailable):
        await KeySet(keys.url).find("one")


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("secret", ["short", "é" * 15])
def test_a_short_secret_is_refused(secret: str) -> None:
    with pytest.raises(SettingsError, match="32 bytes") as refused:
        Settings(jwt_secret=secret).token_secret()
    assert secret not in str(refused.value)


def test_a_published_secret_is_for_laptops() -> None:
    known = "super-secret-jwt-token-with-at-least-32-characters-long"
    assert Settings(jwt_secret=known).token_secret() == known.encode()
    with pytest.raises(SettingsError, match="published"):
        Settings(jwt_secret=known, profile="gpu-24gb").token_secret()


def test_the_secret_stays_out_of_what_deployments_are_told() -> None:
    settings = Settings(jwt_secret=JWT_SECRET, jwt_issuer=ISSUER)
    assert JWT_SECRET not in f"{settings!r}{settings.shared()}"


def test_a_setting_that_is_wrong_shows_no_other() -> None:
    with pytest.raises(ValueError, match="renew_seconds") as refused:
        Settings(jwt_secret=JWT_SECRET, lease_seconds=2, renew_seconds=5)
    assert JWT_SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://auth.test/jwks", "ftp://127.0.0.1/jwks", "/jwks", "https://a:b@auth.test/jwks"]
)
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    with pytest.raises(ValueError, match="jwks_url"):
        Settings(jwks_url=url)
    assert Settings(jwks_url="http://127.0.0.1:9999/auth/v1/.well-known/jwks.json").jwks_url


def test_an_issuer_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect"):
        Settings(jwt_issuer=ISSUER)
