"""What is asked for, by how many, and what came of it."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

CALLERS = 16
SIZE, GUIDANCE = 128, 6.0  # pixels, and the guidance scale: the defaults of sdxl_image_fast on the laptop profile
EQUAL_STEPS = 10
MIX = ((4, 0.30), (10, 0.30), (16, 0.25), (40, 0.15))  # steps, and the share of the requests


@dataclass(frozen=True)
class Work:
    """One image. No two of a run have the same number, and so none the same prompt."""

    number: int
    steps: int

    @property
    def prompt(self) -> str:
        return f"a lighthouse on a cliff, number {self.number}"


@dataclass(frozen=True)
class Lap:
    """What one contender did with one list of works; `forwards` of its denoiser had `rows` rows in all. Both are 0
    where nobody counted."""

    images: int
    seconds: float
    forwards: int = 0
    rows: int = 0

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    def busy(self, step_seconds: float) -> float:
        """The share of the time in which a forward ran."""
        return self.forwards * step_seconds / self.seconds

    @property
    def images_together(self) -> float:
        """The images of a forward, on the mean: each has two rows, since it is guided."""
        return self.rows / (2 * self.forwards) if self.forwards else 0.0


class Tally:
    """Reads what `fix_step_time` counted, from one moment on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def lap(self, images: int, seconds: float) -> Lap:
        """The lap that ended now."""
        counted = self._path.read_bytes()[self._seen :] if self._path.exists() else b""
        return Lap(images, seconds, len(counted), sum(counted))


def equal(first: int, count: int) -> list[Work]:
    """Works that all have the same number of steps."""
    return [Work(first + n, EQUAL_STEPS) for n in range(count)]


def mixed(first: int, count: int, seed: int) -> list[Work]:
    """Works in the shares of `MIX` exactly, as far as whole works can be, in a random order."""
    steps = [steps for steps, share in MIX for _ in range(round(share * count))]
    steps = (steps + [EQUAL_STEPS] * count)[:count]
    random.Random(seed).shuffle(steps)
    return [Work(first + n, s) for n, s in enumerate(steps)]


def drive(works: Sequence[Work], one: Callable[[Work], None], callers: int = CALLERS) -> float:
    """Seconds from the first request to the last result. Each caller asks for the next work when it has the last one;
    `one` returns when a work is done. Raises what the first failure of a caller was."""
    left: SimpleQueue[Work] = SimpleQueue()
    for work in works:
        left.put(work)
    failures: list[BaseException] = []

    def caller() -> None:
        while not failures:
            try:
                one(left.get_nowait())
            except Empty:
                return
            except BaseException as failure:
                failures.append(failure)

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - started
