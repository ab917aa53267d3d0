"""The demonstration: an enhanced batch of images, an enhanced video and a quick image, through the HTTP API.

Each reports to a receiver on this machine, which checks the signatures. It has passed when every job completed,
every file opens and is what the API says it is, and every callback was verified.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.media import UnreadableMedia, probe
from serve_app.api.wire import Asset, Job, JobRequest
from serve_app.client import TERMINAL, Client, DownloadFailed
from serve_app.receiver import Receiver

CALLBACK_SECONDS = 60.0  # for the last callback, after the job has ended: the first retry is sent within a few

REQUESTS = tuple(
    JobRequest.model_validate(request)
    for request in (
        {
            "job_type": "sdxl_image_high",
            "prompt": "a lighthouse on a cliff at dusk, waves breaking, oil painting",
            "num_images": 3,
            "enhance": True,
            "seed": 1001,
        },
        {"job_type": "video7b_fast_enhanced", "prompt": "a paper boat drifting down a rainy street", "seed": 1002},
        {"job_type": "image_fast", "prompt": "a bowl of lemons on a blue table, morning light", "seed": 1003},
    )
)


@dataclass(frozen=True)
class DemoJob:
    """How one job went. `problems` is empty when all is well."""

    job: Job
    files: tuple[Path, ...]
    callbacks: tuple[str, ...]  # the types of the verified ones, in the order of their coming
    callback_verified: bool  # the one that says completed
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DemoReport:
    """How the demonstration went. `rejected` counts callbacks whose signature did not hold."""

    jobs: tuple[DemoJob, ...]
    rejected: int

    @property
    def passed(self) -> bool:
        """All completed, all files open, all callbacks verified."""
        return not self.rejected and all(not job.problems for job in self.jobs)


async def run_demo(
    client: Client,
    receiver: Receiver,
    out: Path,
    changed: Callable[[Job], None] | None = None,
    *,
    requests: Sequence[JobRequest] = REQUESTS,
    callback_seconds: float = CALLBACK_SECONDS,
) -> DemoReport:
    """Run the requests against a started cluster that may call the receiver's origin. The files go to `out`.

    `changed` is called with every state of every job. Cancels what it has begun when it is cancelled itself. Raises
    the client's errors.
    """
    receiver.trust((await client.callback_secret()).secret)
    jobs: list[Job] = []
    try:
        for number, request in enumerate(requests):
            called = request.model_copy(update={"callback_url": f"{receiver.origin}/{number}"})
            jobs.append((await client.submit(called)).job)
        ended = await asyncio.gather(*(client.wait(job.id, changed) for job in jobs))
    except asyncio.CancelledError:
        await asyncio.gather(*(client.cancel(job.id) for job in jobs), return_exceptions=True)
        raise
    judged = [
        await _judge(client, receiver, out, request, job, callback_seconds)
        for request, job in zip(requests, ended, strict=True)
    ]
    return DemoReport(tuple(judged), receiver.rejected)


async def _judge(
    client: Client, receiver: Receiver, out: Path, request: JobRequest, job: Job, callback_seconds: float
) -> DemoJob:
    assert job.status in TERMINAL
    problems: list[str] = []
    files: list[Path] = []
    verified = await asyncio.to_thread(receiver.wait_for, job.id, f"job.{job.status}", callback_seconds)
    if not verified:
        problems.append(f"the callback job.{job.status} did not come within {callback_seconds:g} s")
    if job.status != "completed":
        problems.append(f"{job.status}: {job.error.code if job.error else 'no reason given'}")
    else:
        if len(job.assets) != (request.num_images or 1):
            problems.append(f"{len(job.assets)} files instead of {request.num_images or 1}")
        try:
            files = await client.download(job, out)
        except DownloadFailed as error:
            problems.append(str(error))
        for asset, path in zip(job.assets, files, strict=False):
            problem = await asyncio.to_thread(_compare, asset, path)
            if problem is not None:
                problems.append(f"{path.name}: {problem}")
    types = tuple(delivery.type for delivery in receiver.deliveries(job.id))
    return DemoJob(job, tuple(files), types, verified and job.status == "completed", tuple(problems))


def _compare(asset: Asset, path: Path) -> str | None:
    """What is wrong with a file, by decoding it and comparing it with what the API says about it."""
    try:
        facts = probe(path.read_bytes())
    except UnreadableMedia as error:
        return f"does not open: {error}"
    said = (asset.mime_type, asset.width, asset.height, asset.frames)
    found = (facts.mime_type, facts.width, facts.height, facts.frames)
    return None if said == found else f"is {found}, not {said}"
