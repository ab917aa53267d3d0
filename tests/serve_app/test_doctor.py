"""The doctor on parts that are well and on parts that are not."""

import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from deployments.settings import Settings
from models.profile import Card, load_profile
from serve_app import database_checks, doctor, machine_checks
from serve_app.findings import Finding, Level
from tests.serve_app.pooler import pooled

GOOD = {"signing_secret": "kJ8sd7fHq2LmZx0vB5nTr9wYc3Pg6aUe", "callback_secret": "Xb4Vt8Rk1Ns5Qw2Jp7Gm0Ly9Hc3Fd6Az"}


def installation(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(**({"state_dir": tmp_path / "state"} | changes))


def public(tmp_path: Path, **changes: Any) -> Settings:
    """Outside the laptop profile: one whose models all run on the CPU."""
    path = tmp_path / "public.yaml"
    path.write_text(
        "name: public\ndescription: one model on the CPU\nmodels:\n"
        "  qwen: {model_name: q, source: nobody/nothing, device: cpu, memory_gib: 0, disk_gib: 0.5}\n"
    )
    secrets = {"job_callback_secret": "Ep5Ua1Zo8Wd3Ki6Tb0Mq9Rs4Nx7Cy2Jv"} | GOOD
    return installation(tmp_path, **({"profile": str(path)} | secrets | changes))


def levels(findings: Iterator[Finding] | list[Finding], check: str | None = None) -> list[Level]:
    return [finding.level for finding in findings if check in (None, finding.check)]


async def gathered(findings: AsyncIterator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding async for finding in findings}


async def test_healthy_laptop_has_no_failure(database: Any, tmp_path: Path) -> None:
    findings = [f async for f in doctor.examine(installation(tmp_path, database_url=database.url))]
    assert doctor.healthy(findings), [f for f in findings if f.level is Level.FAIL]
    assert {"python", "ray", "gpu", "fit", "weights", "ports", "secrets", "postgres", "pooler", "migrations",
            "notifications", "clock", "storage", "egress"} <= {f.check for f in findings}  # fmt: skip


async def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    settings = public(tmp_path, database_url="postgresql://nobody@127.0.0.1:1/none", blob_url="file:///proc/none")
    bad = [f async for f in doctor.examine(settings) if f.level is not Level.OK]
    assert {"postgres", "storage", "weights", "public_url"} <= {f.check for f in bad}
    assert all(f.advice for f in bad)


async def test_check_that_breaks_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_broken(settings: Settings) -> Iterator[Finding]:
        raise OSError("secret detail")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, machine_checks.check_python))
    findings = [f async for f in doctor.examine(installation(tmp_path))]
    assert [(f.check, f.level) for f in findings] == [("broken", Level.FAIL), ("python", Level.OK)]
    assert "secret detail" not in findings[0].message


async def test_database_that_is_not_there_is_a_failure_without_its_password(tmp_path: Path) -> None:
    settings = installation(tmp_path, database_url="postgresql://u:hunter2@127.0.0.1:1/d")
    found = await gathered(database_checks.check_postgres(settings))
    assert found["postgres"].level is Level.FAIL
    assert "hunter2" not in repr(found)


async def test_pending_migrations_are_named(postgres_url: str, database: Any, tmp_path: Path) -> None:
    await database.pool.execute("DELETE FROM schema_migrations WHERE number = 1")
    found = await gathered(database_checks.check_postgres(installation(tmp_path, database_url=database.url)))
    assert (found["migrations"].level, found["migrations"].message[:1]) == (Level.WARN, "1")


async def test_direct_connection_has_no_pooler(database: Any, tmp_path: Path) -> None:
    found = await gathered(database_checks.check_postgres(installation(tmp_path, database_url=database.url)))
    assert (found["pooler"].level, found["pooler"].message) == (Level.OK, "no pooler in between")
    assert found["notifications"].level is Level.OK


async def test_pooler_in_transaction_mode_is_found(database: Any) -> None:
    found = await through_pooler(database.url, session=False)
    assert (found.level, "transaction mode" in found.message) == (Level.FAIL, True)


async def test_pooler_in_session_mode_is_fine(database: Any) -> None:
    found = await through_pooler(database.url, session=True)
    assert (found.level, found.message) == (Level.OK, "there is a pooler, and it keeps a connection's session")


async def through_pooler(url: str, *, session: bool) -> Finding:
    if "host=" not in url:
        pytest.skip("the tests' pooler reaches Postgres by its Unix socket only")
    async with pooled(url, session=session) as address:
        connection = await asyncpg.connect(address, statement_cache_size=0)
        try:
            return await database_checks.pooler(address, connection)
        finally:
            await connection.close()


@pytest.mark.parametrize(("seconds", "level"), [(0.1, Level.OK), (-1.9, Level.OK), (30, Level.WARN), (-90, Level.FAIL)])
def test_clock_skew_is_judged_in_both_directions(seconds: float, level: Level) -> None:
    assert database_checks.skew(seconds).level is level


