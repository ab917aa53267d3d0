"""`ourvidz rerun`: make a job again, and say whether the pixels are the same or what differs."""

from typing import Annotated

import typer

from serve_app.api.wire import Job
from serve_app.cli.calls import AsJson, Url, calling, run
from serve_app.cli.progress import state_of
from serve_app.cli.submit import watch_all
from serve_app.cli.terminal import FAILED, USAGE, Stop, say, show, show_json
from serve_app.client import Client
from serve_app.comparison import Comparison, compare


def rerun(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="A completed job of yours; its id may be shortened.")],
    index: Annotated[int | None, typer.Option(min=0, help="Compare this file only; else all of them.")] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make a completed job again and compare: exits with 0 for identical pixels, with 1 where they differ.

    The new job has the same parameters, seed, words and reference, and counts as any other one. Where pixels differ,
    what the two manifests disagree on is printed: weights, libraries, device, parameters.
    """
    run(_rerun(job_id, index, as_json, url))


async def _rerun(text: str, index: int | None, as_json: bool, url: str | None) -> None:
    async with calling(url) as client:
        first = await client.get(await client.find(text))
        indexes = [asset.index for asset in first.assets]
        if first.status != "completed":
            raise Stop(f"only a completed job can be made again; {first.id} is {state_of(first)}", FAILED)
        if index is not None and index not in indexes:
            raise Stop(f"--index: {first.id} has the files {', '.join(map(str, indexes))}", USAGE)
        second = await _made_again(client, first)
        found = [await compare(client, first, second, n) for n in (indexes if index is None else [index])]
    identical = bool(found) and all(one.identical for one in found)
    _tell(first, second, found, identical, as_json)
    if not identical:
        raise typer.Exit(FAILED)


async def _made_again(client: Client, first: Job) -> Job:
    second = Job.model_validate(await client.call("POST", f"/v1/jobs/{first.id}/rerun"))
    say(f"{first.id} is made again as {second.id}")
    (second,) = await watch_all(client, [second])
    if second.status != "completed":
        raise Stop(f"{second.id}: {state_of(second)}", FAILED)
    return second


def _tell(first: Job, second: Job, found: list[Comparison], identical: bool, as_json: bool) -> None:
    if as_json:
        files = [one.document() for one in found]
        show_json({"job_id": first.id, "rerun_job_id": second.id, "identical": identical, "files": files})
        return
    for one in found:
        for line in one.lines():
            show(line)
