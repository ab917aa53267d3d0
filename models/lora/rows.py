"""Which LoRAs change which rows of one forward.

peft wraps the layers that a LoRA changes, and can hold many LoRAs in them. Its own switches are for the whole module
and walk all of it; here they stay off, so that a forward is the base model's, and a hook at each layer adds what
`applied` says for each run of rows. The arithmetic is peft's, operation by operation: a forward whose rows share a set
gets the very bits that `set_adapters` would give it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

AdapterSet = tuple[tuple[str, float], ...]
"""Adapters with their weights, as `models.lora.adapters.Lease` hands them out; empty for the base model."""

_Part = tuple[int, int, AdapterSet]  # first row, row after the last one, what is added to them

_switches: WeakKeyDictionary[Any, _Switch] = WeakKeyDictionary()


@contextlib.contextmanager
def applied(module: Any, rows: Sequence[AdapterSet]) -> Iterator[None]:
    """Around one forward of a UNet or transformer: row i of it runs with the adapters `rows[i]`, or none.

    Costs nothing to change from one forward to the next. Rows of one set should lie together: each run of them is a
    multiplication of its own. Every other module is left as it is, and so is this one outside of the context.
    """
    switch = _switches.get(module)
    if switch is None or not any(rows):
        yield
        return
    ends = itertools.accumulate(sum(1 for _ in run) for _, run in itertools.groupby(rows))
    parts, start = [], 0
    for end in ends:
        parts.append((start, end, rows[start]))
        start = end
    with switch.on(parts, len(rows)):
        yield


@contextlib.contextmanager
def applied_to_all(module: Any, adapters: AdapterSet) -> Iterator[None]:
    """The same with one set for every row, however many there are."""
    switch = _switches.get(module)
    if switch is None or not adapters:
        yield
        return
    with switch.on([(0, 1, adapters)], 1):
        yield


def attach(module: Any) -> None:
    """Take over the layers that peft has wrapped in `module`: peft's switches off, a hook at each. May be repeated."""
    switch = _switches.setdefault(module, _Switch())
    for layer in layers(module):
        layer.set_adapter([], inference_mode=True)  # or peft picks another one when an active one is deleted
        layer.enable_adapters(False)
        layer.eval()
        switch.watch(layer)


def detach(module: Any) -> None:
    """Unwrap the layers that no adapter is left in, so that they cost nothing any more."""
    for name, layer in [(name, part) for name, part in module.named_modules() if _is_layer(part)]:
        if not layer.lora_A:
            _switches[module].forget(layer)
            module.set_submodule(name, layer.get_base_layer())


def layers(module: Any) -> Iterator[Any]:
    """The layers that peft has wrapped."""
    return (part for part in module.modules() if _is_layer(part))


def _is_layer(part: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(part, LoraLayer)


class _Switch:
    """What the layers of one module add to the forward that is running."""

    def __init__(self) -> None:
        self._parts: Sequence[_Part] = ()
        self._rows = 1
        self._watched: dict[Any, Any] = {}

    @contextlib.contextmanager
    def on(self, parts: Sequence[_Part], rows: int) -> Iterator[None]:
        self._parts, self._rows = parts, rows
        try:
            yield
        finally:
            self._parts = ()

    def watch(self, layer: Any) -> None:
        if layer not in self._watched:
            self._watched[layer] = layer.register_forward_hook(self._add)

    def forget(self, layer: Any) -> None:
        self._watched.pop(layer).remove()

    def _add(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        if not self._parts:
            return None
        x, parts = args[0], self._parts
        if len(parts) == 1:
            return _changed(layer, x, output, parts[0][2])
        # a layer may see several entries for each row, one after another, such as one timestep for each token
        entries, rest = divmod(len(x), self._rows)
        if rest:
            raise RuntimeError("a layer's first axis does not count the rows")
        for start, end, adapters in parts:
            if any(name in layer.lora_A for name, _ in adapters):
                rows = slice(start * entries, end * entries)
                output[rows] = _changed(layer, x[rows], output[rows], adapters)
        return output


def _changed(layer: Any, x: Any, output: Any, adapters: AdapterSet) -> Any:
    """The layer's output with each adapter's part added: output + B(A(x)) * scale, as in LoRA (arXiv 2106.09685)."""
    dtype = output.dtype
    for name, weight in adapters:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            x = x.to(down.weight.dtype)
            output = output + up(down(x)) * _scale(layer, name, weight)
    return output.to(dtype)


def _scale(layer: Any, name: str, weight: float) -> float:
    rank = layer.r[name]
    divisor = math.sqrt(rank) if layer.use_rslora.get(name) else rank
    return float(weight * layer.lora_alpha[name] / divisor)
