import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from models.denoising.costs import Costs
from models.engine import (
    Cancelled,
    Control,
    DeviceBroken,
    Engine,
    Generation,
    GenerationError,
    GenerationFailed,
    GenerationRequest,
    InvalidInput,
    Model,
    ModelLoadFailed,
    OutOfMemory,
)
from models.sdxl import SDXL

Make = Callable[..., GenerationRequest]
DEADLINE = 60


class Scripted:
    """A model whose generations do what the test's script says; the engine around it is the real one."""

    model_name = "scripted"
    revision: str | None = None
    device = "cpu"

    def __init__(self, script: Callable[[GenerationRequest, Control], None], load_error: Exception | None = None):
        self.loaded = False
        self.threads: set[int] = set()
        self.order: list[int | None] = []
        self._script = script
        self._load_error = load_error

    def load(self) -> None:
        self.threads.add(threading.get_ident())
        if self._load_error is not None:
            raise self._load_error
        self.loaded = True

    def warm_up(self) -> None:
        self.threads.add(threading.get_ident())

    def measure(self, folder: Path | None) -> Costs:
        return Costs()

    def forward_rows(self, request: GenerationRequest) -> int:
        return 1

    def session(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def generate(self, request: GenerationRequest, control: Control) -> Generation:
        self.threads.add(threading.get_ident())
        self.order.append(request.params.seed)
        self._script(request, control)
        return Generation([], None, None, [request.params.seed or 0], {}, {})


def steps(request: GenerationRequest, control: Control) -> None:
    for done in range(request.params.steps):
        control.step(done + 1, request.params.steps)


def raising(error: BaseException) -> Callable[[GenerationRequest, Control], None]:
    """A script that fails for seed 13 and works for every other seed."""

    def script(request: GenerationRequest, control: Control) -> None:
        if request.params.seed == 13:
            raise error

    return script


@asynccontextmanager
async def running(model: Model, slots: int = 1) -> AsyncIterator[Engine]:
    engine = Engine(model, slots=slots)
    engine.start()
    try:
        async with asyncio.timeout(DEADLINE):
            await engine.ready()
            yield engine
    finally:
        await asyncio.to_thread(engine.close, DEADLINE)
        assert not engine.alive


async def test_engine_gives_what_the_model_gives_and_counts_its_progress(
    sdxl: SDXL, image_request: Make, recorder: Any
) -> None:
    expected = sdxl.generate(image_request(num_images=3), recorder()).images
    assert expected is not None
    async with running(sdxl) as engine:
        activity = engine.activity
        ticket = engine.submit(image_request(num_images=3))
        made = await ticket.result()
        assert made.images is not None
        assert [image.tobytes() for image in made.images] == [image.tobytes() for image in expected]
        assert (ticket.progress.phase, ticket.progress.step, ticket.progress.of) == ("done", 4, 4)
        # three phases, four steps and four forwards; the ticket counts its end as well, and no forward
        assert engine.activity - activity == 11
        assert ticket.progress.activity == 8


async def test_failed_request_leaves_the_engine_usable(sdxl: SDXL, image_request: Make) -> None:
    async with running(sdxl) as engine:
        bad = engine.submit(image_request(scheduler="nonsense"))
        good = engine.submit(image_request())
        with pytest.raises(InvalidInput):
            await bad.result()
        assert len((await good.result()).images or []) == 1
        assert engine.alive


async def test_cancel_ends_a_real_generation_early(sdxl: SDXL, image_request: Make) -> None:
    async with running(sdxl) as engine:
        ticket = engine.submit(image_request(steps=100))
        ticket.cancel()
        with pytest.raises(Cancelled):
            await ticket.result()
        assert ticket.progress.step <= 1
        assert (await engine.submit(image_request()).result()).seeds == [11]


async def test_cancel_is_seen_at_the_next_step(image_request: Make) -> None:
    at_step, cancelled = threading.Event(), threading.Event()

    def script(request: GenerationRequest, control: Control) -> None:
        for done in range(1, 11):
            if done == 4:
                at_step.set()
                assert cancelled.wait(DEADLINE)
            control.step(done, 10)

    async with running(Scripted(script)) as engine:
        ticket = engine.submit(image_request())
        assert await asyncio.to_thread(at_step.wait, DEADLINE)
        assert ticket.progress.step == 3
        ticket.cancel()
        cancelled.set()
        with pytest.raises(Cancelled):
            await ticket.result()
        assert ticket.progress.step == 4


async def test_cancel_of_a_waiting_request_ends_it_at_once(image_request: Make) -> None:
    started, go_on = threading.Event(), threading.Event()

    def script(request: GenerationRequest, control: Control) -> None:
        started.set()
        assert go_on.wait(DEADLINE)

    model = Scripted(script)
    async with running(model) as engine:
        first, second = engine.submit(image_request(seed=1)), engine.submit(image_request(seed=2))
        assert await asyncio.to_thread(started.wait, DEADLINE)
        second.cancel()
        with pytest.raises(Cancelled):
            await second.result()
        assert not first.done
        go_on.set()
        await first.result()
    assert model.order == [1]


async def test_one_thread_runs_everything_in_the_order_of_arrival(image_request: Make) -> None:
    model = Scripted(steps)
    async with running(model, slots=2) as engine:
        tickets = [engine.submit(image_request(seed=seed)) for seed in (5, 3, 9, 1)]
        results = [await ticket.result() for ticket in tickets]
    assert [result.seeds for result in results] == [[5], [3], [9], [1]]
    assert model.order == [5, 3, 9, 1]
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_free_slots_count_what_runs_and_what_waits(image_request: Make) -> None:
    go_on = threading.Event()

    def script(request: GenerationRequest, control: Control) -> None:
        assert go_on.wait(DEADLINE)

    async with running(Scripted(script), slots=2) as engine:
        assert engine.free_slots == 2
        first = engine.submit(image_request())
        assert engine.free_slots == 1
        second, third = engine.submit(image_request()), engine.submit(image_request())
        assert engine.free_slots == 0
        go_on.set()
        await asyncio.gather(first.result(), second.result(), third.result())
        assert engine.free_slots == 2


def torch_oom() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch_oom(), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), GenerationFailed),
        (KeyError("x"), GenerationFailed),
        (SystemExit(1), GenerationFailed),
        (InvalidInput("no"), InvalidInput),
    ],
)
async def test_error_fails_its_own_ticket_only(
    image_request: Make, error: BaseException, kind: type[GenerationError]
) -> None:
    async with running(Scripted(raising(error))) as engine:
        failing, next_one = engine.submit(image_request(seed=13)), engine.submit(image_request(seed=1))
        with pytest.raises(kind):
            await failing.result()
        assert (await next_one.result()).seeds == [1]
        assert engine.broken is None


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
async def test_broken_device_ends_the_engine_and_all_it_holds(image_request: Make, text: str) -> None:
    engine = Engine(Scripted(raising(RuntimeError(text))))
    engine.start()
    async with asyncio.timeout(DEADLINE):
        await engine.ready()
        tickets = [engine.submit(image_request(seed=seed)) for seed in (13, 1)]
        for ticket in tickets:
            with pytest.raises(DeviceBroken):
                await ticket.result()
        assert engine.broken == text.partition("\n")[0]
        assert not engine.alive
        with pytest.raises(DeviceBroken):
            await engine.submit(image_request()).result()
    engine.close()


