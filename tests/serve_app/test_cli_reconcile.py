"""`ourvidz reconcile` as a process."""

import json
from pathlib import Path
from typing import Any

from db.blobs import BlobStore
from db.library import WORKSPACE_BUCKET
from tests.deployments.results import Shelf
from tests.serve_app.running import run_command


async def test_reconcile_reports_and_then_repairs(database: Any, tmp_path: Path) -> None:
    shelf = Shelf(database, BlobStore.from_url(f"file://{tmp_path}/state/blobs"), await database.user())
    where = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_DATABASE_URL": database.url,
        "OURVIDZ_ORPHAN_GRACE_SECONDS": "0",
    }
    kept, lost = await shelf.result(), await shelf.result()
    code, out, err = await run_command("reconcile", environment=where)
    assert (code, out, err) == (0, "", "4 files of 1 users: everything agrees\n")

    await shelf.blobs.delete(WORKSPACE_BUCKET, [lost.keys[0]])
    await shelf.blobs.put(WORKSPACE_BUCKET, kept.keys[0].replace("0.png", "9.png"), b"x", "image/png")
    code, out, err = await run_command("reconcile", environment=where)
    names, *lines = out.splitlines()
    assert (code, names.split("\t")[0]) == (1, "what")
    assert sorted(line.split("\t")[0] for line in lines) == ["missing", "orphan"]
    assert "1 missing, 1 orphan" in err
    assert "nothing was changed" in err

    code, out, _ = await run_command("reconcile", "--repair", "--json", environment=where)
    document = json.loads(out)
    assert (code, document["users"], document["agreeing"]) == (1, 1, 3)
    assert {(one["what"], one["done"]) for one in document["findings"]} == {
        ("missing", "marked"),
        ("orphan", "deleted"),
    }
    assert await database.pool.fetchval("SELECT fault FROM workspace_assets WHERE id = $1", lost.assets[0]) == "missing"

    await shelf.blobs.put(WORKSPACE_BUCKET, lost.keys[0], b"pixels of a lighthouse", "image/png")
    code, _, err = await run_command("reconcile", "--repair", environment=where)
    assert (code, err) == (0, "4 files of 1 users: 1 healed\n")


async def test_reconcile_mends_nothing_in_the_wrong_store(database: Any, tmp_path: Path) -> None:
    shelf = Shelf(database, BlobStore.from_url(f"file://{tmp_path}/elsewhere"), await database.user())
    await shelf.result()
    where = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OURVIDZ_STATE_DIR": str(tmp_path / "state"),
        "OURVIDZ_DATABASE_URL": database.url,
    }
    code, out, err = await run_command("reconcile", "--repair", environment=where)
    assert (code, out) == (1, "")
    assert "[nothing_agrees]" in err
    assert await database.pool.fetchval("SELECT count(*) FROM workspace_assets WHERE fault IS NOT NULL") == 0
