"""`ourvidz endpoints`: the endpoints that hear of all your jobs."""

from typing import Annotated, Any

import typer

from serve_app.cli.calls import AsJson, Url, calling, run
from serve_app.cli.terminal import FAILED, USAGE, Stop, say, show, show_facts, show_json, show_table
from serve_app.client import Client

app = typer.Typer(no_args_is_help=True, help="Endpoints that are called back for all your jobs.")

PATH = "/v1/callbacks/endpoints"
Endpoint = Annotated[str, typer.Argument(metavar="ENDPOINT", help="A whole id, or a unique beginning of one.")]


@app.command("list")
def list_endpoints(as_json: AsJson = False, url: Url = None) -> None:
    """Your endpoints, oldest first."""

    async def work() -> Any:
        async with calling(url) as client:
            return await client.call("GET", PATH)

    rows = run(work())["data"]
    if as_json:
        show_json(rows)
        return
    columns = ("Id", "State", "Events", "Signature", "Failures", "URL", "Description")
    lines = [
        (
            row["id"],
            _state(row),
            ",".join(row["events"]),
            row["signature"],
            row["failures"],
            row["url"],
            row["description"],
        )
        for row in rows
    ]
    show_table(columns, lines)


@app.command("create")
def create(
    receiver: Annotated[str, typer.Argument(metavar="RECEIVER", help="The URL that is called: public https.")],
    event: Annotated[
        list[str] | None,
        typer.Option("--event", "-e", help="processing, completed, failed or cancelled; repeat it. All when left out."),
    ] = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    signature: Annotated[
        str, typer.Option(help="v1: HMAC with a shared secret. v1a: ed25519, you get the public key only.")
    ] = "v1",
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Register an endpoint, and print what verifies its signatures."""
    body: dict[str, Any] = {"url": receiver, "description": description, "signature": signature}
    if event:
        body["events"] = event

    async def work() -> Any:
        async with calling(url) as client:
            return await client.call("POST", PATH, body)

    _show(run(work()), as_json)


@app.command("show")
def show_endpoint(endpoint: Endpoint, as_json: AsJson = False, url: Url = None) -> None:
    """An endpoint, with what verifies its signatures."""
    _show(_on(endpoint, url, "GET"), as_json)


@app.command("rotate")
def rotate(endpoint: Endpoint, as_json: AsJson = False, url: Url = None) -> None:
    """Make a new secret. The one before signs as well for 24 hours."""
    _show(_on(endpoint, url, "POST", "/rotate"), as_json)


@app.command("disable")
def disable(endpoint: Endpoint, as_json: AsJson = False, url: Url = None) -> None:
    """Send nothing more to an endpoint. What waits for it is dead."""
    _show(_on(endpoint, url, "PATCH", body={"enabled": False}), as_json)


@app.command("enable")
def enable(endpoint: Endpoint, as_json: AsJson = False, url: Url = None) -> None:
    """Send to an endpoint again."""
    _show(_on(endpoint, url, "PATCH", body={"enabled": True}), as_json)


@app.command("delete")
def delete(endpoint: Endpoint, url: Url = None) -> None:
    """Delete an endpoint, with its secret."""
    _on(endpoint, url, "DELETE")
    say("deleted")


@app.command("test")
def send_test(endpoint: Endpoint, as_json: AsJson = False, url: Url = None) -> None:
    """Send a signed test, and print what the receiver answered. Exits with 1 unless it took it."""
    result = _on(endpoint, url, "POST", "/test")
    if as_json:
        show_json(result)
    else:
        show(" ".join(str(result[name]) for name in ("status", "error") if result[name] is not None))
    if not result["delivered"]:
        raise Stop(f"not delivered, after {result['elapsed_ms']} ms", FAILED)
    say(f"delivered in {result['elapsed_ms']} ms")


def _on(text: str, url: str | None, method: str, below: str = "", body: dict[str, Any] | None = None) -> Any:
    async def work() -> Any:
        async with calling(url) as client:
            return await client.call(method, f"{PATH}/{await _find(client, text)}{below}", body)

    return run(work())


async def _find(client: Client, text: str) -> str:
    ids = [str(row["id"]) for row in (await client.call("GET", PATH))["data"]]
    fitting = [found for found in ids if text and found.startswith(text.lower())]
    if len(fitting) != 1:
        raise Stop("there is no such endpoint" if not fitting else "several endpoints begin like that", USAGE)
    return fitting[0]


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(row)
        return
    show_facts(
        {
            "id": row["id"],
            "url": row["url"],
            "state": _state(row),
            "description": row["description"],
            "events": ", ".join(row["events"]),
            "signature": row["signature"],
            "secret": row.get("secret"),
            "public key": row.get("public_key"),
            "previous": row.get("previous"),
            "failures": row["failures"] or None,
        }
    )


def _state(row: dict[str, Any]) -> str:
    return "enabled" if row["enabled"] else f"disabled ({row['disabled_reason']})"
