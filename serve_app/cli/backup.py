"""`ourvidz backup` and `ourvidz restore`: the database and the object store of one point in time."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import asyncpg
import typer
from pydantic import SecretStr

from db import restore as restoring
from db.backup import BackupError, Manifest, back_up
from db.blobs import BlobStore
from db.dumps import DumpError
from serve_app.cli.calls import AsJson, load_settings, run
from serve_app.cli.terminal import FAILED, USAGE, Stop, errors, say, show, show_facts, show_json
from serve_app.version import VERSION

T = TypeVar("T")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the backup.")]


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")],
    as_json: AsJson = False,
) -> None:
    """Write the database and all files that it speaks of to a folder, of one point in time. Needs no stop.

    The generated secrets are not in it. Prompts and pictures are: keep it like the system itself.
    """
    _refuse_url(folder)
    settings = load_settings()

    async def work() -> Manifest:
        url = await asyncio.to_thread(settings.postgres)
        with errors().status("backing up …"):
            return await back_up(url, _store(settings.blobs()), folder, VERSION)

    manifest = _run(work())
    if as_json:
        show_json(manifest.model_dump(exclude={"migrations"}) | {"folder": str(folder)})
    else:
        show(str(folder))
        say(f"{_counts(manifest)}; {manifest.files} files of {manifest.bytes} bytes")
    _say_losses(manifest)


def restore(
    folder: Folder,
    into: Annotated[
        str | None,
        typer.Option(help="URL of an empty database; else the one of the settings.", show_default=False),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="URL of an empty object store; else the one of the settings.", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the backup; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fill an empty database and an empty object store from a backup, and check every file. Overwrites nothing."""
    _refuse_url(folder)
    if check:
        manifest = _run(restoring.check(folder))
        if as_json:
            show_json(manifest.model_dump(exclude={"migrations"}) | {"folder": str(folder)})
        else:
            say(f"the backup of {manifest.taken_at} is whole: {_counts(manifest)}; {manifest.files} files")
        return
    if (into is None) != (store is None):
        raise Stop("--into and --store go together: a database and the store that its rows speak of", USAGE)
    settings = load_settings()
    if into is not None:
        settings = settings.model_copy(update={"database_url": SecretStr(into)})

    async def work() -> restoring.Restored:
        await restoring.check(folder)  # before a Postgres is started for it
        url = await asyncio.to_thread(settings.postgres)
        with errors().status("restoring …"):
            return await restoring.restore(folder, url, _store(store or settings.blobs()))

    done = _run(work())
    if as_json:
        document = {"taken_at": done.manifest.taken_at, "counts": done.manifest.counts, "applied": done.applied}
        lost = {"missing": done.missing, "damaged": done.damaged, "faults": [vars(fault) for fault in done.faults]}
        show_json(document | {"files": done.files} | lost)
    else:
        show_facts(done.manifest.counts | {"files": done.files})
        say(f"restored the backup of {done.manifest.taken_at}; {len(done.applied)} migrations were applied to it")
    _say_losses(done.manifest)
    if done.faults:
        for fault in done.faults:
            say(f"{fault.reason}: {fault.bucket}/{fault.key}")
        raise Stop(f"{len(done.faults)} files are not as the rows say", FAILED)


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return run(work)
    except (BackupError, DumpError) as error:
        raise Stop(str(error), FAILED) from error
    except asyncpg.UndefinedTableError as error:
        raise Stop("the database is not migrated yet: run `ourvidz migrate`", FAILED) from error


def _counts(manifest: Manifest) -> str:
    return ", ".join(f"{rows} {name}" for name, rows in manifest.counts.items())


def _say_losses(manifest: Manifest) -> None:
    if manifest.missing:
        say(f"{manifest.missing} files were gone from the store when the backup was made; files.jsonl names them")
    if manifest.damaged:
        say(f"{manifest.damaged} files had another size than their rows say; files.jsonl names them")


def _store(url: str) -> BlobStore:
    try:
        return BlobStore.from_url(url)
    except ValueError as error:
        raise Stop(str(error), USAGE) from error


def _refuse_url(folder: Path) -> None:
    if folder.parts and folder.parts[0].endswith(":"):  # what Path makes of s3://name
        raise Stop("a backup is a folder on this machine; copy it elsewhere when it is whole", USAGE)
