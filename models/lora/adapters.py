"""LoRAs inside one loaded pipeline: loaded when a request needs them, kept while there is room, never evicted in use.

A LoRA stays beside the weights and is never merged into them, so any request can run with or without it at any step,
and without it the model is the base model to the bit. The cache is bounded in bytes; the least recently used one
goes first. `models.lora.rows` has what makes a forward use them.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from models.generation import Cancelled, DeviceBroken, GenerationError, OutOfMemory, as_generation_error
from models.lora.files import LoraFile, LoraInvalid, LoraNoRoom, LoraRegistry
from models.lora.loras import LoraUse
from models.lora.rows import AdapterSet, applied_to_all, attach, detach, layers

log = structlog.get_logger()

_DENOISERS = ("unet", "transformer", "transformer_2")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass
class _Loaded:
    """One adapter in the modules. Its name is made of the file's digest, so a file has one, whatever it is called."""

    bytes: int
    names: set[str]
    leases: int = 0


@dataclass(eq=False)
class Lease:
    """The right of one request to its LoRAs: none of them is taken away before `release`, which may be repeated.

    `adapters` goes to `models.lora.rows.applied`; `settings` is what the result records of them.
    """

    adapters: AdapterSet
    settings: list[dict[str, Any]]
    _owner: Adapters = field(repr=False)
    _released: bool = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._owner._release(self.adapters)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


