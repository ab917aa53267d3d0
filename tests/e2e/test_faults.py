"""What happens when parts of a real cluster die or are told to stop."""

import json
import os
import signal
import threading
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import Running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# large for tiny weights: some seconds, so that there is a middle to be hit in
LONG = {"job_type": "sdxl_image_high", "prompt": "a long job", "width": 1024, "height": 1024, "steps": 20, "seed": 5}


def in_the_middle(job: dict[str, Any]) -> bool:
    return job["progress"] is not None and (job["progress"]["step"] or 0) >= 1


def test_sigkill_of_a_replica_in_mid_job_leads_to_one_completed_job(running: Running) -> None:
    job = running.submit(callback_url=running.receiver.url, **LONG)
    seen = running.wait(job["id"], in_the_middle)
    assert seen["status"] == "processing"
    workers = running.client.get("/v1/workers").json()["data"]
    (victim,) = [w["pid"] for w in workers if w["queue"] == "sdxl" and w["running"] == 1]
    os.kill(victim, signal.SIGKILL)

    done = running.wait(job["id"])
    assert done["status"] == "completed", done["error"]
    assert (done["attempt"], done["failures"]) == (2, 1)
    running.receiver.wait_for(job["id"], "completed")
    kinds = [event["kind"] for event in running.history(job["id"])]
    assert kinds == ["queued", "started", "requeued", "started", "completed"]
    assert [asset["index"] for asset in done["assets"]] == [0]
    assert done["assets"][0]["key"].split("/")[-2] == "2"  # the winning attempt's
    bodies = running.receiver.verified(job["id"], running.secret())
    assert len({body["id"] for body in bodies if body["status"] == "completed"}) == 1
    of_job = {key for key in running.files() if f"/{job['id']}/" in f"/{key}"}
    assert of_job == {done["assets"][0]["key"], done["assets"][0]["thumbnail_key"]}


def test_cancel_of_a_running_job_stops_it_and_leaves_no_file(running: Running) -> None:
    job = running.submit(callback_url=running.receiver.url, **LONG)
    running.wait(job["id"], in_the_middle)
    answer = running.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert answer.status_code == 200
    done = running.wait(job["id"])
    assert (done["status"], done["assets"]) == ("cancelled", [])
    running.receiver.wait_for(job["id"], "cancelled")
    assert not {key for key in running.files() if job["id"] in key}
    again = running.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert again.json()["status"] == "cancelled"


def test_open_event_streams_take_no_room_from_the_api(running: Running) -> None:
    job = running.submit(**LONG)
    opened, ended = threading.Barrier(13), []

    def follow() -> None:
        headers = {"Authorization": f"Bearer {running.key}"}
        with (
            httpx2.Client(base_url=running.addresses.api, headers=headers, timeout=120) as client,
            client.stream("GET", f"/v1/events/jobs/{job['id']}") as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            opened.wait(60)
            ended.append([line for line in lines if line.startswith("data: ")][-1])

    threads = [threading.Thread(target=follow) for _ in range(12)]
    for thread in threads:
        thread.start()
    opened.wait(60)  # twelve streams are open now, more than twice what Serve would let in by default
    for _ in range(20):
        assert running.client.get("/v1/jobs?limit=1").status_code == 200
    running.wait(job["id"])
    for thread in threads:
        thread.join(60)
    assert len(ended) == 12
    assert {json.loads(line.removeprefix("data: "))["status"] for line in ended} == {"completed"}


def test_readyz_and_metrics_tell_the_state_of_the_cluster(running: Running) -> None:
    ready = httpx2.get(f"{running.addresses.api}/readyz")
    assert ready.status_code == 200, ready.text
    assert set(ready.json()["models"]) == {"sdxl", "wan", "qwen"}
    text = httpx2.get(f"{running.addresses.api}/metrics").text
    assert 'ourvidz_workers{queue="wan",state="ready"} 1.0' in text
