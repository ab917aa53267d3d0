"""`ourvidz training`: the registry of LoRA trainings, filled from files and checked."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import asyncpg
import typer

from db.training import Finding, Imported, Numbered, ProductionLora, RefusedRows, Trainings
from db.training_files import read_rows
from deployments.loras import sources
from deployments.settings import Settings
from models.catalog import Family
from models.generation import GenerationError
from models.lora.files import ProfileLoras
from serve_app.cli.calls import AsJson, database, load_settings, run
from serve_app.cli.terminal import FAILED, USAGE, Stop, clean, say, show, show_json, show_table

SIZE_TOLERANCE = 0.05  # some write megabytes for mebibytes

app = typer.Typer(
    no_args_is_help=True,
    help="The registry of LoRA trainings. These commands work on the database that the settings name; they need no key "
    "and no running cluster.",
)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Runs and epochs, in JSON or CSV.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only try it, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take training runs and results of epochs into the registry, all of the file or nothing.

    A run is known by its name, an epoch by its run and number: the same file again changes nothing, another one changes
    what it gives. Exits with 1 if a row was refused; each fault is told with its line and field.
    """
    try:
        rows = read_rows(file)
        done = run(_put(load_settings(), rows, dry_run))
    except OSError as error:
        raise Stop(f"{file} can't be read: {error.strerror}", USAGE) from error
    except RefusedRows as error:
        if as_json:
            show_json({"imported": False, "faults": [vars(fault) for fault in error.bad]})
        else:
            for fault in error.bad:
                show("\t".join((str(fault.line), clean(fault.field), clean(fault.message))))
        raise Stop(f"nothing was imported: {error} [{error.code}]", FAILED) from error
    if as_json:
        show_json({"imported": not dry_run} | asdict(done))
    verb = "would be " if dry_run else ""
    say(f"{done.added} {verb}added, {done.changed} {verb}changed, {done.unchanged} unchanged")


async def _put(settings: Settings, rows: list[Numbered], dry_run: bool) -> Imported:
    async with database(settings) as pool:
        return await Trainings(pool).put(rows, keep=not dry_run)


@app.command()
def audit(
    files: Annotated[
        bool,
        typer.Option("--files", help="Read the files of production LoRAs too; what lies in a repository is fetched."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is missing in the registry or can't be so. Exits with 1 if there is an error among it.

    Production LoRAs that it does not know, epochs without metrics, files whose size does not fit their rank, and more.
    """
    settings = load_settings()
    try:
        found = run(_audit(settings, files))
    except asyncpg.UndefinedTableError as error:
        raise Stop("the database is not migrated yet: run `ourvidz migrate`") from error
    if as_json:
        show_json([asdict(finding) for finding in found])
    elif found:
        columns = ("Severity", "Check", "Run", "Epoch", "LoRA", "Detail")
        rows = [(f.severity, f.check_code, f.run_name, f.epoch_number, f.lora_name, f.detail) for f in found]
        show_table(columns, rows)
    errors = sum(finding.severity == "error" for finding in found)
    say(f"{errors} errors, {len(found) - errors} warnings")
    if errors:
        raise typer.Exit(FAILED)


async def _audit(settings: Settings, files: bool) -> list[Finding]:
    models = settings.loaded_profile.models
    offered = {name for spec in models.values() for name in spec.loras}
    async with database(settings) as pool:
        trainings = Trainings(pool)
        found = await trainings.findings(offered)
        for family in (Family.SDXL, Family.WAN, Family.RV51):
            registered = await trainings.production_loras(family.value)
            own: Mapping[str, object] = models[family].loras if family in models else {}
            found += [_finding(lora, "hidden_by_profile", "the profile has one of that name, which is used instead")
                      for lora in registered if lora.name in own]  # fmt: skip
            if files:
                found += await asyncio.to_thread(lambda rows: list(file_findings(rows)), registered)
    return sorted(found, key=lambda finding: finding.severity)


def file_findings(registered: list[ProductionLora]) -> Iterator[Finding]:
    """What is wrong with the files of these LoRAs, as far as this machine can read them."""
    registry = ProfileLoras(sources(registered))
    for lora in registered:
        try:
            file = registry.file(lora.name)
        except GenerationError as error:
            yield _finding(lora, error.code, error.message)
            continue
        size, said = file.path.stat().st_size / 1e6, lora.checkpoint_file_size_mb
        if said is not None and abs(size - float(said)) > max(SIZE_TOLERANCE * size, 0.1):
            yield _finding(lora, "file_size_differs", f"the file has {size:.2f} MB, registered are {said}")


def _finding(lora: ProductionLora, code: str, detail: str) -> Finding:
    return Finding(code, "error", lora.run_name, lora.epoch_number, lora.name, detail)