class Adapters:
    """The LoRAs of one pipeline of diffusers, SDXL or WAN. `bytes_loaded` never stays above `budget_bytes`.

    `acquire` changes modules, so only the denoising thread may call it, between forwards. `encoding` may be used in
    another thread; each waits for the other. The rest is plain reading.
    """

    def __init__(self, pipeline: Any, registry: LoraRegistry, budget_bytes: int, *, mixes: bool = True) -> None:
        self.mixes = mixes
        """Whether rows with different LoRAs may share a forward."""
        self.budget_bytes = budget_bytes
        self.loads, self.hits, self.evictions = 0, 0, 0
        self._pipeline = pipeline
        self._registry = registry
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the least recently used one first
        self._lock = threading.RLock()

    @property
    def bytes_loaded(self) -> int:
        """What the tensors of the loaded adapters take on the device."""
        return sum(loaded.bytes for loaded in list(self._loaded.values()))

    @property
    def names_loaded(self) -> frozenset[str]:
        """The registry's names of what is loaded: a request for them would load nothing."""
        return frozenset(name for loaded in list(self._loaded.values()) for name in list(loaded.names))

    def fetch(self, uses: Sequence[LoraUse]) -> dict[str, LoraFile]:
        """Finds, downloads and checks the files by name, so that `acquire` need not: from any thread. Raises as it
        does."""
        return {use.name: self._registry.file(use.name) for use in uses}

    def fetch_all(self) -> None:
        """The same for all of the registry, so that no request waits for a download. What is wrong is only logged."""
        for name in self._registry.names():
            try:
                self._registry.file(name)
            except GenerationError as error:
                log.warning("lora_unusable", lora=name, code=error.code, reason=error.message)

    def acquire(self, uses: Sequence[LoraUse], fetched: Mapping[str, LoraFile] | None = None) -> Lease:
        """Loads what is missing, and holds all of it; given what `fetch` found it waits for no download.

        Raises `LoraInvalid`, `LoraUnavailable`, `LoraNoRoom` or `OutOfMemory`, and then holds nothing; the requests
        that run, and the base model, never notice.
        """
        if not uses:  # and waits for no encoding that holds the lock
            return Lease((), [], self)
        files = self.fetch(uses) if fetched is None else fetched
        weights: dict[str, float] = {}
        for use in uses:  # two names may lead to one file
            adapter = _adapter_name(files[use.name])
            weights[adapter] = weights.get(adapter, 0.0) + use.weight
        with self._lock:
            held: list[str] = []
            try:
                missing = {_adapter_name(file): (name, file) for name, file in files.items()}
                for adapter in [adapter for adapter in weights if adapter in self._loaded]:
                    self._hold(adapter, held)
                    missing.pop(adapter)
                    self.hits += 1
                self._check_room([file for _, file in missing.values()], held)
                for adapter, (name, file) in missing.items():
                    self._load(adapter, name, file)
                    self._hold(adapter, held)
            except BaseException:
                self._release([(adapter, 0.0) for adapter in held])
                raise
            for name, file in files.items():
                self._loaded[_adapter_name(file)].names.add(name)
        used = [{"name": use.name, "weight": use.weight, "sha256": files[use.name].sha256} for use in uses]
        return Lease(tuple(weights.items()), used, self)

    def clear(self) -> None:
        """Takes out all that no lease holds."""
        with self._lock:
            for adapter in [adapter for adapter, loaded in self._loaded.items() if not loaded.leases]:
                self._evict(adapter)

    @contextlib.contextmanager
    def encoding(self, adapters: AdapterSet) -> Iterator[None]:
        """Around every encoding of text, with or without LoRAs: the text encoders run with these and no others.

        Raises `Cancelled` where one of them has gone meanwhile: then the request has let go of its lease.
        """
        with self._lock, contextlib.ExitStack() as stack:
            if not all(adapter in self._loaded for adapter, _ in adapters):
                raise Cancelled("stopped before its prompt was encoded")
            for name in _TEXT_ENCODERS:
                encoder = getattr(self._pipeline, name, None)
                if encoder is not None:
                    stack.enter_context(applied_to_all(encoder, adapters))
            yield

    def _hold(self, adapter: str, held: list[str]) -> None:
        self._loaded[adapter].leases += 1
        self._loaded.move_to_end(adapter)
        held.append(adapter)

    def _release(self, adapters: Sequence[tuple[str, float]]) -> None:
        if not adapters:
            return
        with self._lock:
            for adapter, _ in adapters:
                self._loaded[adapter].leases -= 1

    def _check_room(self, missing: Sequence[LoraFile], held: Sequence[str]) -> None:
        """Refuses before anything is loaded or taken out, by what the files say that they hold."""
        if not missing:
            return
        needed = sum(self._predicted_bytes(file) for file in missing)
        whole = needed + sum(self._loaded[adapter].bytes for adapter in held)
        if whole > self.budget_bytes:
            raise LoraInvalid(f"the LoRAs of this request take {_mib(whole)}, the cache is {_mib(self.budget_bytes)}")
        if needed + sum(loaded.bytes for loaded in self._loaded.values() if loaded.leases) > self.budget_bytes:
            raise LoraNoRoom(f"the LoRAs take {_mib(needed)}, and those in use leave no room for them")
        self._make_room(needed)

    def _make_room(self, needed: int) -> None:
        while self.bytes_loaded + needed > self.budget_bytes:
            victim = next((name for name, loaded in self._loaded.items() if not loaded.leases), None)
            if victim is None:
                raise LoraNoRoom("the LoRAs in use leave no room for another one")
            self._evict(victim)

    def _evict(self, adapter: str) -> None:
        del self._loaded[adapter]
        self._take_out(adapter)
        self.evictions += 1
        log.info("lora_evicted", adapter=adapter, bytes_loaded=self.bytes_loaded)

    def _predicted_bytes(self, file: LoraFile) -> int:
        denoisers = [part for name, part in self._parts() if name in _DENOISERS]
        return int(file.numbers * max(_bytes_of_a_number(part) for part in denoisers) * len(denoisers))

    def _load(self, adapter: str, name: str, file: LoraFile) -> None:
        started = time.perf_counter()
        try:
            with _quiet():
                self._put_in(adapter, file)
            self._check(adapter, name, file)
            self._make_room(self._bytes_of(adapter))  # now measured
        except Exception as error:
            self._take_out(adapter)
            failure = error if isinstance(error, GenerationError) else as_generation_error(error)
            if not isinstance(failure, LoraInvalid | LoraNoRoom | OutOfMemory | DeviceBroken):
                failure = LoraInvalid(f"{name}: the file does not fit the model, {type(error).__name__}")
            log.warning("lora_refused", lora=name, sha256=file.sha256, code=failure.code, reason=failure.message)
            raise failure from None
        self._loaded[adapter] = _Loaded(self._bytes_of(adapter), {name})
        self.loads += 1
        milliseconds = round((time.perf_counter() - started) * 1000, 1)
        log.info("lora_loaded", lora=name, adapter=adapter, bytes=self._loaded[adapter].bytes, ms=milliseconds)

    def _put_in(self, adapter: str, file: LoraFile) -> None:
        options = {"adapter_name": adapter, "use_safetensors": True, "local_files_only": True}
        self._pipeline.load_lora_weights(str(file.path), **options)
        if getattr(self._pipeline, "transformer_2", None) is not None:
            self._pipeline.load_lora_weights(str(file.path), **options, load_into_transformer_2=True)
        for name, part in self._parts():
            attach(part)
            for tensor in _tensors(part, adapter):
                tensor.requires_grad_(False)
            if name in _DENOISERS and any(getattr(inner, "fused_projections", False) for inner in part.modules()):
                raise LoraInvalid("this model runs with fused projections, which LoRAs can't change")

    def _check(self, adapter: str, name: str, file: LoraFile) -> None:
        """The loader leaves out what has no place in the model; such a LoRA would do half of what it was made for."""
        import torch

        parts = dict(self._parts())
        tensors = {part: list(_tensors(part, adapter)) for part in parts.values()}
        experts = 2 if "transformer_2" in parts else 1
        numbers = sum(tensor.numel() for found in tensors.values() for tensor in found)
        if numbers < file.numbers * experts:
            share = 100 * numbers // (file.numbers * experts)
            raise LoraInvalid(f"{name}: the file is for another model, {share} % of it have a place in this one")
        # one answer for each part, since each makes the device wait
        finite = (
            torch.stack([torch.isfinite(tensor).all() for tensor in found]) for found in tensors.values() if found
        )
        if not all(bool(each.all()) for each in finite):
            raise LoraInvalid(f"{name}: the file holds numbers that are not finite")

    def _take_out(self, adapter: str) -> None:
        """Also of an adapter that is only half there."""
        for _, part in self._parts():
            attach(part)
        self._pipeline.delete_adapters([adapter])
        for _, part in self._parts():
            detach(part)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """The modules that LoRAs can change, by name."""
        for name in (*_DENOISERS, *_TEXT_ENCODERS):
            part = getattr(self._pipeline, name, None)
            if part is not None:
                yield name, part

    def _bytes_of(self, adapter: str) -> int:
        tensors = (tensor for _, part in self._parts() for tensor in _tensors(part, adapter))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(part: Any, adapter: str) -> Iterator[Any]:
    for layer in layers(part):
        for half in (layer.lora_A, layer.lora_B):
            if adapter in half:
                yield from half[adapter].parameters()


def _adapter_name(file: LoraFile) -> str:
    return f"sha{file.sha256[:24]}"


def _bytes_of_a_number(part: Any) -> int:
    return int(next(part.parameters()).element_size())


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say meanwhile: which parts a LoRA does not touch, which other adapters are there."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    before = [logging.get_verbosity() for logging in both]
    for logging in both:
        logging.set_verbosity(50)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in zip(both, before, strict=True):
            logging.set_verbosity(level)
