"""Resumption: the state of a denoising between two steps, as bytes, and a run that goes on from it.

A stock pipeline can't be entered in the middle. So the resumed run begins as the first one did, with its noise and its
start image, and passes over the steps that are done: its denoiser answers zeros at once, and its scheduler does
nothing. At the step of the state the scheduler gets its history back, the generators theirs, and the latents take
the place of what was passed over. From there on everything is as it was: bit for bit on the same kind of device, if
the forwards have the same rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.params import GenerationParams

FORMAT = "ourvidz-state-1"
MOST_STEPS = 1000  # calls of a scheduler
_NOT_STATE = frozenset({"step", "_internal_dict"})


class StateUnusable(Exception):
    """A state can't be written or gone on from. The run begins at its beginning; the message names the reason."""


@dataclass(frozen=True)
class DenoisingState:
    """After `step` calls of the scheduler in `batch` of a request: its latents, its scheduler and its generators.

    `identity` says what must be the same for a run to go on from it.
    """

    identity: str
    batch: int
    step: int
    latents: Any
    scheduler: dict[str, Any]
    generators: tuple[Any, ...]

    def to_bytes(self) -> bytes:
        """As a safetensors file, whose header holds what is no tensor. Raises `StateUnusable`."""
        self.check()
        from safetensors.torch import save

        tensors: dict[str, Any] = {}
        document = {
            "format": FORMAT,
            "identity": self.identity,
            "batch": self.batch,
            "step": self.step,
            "latents": _put(self.latents, tensors),
            "scheduler": _put(self.scheduler, tensors),
            "generators": _put(list(self.generators), tensors),
        }
        data: bytes = save(tensors, metadata={"state": json.dumps(document)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, identity: str) -> DenoisingState:
        """Raises `StateUnusable` for bytes that are no state, and for one of another identity."""
        from safetensors.torch import load

        try:
            size = int.from_bytes(data[:8], "little")
            document = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["state"])
            if document["format"] != FORMAT:
                raise StateUnusable("another format")
            if document["identity"] != identity:
                raise StateUnusable("another model, version or job")
            tensors = load(data)
            state = cls(
                identity=identity,
                batch=int(document["batch"]),
                step=int(document["step"]),
                latents=_get(document["latents"], tensors),
                scheduler=_get(document["scheduler"], tensors),
                generators=tuple(_get(document["generators"], tensors)),
            )
            state.check()
        except StateUnusable:
            raise
        except Exception as error:  # bytes may say anything
            raise StateUnusable(f"unreadable: {type(error).__name__}") from None
        return state

    def check(self) -> None:
        """Raises `StateUnusable` for one that no run can have left, or that had better not be gone on from."""
        import torch

        if not (0 < self.step <= MOST_STEPS and 0 <= self.batch < MOST_STEPS and self.generators):
            raise StateUnusable("no step of a run")
        if not (torch.is_tensor(self.latents) and bool(torch.isfinite(self.latents).all())):
            raise StateUnusable("the latents are not finite")
        if not isinstance(self.scheduler, dict) or _NOT_STATE & set(self.scheduler):
            raise StateUnusable("no state of a scheduler")


