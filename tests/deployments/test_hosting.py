"""Models that share one process and one engine, each with its own queue."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.hosting import Host
from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings
from models.catalog import Family
from models.profile import load_profile
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, submit


@pytest.fixture(scope="module")
def shared_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The laptop's, with WAN in the process of SDXL."""
    source = Path(__file__).parents[2] / "configs" / "profiles" / "laptop.yaml"
    document = yaml.safe_load(source.read_text(encoding="utf-8"))
    document["models"]["wan"]["hosted_by"] = "sdxl"
    path = tmp_path_factory.mktemp("profile") / "shared.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.fixture
def settings(database: Any, tmp_path: Path, shared_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        profile=str(shared_profile),
        database_url=database.url,
        state_dir=tmp_path_factory.mktemp("state"),
        blob_url=f"file://{tmp_path / 'blobs'}",
        public_url="https://api.example.com",
        signing_secret="s" * 40,
        lease_seconds=30,
        renew_seconds=0.5,
        poll_seconds=0.1,
    )


@asynccontextmanager
async def hosting(settings: Settings) -> AsyncIterator[list[Replica]]:
    families = settings.loaded_profile.hosted(Family.SDXL)
    host = Host(settings, families)
    replicas = [Replica(settings, family, Metrics(), host) for family in families]
    for replica in replicas:
        await replica.start()
    try:
        yield replicas
    finally:
        for replica in replicas:
            await replica.stop(0)
        await host.close()


def test_host_has_the_families_that_it_is_named_by(shared_profile: Path) -> None:
    profile = load_profile(shared_profile)
    assert profile.hosted(Family.SDXL) == ["sdxl", "wan"]
    assert profile.hosted(Family.QWEN) == ["qwen"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wan": "rv51"}, "replicas of its own"),
        ({"wan": "wan"}, "replicas of its own"),
        ({"wan": "qwen"}, "replicas of its own"),
        ({"wan": "sdxl", "sdxl": "wan"}, "replicas of its own"),
        ({"qwen": "sdxl"}, "would have no effect"),
    ],
)
def test_host_that_is_none_is_refused(shared_profile: Path, tmp_path: Path, changes: Any, message: str) -> None:
    document = yaml.safe_load(shared_profile.read_text(encoding="utf-8"))
    for family, host in changes.items():
        document["models"][family]["hosted_by"] = host
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_profile(path)


def test_host_with_another_attention_kernel_is_refused(shared_profile: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(shared_profile.read_text(encoding="utf-8"))
    document["models"]["wan"]["attention"] = "flash"
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ValueError, match="attention kernels"):
        load_profile(path)


async def test_background_video_gives_way_to_a_picture(desk: Desk, settings: Settings) -> None:
    """Between two steps: while the picture is made, the video does not get on."""
    async with hosting(settings):
        video = await submit(desk, settings, "video_fast", steps=60, klass=0)
        await desk.until("SELECT step > 2 FROM job_queue WHERE job_id = $1", video)
        picture = await submit(desk, settings, steps=100, num_images=6, width=192, height=128)
        # progress is told twice a second, so by this step the video's last one before the picture has been told
        await desk.until("SELECT step > 15 FROM job_queue WHERE job_id = $1", picture)
        before = await desk.database.pool.fetchval("SELECT step FROM job_queue WHERE job_id = $1", video)
        await desk.until("SELECT step > 80 FROM job_queue WHERE job_id = $1", picture)
        after = await desk.database.pool.fetchval("SELECT step FROM job_queue WHERE job_id = $1", video)
        assert after - before <= 1  # what was said late
        assert await ended(desk, picture) == "completed"
        assert await ended(desk, video) == "completed"


async def test_hosted_models_share_an_engine(desk: Desk, settings: Settings) -> None:
    async with hosting(settings) as replicas:
        assert len({id(replica.engine) for replica in replicas}) == 1
        video = await submit(desk, settings, "video_fast", steps=30)
        await desk.until("SELECT step > 0 FROM job_queue WHERE job_id = $1", video)
        picture = await submit(desk, settings, steps=4)
        assert await ended(desk, picture) == "completed"
        assert await desk.status(video) == ("processing", None)  # the picture did not wait for the video
        assert await ended(desk, video) == "completed"
        workers = await desk.database.pool.fetch("SELECT queue, model_name, state FROM workers ORDER BY queue")
        assert [tuple(worker) for worker in workers] == [
            ("sdxl", "tiny-sdxl", "ready"),
            ("wan", "tiny-wan", "ready"),
        ]
        assert all(replica.health() is None for replica in replicas)
        costs = await desk.database.pool.fetchval("SELECT count(*) FROM cost_profiles")
        assert costs == 2
