"""The jobs of one fault: a mix of all kinds, each submitted until it is acknowledged, a few of them cancelled."""

import contextlib
import math
import queue
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx2

from benchmarks.chaos.cluster import Cluster, until
from benchmarks.chaos.mix import LARGE, shape_of

CLIENTS = 4
OPEN_JOBS = 40  # at most; enough that no replica waits, and few enough that a fault meets jobs in every state
OPEN_BEYOND = 12  # once the number asked for is reached, while the fault still goes on
BEYOND = 200  # jobs, at most, then
CANCELLED, CANCEL_SECONDS = 0.06, 1.5  # the share, and the mean of what passes before; many are over by then
GIVE_UP_SECONDS = 240.0
LOOK_SECONDS = 0.25


class Load:
    """Keeps jobs flowing in threads until `finish`, and knows which were acknowledged."""

    def __init__(
        self, cluster: Cluster, callback_url: str, fault: str, jobs: int, seed: int, per_second: float = math.inf
    ) -> None:
        """`fault` is noted in each job; no more than `per_second` are submitted, where that is given."""
        self._pace, self._due = 1 / per_second, time.monotonic()
        self._cluster, self._callback_url, self._fault, self._jobs = cluster, callback_url, fault, jobs
        self._random = random.Random(f"{seed} {fault} load")
        self._lock = threading.Lock()
        self._finished, self._stopped = threading.Event(), threading.Event()
        self._next, self._open, self._large_wanted = 0, 0, 0
        self._cancels: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.accepted: dict[int, str] = {}  # by the number of the job, its id
        self.cancel_asked: set[str] = set()
        self.refused: list[str] = []
        self.answers: Counter[str] = Counter()  # what was said instead of yes, and was followed by another try
        self._clients = [threading.Thread(target=self._client, daemon=True) for _ in range(CLIENTS)]
        self._canceller = threading.Thread(target=self._cancel_due, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin."""
        for thread in (*self._clients, self._canceller, self._watcher):
            thread.start()

    def finish(self) -> None:
        """The fault is over: submit what is missing from the number asked for, and return when all is acknowledged."""
        self._finished.set()
        for thread in self._clients:
            thread.join()
        self._cancels.put(None)
        self._canceller.join()
        self._stopped.set()
        self._watcher.join()

    def stop(self) -> None:
        """Submit no more than there are by now; return when all is acknowledged."""
        self._jobs = self._next
        self.finish()

    def wait_share(self, share: float, seconds: float) -> bool:
        """Until that share of the jobs asked for is acknowledged; whether it was in time."""
        return until(lambda: len(self.accepted) >= share * self._jobs, seconds, every=0.05)

    def want_large(self) -> None:
        """Make the next job a large one that nobody cancels, for a fault that must hit one in the middle; its metadata
        says `to_hit`."""
        with self._lock:
            self._large_wanted += 1

    def _watch(self) -> None:
        rows = self._cluster.rows()
        while not self._stopped.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # a database that is away is what some faults are about
                self._open = int(rows.fetch("SELECT count(*) FROM job_queue")[0][0])
        rows.close()

    def _enough(self) -> bool:
        done = self._next >= self._jobs
        return done and (self._finished.is_set() or self._next >= self._jobs + BEYOND) and not self._large_wanted

    def _full(self) -> bool:
        if self._large_wanted:
            return False
        if time.monotonic() < self._due:
            return True
        beyond = self._next >= self._jobs
        return self._open >= (OPEN_BEYOND if beyond else OPEN_JOBS)

    def _client(self) -> None:
        with self._http() as client:
            while not self._done():
                if self._full() or self._enough():
                    time.sleep(0.05)
                    continue
                with self._lock:
                    number, self._next, self._open = self._next, self._next + 1, self._open + 1
                    self._due += self._pace
                    body = self._body(number)
                    cancel = self._random.random() < CANCELLED and "to_hit" not in body["metadata"]
                    cancel_after = self._random.expovariate(1 / CANCEL_SECONDS)
                job_id = self._submit(client, number, body)
                if job_id is not None and cancel:
                    self._cancels.put((time.monotonic() + cancel_after, job_id))

    def _done(self) -> bool:
        return self._finished.is_set() and self._enough()

    def _http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self._cluster.key()}"}
        return httpx2.Client(base_url=self._cluster.api, headers=headers, timeout=15)

    def _body(self, number: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {"fault": self._fault, "number": number}
        shape = shape_of(number, self._random)
        if self._large_wanted:
            self._large_wanted -= 1
            shape, metadata["to_hit"] = dict(LARGE), True
        return shape | {
            "prompt": "a lighthouse on a cliff",
            "seed": number,
            "callback_url": self._callback_url,
            "metadata": metadata,
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

    def _cancel_due(self) -> None:
        with self._http() as client:
            while (item := self._cancels.get()) is not None:
                due, job_id = item
                time.sleep(max(0.0, due - time.monotonic()))
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
