"""The fault matrix in short, on a cluster of its own; and that the mutations, which must fail it, still apply."""

import subprocess
import sys
from pathlib import Path

import aiosql
import pytest

from benchmarks.chaos.overlay import MUTATIONS, copy_code

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def chaos(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.chaos", "--short", "--seed", "20", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)


def test_short_fault_matrix_breaks_no_promise() -> None:
    done = chaos()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VIOLATION" not in done.stdout


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_every_mutation_still_changes_what_it_names_and_leaves_statements_that_load(
    tmp_path: Path, mutation: str
) -> None:
    copy_code(ROOT, tmp_path / "sound")
    broken = copy_code(ROOT, tmp_path / "broken", mutation)
    for name in MUTATIONS[mutation]:
        text = (broken / name).read_text()
        assert text != (tmp_path / "sound" / name).read_text()
        assert aiosql.from_str(text, "asyncpg").available_queries
