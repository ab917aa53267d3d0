"""`ourvidz reconcile`: the database's rows against the files of the object store."""

from collections import Counter
from typing import Annotated

import typer

from db.blobs import BlobStore
from db.library import LibraryRows
from db.queue import Queue
from db.reconciliation import Reconciliation
from deployments.reconciler import Finding, NothingAgrees, Reconciler, Tally
from deployments.settings import Settings
from serve_app.cli.calls import AsJson, database, load_settings, run
from serve_app.cli.terminal import FAILED, Stop, say, show_json, show_table


def reconcile(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended; else it only says what is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what the rows of the workspace, the library and the uploads say with the files that there are.

    Runs beside a working system. Exits with 1 where something does not agree and was not mended.
    """
    settings = load_settings()
    try:
        findings, tally = run(_reconcile(settings, repair))
    except NothingAgrees as error:
        raise Stop(f"{error} [{error.code}]", FAILED) from error
    if as_json:
        show_json({**vars(tally), "findings": [_facts(finding) for finding in findings]})
    elif findings:
        columns = ("What", "Bucket", "Key", "Table", "Row", "Bytes", "Found", "Done")
        show_table(columns, [tuple(_facts(finding).values()) for finding in findings])
    kinds = Counter(finding.kind for finding in findings)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "everything agrees"
    say(f"{tally.files} files of {tally.users} users: {told}")
    if any(finding.repair in (None, "left", "marked") for finding in findings):
        raise Stop("some of it was not mended" if repair else "nothing was changed; --repair mends what it can", FAILED)


async def _reconcile(settings: Settings, repair: bool) -> tuple[list[Finding], Tally]:
    async with database(settings) as pool:
        blobs = BlobStore.from_url(settings.blobs())
        reconciler = Reconciler(
            Reconciliation(pool), LibraryRows(pool), Queue(pool), blobs, settings.orphan_grace_seconds
        )
        findings = await reconciler.compare()
        return (await reconciler.repair(findings) if repair else findings), reconciler.tally


def _facts(finding: Finding) -> dict[str, object]:
    row = finding.row
    return {
        "what": finding.kind,
        "bucket": finding.bucket,
        "key": finding.key,
        "table": row and row.table,
        "row": row and str(row.id),
        "bytes": row and row.size,
        "found": finding.found,
        "done": finding.repair,
    }