async def test_clock_of_this_machine_is_compared(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(database_checks.time, "time", lambda: real() + 600)
    async with database.pool.acquire() as connection:
        assert (await database_checks.clock("", connection)).level is Level.FAIL


def test_models_that_do_not_fit_the_cards_fail() -> None:
    profile = load_profile("gpu-24gb")
    assert levels(machine_checks.fit(profile, [])) == [Level.FAIL, Level.FAIL, Level.OK]
    assert levels(machine_checks.fit(profile, [Card("A", 24, 23.5)])) == [Level.OK] * 3
    assert Level.FAIL in levels(machine_checks.fit(profile, [Card("A", 12, 11.5)]))


def test_missing_weights_are_a_warning_and_offline_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(machine_checks.check_weights(public(tmp_path)), "weights") == [Level.WARN]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert levels(machine_checks.check_weights(public(tmp_path)), "weights") == [Level.FAIL]


def test_tiny_weights_are_no_download(tmp_path: Path) -> None:
    assert levels(machine_checks.check_weights(installation(tmp_path))) == [Level.OK] * 3


def test_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert machine_checks.port_problem(port) == "in use"
    assert machine_checks.port_problem(port) is None


def test_secrets_of_a_public_installation_must_be_set(tmp_path: Path) -> None:
    findings = list(doctor.check_secrets(public(tmp_path, signing_secret=None)))
    assert [f.message for f in findings if f.level is Level.FAIL] == [
        "OURVIDZ_SIGNING_SECRET must be set on the profile public"
    ]


@pytest.mark.parametrize("weak", ["a" * 40, "changeme-changeme-changeme-changeme", "short"])
def test_placeholder_or_short_secret_fails_outside_the_laptop(tmp_path: Path, weak: str) -> None:
    findings = list(doctor.check_secrets(public(tmp_path, callback_secret=weak)))
    failed = [f for f in findings if f.level is Level.FAIL]
    assert len(failed) == 1
    assert "OURVIDZ_CALLBACK_SECRET" in failed[0].message
    assert weak not in repr(findings)


def test_one_secret_for_two_purposes_is_a_warning(tmp_path: Path) -> None:
    same = public(tmp_path, callback_secret=GOOD["signing_secret"])
    assert levels(doctor.check_secrets(same)) == [Level.OK, Level.OK, Level.WARN]


def test_good_secrets_are_ok(tmp_path: Path) -> None:
    assert levels(doctor.check_secrets(public(tmp_path))) == [Level.OK] * 3


def test_kept_secrets_that_others_can_read_fail(tmp_path: Path) -> None:
    settings = installation(tmp_path)
    settings.secret("signing_secret")
    kept = settings.state_dir / "secrets.json"
    assert set(levels(doctor.check_secrets(settings))) == {Level.OK}
    kept.chmod(kept.stat().st_mode | stat.S_IROTH)
    assert set(levels(doctor.check_secrets(settings))) == {Level.FAIL}


@pytest.mark.parametrize(
    ("origin", "level"),
    [
        ("https://hooks.example.com:8443", Level.OK),
        ("http://10.0.0.7:9000", Level.WARN),
        ("http://169.254.169.254:80", Level.FAIL),
        ("https://0x7f.1:443", Level.FAIL),
    ],
)
def test_egress_exceptions_are_judged(tmp_path: Path, origin: str, level: Level) -> None:
    assert levels(doctor.check_egress(public(tmp_path, egress_allow=(origin,)))) == [level]


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("https://media.example.com", Level.OK),
        ("http://media.example.com", Level.WARN),
        ("http://127.0.0.1:8000", Level.WARN),
        ("https://localhost", Level.WARN),
    ],
)
def test_public_address_is_judged_outside_the_laptop(tmp_path: Path, url: str, level: Level) -> None:
    assert levels(doctor.check_addresses(public(tmp_path, public_url=url))) == [level]


async def test_object_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    settings = installation(tmp_path)
    findings = [f async for f in doctor.check_storage(settings)]
    assert levels(findings) == [Level.OK, Level.OK]
    assert not [path for path in (settings.state_dir / "blobs").rglob("*") if path.is_file()]


async def test_object_store_that_is_not_there_fails_at_its_step(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    findings = [f async for f in doctor.check_storage(installation(tmp_path, blob_url=f"file://{blocked}/blobs"))]
    assert [(f.level, "fails at open" in f.message) for f in findings] == [(Level.FAIL, True)]


def test_state_folder_that_is_a_file_fails(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert levels(doctor.check_state_folder(installation(tmp_path, state_dir=blocked / "x"))) == [Level.FAIL]
    assert levels(doctor.check_state_folder(installation(tmp_path))) == [Level.OK]
