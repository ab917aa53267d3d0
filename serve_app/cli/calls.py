"""How commands call: the API, the settings and the database, with their failures turned into exit codes."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import asyncpg
import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from db.blobs import StorageUnavailable
from db.embedded import EmbeddedPostgresError, is_running
from db.migrate import MigrationError
from db.pool import CONNECTION_FAULTS, DatabaseUnavailable, open_pool
from deployments.settings import Settings, SettingsError
from serve_app.cli.terminal import FAILED, UNREACHABLE, USAGE, Stop, say
from serve_app.client import ApiError, CannotConnect, Client, ClientError, NoSuchJob
from serve_app.endpoint import Endpoint

T = TypeVar("T")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Address of the API; else OURVIDZ_URL, else http://127.0.0.1:8000. The key comes from OURVIDZ_API_KEY, "
        "or for this machine's own cluster from its state folder.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


class Commands(TyperGroup):
    """The root of all commands: says what went wrong in a line, and exits with the code for it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Stop as error:
            _end(str(error), error.exit_code)
        except ApiError as error:
            fields = "".join(f"\n  {field.field}: {field.message}" for field in error.errors)
            hint = "\nset OURVIDZ_API_KEY; `ourvidz keys create` makes a key" if error.status == 401 else ""
            wrong_request = error.status in (400, 413, 415, 422)
            _end(f"refused: {error} [{error.code}]{fields}{hint}", USAGE if wrong_request else FAILED)
        except CannotConnect as error:
            _end(f"{error}; is the cluster running? `ourvidz up` starts one on this machine", UNREACHABLE)
        except NoSuchJob as error:
            _end(str(error), USAGE)
        except ClientError as error:
            _end(str(error), FAILED)
        except (DatabaseUnavailable, StorageUnavailable) as error:
            _end(str(error), UNREACHABLE)
        except SettingsError as error:
            _end(str(error), USAGE)
        except (MigrationError, EmbeddedPostgresError) as error:
            _end(str(error), FAILED)


def _end(message: str, exit_code: int) -> None:
    say(message)
    raise typer.Exit(exit_code)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's asynchronous part."""
    return asyncio.run(work)


@asynccontextmanager
async def calling(url: str | None) -> AsyncIterator[Client]:
    """The API."""
    try:
        endpoint = Endpoint.find(url)
    except ValueError as error:
        raise Stop(str(error), USAGE) from error
    async with Client(endpoint) as client:
        yield client


def load_settings(args: dict[str, Any] | None = None) -> Settings:
    """The settings of this machine, with a profile that exists. Values are never repeated in the message."""
    try:
        settings = Settings.load(args)
        assert settings.loaded_profile
    except ValidationError as error:
        raise Stop("the settings are wrong:\n" + field_errors(error, "OURVIDZ_"), USAGE) from error
    except (OSError, ValueError) as error:
        raise Stop(f"the profile can't be read: {error}", USAGE) from error
    return settings


def field_errors(error: ValidationError, prefix: str = "") -> str:
    """What is wrong with which field, without the values, which may be secret."""
    lines = []
    for item in error.errors(include_input=False, include_url=False):
        name = ".".join(map(str, item["loc"])) or "value"
        lines.append(f"  {prefix}{name.upper() if prefix else name}: {item['msg']}")
    return "\n".join(lines)


@asynccontextmanager
async def database(settings: Settings) -> AsyncIterator[asyncpg.Pool]:
    """The database, as the owner of the tables. Starts the embedded one, and says so."""
    folder = settings.embedded_postgres
    if folder is not None and not is_running(folder):
        say("starting the embedded Postgres; `ourvidz down` stops it")
    url = await asyncio.to_thread(settings.postgres)
    pool = await open_pool(url, max_size=2, name="ourvidz cli")
    try:
        yield pool
    except asyncpg.UndefinedTableError as error:
        raise Stop("the database is not migrated yet: run `ourvidz migrate`") from error
    except CONNECTION_FAULTS as error:
        raise DatabaseUnavailable(f"the connection to Postgres was lost: {type(error).__name__}") from error
    finally:
        await pool.close()
