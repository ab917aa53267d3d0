"""The engine against one-at-a-time FIFO and against request batching as `@serve.batch` does it, under Poisson arrivals.

    python -m benchmarks.engine [--rounds 3] [--requests 60] [--only latency|overhead|memory]

Every denoise step and every decode really runs, on the tiny SDXL checkpoint with one torch thread: at 64 pixels, where
a forward of 8 rows costs little more than one of 2 ("launch-bound", as small pictures are on a large card), and at 320
pixels, where it costs in proportion ("compute-bound"). The clock of arrivals and latencies is the CPU time of this
process, so that other tenants of the machine do not count and idle waits cost nothing. All policies get the same
arrivals in each round, in turn; the table has the medians of the rounds. The load is that of each round's own arrivals:
their work, as FIFO does it, over the time in which they come.
"""

import argparse
import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from models.catalog import Family
from models.engine import Control, Engine, GenerationRequest
from models.params import GenerationParams
from models.profile import load_profile
from models.samples.tiny import ensure_tiny
from models.sdxl import SDXL

MIX = ((4, 0.30), (10, 0.30), (16, 0.25), (40, 0.15))  # steps and their share; 4-step jobs go without guidance
SHORT = 4
LOADS = (0.5, 0.9, 1.5)
REGIMES = {"launch-bound": 64, "compute-bound": 320}
BATCH, BATCH_WAIT_SECONDS = 8, 0.1
CALIBRATION = 5  # jobs of each kind that FIFO is timed with
NUMBERS = count()  # of jobs: each prompt is new, so that nobody finds its encoding in the cache
OVERHEAD_LIMIT_MS = 3.0


@dataclass
class Job:
    """One request of the trace; times in seconds of the clock."""

    number: int
    steps: int
    pixels: int
    arrival: float
    done: float = 0.0

    @property
    def request(self) -> GenerationRequest:
        params = GenerationParams(
            prompt=f"a picture of number {self.number}",
            seed=self.number,
            num_images=1,
            width=self.pixels,
            height=self.pixels,
            frames=1,
            steps=self.steps,
            guidance_scale=1.0 if self.steps == SHORT else 5.0,
            scheduler="euler",
        )
        return GenerationRequest(str(self.number), params)


class Clock:
    """The CPU seconds of this process, and the idle time that was skipped."""

    def __init__(self) -> None:
        self._started, self._skipped = time.process_time(), 0.0

    def now(self) -> float:
        return time.process_time() - self._started + self._skipped

    def skip_to(self, moment: float) -> None:
        self._skipped += max(0.0, moment - self.now())


def trace(pixels: int, size: int, load: float, service: dict[int, float], seed: int) -> list[Job]:
    """Poisson arrivals whose work is `load` of the time until the last; `service` are FIFO's seconds by steps."""
    chance = random.Random(seed)
    jobs, now = [], 0.0
    for _ in range(size):
        now += chance.expovariate(1.0)
        steps = chance.choices([steps for steps, _ in MIX], [share for _, share in MIX])[0]
        jobs.append(Job(next(NUMBERS), steps, pixels, now))
    # a hundred draws may have a tenth more or less work, or time, than is to be expected
    scale = sum(service[job.steps] for job in jobs) / (load * now)
    for job in jobs:
        job.arrival *= scale
    return jobs


def fifo(model: SDXL, jobs: list[Job]) -> None:
    """One at a time, in the order of arrival."""
    clock = Clock()
    for job in jobs:
        clock.skip_to(job.arrival)
        model.generate(job.request, Control())
        job.done = clock.now()


def serve_batch(model: SDXL, jobs: list[Job]) -> None:
    """As `@serve.batch(8, 0.1)`: waits for 8 or for 0.1 s; the handler splits by steps; all answers leave together."""
    clock, coming = Clock(), list(jobs)
    waiting: list[Job] = []
    while coming or waiting:
        if not waiting:
            clock.skip_to(coming[0].arrival)
            waiting.append(coming.pop(0))
        until = max(waiting[0].arrival, clock.now()) + BATCH_WAIT_SECONDS
        while len(waiting) < BATCH and coming and coming[0].arrival <= until:
            clock.skip_to(coming[0].arrival)
            waiting.append(coming.pop(0))
        if len(waiting) < BATCH:
            clock.skip_to(until)
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        for steps in sorted({job.steps for job in batch}):
            stock_batch(model, [job for job in batch if job.steps == steps])
        for job in batch:
            job.done = clock.now()


