"""`ourvidz keys`: API keys, made and ended directly in the database."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from db.access import ROLES, Access, ApiKey
from serve_app.cli.calls import AsJson, database, load_settings, run
from serve_app.cli.terminal import USAGE, Stop, say, show, show_json, show_table

app = typer.Typer(
    no_args_is_help=True,
    help="API keys. These commands work on the database that the settings name (DATABASE_URL, or the embedded one), "
    "because the first key has to come from somewhere; they need no key and no running cluster.",
)


@app.command("create")
def create(
    username: Annotated[str, typer.Argument(help="Whose key; made when new.")],
    role: Annotated[str, typer.Option(help=f"One of {', '.join(ROLES)}; added to the roles that the user has.")] = (
        "basic_user"
    ),
    name: Annotated[str, typer.Option(help="What the key is for.")] = "default",
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Else it doesn't.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it can't be shown again."""
    if role not in ROLES:
        raise Stop(f"no such role: {role}; the roles are {', '.join(ROLES)}", USAGE)
    if not username.strip() or not name.strip():
        raise Stop("the user and the key need a name", USAGE)
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None

    async def work() -> ApiKey:
        async with database(load_settings()) as pool:
            access = Access(pool)
            return await access.create_key(await access.ensure_user(username, role), name, expires_at)

    key = run(work())
    say(f"a key of {username} ({role}); keep it, it is not shown again")
    if as_json:
        show_json(_document(key) | {"username": username, "key": key.secret})
    else:
        show(key.secret or "")


@app.command("list")
def list_keys(
    username: Annotated[str | None, typer.Option("--user", help="Only the keys of this user.")] = None,
    as_json: AsJson = False,
) -> None:
    """All keys, without the keys themselves."""

    async def work() -> list[ApiKey]:
        async with database(load_settings()) as pool:
            return await Access(pool).list_keys()

    keys = [key for key in run(work()) if username is None or key.username == username]
    if as_json:
        show_json([_document(key) for key in keys])
        return
    rows = [
        (key.id, key.username, key.name, f"{key.prefix}…", _state(key), _time(key.created_at), _time(key.last_used_at))
        for key in keys
    ]
    show_table(("Id", "User", "Name", "Key", "State", "Created", "Last used"), rows)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, or the beginning of the key as listed.")],
    as_json: AsJson = False,
) -> None:
    """End a key at once."""

    async def work() -> ApiKey:
        async with database(load_settings()) as pool:
            access = Access(pool)
            revoked = await access.revoke_key(await _find(access, key_id))
            assert revoked is not None  # keys are never deleted
            return revoked

    key = run(work())
    if as_json:
        show_json(_document(key))
    else:
        say(f"revoked {key.prefix}… ({key.name})")


async def _find(access: Access, text: str) -> UUID:
    """The id of a key by its id or the characters that `list` shows. A whole key pasted in is understood too."""
    keys = await access.list_keys()
    wanted = text.removesuffix("…")
    fitting = [key.id for key in keys if str(key.id) == wanted.lower() or (wanted and wanted.startswith(key.prefix))]
    if len(fitting) != 1:
        raise Stop("there is no such key" if not fitting else "several keys begin like that; give the id", USAGE)
    return fitting[0]


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        return "expired"
    return "active"


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"


def _document(key: ApiKey) -> dict[str, Any]:
    document = asdict(key)
    del document["secret"]
    return document
