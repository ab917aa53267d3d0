"""The code that the cluster runs: a copy, so that an edit meanwhile mixes no versions; with a mutation, a broken one.

A mutation is the proof that the checks can fail. `no-fence` takes out of the queue's statements what makes a late
replica's write harmless: owner and attempt. So any replica may renew, settle and requeue any job that runs.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("serve_app", "deployments", "models", "db", "configs")
MUTATIONS = {
    "no-fence": {
        "db/queries/queue.sql": (
            (
                "q.attempt = g.attempt AND q.state::text = 'running' AND q.worker = :worker",
                "q.state = 'running' AND (q.worker = :worker OR true)",
            ),
            ("q.state = 'running' AND q.attempt = g.attempt END", "q.state = 'running' END"),
            (
                "q.state = 'running' AND q.attempt = g.attempt AND q.cancel IS NULL",
                "q.state = 'running' AND q.cancel IS NULL",
            ),
        )
    }
}


class MutationMisses(RuntimeError):
    """The text that a mutation replaces is not there exactly once; it must be written anew."""


def copy_code(root: Path, folder: Path, mutation: str | None = None) -> Path:
    """Copy the packages of a checkout into a new folder, mutated if asked; returns the folder."""
    for package in PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, replacements in MUTATIONS[mutation].items() if mutation else ():
        replace_text(folder / name, replacements)
    return folder


def replace_text(path: Path, replacements: Iterable[tuple[str, str]]) -> None:
    """Put each second text in the place of the first. Raises `MutationMisses`."""
    text = path.read_text(encoding="utf-8")
    for before, after in replacements:
        if text.count(before) != 1:
            raise MutationMisses(f"{path.name}: {before}")
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
