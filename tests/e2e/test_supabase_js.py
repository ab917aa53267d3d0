"""The functions on a real cluster, driven by the client library that web clients use: supabase-js of npm."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import javascript
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SNAKE = {"job_type": "sdxl_image_fast", "prompt": "a red bicycle", "seed": 0, "metadata": {"num_images": 1}}
CAMEL = {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a red bicycle", "seed": 0, "num_images": 1}}


class Client:
    """supabase-js with an API key."""

    def __init__(self, running: Running, folder: Path, key: str) -> None:
        self._url, self._folder, self._key = str(running.client.base_url).rstrip("/"), folder, key

    def invoke(self, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of `functions.invoke`, one after the other."""
        given = {"url": self._url, "key": self._key, "calls": [{"name": name, "body": body} for name, body in calls]}
        done = javascript.run(self._folder, Path(__file__).with_name("functions.mjs"), given, seconds=200)
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    def data(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The data of one call, which must go well."""
        (answer,) = self.invoke((name, body))
        assert "data" in answer, answer
        data: dict[str, Any] = answer["data"]
        return data


@pytest.fixture(scope="module")
def client(running: Running, node_folder: Path) -> Client:
    return Client(running, node_folder, running.key)


def test_both_dialects_queue_a_job_with_the_same_pixels(running: Running, client: Client) -> None:
    answers, jobs = [], []
    for body in (SNAKE, CAMEL):  # the second after the first: what runs beside a job may show in its last bit
        answers.append(client.data("queue-job", body))
        jobs.append(running.wait(answers[-1]["jobId"]))
    snake, camel = answers
    assert [job["status"] for job in jobs] == ["completed", "completed"]
    assert snake["status"] == "queued"
    assert camel["success"] is True
    assert camel["job"]["id"] == camel["jobId"] != snake["jobId"]
    files = [running.client.get(job["assets"][0]["url"]).content for job in jobs]
    # the manifests in the files differ, by the job's id at least
    first, second = (Image.open(io.BytesIO(data)) for data in files)
    assert (first.mode, first.size) == (second.mode, second.size)
    assert first.tobytes() == second.tobytes()
    assert any(low != high for low, high in first.convert("RGB").getextrema()), "a picture, not one plain colour"
    assert [job["assets"][0]["seed"] for job in jobs] == [0, 0]


def test_a_prompt_is_enhanced(client: Client) -> None:
    answer = client.data("enhance-prompt", {"prompt": "a red bicycle", "jobType": "sdxl_image_fast"})
    assert answer["success"] is True
    assert answer["enhanced_prompt"] == answer["enhancedPrompt"] != "a red bicycle"
    assert 0 < answer["tokenCount"]["enhanced"] <= 75


def test_the_workspace_is_saved_and_cleared(running: Running, client: Client) -> None:
    job = running.wait(client.data("queue-job", SNAKE)["jobId"])
    (asset,) = job["assets"]
    saved = client.data("workspace-actions", {"action": "save_to_library", "assetId": asset["id"]})
    again = client.data("workspace-actions", {"action": "save_to_library", "assetId": asset["id"]})
    assert saved["libraryAssetId"] == again["libraryAssetId"]
    back = client.data("workspace-actions", {"action": "copy_to_workspace", "libraryAssetId": saved["libraryAssetId"]})
    discarded = client.data("workspace-actions", {"action": "discard_asset", "assetId": back["workspaceAssetId"]})
    assert discarded["success"] is True
    cleared = client.data("workspace-actions", {"action": "clear_job", "jobId": job["id"]})
    assert (cleared["success"], cleared["assetsProcessed"]) == (True, 1)


def test_a_chat_is_answered(client: Client) -> None:
    answer = client.data("playground-chat", {"message": "hello", "content_tier": "sfw"})
    assert answer["success"] is True
    assert answer["response"] == answer["content"]
    assert answer["conversation_id"]


def test_an_admin_sees_the_cluster(client: Client) -> None:
    answer = client.data("system-metrics", {})
    assert set(answer["queues"]) >= {"sdxl_queue", "wan_queue"}
    assert answer["workers"]["sdxl"][0]["type"] == "sdxl"


def test_refusals_reach_the_client_with_status_and_json(running: Running, client: Client, node_folder: Path) -> None:
    wrong, missing = client.invoke(("queue-job", {**SNAKE, "job_type": "oil_painting"}), ("queue-job", {}))
    assert (wrong["error"], wrong["status"]) == ("FunctionsHttpError", 400)
    assert "error" in wrong["body"]
    assert missing["status"] == 400
    (stranger,) = Client(running, node_folder, "ovz_nobody").invoke(("queue-job", SNAKE))
    assert (stranger["status"], "error" in stranger["body"]) == (401, True)
