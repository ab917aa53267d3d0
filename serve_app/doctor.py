"""The doctor: looks at an installation, part by part, and says what is wrong and what to do.

A check is a function from the settings to findings. It changes nothing that lasts: it starts the embedded Postgres
where there is no other, and puts one small blob that it takes away again.
"""

import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from db.blobs import BlobError, BlobStore, UrlSigner
from deployments.addresses import is_never_allowed, literal_address
from deployments.destinations import AllowedHost
from deployments.settings import GENERATED, Settings, SettingsError
from serve_app.database_checks import check_postgres
from serve_app.findings import Finding, Level, fail, ok, warn
from serve_app.machine_checks import (
    check_cards,
    check_host,
    check_ports,
    check_python,
    check_ray,
    check_weights,
)

Check = Callable[[Settings], Iterator[Finding] | AsyncIterator[Finding]]

EXPECTED = (OSError, ValueError, RuntimeError)  # a broken check must not hide the others
PLACEHOLDERS = ("changeme", "change-me", "change_me", "example", "placeholder", "password", "default", "secret-secret")
FEW_CHARACTERS = 8  # a random secret of 32 characters has more different ones


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Every finding, as soon as it is known."""
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            findings = check(settings)
            if isinstance(findings, AsyncIterator):
                async for finding in findings:
                    yield finding
            else:
                for finding in findings:
                    yield finding
        except EXPECTED as error:
            yield fail(name, f"the check itself failed: {type(error).__name__}", "Please report this.")


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing failed. Warnings don't count."""
    return all(finding.level is not Level.FAIL for finding in findings)


def check_secrets(settings: Settings) -> Iterator[Finding]:
    """The secrets are set, long, unlike each other, and nobody's example."""
    values: dict[bytes, str] = {}
    for name in sorted(GENERATED):
        variable = f"OURVIDZ_{name.upper()}"
        advice = f"Set {variable} to 32 or more random characters, for example from: openssl rand -base64 32"
        if getattr(settings, name) is None and settings.loaded_profile.laptop:
            yield from _kept_secret(settings, variable)
            continue
        try:
            value = settings.secret(name)
        except SettingsError as error:
            yield fail("secrets", str(error), advice)
            continue
        text = value.decode(errors="replace").lower()
        if len(set(text)) < FEW_CHARACTERS or any(word in text for word in PLACEHOLDERS):
            level = warn if settings.loaded_profile.laptop else fail
            yield level("secrets", f"{variable} looks like a placeholder", advice)
        elif value in values:
            yield warn("secrets", f"{variable} is the same as {values[value]}", advice)
        else:
            yield ok("secrets", f"{variable} is set")
        values.setdefault(value, variable)


def _kept_secret(settings: Settings, variable: str) -> Iterator[Finding]:
    kept = settings.state_dir / "secrets.json"
    if kept.exists() and kept.stat().st_mode & 0o077:
        yield fail("secrets", f"{kept} can be read by others", f"chmod 600 {kept}")
    else:
        yield ok("secrets", f"{variable} is random, made and kept on this machine")


def check_addresses(settings: Settings) -> Iterator[Finding]:
    """`public_url` is one that clients can reach and whose answers nobody reads on the way."""
    url = urlsplit(settings.public_url)
    host = url.hostname or ""
    local = host == "localhost" or _is_loopback(host)
    if settings.loaded_profile.laptop or (url.scheme == "https" and not local):
        yield ok("public_url", f"clients are sent to {url.scheme}://{url.netloc.rpartition('@')[2]}")
    elif local:
        message = f"clients are sent to {host}, which only this machine reaches"
        yield warn("public_url", message, "Set OURVIDZ_PUBLIC_URL to the address that clients use.")
    else:
        message = "clients are sent to an address without TLS; API keys and signed URLs can be read on the way"
        yield warn("public_url", message, "Put a proxy with TLS before it and set OURVIDZ_PUBLIC_URL to https://…")


def check_egress(settings: Settings) -> Iterator[Finding]:
    """What callbacks and references may reach beyond public HTTPS addresses."""
    if not settings.egress_allow:
        yield ok("egress", "callbacks and references reach public HTTPS addresses only")
    for origin in settings.egress_allow:
        try:
            allowed = AllowedHost.parse(origin)
            address = literal_address(allowed.host)
        except ValueError:
            yield fail("egress", f"{origin!r} in OURVIDZ_EGRESS_ALLOW is no origin", "Write it as http://10.0.0.7:9000")
            continue
        shown = f"{allowed.scheme}://{allowed.host}:{allowed.port}"
        if address is not None and is_never_allowed(address):
            advice = "Take it out of OURVIDZ_EGRESS_ALLOW."
            yield fail("egress", f"{shown} is a metadata or link-local address; it stays refused", advice)
        elif allowed.scheme == "http" and not settings.loaded_profile.laptop:
            advice = "Give the receiver a certificate and allow it as https://…"
            yield warn("egress", f"{shown} may be called, in clear text", advice)
        else:
            yield ok("egress", f"{shown} may be called as well")


async def check_storage(settings: Settings) -> AsyncIterator[Finding]:
    """The object store takes a blob, gives it back, and lets it go; our signature of its URL holds."""
    bucket, key = "system_assets", f"doctor/{uuid4().hex}.json"
    advice = "Check OURVIDZ_BLOB_URL, the credentials and the rights on the bucket or folder."
    step = "open"
    try:
        store = BlobStore.from_url(settings.blobs())
        step = "put"
        await store.put(bucket, key, b"{}", "application/json")
        step = "get"
        intact = await store.get(bucket, key) == b"{}"
        step = "delete"
        await store.delete(bucket, [key])
    except (BlobError, OSError, ValueError) as error:
        yield fail("storage", f"the object store fails at {step}: {type(error).__name__}", advice)
        return
    where = urlsplit(settings.blobs())
    shown = f"{where.scheme}://{where.netloc.rpartition('@')[2]}{where.path}"
    if intact:
        yield ok("storage", f"{shown}: put, get and delete work")
    else:
        yield fail("storage", f"{shown} gives back other bytes than it was given", advice)
    try:
        signer = UrlSigner(settings.secret("signing_secret"), settings.public_url)
    except SettingsError:
        return  # the check of the secrets says it
    url = urlsplit(signer.sign(bucket, key, 60))
    given = dict(pair.split("=", 1) for pair in url.query.split("&"))
    if signer.verify(bucket, key, int(given["expires"]), given["signature"]):
        yield ok("storage", "signed URLs verify")
    else:
        yield fail("storage", "a URL signed now does not verify", "Check this machine's clock.")


def check_state_folder(settings: Settings) -> Iterator[Finding]:
    """The state folder can be written, or made."""
    import os

    folder = settings.state_dir.absolute()
    nearest: Path = next(path for path in (folder, *folder.parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        yield ok("state", f"state is kept in {folder}")
    else:
        yield fail("state", f"{nearest} can't be written", "Set OURVIDZ_STATE_DIR to a folder of yours.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


CHECKS: tuple[Check, ...] = (
    check_python,
    check_ray,
    check_host,
    check_state_folder,
    check_cards,
    check_weights,
    check_ports,
    check_secrets,
    check_addresses,
    check_egress,
    check_postgres,
    check_storage,
)
