"""An operator's classifier in a replica: what it says decides the status, and what fails leaves nothing behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.metrics import Metrics
from deployments.replica import Replica
from deployments.settings import Settings, SettingsError
from models.moderation import Decision, Verdict
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import SECRET, ended, files, serving, submit

HERE = "tests.deployments.test_judging"


class Approving:
    def classify(self, image: Image.Image) -> Verdict:
        return Verdict(Decision.APPROVE, "clean", 0.9)


class Rejecting:
    """Rejects whatever has pixels in the middle of the range, as all that the tiny weights make has."""

    def classify(self, image: Image.Image) -> Verdict:
        low, high = image.convert("L").getextrema()
        return Verdict(Decision.REJECT if low < 250 and high > 5 else Decision.APPROVE, "grey", 0.8)


class Failing:
    """Fails until `works` is set."""

    works = threading.Event()

    def classify(self, image: Image.Image) -> Verdict:
        if not self.works.is_set():
            raise RuntimeError("no room")
        return Verdict(Decision.REVIEW, "unsure", 0.5)


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, made once."""
    return tmp_path_factory.mktemp("state")


def settings(database: Any, tmp_path: Path, state_dir: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "database_url": database.url,
        "state_dir": state_dir,
        "blob_url": f"file://{tmp_path / 'blobs'}",
        "public_url": "https://api.example.com",
        "signing_secret": SECRET,
        "renew_seconds": 0.5,
        "poll_seconds": 0.1,
    }
    return Settings(**(values | changes))


async def judged(desk: Desk) -> list[tuple[str, str | None, str]]:
    """Status and reason of each asset, with the status of its job."""
    rows = await desk.database.pool.fetch(
        """SELECT a.moderation_status AS status, a.moderation_reason AS reason, j.moderation_status AS job
           FROM workspace_assets a JOIN jobs j ON j.id = a.job_id ORDER BY a.created_at, a.asset_index"""
    )
    return [tuple(row) for row in rows]


async def test_the_verdict_is_there_with_the_row(desk: Desk, tmp_path: Path, state_dir: Path) -> None:
    own = settings(desk.database, tmp_path, state_dir, image_classifier=f"{HERE}:Approving")
    async with serving(own):
        job_id = await submit(desk, own, num_images=3)
        assert await ended(desk, job_id) == "completed"
    assert await judged(desk) == [("approved", "classifier:clean", "approved")] * 3


async def test_what_is_rejected_and_held_is_there_for_its_owner(desk: Desk, tmp_path: Path, state_dir: Path) -> None:
    own = settings(desk.database, tmp_path, state_dir, image_classifier=f"{HERE}:Rejecting")
    async with serving(own):
        assert await ended(desk, await submit(desk, own)) == "completed"
    assert await judged(desk) == [("rejected", "classifier:grey", "rejected")]
    assert len(files(own)) == 2


async def test_what_is_rejected_and_not_kept_leaves_no_row_and_no_file(
    desk: Desk, tmp_path: Path, state_dir: Path
) -> None:
    own = settings(desk.database, tmp_path, state_dir, image_classifier=f"{HERE}:Rejecting", on_reject="fail")
    async with serving(own):
        job_id = await submit(desk, own, num_images=3, previews=True)
        assert await ended(desk, job_id) == "failed"
        assert await desk.status(job_id) == ("failed", "content_rejected")
        await desk.until("SELECT count(*) = 0 FROM job_queue")
        row = await desk.database.pool.fetchrow("SELECT attempts, retryable FROM jobs WHERE id = $1", job_id)
        assert tuple(row) == (1, False), "another try of the same would end the same"
    assert await judged(desk) == []
    assert files(own) == []
    assert await desk.callbacks(job_id) == ["job.failed"]


async def test_a_classifier_that_fails_leaves_the_result_pending_and_says_so(
    desk: Desk, tmp_path: Path, state_dir: Path
) -> None:
    Failing.works.clear()
    own = settings(desk.database, tmp_path, state_dir, image_classifier=f"{HERE}:Failing", on_reject="fail")
    async with serving(own):
        assert await ended(desk, await submit(desk, own)) == "completed"
        assert await judged(desk) == [("pending", "classifier_failed", "pending")]
        Failing.works.set()
        assert await ended(desk, await submit(desk, own)) == "completed"
    assert (await judged(desk))[1:] == [("flagged", "classifier:unsure", "flagged")]


async def test_a_replica_whose_classifier_is_not_to_be_had_does_not_start(
    desk: Desk, tmp_path: Path, state_dir: Path
) -> None:
    own = settings(desk.database, tmp_path, state_dir, image_classifier="nowhere.at_all:Judge")
    replica = Replica(own, "sdxl", Metrics())
    with pytest.raises(SettingsError, match="OURVIDZ_IMAGE_CLASSIFIER"):
        await replica.start()
    row = await desk.database.pool.fetchrow("SELECT state, error FROM workers")
    assert row["state"] == "failed"
    assert "nowhere.at_all" in row["error"]


@pytest.mark.parametrize(
    "values", [{"on_reject": "fail"}, {"image_classifier": "no path"}, {"image_classifier": "os.path"}], ids=str
)
def test_settings_that_can_not_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image_classifier"):
        Settings(**values)
