"""`ourvidz submit`: hand in a job, and on request wait for it and fetch its files."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError

from serve_app.api.wire import Job, JobRequest
from serve_app.cli.calls import AsJson, Url, calling, field_errors, run
from serve_app.cli.progress import Watching, state_of
from serve_app.cli.terminal import FAILED, INTERRUPTED, USAGE, Stop, say, show, show_json
from serve_app.client import Client

OPTIONS = frozenset({"job_type", "prompt", "enhance", "callback_url"})  # not given by --param


def submit(
    job_type: Annotated[str, typer.Argument(metavar="TYPE", help="A job type, e.g. sdxl_image_fast.")],
    prompt: Annotated[str, typer.Argument(help="What to make; - reads it from stdin.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="A field of the request; repeatable. See `openapi`."),
    ] = None,
    enhance: Annotated[
        bool | None, typer.Option("--enhance/--no-enhance", help="Let the language model rewrite the prompt first.")
    ] = None,
    callback_url: Annotated[str | None, typer.Option(help="Where to report every change, signed.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Repeating a key gives the first job again.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has ended.")] = False,
    out: Annotated[Path | None, typer.Option(help="Wait, and put the files into this folder.", file_okay=False)] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Hand in a job and print its id; with --wait or --out, print its files instead."""
    given: dict[str, Any] = {"job_type": job_type, "prompt": sys.stdin.read().strip() if prompt == "-" else prompt}
    given |= {"enhance": enhance} if enhance is not None else {}
    given |= {"callback_url": callback_url} if callback_url is not None else {}
    given |= dict(_parameter(text) for text in param or ())
    try:
        request = JobRequest.model_validate(given)
    except ValidationError as error:
        raise Stop("the request is wrong:\n" + field_errors(error), USAGE) from error
    if out is not None:
        check_folder(out)
    run(_submit(request, idempotency_key, wait or out is not None, out, as_json, url))


async def _submit(
    request: JobRequest, idempotency_key: str | None, wait: bool, out: Path | None, as_json: bool, url: str | None
) -> None:
    async with calling(url) as client:
        submission = await client.submit(request, idempotency_key)
        job = submission.job
        if submission.replayed:
            say("this idempotency key was used before; here is its job")
        for adjusted in job.adjustments:
            say(f"{adjusted.field}: {adjusted.used} instead of {adjusted.given} ({adjusted.reason})")
        if wait:
            (job,) = await watch_all(client, [job])
        await conclude(client, [job], out, as_json, ended=wait)


def check_folder(out: Path) -> None:
    """Make the folder for the files, so that no job is made or waited for whose files have nowhere to go. Raises
    `Stop`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise Stop(f"--out {out}: no files can be put there ({error.strerror})", USAGE) from error


async def watch_all(client: Client, jobs: list[Job]) -> list[Job]:
    """Show the jobs until every one of them has ended. Interrupted, it says how to cancel what goes on."""
    import asyncio

    with Watching() as watching:
        try:
            return list(await asyncio.gather(*(client.wait(job.id, watching) for job in jobs)))
        except asyncio.CancelledError:
            pass
    names = " ".join(str(job.id) for job in jobs)
    raise Stop(
        f"no longer watching; nothing was cancelled.\n  to cancel: ourvidz jobs cancel {names}"
        f"\n  to watch again: ourvidz jobs watch {names}",
        INTERRUPTED,
    )


async def conclude(client: Client, jobs: list[Job], out: Path | None, as_json: bool, *, ended: bool) -> None:
    """Fetch the files and print the outcome; exits with 1 if a job that was waited for did not complete."""
    documents = []
    for job in jobs:
        paths = await _fetch(client, job, out) if out is not None and job.status == "completed" else []
        document = job.model_dump(mode="json")
        documents.append(document | {"files": [str(path) for path in paths]} if out is not None else document)
        if as_json:
            continue
        if not ended:
            show(str(job.id))
        for line in [str(path) for path in paths] or [asset.url for asset in job.assets if ended]:
            show(line)
    if as_json:
        show_json(documents[0] if len(documents) == 1 else documents)
    bad = [job for job in jobs if ended and job.status != "completed"]
    if bad:
        raise Stop("\n".join(f"{job.id}: {state_of(job)}" for job in bad), FAILED)


async def _fetch(client: Client, job: Job, out: Path) -> list[Path]:
    try:
        return await client.download(job, out)
    except OSError as error:  # the disk is full, say, or the folder is gone by now
        again = f"`ourvidz jobs watch {job.id} --out FOLDER` fetches them again"
        raise Stop(f"--out {out}: the files can't be put there ({error.strerror}); {again}", FAILED) from error


def _parameter(text: str) -> tuple[str, Any]:
    """`name=value`. Text fields take the value as it is, all others as JSON."""
    name, equals, value = text.partition("=")
    allowed = sorted(set(JobRequest.model_fields) - OPTIONS)
    if not equals or name not in allowed:
        raise Stop(f"--param takes NAME=VALUE; the names are {', '.join(allowed)}", USAGE)
    kind = JobRequest.model_fields[name].annotation
    kinds = (kind, *get_args(kind))
    if str in kinds or any(get_origin(member) is Literal for member in kinds):
        return name, value
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise Stop(f"--param {name}: not a JSON value", USAGE) from error