async def test_error_messages_hold_no_prompt(image_request: Make) -> None:
    error = ValueError("`prompt` has to be of type str but is: a secret garden")
    async with running(Scripted(raising(error))) as engine:
        with pytest.raises(GenerationFailed) as failed:
            await engine.submit(image_request(seed=13, prompt="a secret garden")).result()
    assert "secret" not in failed.value.message
    assert failed.value.message.startswith("ValueError at test_engine.py:")
    assert failed.value.__cause__ is None


@pytest.mark.parametrize("error", [ModelLoadFailed("no weights"), OSError("no weights"), torch_oom()])
async def test_failed_load_is_told_by_ready_and_to_whoever_submits(image_request: Make, error: Exception) -> None:
    engine = Engine(Scripted(steps, load_error=error))
    early = engine.submit(image_request())
    engine.start()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ModelLoadFailed):
            await engine.ready()
        for ticket in (early, engine.submit(image_request())):
            with pytest.raises(ModelLoadFailed):
                await ticket.result()
    engine.close()
    assert not engine.alive
    assert engine.broken


async def test_close_stops_what_runs_and_what_waits(image_request: Make) -> None:
    started = threading.Event()

    def script(request: GenerationRequest, control: Control) -> None:
        started.set()
        while True:
            control.step(1, 100)

    engine = Engine(Scripted(script), slots=2)
    engine.start()
    async with asyncio.timeout(DEADLINE):
        await engine.ready()
        tickets = [engine.submit(image_request()) for _ in range(2)]
        assert await asyncio.to_thread(started.wait, DEADLINE)
        await asyncio.to_thread(engine.close, DEADLINE)
        for ticket in [*tickets, engine.submit(image_request())]:
            with pytest.raises(Cancelled):
                await ticket.result()
    assert not engine.alive


async def test_giving_up_waiting_does_not_disturb_the_generation(image_request: Make) -> None:
    go_on = threading.Event()

    def script(request: GenerationRequest, control: Control) -> None:
        assert go_on.wait(DEADLINE)

    async with running(Scripted(script)) as engine:
        ticket = engine.submit(image_request(seed=2))
        waiter = asyncio.create_task(ticket.result())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        go_on.set()
        assert (await ticket.result()).seeds == [2]
