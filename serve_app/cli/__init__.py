"""`ourvidz`, the command line. Data goes to stdout, messages and progress to stderr.

Exit codes: 0 all is well, 1 a job or check failed or the API refused, 2 wrong usage, 3 nothing to connect to, 130
interrupted. NO_COLOR is honoured.
"""

import os

import typer

from deployments.logs import configure_logs
from serve_app.cli import (
    backup,
    clusters,
    config,
    endpoints,
    installation,
    jobs,
    keys,
    queues,
    reconcile,
    rerun,
    retention,
    submit,
    takeover,
    training,
)
from serve_app.cli.calls import Commands

app = typer.Typer(
    name="ourvidz",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # they hold keys and prompts
    help="A self-hosted cluster that makes images and video from durable, called-back jobs.",
    epilog="Exit codes: 0 ok, 1 a job or check failed, 2 wrong usage, 3 nothing to connect to, 130 interrupted.",
)
for command in (
    clusters.up,
    clusters.serve,
    clusters.demo,
    clusters.down,
    submit.submit,
    rerun.rerun,
    installation.migrate,
    backup.backup,
    backup.restore,
    takeover.import_queue,
    reconcile.reconcile,
    retention.archive,
    installation.doctor,
    installation.openapi,
    installation.version,
):
    app.command()(command)
app.add_typer(jobs.app, name="jobs")
app.add_typer(queues.queues, name="queues")
app.add_typer(queues.callbacks, name="callbacks")
app.add_typer(endpoints.app, name="endpoints")
app.add_typer(keys.app, name="keys")
app.add_typer(retention.users, name="users")
app.add_typer(training.app, name="training")
app.add_typer(config.config, name="config")


def main() -> None:
    """The entry point. Logs below warnings are left out, unless OURVIDZ_LOG_LEVEL asks for them."""
    configure_logs(os.environ.get("OURVIDZ_LOG_LEVEL") or "warning")
    app(prog_name="ourvidz")
