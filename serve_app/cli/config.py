"""`ourvidz config get` and `set`: the limits and switches of a running installation. For admins."""

import json
from typing import Annotated, Any

import typer

from serve_app.cli.calls import AsJson, Url, calling, run
from serve_app.cli.installation import config as config
from serve_app.cli.terminal import USAGE, Stop, show_facts, show_json

OFF = ("off", "none", "null")
WORDS = {"on": "true"}


@config.command("get")
def get_config(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this one.", show_default=False)] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """The limits and switches that the cluster holds to, and what is off."""
    values = _call("GET", url)
    if name is not None and name not in values:
        raise Stop(f"there is no {name}; there are {', '.join(values)}", USAGE)
    _show(values if name is None else {name: values[name]}, as_json)


@config.command("set")
def set_config(
    pairs: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Such as maxJobsPerHour=20.")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Set limits and switches, in force at once. `NAME=off` takes a limit away."""
    given: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise Stop(f"not NAME=VALUE: {pair}", USAGE)
        given[name] = value if name == "moderation" else _value(value)  # which has an `off` of its own
    _show(_call("PATCH", url, given), as_json)


def _value(text: str) -> Any:
    if text.lower() in OFF:
        return None
    try:
        return json.loads(WORDS.get(text.lower(), text.lower()))
    except ValueError:
        return text  # the API says what it should have been


def _call(method: str, url: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        async with calling(url) as client:
            answer: dict[str, Any] = await client.call(method, "/v1/config", body)
            return answer

    return run(work())


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(values)
    else:
        show_facts({name: "off" if value is None else json.dumps(value) for name, value in values.items()})
