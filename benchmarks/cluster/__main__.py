"""`python -m benchmarks.cluster`: images a second through the whole system (HTTP, Postgres, replica, file, callback)
beside a bare loop over the same engine in one process, and beside LitServe and BentoML with the stock pipeline, in one
run.

The denoiser has a fixed step time, whatever its rows, as on a card with room; everything else is real, on the tiny
checkpoint. So the cost of the systems shows, and not the contention for the cores of a small machine. Contenders take
turns, round by round. The laptop profile as it is, with its real denoiser, is measured at the end. Ends with 1 where
the whole system is below 0.9 of the bare loop.

The other servers want an environment of their own (`pip install -e '.[bench-serving]'`), whose Python is told by
`--peers-python`.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.cluster.bare import Bare
from benchmarks.cluster.peers import KINDS, Peer
from benchmarks.cluster.system import System
from benchmarks.cluster.table import BARE, SYSTEM, table, verdict
from benchmarks.cluster.workload import CALLERS, EQUAL_STEPS, MIX, Lap, Work, equal, mixed
from models.samples.tiny import ensure_tiny

WARM_UP = 24  # images: the batching of BentoML learns from its first calls


class Bench:
    """The contenders of one part, and what they did."""

    def __init__(self, bare: Bare, system: System, peers: list[Peer]) -> None:
        self.bare, self.system, self.peers = bare, system, peers
        self._numbers = 0

    async def start(self) -> None:
        """All of them, one after the other, warm."""
        for peer in self.peers:
            peer.start()
            peer.run(self.equal(WARM_UP))
        with self.resting():
            await self.bare.start()
            await asyncio.to_thread(self.system.start)
            await self.bare.run(self.equal(WARM_UP))
            await asyncio.to_thread(self.system.run, self.equal(WARM_UP))

    def equal(self, count: int) -> list[Work]:
        """So many works that were not seen before."""
        self._numbers += count
        return equal(self._numbers - count, count)

    def mixed(self, count: int, seed: int) -> list[Work]:
        """The same with steps of all lengths."""
        self._numbers += count
        return mixed(self._numbers - count, count, seed)

    async def round(self, works: list[Work], laps: dict[str, list[Lap]]) -> None:
        """A turn of each."""
        with self.resting():
            laps.setdefault(BARE, []).append(await self.bare.run(works))
            laps.setdefault(SYSTEM, []).append(await asyncio.to_thread(self.system.run, works))
        for peer in self.peers:
            with self.resting(but=peer):
                laps.setdefault(peer.kind.name, []).append(await asyncio.to_thread(peer.run, works))
        print("  " + ", ".join(f"{name} {own[-1].rate:.2f}" for name, own in laps.items()), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def resting(self, but: Peer | None = None) -> Iterator[None]:
        """Other servers stand still meanwhile."""
        with contextlib.ExitStack() as stack:
            for peer in self.peers:
                if peer is not but:
                    stack.enter_context(peer.resting())
            yield

    def close(self) -> None:
        """End everything, whatever fails."""
        with contextlib.ExitStack() as stack:
            for peer in self.peers:
                stack.callback(peer.close)
            stack.callback(self.system.close)
            stack.callback(self.bare.close)


async def fixed(bench: Bench, asked: argparse.Namespace, missing: list[str]) -> bool:
    """The part with the fixed step time; whether the promise is kept."""
    step = asked.step_ms / 1000
    met = True
    mix = ", ".join(f"{share:.0%} of {steps}" for steps, share in MIX)
    kinds: list[tuple[str, int, Callable[[int, int], list[Work]]]] = [
        (f"All of {EQUAL_STEPS} steps", asked.images, lambda count, _: bench.equal(count)),
        (f"Steps mixed: {mix}", asked.mixed_images, bench.mixed),
    ]
    for title, count, works in kinds:
        laps: dict[str, list[Lap]] = {}
        for number in range(asked.rounds):
            await bench.round(works(count, number), laps)
        fine, sentence = verdict(laps)
        met &= fine
        print(f"\n**{title}**; {count} images a round\n")
        print("\n".join(table(laps, step, missing)))
        print(f"\n{sentence}", flush=True)
    return met


async def laptop(bench: Bench, asked: argparse.Namespace) -> None:
    """The laptop profile as it is."""
    laps: dict[str, list[Lap]] = {}
    for _ in range(asked.rounds):
        await bench.round(bench.equal(asked.images), laps)
    print(f"\n**The laptop profile as it is, {EQUAL_STEPS} steps**; {asked.images} images a round\n")
    print("\n".join(table(laps, None)), flush=True)


async def measured(folder: Path, asked: argparse.Namespace) -> bool:
    """Both parts, each with a cluster of its own."""
    met = asked.only == "laptop" or await measured_fixed(folder, asked)
    if asked.only != "fixed":
        bench = Bench(Bare(folder, None), System(subfolder(folder, "laptop"), None), [])
        try:
            await bench.start()
            await laptop(bench, asked)
        finally:
            bench.close()
    return met


async def measured_fixed(folder: Path, asked: argparse.Namespace) -> bool:
    """The first part; whether the promise is kept."""
    checkpoint, step = ensure_tiny("sdxl", folder), asked.step_ms / 1000
    bare = Bare(folder, step)
    peers = [
        Peer(kind, asked.peers_python, folder, checkpoint, step, bare.slots) for kind in KINDS if asked.peers_python
    ]
    versions = ", ".join(f"{peer.kind.name} {peer.version()}" for peer in peers) or "no other servers"
    print(
        f"{asked.rounds} rounds, {os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}; a forward takes {asked.step_ms:g} ms; {bare.slots} slots or images in a batch; {CALLERS} callers"
    )
    bench = Bench(bare, System(subfolder(folder, "fixed"), step), peers)
    try:
        await bench.start()
        return await fixed(bench, asked, [] if peers else [kind.name for kind in KINDS])
    finally:
        bench.close()


def subfolder(folder: Path, name: str) -> Path:
    """A new one that the server of Postgres may pass through."""
    made = folder / name
    made.mkdir(mode=0o755)
    return made


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=60, help="of equal steps, a round")
    parser.add_argument("--mixed-images", type=int, default=40, help="of mixed steps, a round")
    parser.add_argument("--step-ms", type=float, default=50)
    parser.add_argument("--peers-python", type=Path, help="of the environment with litserve and bentoml; else not run")
    parser.add_argument("--only", choices=["fixed", "laptop"], help="one part: with the fixed step time, or without")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="ovzcluster"))
    folder.chmod(0o755)  # as root, Postgres runs as another user, who must be able to pass
    started = time.monotonic()
    try:
        met = asyncio.run(measured(folder, asked))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
