"""What requests that share an engine do to each other: as little as possible."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from models.denoising import forwards
from models.denoising.costs import Costs, Shape, shape_of
from models.engine import (
    Cancelled,
    Control,
    DeviceBroken,
    Engine,
    GenerationFailed,
    GenerationRequest,
    Model,
    OutOfMemoryPredicted,
    Ticket,
)
from models.sdxl import SDXL
from models.wan import WAN

Make = Callable[..., GenerationRequest]
DEADLINE = 60


def batching_costs(*shapes: Shape) -> Costs:
    """A profile by which 16 rows are worth a forward."""
    costs = Costs()
    for shape in shapes:
        costs.measured[shape] = {1: 0.1, 16: 0.1}
        costs.seen[shape] = {1: 0.1, 16: 0.1}
    return costs


@asynccontextmanager
async def running(*models: Model, slots: int = 4, overlap: bool = True) -> AsyncIterator[Engine]:
    engine = Engine(*models, slots=slots, overlap=overlap)
    engine.start()
    try:
        async with asyncio.timeout(DEADLINE):
            await engine.ready()
            for name in engine.models:
                engine.costs[name] = batching_costs(Shape(64, 64, 1), Shape(64, 96, 17))
            yield engine
    finally:
        await asyncio.to_thread(engine.close, DEADLINE)


@contextmanager
def before_forwards(module: Any, act: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`act` is called on the engine's thread before each forward, with its arguments, and may raise."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: act(kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Gate:
    """Holds the engine's thread before a forward until it is opened, so that a test can act between two steps."""

    def __init__(self, at: int) -> None:
        self.forwards = 0
        self.rows: list[int] = []
        self._at = at
        self._reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, arguments: dict[str, Any]) -> None:
        self.forwards += 1
        self.rows.append(int(arguments["sample"].shape[0]))
        if self.forwards == self._at:
            self._reached.set()
            assert self._opened.wait(DEADLINE)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, DEADLINE)

    def open(self) -> None:
        self._opened.set()


async def outcomes(*tickets: Ticket) -> list[Any]:
    return await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)


async def test_error_in_a_shared_forward_fails_the_guilty_alone(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    import torch

    poison, innocent = image_request(prompt="poison", seed=1), [image_request(seed=seed) for seed in (2, 3)]
    expected = [sdxl.generate(request, recorder()).images for request in innocent]
    with torch.no_grad():
        text = sdxl._pipeline.encode_prompt("poison", device="cpu", do_classifier_free_guidance=False)[0][0]
    together = []

    def act(arguments: dict[str, Any]) -> None:
        rows = arguments["encoder_hidden_states"]
        together.append(len(rows))
        if any(torch.equal(row, text) for row in rows):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    async with running(sdxl) as engine:
        with before_forwards(sdxl._pipeline.unet, act):
            failed, *made = await outcomes(*map(engine.submit, [poison, *innocent]))
            assert engine.broken is None
            assert engine.free_slots == engine.slots
    assert isinstance(failed, GenerationFailed)
    assert max(together) > 2  # the poison did share a forward
    for generation, images in zip(made, expected, strict=True):
        assert images is not None
        assert abs(pixels(generation.images[0]) - pixels(images[0])).max() <= 1


def pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image).astype(int)


