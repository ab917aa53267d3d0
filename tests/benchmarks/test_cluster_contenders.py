import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.cluster import ROOT, SETTINGS, Cluster
from benchmarks.chaos.overlay import MutationMisses, copy_code, replace_text
from benchmarks.cluster.bare import Bare
from benchmarks.cluster.system import fix_steps, one_replica
from benchmarks.cluster.workload import equal


def test_the_copied_code_gets_a_fixed_step_and_the_checkout_none(tmp_path: Path) -> None:
    code = copy_code(ROOT, tmp_path / "code")
    fix_steps(code, 0.05, tmp_path / "tally")
    changed = (code / "models" / "sdxl.py").read_text()
    ast.parse(changed)
    assert f"fix_step_time(self._pipeline.unet, 0.05, Path({str(tmp_path / 'tally')!r}))" in changed
    assert "fix_step_time" not in (ROOT / "models" / "sdxl.py").read_text()
    loads = "from models.fixed_step import fix_step_time; import models.fixed_step as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-c", loads], cwd=code, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(code / "models" / "fixed_step.py")


def test_a_text_that_is_not_there_exactly_once_is_no_place_for_another(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("a = 1\na = 1\nb = 2\n")
    replace_text(path, [("b = 2", "b = 3")])
    assert path.read_text() == "a = 1\na = 1\nb = 3\n"
    for text in ("a = 1", "c = 4"):
        with pytest.raises(MutationMisses):
            replace_text(path, [(text, "d = 5")])


def test_the_measured_cluster_has_one_replica_of_each_model_and_everybodys_settings(tmp_path: Path) -> None:
    cluster = one_replica(Cluster(tmp_path, "http://127.0.0.1:1"))
    counts = {d["name"]: d.get("num_replicas") for d in cluster.config["applications"][0]["deployments"]}
    assert counts["sdxl"] == counts["wan"] == 1
    left = {name for name in SETTINGS if f"OURVIDZ_{name}" in cluster.environment}
    assert left == {"PROFILE"}


async def test_the_bare_loop_makes_each_image_in_shared_forwards(tmp_path: Path) -> None:
    bare = Bare(tmp_path, 0.001)
    await bare.start()
    lap = await bare.run(equal(0, 6))
    bare.close()
    assert lap.images == 6
    assert lap.rows == 6 * 10 * 2
    assert lap.forwards < 6 * 10
