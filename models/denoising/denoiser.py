"""Denoiser calls: what a pipeline asks of its UNet or transformer, taken out of the pipeline so that requests can share
a forward.

A pipeline of diffusers calls `self.unet(...)` once or twice a step. Here a `StandIn` sits in that place and hands the
`Call` to the request's `Control`, which returns the outputs: at once, or after the engine has run it together with the
calls of other requests (`run_together`). Rows of one forward do not see each other, so a row's result depends on its
neighbours by rounding only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from models.denoising.lanes import LaneName
from models.guiding.image_prompts import ImagePrompt, attending
from models.lora.rows import AdapterSet, applied

T = TypeVar("T")

# The arguments of the UNet and of the transformers that hold the noisy latents; their first axis counts the rows.
LATENTS = ("sample", "hidden_states")
TEXT, TEXT_MASK = "encoder_hidden_states", "encoder_attention_mask"
CONTROL_SCALE = "conditioning_scale"  # of a ControlNet: one number for all rows, or one for each


@dataclass(frozen=True, eq=False)
class Call:
    """One forward that one request asks for: `rows` rows for `module`, with its arguments by name.

    `context` is the name under which the module's step cache keeps the state of this request, where there is one.
    Calls of the same `key` may share a forward; `adapters` are the LoRAs of its rows, `prompts` the images that they
    attend to. `part` names the module where it is not the denoiser itself.
    """

    module: Any
    arguments: dict[str, Any]
    rows: int
    key: Hashable
    context: tuple[str, dict[str, Any]] | None = None
    adapters: AdapterSet = ()
    prompts: tuple[ImagePrompt, ...] = ()
    part: str = ""

    def run(self) -> Any:
        """The forward of this call alone, exactly as the pipeline would have made it."""
        with _in_context(self), _steered([self]):
            return self.module(**self.arguments)

    @property
    def latents(self) -> Any:
        return self.arguments[_latents_name(self.arguments)]


class Forwarding(Protocol):
    """The part of a `Control` that a stand-in needs."""

    def forward(self, call: Call) -> Any: ...

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T: ...


class StandIn:
    """In the place of a pipeline's denoiser, for one request: calls go to its control, the rest to the module.

    `alone` keeps the request's calls from sharing a forward, `adapters` are the LoRAs and `prompts` the images that all
    of them run with, and `mixes` says whether calls with other LoRAs may share it.
    """

    part = ""

    def __init__(
        self,
        module: Any,
        control: Forwarding,
        name: str,
        *,
        alone: bool,
        adapters: AdapterSet = (),
        mixes: bool = True,
        prompts: Sequence[ImagePrompt] = (),
    ) -> None:
        self._module, self._control, self._name = module, control, name
        self._alone, self._adapters, self._mixes, self._prompts = alone, adapters, mixes, prompts
        self._context: tuple[str, dict[str, Any]] | None = None
        self.halved: Callable[[], bool] | None = None  # whether the second half of the rows is run for both, just now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(type(self._module).forward)
        bound = signature.bind(self._module, *args, **kwargs)
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        halved = self.halved is not None and self.halved()
        if halved:
            arguments = _of_tensors(arguments, lambda tensor: tensor.chunk(2)[1])
        rows = int(arguments[_latents_name(arguments)].shape[0])
        # a step cache decides once for a forward, so its requests go alone
        own = self._name if self._alone or self._context is not None else None
        # where there is no mask to take padding out, texts must be of one length
        text = None if TEXT_MASK in signature.parameters else arguments[TEXT].shape[1]
        key = (id(self._module), own, None if self._mixes else self._adapters, text, _shape_key(arguments))
        prompts = tuple(prompt.of_rows(rows) for prompt in self._prompts)
        call = Call(self._module, arguments, rows, key, self._context, self._adapters, prompts, self.part)
        output = self._control.forward(call)
        return _of_tensors(output, lambda tensor: tensor.repeat(2, 1, 1, 1)) if halved else output

    @contextlib.contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """The pipeline's name for a branch ("cond"), made the request's own: states of two requests must not mix."""
        self._context = (f"{self._name}:{name}", kwargs) if getattr(self._module, "is_cache_enabled", False) else None
        yield
        self._context = None

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """A pipeline that ends would wipe the states of all requests; theirs are dropped by name."""
        return


class ControlStandIn(StandIn):
    """In the place of a ControlNet, which pipelines tell from several by its class."""

    part = "controlnet"

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance looks at
        return type(self.__dict__["_module"])


class AsideStandIn:
    """In the place of a VAE or a processor, for one request: the named methods run aside, off the denoising thread.

    The VAE of all requests is one: it is never moved or cast for one of them. Where a checkpoint's VAE must be in
    float32 beside a half-precision denoiser, it is so from load on, and what goes in is cast here.
    """

    def __init__(self, real: Any, control: Forwarding, methods: Sequence[str]) -> None:
        self._real, self._control, self._methods = real, control, frozenset(methods)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name not in self._methods:
            return value

        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = getattr(self._real, "dtype", None)
            given = first.to(dtype) if dtype is not None and first.dtype != dtype else first
            return self._control.aside(lambda: value(given, *args, **kwargs))

        return run

    def to(self, *args: Any, **kwargs: Any) -> AsideStandIn:
        return self


def run_together(calls: Sequence[Call]) -> list[Any]:
    """The outputs of calls of one key from one forward, in their order. One call alone is run as it is.

    Texts of different lengths are padded with zeros that a mask takes out of the attention, which is exact.
    """
    import torch

    if len(calls) == 1:
        return [calls[0].run()]
    first, rows = calls[0], [call.rows for call in calls]
    joined: dict[str, Any] = {}
    for name in first.arguments:
        values: list[Any] = [
            call.arguments.get(name) for call in calls
        ]  # some pipelines leave out what is None to others
        if name == "timestep":
            joined[name] = torch.cat([_per_row(value, n, first.latents) for value, n in zip(values, rows, strict=True)])
        elif name == TEXT:
            joined[name], mask = _padded(values)
            if mask is not None:
                joined[TEXT_MASK] = mask
        elif name == CONTROL_SCALE:
            joined[name] = _scales(values, rows, first.latents)
        elif name != TEXT_MASK or first.arguments[name] is not None:
            joined[name] = _joined(values)
    with _steered(calls):
        return _split(first.module(**joined), rows)


def blank_output(call: Call) -> Any:
    """Zeros of the shape of the call's output, for steps that are passed over; see `models.denoising.resumption`."""
    if call.part:  # what only the denoiser would get, which is passed over itself
        return ((), None)
    latents = call.latents
    channels = call.module.config.out_channels
    return (latents.new_zeros(latents.shape[0], channels, *latents.shape[2:]),)


