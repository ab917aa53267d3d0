"""The jobs of one fault: a mix of all kinds, each submitted until it is acknowledged, a few of them cancelled."""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx2

from benchmarks.chaos.cluster import Cluster

MIX: tuple[tuple[int, dict[str, Any]], ...] = (
    (6, {"job_type": "sdxl_image_fast"}),
    (3, {"job_type": "sdxl_image_high"}),
    (1, {"job_type": "sdxl_image_high", "width": 1024, "height": 1024}),  # seconds long, to be hit in the middle
    (3, {"job_type": "sdxl_image_fast", "num_images": 3}),
    (1, {"job_type": "sdxl_image_high", "num_images": 3, "enhance": True}),
    (3, {"job_type": "image_fast"}),
    (1, {"job_type": "video_fast", "frames": 17}),
    (1, {"job_type": "video7b_fast_enhanced", "frames": 17}),
)
CLIENTS = 3
OPEN_JOBS = 14  # more would only wait: the fault should meet jobs in every state
CANCELLED = 0.06
GIVE_UP_SECONDS = 240.0
OVERFLOW = 4  # times the asked number, at most, while a fault still goes on


class Load:
    """Keeps jobs flowing in threads until `enough`, and knows which were acknowledged."""

    def __init__(self, cluster: Cluster, callback_url: str, fault: str, jobs: int, seed: int) -> None:
        self._cluster, self._callback_url, self._fault, self._jobs = cluster, callback_url, fault, jobs
        self._random = random.Random(f"{seed} {fault} load")
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._next, self._open = 0, 0
        self.accepted: dict[int, str] = {}  # by the number of the job, its id
        self.cancel_asked: set[str] = set()
        self.refused: list[str] = []
        self.answers: Counter[str] = Counter()  # what was said instead of yes, and was followed by another try
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(CLIENTS)]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """The fault is over: submit what is missing from the number asked for, and return when all is acknowledged."""
        self._finished.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        while not self._enough():
            with contextlib.suppress(Exception):  # a database that is away is what some faults are about
                rows = asyncio.run(self._cluster.query("SELECT count(*) FROM job_queue"))
                self._open = int(rows[0][0])
            time.sleep(0.3)

    def _enough(self) -> bool:
        done = self._next >= self._jobs
        return done and (self._finished.is_set() or self._next >= OVERFLOW * self._jobs)

    def _client(self) -> None:
        headers = {"Authorization": f"Bearer {self._cluster.key()}"}
        with httpx2.Client(base_url=self._cluster.api, headers=headers, timeout=15) as client:
            while not self._enough():
                if self._open >= OPEN_JOBS:
                    time.sleep(0.1)
                    continue
                with self._lock:
                    number, self._next, self._open = self._next, self._next + 1, self._open + 1
                    body, cancel_after = self._body(number), None
                    if self._random.random() < CANCELLED:
                        cancel_after = self._random.uniform(0, 2)
                job_id = self._submit(client, number, body)
                if job_id is not None and cancel_after is not None:
                    time.sleep(cancel_after)
                    self._cancel(client, job_id)

    def _body(self, number: int) -> dict[str, Any]:
        (shape,) = self._random.choices([kind for _, kind in MIX], [weight for weight, _ in MIX])
        return shape | {
            "prompt": "a lighthouse on a cliff",
            "seed": number,
            "steps": self._random.randint(2, 6),
            "callback_url": self._callback_url,
            "metadata": {"fault": self._fault, "number": number},
        }

    def _submit(self, client: httpx2.Client, number: int, body: dict[str, Any]) -> str | None:
        key = {"Idempotency-Key": f"{self._fault}-{number}"}
        answer = self._until_answered(client, "/v1/jobs", {200, 202}, json=body, headers=key)
        if answer is None:
            return None
        job_id: str = answer.json()["id"]
        with self._lock:
            self.accepted[number] = job_id
        return job_id

    def _cancel(self, client: httpx2.Client, job_id: str) -> None:
        if self._until_answered(client, f"/v1/jobs/{job_id}/cancel", {200}) is not None:
            self.cancel_asked.add(job_id)

    def _until_answered(
        self, client: httpx2.Client, path: str, good: set[int], **request: Any
    ) -> httpx2.Response | None:
        """Repeat a request until it is taken. A refusal that is no matter of time is kept as one."""
        end, wait = time.monotonic() + GIVE_UP_SECONDS, 0.2
        while time.monotonic() < end:
            try:
                answer = client.post(path, **request)
            except httpx2.HTTPError as error:
                self.answers[type(error).__name__] += 1
            else:
                if answer.status_code in good:
                    return answer
                self.answers[f"{answer.status_code} {_code(answer)}"] += 1
                if answer.status_code < 500 and answer.status_code not in (404, 409, 429):
                    self.refused.append(f"{answer.status_code} {answer.text[:200]}")
                    return None
            time.sleep(wait)
            wait = min(2 * wait, 1.0)
        self.refused.append(f"{path}: not answered within {GIVE_UP_SECONDS:.0f} s")
        return None


def _code(answer: httpx2.Response) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(answer.json().get("code"))
    return "(no problem document)"
