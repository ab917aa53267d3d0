"""`ourvidz queues` and `ourvidz callbacks`: what operators do to queues, and what became of a job's callbacks."""

from typing import Annotated, Any

import typer

from serve_app.cli.calls import AsJson, Url, calling, run
from serve_app.cli.terminal import show_json, show_table

queues = typer.Typer(no_args_is_help=True, help="The queues, one for each model family. For admins.")
callbacks = typer.Typer(no_args_is_help=True, help="The callbacks of a job.")

Name = Annotated[str, typer.Argument(metavar="QUEUE", help="qwen, sdxl, wan or rv51.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A whole id, or a unique beginning or end of one.")]


@queues.command("list")
def list_queues(as_json: AsJson = False, url: Url = None) -> None:
    """What waits and what runs in each queue."""
    _show_queues(_call("GET", "/v1/queues", url)["data"], as_json)


@queues.command("pause")
def pause(name: Name, as_json: AsJson = False, url: Url = None) -> None:
    """Stop a queue: nothing more is started. It is drained when nothing runs any more."""
    _show_queues([_call("POST", f"/v1/queues/{name}/pause", url)], as_json)


@queues.command("resume")
def resume(name: Name, as_json: AsJson = False, url: Url = None) -> None:
    """Let a paused queue go on."""
    _show_queues([_call("POST", f"/v1/queues/{name}/resume", url)], as_json)


@callbacks.command("list")
def list_callbacks(job_id: JobId, as_json: AsJson = False, url: Url = None) -> None:
    """A job's callbacks, and what every attempt to deliver them gave."""
    _show_callbacks(_of_job(job_id, url), as_json)


@callbacks.command("replay")
def replay(
    job_id: JobId,
    callback_id: Annotated[str, typer.Argument(metavar="CALLBACK", help="The id of a callback that is not under way.")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Send a callback once more, under the same id and with the same bytes."""
    _show_callbacks(_of_job(job_id, url, callback_id), as_json)


def _call(method: str, path: str, url: str | None) -> Any:
    async def work() -> Any:
        async with calling(url) as client:
            return await client.call(method, path)

    return run(work())


def _of_job(text: str, url: str | None, replayed: str | None = None) -> Any:
    async def work() -> Any:
        async with calling(url) as client:
            path = f"/v1/jobs/{await client.find(text)}/callbacks"
            if replayed is not None:
                return await client.call("POST", f"{path}/{replayed}/replay")
            return await client.call("GET", path)

    return run(work())["data"]


def _show_queues(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        show_json(rows)
        return
    columns = ("name", "paused", "ready", "scheduled", "blocked", "running")
    show_table(tuple(column.title() for column in columns), [tuple(row[column] for column in columns) for row in rows])


def _show_callbacks(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        show_json(rows)
        return
    lines = [
        (row["id"], row["event"], row["state"], attempt["at"], attempt["status"] or "", attempt["error"] or "")
        for row in rows
        for attempt in (row["attempts"] or [{"at": "", "status": None, "error": None}])
    ]
    show_table(("Id", "Event", "State", "Attempt at", "Status", "Error"), lines)
