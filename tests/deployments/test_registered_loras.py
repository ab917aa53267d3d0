"""A LoRA of the training registry in a real job: the replica learns of it from the database and loads its file."""

from pathlib import Path
from typing import Any

import pytest

from db.training import EpochResult, Numbered, TrainingRun, Trainings
from deployments.settings import Settings
from models.lora.files import read_lora
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import SECRET, ended, serving, submit
from tests.models.lora_making import make_lora

PROFILE = """
name: studio
description: Tiny weights with room for LoRAs
laptop: true
models:
  sdxl:
    model_name: tiny-sdxl
    source: tiny
    device: cpu
    memory_gib: 0
    disk_gib: 0.01
    lora_cache_gib: 0.1
    defaults: {sizes: [[128, 128]], width: 128, height: 128}
"""


@pytest.fixture
def settings(database: Any, tmp_path: Path) -> Settings:
    profile = tmp_path / "studio.yaml"
    profile.write_text(PROFILE)
    return Settings(
        database_url=database.url,
        state_dir=tmp_path / "state",
        profile=str(profile),
        blob_url=f"file://{tmp_path / 'blobs'}",
        public_url="https://api.example.com",
        signing_secret=SECRET,
        renew_seconds=0.5,
        poll_seconds=0.1,
    )


async def test_a_job_runs_with_a_lora_that_was_registered_while_the_replica_ran(
    desk: Desk, database: Any, settings: Settings, tmp_path: Path
) -> None:
    loras = [{"name": "chalk", "weight": 1.5}]
    async with serving(settings) as replica:
        plain = await submit(desk, settings)
        assert await ended(desk, plain) == "completed"
        path = make_lora(tmp_path / "chalk.safetensors", replica.model._pipeline, 1)  # type: ignore[attr-defined]
        run = {"run_name": "chalk", "base_model": "sdxl", "model_family": "sdxl", "is_production": True}
        epoch = {
            "run_name": "chalk",
            "epoch_number": 3,
            "production_ready": True,
            "lora_name": "chalk",
            "checkpoint_path": str(path),
            "sha256": read_lora("chalk", path).sha256,
        }
        trainings = Trainings(database.pool)
        await trainings.put(
            [Numbered(1, TrainingRun.model_validate(run)), Numbered(2, EpochResult.model_validate(epoch))]
        )
        styled = await submit(desk, settings, params=await with_loras(desk, plain, loras))
        assert await ended(desk, styled) == "completed"

        # what is taken out of production fails the next one, with its name
        await trainings.put([Numbered(1, TrainingRun.model_validate(run | {"is_production": False}))])
        late = await submit(desk, settings, params=await with_loras(desk, plain, loras))
        assert await ended(desk, late) == "failed"
    used = await database.pool.fetchval("SELECT generation_settings -> 'loras' FROM jobs WHERE id = $1", styled)
    assert [(lora["name"], lora["weight"]) for lora in used] == [("chalk", 1.5)]
    assert used[0]["sha256"] == epoch["sha256"]
    pictures = made(settings)
    assert len(pictures) == 2  # the LoRA changed what the same seed gives
    row = await database.pool.fetchrow("SELECT error_code, error_message FROM jobs WHERE id = $1", late)
    assert row["error_code"] == "lora_invalid"
    assert "chalk" in row["error_message"]


def made(settings: Settings) -> set[bytes]:
    """The pictures in the store."""
    folder = Path(settings.blobs().removeprefix("file://"))
    return {path.read_bytes() for path in folder.rglob("0.png")}


async def with_loras(desk: Desk, job_id: Any, loras: list[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of a job, with LoRAs."""
    params: dict[str, Any] = await desk.database.pool.fetchval("SELECT params FROM jobs WHERE id = $1", job_id)
    return params | {"loras": loras}
