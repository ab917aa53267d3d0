"""Commands about this installation: migrate, doctor, config, openapi, version. None needs a running cluster."""

import os
import platform
from dataclasses import asdict
from importlib.metadata import version as installed
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import typer
from pydantic import SecretStr

from db.migrate import migrations, pending
from deployments.settings import Settings
from serve_app import doctor as doctor_
from serve_app.bootstrap import prepare
from serve_app.cli.calls import AsJson, database, load_settings, run
from serve_app.cli.terminal import FAILED, Stop, errors, say, show, show_json, show_table
from serve_app.findings import Finding, Level
from serve_app.version import VERSION

config = typer.Typer(no_args_is_help=True, help="The settings.")


def migrate(
    status: Annotated[bool, typer.Option("--status", help="Change nothing; exit with 1 if any is pending.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database up to date: apply missing migrations and write the seed rows."""
    settings = load_settings()
    if status:
        missing = run(_pending(settings))
        if as_json:
            show_json({"pending": missing, "known": [migration.name for migration in migrations()]})
        else:
            for migration in migrations():
                show(f"{'pending' if migration.name in missing else 'applied'}\t{migration.name}")
        if missing:
            raise Stop(f"{len(missing)} migrations are pending", FAILED)
        return
    applied = run(prepare(settings))
    if as_json:
        show_json({"applied": applied})
        return
    for name in applied:
        show(name)
    say(f"{len(applied)} migrations were applied" if applied else "nothing to do: every migration is applied")


async def _pending(settings: Settings) -> list[str]:
    async with database(settings) as pool, pool.acquire() as connection:
        assert isinstance(connection, asyncpg.pool.PoolConnectionProxy)
        return await pending(connection)  # type: ignore[arg-type]  # the proxy has every method of a connection


def doctor(as_json: AsJson = False) -> None:
    """Look for what is wrong with this installation, and say what to do. Exits with 1 if anything failed."""
    settings = load_settings()

    async def work() -> list[Finding]:
        found = []
        with errors().status("looking …"):
            async for finding in doctor_.examine(settings):
                found.append(finding)
        return found

    findings = run(work())
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        show_table(("State", "Check", "Found"), [(found.level, found.check, found.message) for found in findings])
        for found in findings:
            if found.advice:
                say(f"{found.level} {found.check}: {found.message}\n  {found.advice}")
    failed = sum(found.level is Level.FAIL for found in findings)
    if failed:
        raise Stop(f"{failed} of {len(findings)} checks failed", FAILED)


@config.command("show")
def show_config(as_json: AsJson = False) -> None:
    """Every setting, where its value comes from, and what it is. Secrets are masked."""
    settings = load_settings()
    rows = []
    for name, field in Settings.model_fields.items():
        variable = f"OURVIDZ_{name.upper()}"
        value = getattr(settings, name)
        source = variable if variable in os.environ else "default"
        if name == "database_url" and source == "default" and os.environ.get("DATABASE_URL"):
            source = "DATABASE_URL"
        rows.append({"name": name, "value": _shown(name, value), "source": source, "description": field.description})
    if as_json:
        show_json(rows)
    else:
        show_table(("Name", "Value", "Source"), [(row["name"], row["value"], row["source"]) for row in rows])


def openapi() -> None:
    """Print the OpenAPI document of the HTTP API as JSON. Starts nothing."""
    from serve_app.app import openapi_document  # brings in Ray, which takes seconds

    show_json(openapi_document())


def version(as_json: AsJson = False) -> None:
    """The version of this program, and of what it stands on."""
    versions = {"ourvidz-serve": VERSION, "python": platform.python_version()}
    versions |= {name: installed(name) for name in ("ray", "torch", "diffusers", "transformers")}
    if as_json:
        show_json(versions)
    else:
        for name, number in versions.items():
            show(f"{name} {number}")


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, SecretStr):
        return masked_url(value.get_secret_value()) if name == "database_url" else "(set, not shown)"
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def masked_url(url: str) -> str:
    """A database URL without its password, and without its query, which may hold one too."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    netloc = f"{name}{':***' if colon else ''}{at}{host}"
    return urlunsplit((parts.scheme, netloc, parts.path, "***" if parts.query else "", ""))
