"""`ourvidz training` as processes."""

import json
from pathlib import Path
from typing import Any

from tests.serve_app.running import run_command
from tests.serve_app.test_cli_retention import environment

RUNS = "run_name,base_model,network_dim,is_production\nCAPTION_FIX,runwayml/stable-diffusion-v1-5,128,true\n"
EPOCH = {
    "run_name": "CAPTION_FIX",
    "epoch_number": 8,
    "checkpoint_path": "lora_checkpoints/caption_fix/caption_fix_epoch8.safetensors",
    "checkpoint_file_size_mb": 36,
    "visual_quality_score": 9,
    "style_match_score": 8,
    "prompt_adherence_score": 8,
    "verdict": "good",
    "production_ready": True,
    "quantitative_metrics": {"avg_colors": 216.6},
}


async def test_runs_and_epochs_are_imported_and_audited(database: Any, tmp_path: Path) -> None:
    where = environment(database, tmp_path)
    runs, epochs = tmp_path / "runs.csv", tmp_path / "epochs.json"
    runs.write_text(RUNS)
    epochs.write_text(json.dumps([EPOCH]))

    code, out, err = await run_command("training", "import", str(runs), "--dry-run", environment=where)
    assert (code, out, err) == (0, "", "1 would be added, 0 would be changed, 0 unchanged\n")
    assert (await run_command("training", "import", str(runs), environment=where))[0] == 0
    code, out, _ = await run_command("training", "audit", "--json", environment=where)
    assert (code, [found["check_code"] for found in json.loads(out)]) == (1, ["production_unlogged"])

    code, out, _ = await run_command("training", "import", str(epochs), "--json", environment=where)
    assert (code, json.loads(out)) == (0, {"imported": True, "added": 1, "changed": 0, "unchanged": 0})
    code, out, err = await run_command("training", "audit", environment=where)
    assert (code, err) == (1, "1 errors, 1 warnings\n")
    assert [line.split("\t")[:4] for line in out.splitlines()] == [
        ["severity", "check", "run", "epoch"],
        ["error", "size_rank_mismatch", "CAPTION_FIX", "8"],
        ["warning", "issues_missing", "CAPTION_FIX", "8"],
    ]


async def test_bad_rows_are_told_with_line_and_field(database: Any, tmp_path: Path) -> None:
    where = environment(database, tmp_path)
    file = tmp_path / "runs.csv"
    file.write_text(RUNS + "x,,128,true\ny,sdxl,-1,true\n")
    code, out, err = await run_command("training", "import", str(file), environment=where)
    assert code == 1
    assert [line.split("\t")[:2] for line in out.splitlines()] == [["3", "base_model"], ["4", "network_dim"]]
    assert "nothing was imported" in err
    assert await database.pool.fetchval("SELECT count(*) FROM lora.training_runs") == 0

    code, _, err = await run_command("training", "import", str(tmp_path / "none.csv"), environment=where)
    assert (code, "can't be read" in err) == (2, True)


async def test_a_file_of_what_can_not_be_stored_changes_nothing(database: Any, tmp_path: Path) -> None:
    where = environment(database, tmp_path)
    file = tmp_path / "all.json"
    run = {"run_name": "a", "base_model": "x"}
    for value, told in (("NaN", "loss: NaN is no number"), ("1e400", "loss: 1e400 is beyond what a number can be")):
        file.write_text(
            json.dumps([run, run | {"run_name": "b"}]).replace('"b"', f'"b", "training_config": {{"loss": {value}}}')
        )
        code, out, err = await run_command("training", "import", str(file), environment=where)
        assert (code, out) == (1, f"1\ttraining_config\tValue error, {told}\n")
        assert "nothing was imported" in err
    assert await database.pool.fetchval("SELECT count(*) FROM lora.training_runs") == 0


async def test_the_files_of_production_loras_are_read(database: Any, tmp_path: Path) -> None:
    where = environment(database, tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_text("no tensors")
    named = {"lora_name": "a", "checkpoint_path": str(broken), "diagnosed_issues": [], "sha256": "0" * 64}
    gone = named | {"epoch_number": 9, "lora_name": "b", "checkpoint_path": str(tmp_path / "gone.safetensors")}
    run = {"run_name": "CAPTION_FIX", "base_model": "sdxl", "model_family": "sdxl", "is_production": True}
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"training_runs": [run], "epoch_results": [EPOCH | named, EPOCH | gone]}))
    assert (await run_command("training", "import", str(file), environment=where))[0] == 0
    code, out, _ = await run_command("training", "audit", "--json", environment=where)
    assert (code, json.loads(out)) == (0, [])
    code, out, _ = await run_command("training", "audit", "--files", "--json", environment=where)
    found = {(finding["lora_name"], finding["check_code"]) for finding in json.loads(out)}
    assert (code, found) == (1, {("a", "lora_invalid"), ("b", "lora_unavailable")})