class States:
    """Where one generation leaves its state, every `every` steps; an untaken one gives way to the next."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._lock = threading.Lock()
        self._left: DenoisingState | None = None

    def offer(self, state: DenoisingState) -> None:
        with self._lock:
            self._left = state

    def take(self) -> DenoisingState | None:
        """What was left since the last call; None for nothing."""
        with self._lock:
            left, self._left = self._left, None
        return left


class Resumption:
    """The steps of one batch of a request: passes over those that are done, and leaves states of those that follow."""

    def __init__(self, identity: str, batch: int, states: States | None, resumed: DenoisingState | None) -> None:
        self._identity, self._batch, self._states = identity, batch, states
        self._resumed = resumed if resumed is not None and resumed.batch == batch else None
        self._done = 0

    @property
    def passing(self) -> bool:
        """Whether the next step is one that is passed over."""
        return self._resumed is not None and self._done < self._resumed.step

    def attach(self, scheduler: Any, generators: Sequence[Any]) -> None:
        """Take the scheduler's `step` over; the pipeline may look at its signature."""
        original = scheduler.step

        @functools.wraps(original)
        def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            passing, resumed = self.passing, self._resumed
            self._done += 1
            if passing and resumed is not None:
                if self._done < resumed.step:
                    return (sample,)
                return (_restore(resumed, scheduler, generators, sample),)
            result = original(model_output, timestep, sample, *args, **kwargs)
            if self._states is not None and self._done % self._states.every == 0:
                self._states.offer(self._state(result, scheduler, generators))
            return result

        scheduler.step = step

    def _state(self, result: Any, scheduler: Any, generators: Sequence[Any]) -> DenoisingState:
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        kept = {name: _copy(value) for name, value in vars(scheduler).items() if name not in _NOT_STATE}
        states = tuple(generator.get_state() for generator in generators)
        return DenoisingState(self._identity, self._batch, self._done, _copy(latents), kept, states)


def identity_of(params: GenerationParams, files: Mapping[str, bytes], batch_size: int | None, model: Any) -> str:
    """A hash of what must be the same: the request with its files by their names, and the model with its versions, as
    `model` tells them."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    document = [params.model_dump(mode="json", exclude={"previews"}), digests, batch_size, model]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _restore(state: DenoisingState, scheduler: Any, generators: Sequence[Any], sample: Any) -> Any:
    if state.latents.shape != sample.shape or any(callable(getattr(scheduler, name, None)) for name in state.scheduler):
        raise StateUnusable("of another shape or scheduler")
    for name, value in state.scheduler.items():
        before = getattr(scheduler, name, None)
        setattr(scheduler, name, _to(value, before, sample))
    for generator, kept in zip(generators, state.generators, strict=True):
        generator.set_state(kept)
    return state.latents.to(sample.device, sample.dtype)


def _to(value: Any, before: Any, sample: Any) -> Any:
    """Tensors where the scheduler has its own: histories beside the latents, tables where they were made."""
    import torch

    if isinstance(value, list):
        return [_to(inner, None, sample) for inner in value]
    if torch.is_tensor(value):
        return value.to(before.device if torch.is_tensor(before) else sample.device)
    return value


def _copy(value: Any) -> Any:
    import torch

    if torch.is_tensor(value):
        return value.detach().clone()
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _put(value: Any, tensors: dict[str, Any]) -> Any:
    """JSON for a value; its tensors go to `tensors`. Raises `StateUnusable` for what is neither."""
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        return {"array": _put(torch.from_numpy(value.copy()), tensors)}
    if torch.is_tensor(value):
        name = f"t{len(tensors)}"
        # in the order that it has in memory: kernels choose their way, and so their rounding, by the strides
        order = sorted(range(value.ndim), key=lambda axis: -value.stride(axis))
        tensors[name] = value.detach().permute(order).cpu().contiguous()
        return {"tensor": [name, order]}
    if isinstance(value, np.generic):
        return _put(value.item(), tensors)
    if isinstance(value, list):
        return {"list": [_put(inner, tensors) for inner in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): _put(inner, tensors) for key, inner in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise StateUnusable(f"a {type(value).__name__} can't be kept")


def _get(document: Any, tensors: dict[str, Any]) -> Any:
    [(kind, value)] = document.items()
    if kind == "tensor":
        name, order = value
        return tensors[name].permute(sorted(range(len(order)), key=order.__getitem__))
    if kind == "array":
        return _get(value, tensors).numpy()
    if kind == "list":
        return [_get(inner, tensors) for inner in value]
    if kind == "dict":
        return {key: _get(inner, tensors) for key, inner in value.items()}
    return value
