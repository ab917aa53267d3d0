"""The files of LoRAs: where a name leads, and what is checked before a model sees the file.

What can go wrong, with the `code` that clients see::

    GenerationError (models.generation)
    ├── LoraInvalid         lora_invalid        the file is damaged, of another kind or model, or not as registered
    ├── LoraUnavailable     lora_unavailable    the file is not there, or could not be fetched
    └── LoraNoRoom          lora_no_room        the LoRAs that other requests use leave no room for those of this one
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.generation import GenerationError
from models.lora.loras import LoraSource

# Pairs of matrices under the names that trainers give them, and biases of the second one. The rest would be left out
# without a word by the loader: DoRA magnitudes, Kronecker and Hadamard products, the middle factor of convolutions.
_MATRIX = re.compile(r"lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight$")
_BIAS = re.compile(r"lora_B(?:\.default)?\.bias$")
_ALPHA = re.compile(r"alpha$")


class LoraInvalid(GenerationError):
    """A LoRA's file is damaged, of another kind or for another model, or not the one that was registered."""

    code = "lora_invalid"
    retryable = False


class LoraUnavailable(GenerationError):
    """A LoRA's file is not where the profile says, or could not be fetched."""

    code = "lora_unavailable"
    retryable = True


class LoraNoRoom(GenerationError):
    """The LoRAs that other requests use leave no room for those of this one."""

    code = "lora_no_room"
    retryable = True


@dataclass(frozen=True)
class LoraFile:
    """One checked file: `sha256` of its bytes, and how many numbers its matrices hold."""

    path: Path
    sha256: str
    numbers: int


class LoraRegistry(Protocol):
    """What leads from a name to a file. May be asked from any thread."""

    def names(self) -> Collection[str]: ...

    def file(self, name: str) -> LoraFile:
        """May read or download gigabytes the first time. Raises `LoraInvalid` or `LoraUnavailable`."""


class ProfileLoras:
    """The LoRAs that a profile registers for one model, and those that its owner learns of while it runs.

    A file that was replaced on the disk is checked anew.
    """

    def __init__(self, sources: Mapping[str, LoraSource]) -> None:
        self._of_profile = dict(sources)
        self._sources = dict(sources)
        self._checked: dict[Path, tuple[tuple[int, int, int], LoraFile]] = {}
        self._locks: dict[str, threading.Lock] = {}  # one for each name: a long download holds up its own alone

    def names(self) -> Collection[str]:
        return self._sources.keys()

    def renew(self, registered: Mapping[str, LoraSource]) -> None:
        """What is registered beside the profile from now on. A name of the profile stays the profile's."""
        self._sources = {**registered, **self._of_profile}

    def file(self, name: str) -> LoraFile:
        source = self._sources.get(name)
        if source is None:
            raise LoraInvalid(f"{name}: the registry no longer has this LoRA")
        with self._locks.setdefault(name, threading.Lock()):
            file = self._read(name, _located(name, source))
        if source.sha256 not in (None, file.sha256):
            raise LoraInvalid(f"{name}: the file has the SHA-256 {file.sha256}, another one is registered")
        return file

    def _read(self, name: str, path: Path) -> LoraFile:
        try:
            stat = path.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if path not in self._checked or self._checked[path][0] != seen:
                self._checked[path] = (seen, read_lora(name, path))
        except OSError as error:
            raise LoraUnavailable(f"{name}: {type(error).__name__}") from error
        return self._checked[path][1]


def read_lora(name: str, path: Path) -> LoraFile:
    """Checks the header and takes the digest. Raises `LoraInvalid`, and `OSError` where it can't be read."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoraInvalid(f"{name}: the file is no safetensors file, or damaged") from error
    matrices = {key: shape for key, shape in shapes.items() if _MATRIX.search(key)}
    rest = shapes.keys() - matrices.keys()
    strange = sorted(key for key in rest if not _BIAS.search(key) and not _ALPHA.search(key))
    if strange:
        raise LoraInvalid(f"{name}: {len(strange)} tensors are no part of a plain LoRA, such as {strange[0][-60:]!r}")
    if not matrices or _count(matrices, "down", "A") != _count(matrices, "up", "B"):
        raise LoraInvalid(f"{name}: the file holds no pairs of matrices")
    biases = [shape for key, shape in shapes.items() if _BIAS.search(key)]
    return LoraFile(path, digest, sum(math.prod(shape) for shape in [*matrices.values(), *biases]))


def _count(keys: Iterable[str], *halves: str) -> int:
    return sum(1 for key in keys if (found := _MATRIX.search(key)) and found[1] in halves)


def _located(name: str, source: LoraSource) -> Path:
    """The file on this machine, fetched if it lies in a repository and not in the cache."""
    local = Path(source.source).expanduser()
    if local.is_file() and source.file is None:
        return local
    if source.file is None:
        raise LoraUnavailable(f"{name}: there is no such file")
    if local.is_absolute() or local.is_dir():
        return local / source.file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source.source, source.file, revision=source.revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LoraUnavailable(f"{name}: could not be fetched, {type(error).__name__}") from error