@contextlib.contextmanager
def _steered(calls: Sequence[Call]) -> Iterator[None]:
    """Around a forward of these calls: each row with its own LoRAs and images."""
    module = calls[0].module
    with (
        applied(module, [call.adapters for call in calls for _ in range(call.rows)]),
        attending(module, [(call.rows, call.prompts) for call in calls]),
    ):
        yield


def _in_context(call: Call) -> contextlib.AbstractContextManager[Any]:
    if call.context is None:
        return contextlib.nullcontext()
    name, options = call.context
    context: contextlib.AbstractContextManager[Any] = call.module.cache_context(name, **options)
    return context


def _latents_name(arguments: dict[str, Any]) -> str:
    return next(name for name in LATENTS if name in arguments)


def _shape_key(value: Any, name: str = "") -> Hashable:
    """What must be equal for values to be joined: the shape but for the rows, the type, and whatever is no tensor."""
    import torch

    if isinstance(value, torch.Tensor):
        if name == "timestep":  # one for all rows or one for each; also of different integer or float types
            return ("timestep", tuple(value.shape[1:]))
        if name == TEXT:  # other lengths can be padded
            return (tuple(value.shape[2:]), value.dtype)
        return (tuple(value.shape[1:]), value.dtype)
    if name == CONTROL_SCALE:
        return CONTROL_SCALE
    if isinstance(value, dict):
        return tuple((key, _shape_key(inner, key)) for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return tuple(_shape_key(inner) for inner in value)
    if name == "timestep":
        return ("timestep", ())
    return value if isinstance(value, Hashable) else id(value)


def _of_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same with every tensor in it changed, but for single numbers such as a timestep."""
    import torch

    if isinstance(value, dict):
        return {name: _of_tensors(inner, change) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_of_tensors(inner, change) for inner in value)
    return change(value) if torch.is_tensor(value) and value.ndim else value


def _per_row(value: Any, rows: int, like: Any) -> Any:
    import torch

    tensor = value if torch.is_tensor(value) else torch.tensor(value, device=like.device)
    tensor = tensor.to(like.device)
    return tensor.reshape(1).expand(rows) if tensor.numel() == 1 and tensor.ndim <= 1 else tensor


def _scales(values: Sequence[float], rows: Sequence[int], like: Any) -> Any:
    """One number where all agree, else (N, 1, 1, 1)."""
    if len(set(values)) == 1:
        return values[0]
    each = [value for value, count in zip(values, rows, strict=True) for _ in range(count)]
    return like.new_tensor(each).reshape(-1, 1, 1, 1)


def _padded(values: Sequence[Any]) -> tuple[Any, Any]:
    """Texts (N, L, C) joined, and the mask (N, L) of what is text, None where all are equally long."""
    import torch

    longest = max(int(value.shape[1]) for value in values)
    if all(value.shape[1] == longest for value in values):
        return torch.cat(list(values)), None
    mask = torch.cat(
        [
            (torch.arange(longest, device=value.device) < value.shape[1]).to(value.dtype).expand(value.shape[0], -1)
            for value in values
        ]
    )
    pad = torch.nn.functional.pad
    return torch.cat([pad(value, (0, 0, 0, longest - value.shape[1])) for value in values]), mask


def _joined(values: Sequence[Any]) -> Any:
    import torch

    first = values[0]
    if torch.is_tensor(first):
        return torch.cat(list(values))
    if isinstance(first, dict):
        return {key: _joined([value.get(key) for value in values]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(inner) for inner in zip(*values, strict=True))
    return first


def _split(output: Any, rows: Sequence[int]) -> list[Any]:
    """The rows of each request; the views keep the whole forward's memory only until their scheduler's step."""
    if hasattr(output, "split"):
        return list(output.split(list(rows)))
    inner = output if isinstance(output, tuple | list) else tuple(output.values())
    parts = zip(*(_split(each, rows) for each in inner), strict=True)
    if isinstance(output, tuple | list):
        return [type(output)(part) for part in parts]
    return [type(output)(*part) for part in parts]


def forget_context(module: Any, name: str) -> None:
    """Drop what the module's step cache keeps for one request; diffusers itself can only drop everybody's."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            states = getattr(getattr(hook, "state_manager", None), "_state_cache", {})
            for context in [context for context in states if context.startswith(f"{name}:")]:
                del states[context]
