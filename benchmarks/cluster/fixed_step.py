"""A denoiser whose every forward takes the same time, whatever its rows: what is left is the cost of the system around
it. It needs torch alone, since it also runs inside the other servers, and inside the copied code of the replica."""

import time
from pathlib import Path
from typing import Any


def fix_step_time(denoiser: Any, seconds: float, tally: Path) -> None:
    """From now on a forward scales its sample and sleeps out its time; one byte, its rows, is added to `tally`."""

    def forward(sample: Any, *_: Any, **__: Any) -> tuple[Any]:
        end = time.perf_counter() + seconds
        with tally.open("ab") as counted:  # some microseconds of the step
            counted.write(bytes([sample.shape[0]]))
        output = sample * 0.1
        time.sleep(max(0.0, end - time.perf_counter()))
        return (output,)

    denoiser.forward = forward
