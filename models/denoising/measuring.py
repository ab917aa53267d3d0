"""Measuring what a model's forwards cost on this device, once, at warm-up."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from models.denoising.costs import Costs, Shape, shape_of
from models.denoising.denoiser import Call, run_together
from models.denoising.lanes import LaneName
from models.generation import Control, OutOfMemory, as_generation_error, release_device_memory
from models.origin.libraries import library_versions

if TYPE_CHECKING:
    from models.pipeline import PipelineModel

T = TypeVar("T")

log = structlog.get_logger()

BUDGET_SECONDS = 10.0
# the fields of a spec that change neither the time nor the memory of a forward or a decoding
OF_NO_FORWARD = {
    "defaults",
    "memory_gib",
    "disk_gib",
    "num_gpus",
    "slots",
    "state_steps",
    "hosted_by",
    "backend",
    "sequences",
    "cache_tokens",
    "loras",
    "lora_cache_gib",
}


def measured(model: PipelineModel, folder: Path | None) -> Costs:
    """The model's costs: from `folder`, where they are of this device, model and versions; else measured, and kept."""
    identity = identity_of(model)
    path = None if folder is None else folder / f"{model.model_name.replace('/', '--')}.json"
    known = None if path is None else Costs.read(path, identity)
    if known is not None:
        log.info("costs_read", model=model.model_name)
        return known
    import torch

    with model.session(), torch.no_grad():  # what is in force while jobs run
        costs = _taken(model)
    log.info("costs_measured", model=model.model_name, cap=costs.cap(shape_of(model.sample_request().params)))
    if path is not None:
        costs.save(path, identity)
    return costs


def _taken(model: PipelineModel) -> Costs:
    """All that is measured of a model, and what of its settings says how many forwards a job makes."""
    costs = Costs()
    request = model.sample_request()
    guided = replace(request, params=request.params.model_copy(update={"guidance_scale": 2.0}))
    costs.branches_apart = model.forward_rows(guided) == model.forward_rows(request)
    costs.guidance_interval = model.spec.acceleration.guidance_interval
    sample = _Sample()
    model.generate(request, sample)
    shape = shape_of(request.params)
    costs.decoded(shape, 1, sample.pixels_seconds)
    costs.bytes_per_row_pixel = _forward_bytes(sample.calls[""], model.device, shape.volume)
    _measure(costs, shape, sample.calls[""], model.device)
    others = model.steered_samples()
    if request.params.frames > 1:  # a video fills the device with one row, and says nothing of pictures
        others = [model.sample_request(frames=1), *others]
    for other in others:
        sample = _Sample()
        model.generate(other, sample)
        for part, call in sample.calls.items():
            shape = shape_of(other.params)
            _measure(costs, shape._replace(part=part) if part else shape, call, model.device)
    return costs


def identity_of(model: PipelineModel) -> dict[str, Any]:
    """What the measurements hold for."""
    import torch

    on_card = model.device == "cuda"
    defaults = model.spec.defaults
    assert defaults is not None  # a spec of a media family always has them
    return {
        "device": torch.cuda.get_device_name() if on_card else f"{platform.machine()} x{torch.get_num_threads()}",
        "model": model.model_name,
        "revision": model.revision,
        "sample": Shape(defaults.width, defaults.height, defaults.frames or 1).name,
        # whatever it is that comes to it, a new field counts
        "spec": model.spec.model_dump(mode="json", exclude=OF_NO_FORWARD),
        "libraries": dict(library_versions()),
    }


def room_bytes(device: str) -> int | None:
    """The memory of the device that is free now, what the allocator keeps for reuse included; None for the host, which
    has other tenants."""
    if device != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _measure(costs: Costs, shape: Shape, call: Call, device: str) -> None:
    try:
        costs.measure(shape, lambda rows: _seconds(call, rows, device), BUDGET_SECONDS)
    except Exception as error:  # the rows that had room have been measured
        failure = as_generation_error(error)
        if not isinstance(failure, OutOfMemory) or shape not in costs.measured:
            raise
    else:
        return
    # outside of the handler, whose exception holds the memory of the failed forward
    release_device_memory()


class _Sample(Control):
    """Keeps one call of each part of a generation's step, and the time that its decoding took."""

    def __init__(self) -> None:
        self.pixels_seconds = 0.0
        self.calls: dict[str, Call] = {}

    def forward(self, call: Call) -> Any:
        self.calls[call.part] = call
        return call.run()

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T:
        started = time.perf_counter()
        result = work()
        if lane == "pixels":
            self.pixels_seconds += time.perf_counter() - started
        return result


def _seconds(call: Call, rows: int, device: str) -> float:
    import torch

    started = time.perf_counter()
    run_together([call] * max(1, rows // call.rows))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _forward_bytes(call: Call, device: str, volume: int) -> float | None:
    """The peak of device memory during a forward beside what was there before, for a row and a pixel."""
    if device != "cuda":
        return None  # the host's allocator tells no peak
    import torch

    call.run()  # with offload, it is this that brings the weights onto the card
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / (call.rows * volume)
