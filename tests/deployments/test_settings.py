"""Settings: where values come from, what is refused, and secrets that are made once."""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.settings import GENERATED, SECRET_FIELDS, Settings, SettingsError

SECRET = "s" * 32


def test_defaults_are_a_laptop_in_the_users_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = Settings.load()
    assert (settings.profile, settings.state_dir) == ("laptop", tmp_path / "ourvidz")
    assert settings.blobs() == f"file://{tmp_path}/ourvidz/blobs"
    assert settings.embedded_postgres == tmp_path / "ourvidz" / "postgres"


def test_the_environment_wins_over_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURVIDZ_LEASE_SECONDS", "45")
    settings = Settings.load({"lease_seconds": 60, "renew_seconds": 7})
    assert (settings.lease_seconds, settings.renew_seconds) == (45, 7)


def test_arguments_win_over_defaults() -> None:
    assert Settings.load({"max_attempts": 5}).max_attempts == 5


def test_signing_needs_a_certificate_and_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="c2pa_certificate and c2pa_key"):
        Settings.load({"provenance": "c2pa"})
    with pytest.raises(ValidationError, match="needs c2pa_key"):
        Settings.load({"provenance": "c2pa", "c2pa_certificate": tmp_path / "chain.pem"})
    with pytest.raises(ValidationError, match="no effect"):
        Settings.load({"provenance": "iptc", "c2pa_key": tmp_path / "key.pem"})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="leese_seconds"):
        Settings.load({"leese_seconds": 60})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DATABASE_URL": "postgresql://a/1"}, "postgresql://a/1"),
        ({"OURVIDZ_DATABASE_URL": "postgresql://b/2"}, "postgresql://b/2"),
        ({"DATABASE_URL": "postgresql://a/1", "OURVIDZ_DATABASE_URL": "postgresql://b/2"}, "postgresql://b/2"),
    ],
)
def test_the_database_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for settings in (Settings.load(), Settings.in_deployment(Settings.load().shared())):
        assert settings.postgres() == expected
        assert settings.embedded_postgres is None


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "OURVIDZ_DATABASE_URL", "OURVIDZ_SIGNING_SECRET", "OURVIDZ_MAX_ATTEMPTS"):
        monkeypatch.setenv(name, "")
    settings = Settings.load({"max_attempts": 5})
    assert (settings.database_url, settings.signing_secret, settings.max_attempts) == (None, None, 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ()),
        ("http://10.0.0.7:9000", ("http://10.0.0.7:9000",)),
        ("http://a:1 , https://b:2,", ("http://a:1", "https://b:2")),
    ],
)
def test_lists_are_read_from_text(monkeypatch: pytest.MonkeyPatch, given: str, expected: tuple[str, ...]) -> None:
    monkeypatch.setenv("OURVIDZ_EGRESS_ALLOW", given)
    assert Settings.load().egress_allow == expected


def test_a_schedule_is_read_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURVIDZ_CALLBACK_SCHEDULE", "0, 1.5, 20")
    assert Settings.load().callback_schedule == (0, 1.5, 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("egress_allow", "10.0.0.7"),
        ("egress_allow", "http://10.0.0.7/path"),
        ("egress_allow", "ftp://10.0.0.7"),
        ("egress_allow", "http://user@10.0.0.7"),
        ("egress_allow", "*"),
        ("callback_schedule", "0,soon"),
        ("public_url", "127.0.0.1:8000"),
        ("lease_seconds", "1"),
        ("lease_seconds", "nan"),
        ("renew_seconds", "0"),
        ("max_attempts", "0"),
        ("max_attempts", "21"),
        ("signed_url_seconds", "0"),
        ("drain_seconds", "-1"),
    ],
)
def test_a_value_that_can_not_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"OURVIDZ_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        Settings.load()


def test_a_lease_must_outlast_its_renewals() -> None:
    with pytest.raises(ValidationError, match="renew_seconds"):
        Settings(lease_seconds=5, renew_seconds=10)


def test_the_public_url_has_no_slash_at_its_end() -> None:
    assert Settings(public_url="https://api.example.com/").public_url == "https://api.example.com"


def test_what_deployments_are_told_holds_no_secret() -> None:
    values: dict[str, Any] = dict.fromkeys(SECRET_FIELDS, SECRET) | {"database_url": "postgresql://u:word@h/db"}
    settings = Settings(**values)
    shared = settings.shared()
    assert not shared.keys() & SECRET_FIELDS
    assert SECRET not in json.dumps(shared)
    assert "word" not in json.dumps(shared)
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert SECRET not in shown
        assert "word" not in shown


def test_every_secret_is_hidden() -> None:
    secrets = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert secrets == SECRET_FIELDS


def test_a_deployment_takes_what_it_is_told_and_its_own_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = Settings(state_dir=tmp_path, lease_seconds=44, egress_allow=("http://10.0.0.7:9000",)).shared()
    monkeypatch.setenv("OURVIDZ_SIGNING_SECRET", SECRET)
    settings = Settings.in_deployment(json.loads(json.dumps(told)))
    assert (settings.state_dir, settings.lease_seconds) == (tmp_path, 44)
    assert settings.egress_allow == ("http://10.0.0.7:9000",)
    assert settings.secret("signing_secret") == SECRET.encode()


# ------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("name", GENERATED)
def test_a_secret_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(f"OURVIDZ_{name.upper()}", SECRET)
    assert Settings(state_dir=tmp_path).secret(name) == SECRET.encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", GENERATED)
def test_a_short_secret_is_refused_by_name(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {name: "s" * 31}
    with pytest.raises(SettingsError, match=f"OURVIDZ_{name.upper()}"):
        Settings(state_dir=tmp_path, **values).secret(name)


@pytest.mark.parametrize("profile", ["gpu-24gb", "gpu-80gb"])
@pytest.mark.parametrize("name", GENERATED)
def test_no_other_profile_starts_without_its_secrets(tmp_path: Path, profile: str, name: str) -> None:
    with pytest.raises(SettingsError, match=f"OURVIDZ_{name.upper()}.*{profile}"):
        Settings(profile=profile, state_dir=tmp_path).secret(name)
    assert list(tmp_path.iterdir()) == []


def test_a_laptop_makes_its_secrets_once_and_for_itself(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    first = {name: Settings(state_dir=state).secret(name) for name in GENERATED}
    assert {name: Settings(state_dir=state).secret(name) for name in GENERATED} == first
    assert len(set(first.values())) == 3
    assert all(len(secret) == 32 for secret in first.values())
    assert [entry.name for entry in state.iterdir()] == ["secrets.json"]
    assert stat.S_IMODE((state / "secrets.json").stat().st_mode) == 0o600


def test_two_laptops_have_different_secrets(tmp_path: Path) -> None:
    made = {Settings(state_dir=tmp_path / name).secret("signing_secret") for name in "ab"}
    assert len(made) == 2


def test_processes_that_race_for_the_secrets_agree(tmp_path: Path) -> None:
    script = "from deployments.settings import Settings; print(Settings.load().secret('signing_secret').hex())"
    environment = os.environ | {"OURVIDZ_STATE_DIR": str(tmp_path)}

    def make() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(4) as threads:
        made = [future.result() for future in [threads.submit(make) for _ in range(4)]]
    assert len(set(made)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["secrets.json"]


def test_threads_that_race_for_the_secrets_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        made = {
            future.result()
            for future in [
                threads.submit(lambda: Settings(state_dir=tmp_path).secret("signing_secret")) for _ in range(64)
            ]
        }
    assert len(made) == 1