def stock_batch(model: SDXL, jobs: list[Job]) -> None:
    """Jobs of the same steps in one call of the pipeline of diffusers."""
    import torch

    model._pipeline(
        prompt=[job.request.params.prompt for job in jobs],
        num_inference_steps=jobs[0].steps,
        guidance_scale=jobs[0].request.params.guidance_scale,
        width=jobs[0].pixels,
        height=jobs[0].pixels,
        generator=[torch.Generator().manual_seed(job.number) for job in jobs],
    )


async def engine_run(engine: Engine, jobs: list[Job]) -> None:
    """By the engine: each job is submitted when it arrives, and leaves when it is done."""
    clock, coming = Clock(), list(jobs)
    held: set[asyncio.Task[None]] = set()

    async def one(job: Job) -> None:
        await engine.submit(job.request).result()
        job.done = clock.now()

    while coming or held:
        if not held:
            clock.skip_to(coming[0].arrival)
        while coming and coming[0].arrival <= clock.now():
            held.add(asyncio.create_task(one(coming.pop(0))))
        # at most all cores count, so a job can't be due sooner than this
        due = (coming[0].arrival - clock.now()) / (psutil.cpu_count() or 1) if coming else None
        timeout = None if due is None else max(0.001, due)
        done, held = await asyncio.wait(held, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def summary(jobs: list[Job]) -> tuple[float, float, float, float]:
    """Mean, 95th percentile and mean of the short jobs' latency in seconds, and images a second."""
    latencies = [job.done - job.arrival for job in jobs]
    short = [job.done - job.arrival for job in jobs if job.steps == SHORT]
    span = max(job.done for job in jobs) - jobs[0].arrival
    p95 = statistics.quantiles(latencies, n=20)[-1]
    return statistics.mean(latencies), p95, statistics.mean(short), len(jobs) / span


async def latency(model: SDXL, folder: Path, requests: int, rounds: int) -> bool:
    # the clock is that of one core: what went on beside the steps would count twice
    engine = Engine(model, slots=64, costs_folder=folder, overlap=False)
    engine.start()
    await engine.ready()
    met = True
    columns = ("regime", "load", "policy", "mean s", "p95 s", "short jobs' mean s", "images/s")
    print(f"| {' | '.join([*columns, 'mean / FIFO', 'short / FIFO', 'images / FIFO'])} |")
    print("|---" * (len(columns) + 3) + "|")
    for regime, pixels in REGIMES.items():
        await profile_size(engine, model, pixels)
        service = measured_service(model, pixels)
        for load in LOADS:
            results: dict[str, list[tuple[float, float, float, float]]] = {}
            for seed in range(rounds):
                for policy in ("FIFO", "serve.batch", "engine"):
                    jobs = trace(pixels, requests, load, service, seed)
                    gc.collect()
                    if policy == "FIFO":
                        await asyncio.to_thread(fifo, model, jobs)
                    elif policy == "serve.batch":
                        await asyncio.to_thread(serve_batch, model, jobs)
                    else:
                        await engine_run(engine, jobs)
                    results.setdefault(policy, []).append(summary(jobs))
            met &= show(regime, load, results)
    await asyncio.to_thread(engine.close)
    return met


def show(regime: str, load: float, results: dict[str, list[tuple[float, float, float, float]]]) -> bool:
    """Print the medians, with the ratios taken within each round; whether the goals at this point are met."""
    median: dict[str, Any] = {}
    for policy, rows in results.items():
        ratios = [
            (own[0] / other[0], own[2] / other[2], own[3] / other[3])
            for own, other in zip(rows, results["FIFO"], strict=True)
        ]
        median[policy] = [statistics.median(values) for values in zip(*ratios, strict=True)]
        figures = [statistics.median(values) for values in zip(*rows, strict=True)]
        cells = " | ".join(f"{value:.2f}" for value in [*figures, *median[policy]])
        print(f"| {regime} | {load} | {policy} | {cells} |", flush=True)
    mean, short, images = median["engine"]
    versus_batch = statistics.median(
        own[0] / other[0] for own, other in zip(results["engine"], results["serve.batch"], strict=True)
    )
    print(f"| {regime} | {load} | engine / serve.batch | {versus_batch:.2f} | | | | | | |", flush=True)
    if load != 0.9:
        return True
    goal = 0.5 if regime == "launch-bound" else 0.8
    return mean <= goal and versus_batch <= goal and (regime != "launch-bound" or short <= 0.3) and images >= 0.9


async def profile_size(engine: Engine, model: SDXL, pixels: int) -> None:
    """The engine's profile of this size, as its warm-up takes it for the default size."""
    from models.denoising.costs import Shape
    from models.denoising.measuring import measured

    class Sized(SDXL):
        def sample_request(self, frames: int | None = None) -> GenerationRequest:
            return Job(0, 1, pixels, 0.0).request

    sized = Sized(model.spec, model.weights)
    sized.__dict__.update(model.__dict__)
    costs = await asyncio.to_thread(measured, sized, None)
    engine.costs[model.model_name] = costs
    shape = Shape(pixels, pixels, 1)
    curve = ", ".join(f"{rows}: {seconds * 1000:.0f}" for rows, seconds in costs.measured[shape].items())
    print(f"\n{pixels} x {pixels}: ms of a forward by rows: {curve}; cap {costs.cap(shape)} rows\n", flush=True)


def measured_service(model: SDXL, pixels: int) -> dict[int, float]:
    """Seconds of FIFO for a job, by steps: medians of jobs that take turns, each with a prompt of its own."""
    seconds: dict[int, list[float]] = {steps: [] for steps, _ in MIX}
    for steps in [steps for steps, _ in MIX] * CALIBRATION:
        request = Job(next(NUMBERS), steps, pixels, 0.0).request
        started = time.process_time()
        model.generate(request, Control())
        seconds[steps].append(time.process_time() - started)
    return {steps: statistics.median(found) for steps, found in seconds.items()}


async def overhead(model: SDXL) -> bool:
    """What the engine itself costs: denoiser and decoder answer at once, the rest is as for 1024 x 1024 pixels."""
    met = True
    print("\n| requests | rows in a forward | CPU ms for a request and step | goal |\n|---|---|---|---|")
    for requests in (1, 4, 8):
        engine = Engine(model, slots=requests)
        engine.start()
        await engine.ready()  # which loads the model anew
        model._pipeline.unet.forward = lambda sample, *_, **__: (sample * 0.1,)
        model._pipeline.vae.decode = lambda latents, *_, **__: (latents[:, :3, :8, :8],)
        engine.costs[model.model_name] = flat_costs(16)
        _, short, long = [await burst(engine, requests, steps) for steps in (10, 10, 90)]
        milliseconds = (long - short) / (80 * requests) * 1000
        met &= milliseconds <= OVERHEAD_LIMIT_MS
        rows = engine.rows / engine.forwards
        print(f"| {requests} | {rows:.1f} | {milliseconds:.2f} | {OVERHEAD_LIMIT_MS} |", flush=True)
        await asyncio.to_thread(engine.close)
    model.load()
    return met


def flat_costs(cap: int) -> Any:
    """A profile by which so many rows are worth a forward."""
    from models.denoising.costs import Costs, Shape

    costs = Costs()
    costs.measured[Shape(1024, 1024, 1)] = costs.seen[Shape(1024, 1024, 1)] = {1: 1e-3, cap: 1e-3}
    return costs


async def burst(engine: Engine, requests: int, steps: int) -> float:
    """CPU seconds of so many equal requests together."""
    started = time.process_time()
    tickets = [engine.submit(Job(number, steps, 1024, 0.0).request) for number in range(requests)]
    for ticket in tickets:
        await ticket.result()
    return time.process_time() - started


async def memory(model: SDXL, requests: int) -> bool:
    """Memory over many requests, of which every seventh is cancelled. A hundred prompts, so that the cache of encoded
    ones, which may take 256 MiB, is full from the beginning."""
    engine = Engine(model, slots=16)
    engine.start()
    await engine.ready()
    process = psutil.Process()
    print("\n| requests | resident MiB |\n|---|---|")
    sizes = []
    for tenth in range(10):
        for batch in batched(range(tenth * requests // 10, (tenth + 1) * requests // 10), 50):
            tickets = [engine.submit(Job(number % 100, 2, 64, 0.0).request) for number in batch]
            for number, ticket in zip(batch, tickets, strict=True):
                if number % 7 == 0:
                    ticket.cancel()
            await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)
        gc.collect()
        sizes.append(process.memory_info().rss / 2**20)
        print(f"| {(tenth + 1) * requests // 10} | {sizes[-1]:.0f} |", flush=True)
    await asyncio.to_thread(engine.close)
    return sizes[-1] <= 1.05 * sizes[2]


def batched(numbers: range, size: int) -> Iterator[range]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--memory-requests", type=int, default=10_000)
    parser.add_argument("--only", choices=["latency", "overhead", "memory"])
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = SDXL(load_profile("laptop").models[Family.SDXL], ensure_tiny("sdxl", Path(folder)))
        model.load()
        parts: dict[str, Callable[[], Any]] = {
            "latency": lambda: latency(model, Path(folder), asked.requests, asked.rounds),
            "overhead": lambda: overhead(model),
            "memory": lambda: memory(model, asked.memory_requests),
        }
        met = {name: await part() for name, part in parts.items() if asked.only in (None, name)}
    for name, value in met.items():
        print(f"{name}: goals {'met' if value else 'MISSED'}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
