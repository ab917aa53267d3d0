"""`ourvidz archive` and `ourvidz users`: taking old jobs, and whole users, out of the database."""

import re
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from db.archives import Survey
from db.blobs import BlobStore
from db.erasures import Erasures, Holdings
from deployments.archive import Archive, Archived, ArchiveError
from deployments.erasure import Erasure
from deployments.settings import Settings
from serve_app.cli.calls import AsJson, database, load_settings, run
from serve_app.cli.terminal import FAILED, USAGE, Stop, say, show_facts, show_json, show_table

LEAST_DAYS = 2  # an Idempotency-Key lives that long: its job must not be gone before

users = typer.Typer(
    no_args_is_help=True,
    help="Users. These commands work on the database and the object store that the settings name; they need no key and "
    "no running cluster.",
)


def archive(
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="DAYS",
            help="Take the jobs that ended longer ago than that, e.g. 365d; else OURVIDZ_JOB_RETENTION_DAYS.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be archived.")] = False,
    keep_files: Annotated[
        bool,
        typer.Option("--keep-files", help="Copy the jobs' images and videos into the archive; else they are deleted."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write old jobs with their history into the object store, read everything back, then delete them here.

    Jobs that are open or have a callback to send stay. What users saved to their library stays too. It may be stopped
    at any time; the next one goes on where it was.
    """
    settings = load_settings()
    age = _age(older_than, settings)
    if dry_run:
        found = run(_survey(settings, age))
        facts = asdict(found)
        if as_json:
            show_json(facts)
        else:
            show_facts(facts)
        say(f"nothing was changed; the files would be {'copied into the archive' if keep_files else 'deleted'}")
        return
    try:
        done = run(_archive(settings, age, keep_files))
    except ArchiveError as error:
        raise Stop(f"{error} [{error.code}]", FAILED) from error
    if as_json:
        show_json([asdict(archived) for archived in done])
    elif done:
        rows = [(a.name, a.jobs, a.deleted, a.files_deleted) for a in done]
        show_table(("Archive", "Jobs", "Deleted", "Files deleted"), rows)
    else:
        say("there was nothing to archive")


async def _survey(settings: Settings, age: timedelta) -> Survey:
    async with database(settings) as pool:
        return await Archive(pool, BlobStore.from_url(settings.blobs())).survey(age)


async def _archive(settings: Settings, age: timedelta, keep_files: bool) -> list[Archived]:
    done = []
    async with database(settings) as pool:
        async for archived in Archive(pool, BlobStore.from_url(settings.blobs())).run(age, keep_files=keep_files):
            say(f"{archived.name}: {archived.deleted} of {archived.jobs} jobs deleted")
            done.append(archived)
    return done


def _age(text: str | None, settings: Settings) -> timedelta:
    if text is None:
        if settings.job_retention_days is None:
            raise Stop("say --older-than, or set OURVIDZ_JOB_RETENTION_DAYS: jobs are kept for ever otherwise", USAGE)
        return timedelta(days=settings.job_retention_days)
    match = re.fullmatch(r"([0-9]{1,5})d?", text.strip())
    if match is None or not LEAST_DAYS <= int(match[1]) <= 36500:
        raise Stop(f"--older-than is a number of days from {LEAST_DAYS} on, such as 365d", USAGE)
    return timedelta(days=int(match[1]))


@users.command("erase")
def erase(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user's id, or the name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really do it; else it only says what there is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a user for good: keys, jobs, files, callbacks, endpoints, library, charges and the profile.

    Running jobs are stopped. One audit row stays, with no more of the user in it than the id.
    """
    settings = load_settings()
    user_id, holdings, complete = run(_erase(settings, user, yes))
    facts: dict[str, Any] = {"user_id": str(user_id), **asdict(holdings), "erased": yes and complete}
    if as_json:
        show_json(facts)
    else:
        show_facts(facts)
    if not yes:
        raise Stop("nothing was erased; say it with --yes", USAGE)


async def _erase(settings: Settings, user: str, yes: bool) -> tuple[UUID, Holdings, bool]:
    async with database(settings) as pool:
        erasures = Erasures(pool)
        user_id = await erasures.find(_id_or_name(user))
        if user_id is None:
            raise Stop("there is no such user", USAGE)
        holdings = await erasures.holdings(user_id)
        if not yes:
            return user_id, holdings, False
        await erasures.request(user_id, "operator")
        return user_id, holdings, await Erasure(erasures, BlobStore.from_url(settings.blobs())).carry_out(user_id)


def _id_or_name(text: str) -> UUID | str:
    try:
        return UUID(text)
    except ValueError:
        return text