async def test_want_of_memory_in_a_shared_forward_costs_nobody_the_job(sdxl: SDXL, image_request: Make) -> None:
    import torch

    def act(arguments: dict[str, Any]) -> None:
        if len(arguments["sample"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    async with running(sdxl) as engine:
        with before_forwards(sdxl._pipeline.unet, act):
            requests = [image_request(seed=seed) for seed in range(4)]
            made = await outcomes(*map(engine.submit, requests))
            cap = engine.costs[sdxl.model_name].cap(shape_of(requests[0].params))
    assert [generation.seeds for generation in made] == [[0], [1], [2], [3]]
    assert cap in (3, 4)  # half of what failed, which is what had joined by then


async def test_broken_device_fails_all_that_share_it(sdxl: SDXL, image_request: Make) -> None:
    gate = Gate(at=2)

    def act(arguments: dict[str, Any]) -> None:
        gate(arguments)
        if gate.forwards == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with running(sdxl) as engine:
        with before_forwards(sdxl._pipeline.unet, act):
            first = engine.submit(image_request(seed=1))
            await gate.reached()
            others = [engine.submit(image_request(seed=seed)) for seed in (2, 3)]
            gate.open()
            ended = await outcomes(first, *others)
            assert [type(error) for error in ended] == [DeviceBroken] * 3
            assert engine.broken == "CUDA error: an illegal memory access was encountered"
            assert not engine.alive


async def test_cancel_frees_the_slot_before_the_next_forward(sdxl: SDXL, image_request: Make) -> None:
    gate = Gate(at=3)
    async with running(sdxl) as engine:
        with before_forwards(sdxl._pipeline.unet, gate):
            stays, goes = engine.submit(image_request(steps=8, seed=1)), engine.submit(image_request(steps=8, seed=2))
            await gate.reached()
            goes.cancel()
            gate.open()
            with pytest.raises(Cancelled):
                await goes.result()
            assert (await stays.result()).seeds == [1]
    held = gate.rows.index(4)  # from when both were there
    assert all(rows == 2 for rows in gate.rows[max(3, held + 1) :])
    assert goes.progress.step <= 3


async def test_interactive_goes_before_background(sdxl: SDXL, image_request: Make) -> None:
    gate = Gate(at=4)
    async with running(sdxl, slots=2) as engine:
        with before_forwards(sdxl._pipeline.unet, gate):
            background = engine.submit(image_request(steps=20, seed=1, priority=1))
            await gate.reached()
            alive = background.progress.activity
            urgent = engine.submit(image_request(steps=9, seed=2))
            gate.open()
            await urgent.result()
            # one forward was held by the gate, and one or two more ran until the text was encoded
            assert background.progress.step <= 12
            assert not background.done
            assert background.progress.activity > alive + 9  # waiting for its turn is a sign of life
            await background.result()
    assert gate.rows[-1] == 2
    assert 4 not in gate.rows  # they never shared a forward


async def test_interactive_comes_in_where_background_holds_every_slot(sdxl: SDXL, image_request: Make) -> None:
    gate = Gate(at=4)
    async with running(sdxl, slots=2) as engine:
        with before_forwards(sdxl._pipeline.unet, gate):
            background = [engine.submit(image_request(steps=20, seed=seed, priority=1)) for seed in (1, 2, 3)]
            await gate.reached()
            urgent = engine.submit(image_request(steps=9, seed=4))
            gate.open()
            await urgent.result()
            assert [ticket.done for ticket in background] == [False] * 3
            assert background[2].progress.phase == "waiting"
            await asyncio.gather(*(ticket.result() for ticket in background))


async def test_models_share_an_engine(sdxl: SDXL, wan: WAN, image_request: Make, video_request: Make) -> None:
    async with running(sdxl, wan) as engine:
        picture = engine.submit(image_request(model=sdxl.model_name))
        video = engine.submit(video_request(model=wan.model_name))
        nobody = engine.submit(image_request(model="another"))
        made = await outcomes(picture, video, nobody)
    assert (made[0].images is not None, made[1].frames is not None) == (True, True)
    assert made[2].code == "invalid_input"
    assert made[1].timings_ms["compute"] <= made[1].timings_ms["total"]


async def test_what_can_not_fit_is_not_tried(sdxl: SDXL, image_request: Make) -> None:
    gate = Gate(at=0)
    async with running(sdxl) as engine:
        with before_forwards(sdxl._pipeline.unet, gate):
            costs = engine.costs[sdxl.model_name]
            costs.bytes_per_row_pixel, costs.room_bytes = 2.0**20, 4 * 64 * 64 * 2**20
            large, small = image_request(num_images=3), image_request(num_images=2)
            refused, made = await outcomes(engine.submit(large), engine.submit(small))
    assert isinstance(refused, OutOfMemoryPredicted)
    assert refused.code == "oom_predicted"
    assert refused.message == "a step needs 24.0 GiB beside the weights, and there are 16.0"
    assert made.seeds == [11, 12]
    assert set(gate.rows) == {4}


async def test_shapes_that_run_are_told_with_the_rows_that_free_memory_holds(
    sdxl: SDXL, image_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, free = Gate(at=2), 5 * 64 * 64 * 2**20
    monkeypatch.setattr(forwards, "room_bytes", lambda device: free)
    async with running(sdxl) as engine:
        engine.costs[sdxl.model_name].bytes_per_row_pixel = 2.0**20
        assert engine.shapes(sdxl.model_name) == {}
        with before_forwards(sdxl._pipeline.unet, gate):
            ticket = engine.submit(image_request())
            await gate.reached()
            assert engine.shapes(sdxl.model_name) == {Shape(64, 64, 1): 5}
            gate.open()
            await ticket.result()


async def test_only_denoising_is_done_on_the_denoising_thread(
    sdxl: SDXL, image_request: Make, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {}

    def noting(name: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return call(*args, **kwargs)

        return noted

    reference = {"bucket": "b", "key": "k", "strength": 0.3}
    async with running(sdxl) as engine:
        pipeline = sdxl._pipeline
        monkeypatch.setattr(pipeline.vae, "decode", noting("decode", pipeline.vae.decode))
        monkeypatch.setattr(pipeline.vae, "encode", noting("start", pipeline.vae.encode))
        monkeypatch.setattr(pipeline.text_encoder, "forward", noting("text", pipeline.text_encoder.forward))
        monkeypatch.setattr(pipeline.unet, "forward", noting("denoise", pipeline.unet.forward))
        await engine.submit(image_request(picture, reference=reference, prompt="never seen before")).result()
    name = sdxl.model_name
    pixels, text = {f"{name} pixels"}, {f"{name} text"}
    assert threads == {"start": pixels, "decode": pixels, "text": text, "denoise": {"engine"}}


async def test_a_ticket_tells_when_its_steps_are_done(
    sdxl: SDXL, image_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    async with running(sdxl) as engine:
        decode = sdxl._pipeline.vae.decode

        def held_up(*args: Any, **kwargs: Any) -> Any:
            assert opened.wait(DEADLINE)
            return decode(*args, **kwargs)

        monkeypatch.setattr(sdxl._pipeline.vae, "decode", held_up)
        ticket, stopped = engine.submit(image_request()), engine.submit(image_request(model="another"))
        await asyncio.gather(ticket.denoised(), stopped.denoised())
        assert (ticket.done, stopped.done) == (False, True)
        opened.set()
        assert (await ticket.result()).images


class Noting(Control):
    """Notes the lanes that a generation waits for, and its forwards."""

    def __init__(self) -> None:
        self.waits: list[str] = []

    def forward(self, call: Any) -> Any:
        self.waits.append("forward")
        return call.run()

    def aside(self, work: Callable[[], Any], lane: str = "pixels") -> Any:
        self.waits.append(lane)
        return work()


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_a_request_without_references_waits_for_its_text_alone(
    family: str, sdxl: SDXL, wan: WAN, image_request: Make, video_request: Make
) -> None:
    """Each lane that it waits for may cost it the length of a forward of others."""
    noting = Noting()
    model, request = (sdxl, image_request()) if family == "sdxl" else (wan, video_request())
    model.load()
    model.generate(request, noting)
    assert noting.waits[: noting.waits.index("forward")] == ["text"]


@pytest.mark.parametrize("overlap", [True, False])
async def test_failed_decode_fails_its_own_request(
    sdxl: SDXL, image_request: Make, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    async with running(sdxl, overlap=overlap) as engine:
        vae, decode = sdxl._pipeline.vae, sdxl._pipeline.vae.decode

        def failing(latents: Any, *args: Any, **kwargs: Any) -> Any:
            if len(latents) == 3:
                raise RuntimeError("no")
            return decode(latents, *args, **kwargs)

        monkeypatch.setattr(vae, "decode", failing)
        tickets = [engine.submit(image_request(num_images=count)) for count in (3, 2)]
        failed, made = await outcomes(*tickets)
    assert isinstance(failed, GenerationFailed)
    assert made.seeds == [11, 12]


async def test_fault_outside_of_a_pipeline_ends_everything_and_hangs_nothing(
    sdxl: SDXL, image_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(sdxl, slots=1)
    engine.start()
    async with asyncio.timeout(DEADLINE):
        await engine.ready()
        monkeypatch.setattr(engine._forwards, "step", lambda parked: 1 / 0)
        tickets = [engine.submit(image_request(seed=seed)) for seed in range(3)]
        ended = await outcomes(*tickets)
        assert [type(error) for error in ended] == [DeviceBroken] * 3
        assert engine.broken == "the engine failed: ZeroDivisionError"
        with pytest.raises(DeviceBroken):
            await engine.submit(image_request()).result()
        await asyncio.to_thread(engine.close, DEADLINE)
    assert not engine.alive


async def test_encoded_prompts_are_kept(sdxl: SDXL, image_request: Make) -> None:
    kept = sdxl._embeddings
    async with running(sdxl) as engine:
        hits = kept.hits
        for seed in range(3):
            await engine.submit(image_request(seed=seed, prompt="the same words")).result()
    assert kept.hits - hits == 2
    assert kept.size_bytes <= kept.max_bytes


async def test_many_requests_leave_nothing_behind(sdxl: SDXL, image_request: Make) -> None:
    """Finished, cancelled and failed ones: no tensor of theirs stays. The benchmark goes on to ten thousand."""
    import torch

    async with running(sdxl, slots=16) as engine:

        async def some(count: int) -> int:
            requests = [image_request(steps=2, seed=seed) for seed in range(count)]
            requests += [image_request(scheduler="nonsense"), image_request(steps=2, num_images=2, batch_size=1)]
            tickets = [engine.submit(request) for request in requests]
            for ticket in tickets[::5]:
                ticket.cancel()
            await outcomes(*tickets)
            del tickets
            gc.collect()
            return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

        before = await some(40)
        assert engine.free_slots == engine.slots
        assert await some(80) <= before + 20
