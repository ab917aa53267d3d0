"""`ourvidz jobs`: list, show, watch, cancel and retry. Ids may be shortened to a beginning or end that is unique."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from serve_app.api.wire import Job
from serve_app.cli.calls import AsJson, Url, calling, run
from serve_app.cli.progress import state_of
from serve_app.cli.submit import check_folder, conclude, watch_all
from serve_app.cli.terminal import seconds, show_facts, show_json, show_table
from serve_app.client import Client

app = typer.Typer(no_args_is_help=True, help="Your jobs.")

Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Whole ids, or a unique beginning or end of each.")]


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="queued, processing, completed, failed or cancelled.")] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Only this job type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    before: Annotated[UUID | None, typer.Option(help="Only older ones than this job: the next page.")] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Jobs, newest first."""

    async def work() -> None:
        async with calling(url) as client:
            page = await client.list_jobs(status=status, job_type=job_type, limit=limit, before=before)
        if as_json:
            show_json(page.model_dump(mode="json"))
            return
        rows = [
            (job.id, job.job_type, job.status, len(job.assets), f"{job.created_at:%Y-%m-%d %H:%M:%S}", state_of(job))
            for job in page.data
        ]
        show_table(("Id", "Type", "Status", "Files", "Created", "State"), rows)

    run(work())


@app.command("show")
def show_job(job_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False, url: Url = None) -> None:
    """Everything about a job."""

    async def work() -> Job:
        async with calling(url) as client:
            return await client.get(await client.find(job_id))

    job = run(work())
    if as_json:
        show_json(job.model_dump(mode="json"))
        return
    show_facts(
        {
            "id": job.id,
            "type": job.job_type,
            "state": state_of(job),
            "model": job.model,
            "prompt": job.prompt,
            "enhanced": job.enhanced_prompt,
            "attempt": f"{job.attempt} (failures: {job.failures} of {job.max_attempts})",
            "created": job.created_at.isoformat(),
            "queue wait": seconds(job.queue_wait_seconds),
            "enhancement": seconds(job.enhancement_seconds),
            "run": seconds(job.generation_seconds),
            "params": ", ".join(f"{name}={value}" for name, value in job.params.items() if name != "prompt"),
        }
    )
    for adjusted in job.adjustments:
        show_facts({"adjusted": f"{adjusted.field} {adjusted.given} -> {adjusted.used} ({adjusted.reason})"})
    for asset in job.assets:
        show_facts({f"file {asset.index}": f"{asset.width}x{asset.height} {asset.mime_type} {asset.url}"})
    for callback in job.callbacks:
        last = callback.last_status or callback.last_error or "no answer yet"
        show_facts({"callback": f"{callback.event} {callback.state}, {callback.attempts} attempts, {last}"})


@app.command("watch")
def watch(
    ids: Ids,
    out: Annotated[Path | None, typer.Option(help="Put the files into this folder.", file_okay=False)] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Follow jobs until they have ended; print their files. Exits with 1 unless all completed."""
    if out is not None:
        check_folder(out)

    async def work() -> None:
        async with calling(url) as client:
            jobs = [await client.get(await client.find(text)) for text in ids]
            await conclude(client, await watch_all(client, jobs), out, as_json, ended=True)

    run(work())


@app.command("cancel")
def cancel(ids: Ids, as_json: AsJson = False, url: Url = None) -> None:
    """Cancel jobs: a waiting one at once, a running one at its next step."""
    _each(ids, Client.cancel, as_json, url)


@app.command("retry")
def retry(ids: Ids, as_json: AsJson = False, url: Url = None) -> None:
    """Queue failed or cancelled jobs again."""
    _each(ids, Client.retry, as_json, url)


def _each(ids: list[str], act: Callable[[Client, UUID], Awaitable[Job]], as_json: bool, url: str | None) -> None:
    async def work() -> list[Job]:
        async with calling(url) as client:
            found = [await client.find(text) for text in ids]  # all of them before anything is changed
            return [await act(client, job_id) for job_id in found]

    jobs = run(work())
    if as_json:
        documents = [job.model_dump(mode="json") for job in jobs]
        show_json(documents[0] if len(documents) == 1 else documents)
    else:
        show_table(
            ("Id", "Type", "Status", "State"), [(job.id, job.job_type, job.status, state_of(job)) for job in jobs]
        )
