"""The fault matrix in short: a cluster of its own under load, two faults, and every promise checked; then proof that the
checks can fail, on code without the fence."""

import subprocess
import sys
from pathlib import Path

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
def test_every_mutation_still_finds_what_it_replaces(tmp_path: Path, mutation: str) -> None:
    copy_code(ROOT, tmp_path / "sound")
    broken = copy_code(ROOT, tmp_path / "broken", mutation)
    for name in MUTATIONS[mutation]:
        assert (broken / name).read_text() != (tmp_path / "sound" / name).read_text()
