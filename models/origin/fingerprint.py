"""Which weights a model was loaded from: the SHA-256 of every file, and the revision of the repository they came from.

Hashing reads each file once: the hash is kept on disk beside the file's size and modification time, and is made anew
when one of them has changed. SDXL is 7 GB and WAN up to 60, so this runs in a thread, after loading, never in the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.guiding.guides import IpAdapter
from models.profile import TINY, ModelSpec
from models.weights import Guide, adapter_files, file_of

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf")  # in the order in which they are looked for
_CONFIGURATION = (".json", ".txt", ".model")  # of components and tokenizers: small, and any of them changes pixels
_SAMPLE_BYTES = 64 * 1024
CONFIGURATION = "configuration"  # the name under which one hash stands for all of those


@dataclass(frozen=True)
class Fingerprint:
    """The weights of a loaded model. `files` maps their names inside the checkpoint to SHA-256 in hex.

    One entry, `configuration`, stands for all configuration and tokenizer files. `revision` is the commit of the
    repository where one is known. `error` says why there are no hashes, where there are none.
    """

    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


class Hashes:
    """SHA-256 of files, remembered in a JSON file by path, size and modification time.

    Safe among processes: the file is replaced as a whole, and what two of them write at once costs a second hashing.
    A file that is rewritten with the same size within the clock's resolution is taken for the old one.
    """

    def __init__(self, remembered: Path) -> None:
        self._path = remembered

    def of(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The hash of each file, by the same names. Blocking. Raises `OSError`."""
        known, fresh, answer = self._read(), dict[str, list[str | int]](), dict[str, str]()
        for name, path in files.items():
            real = path.resolve()
            state = real.stat()
            entry = known.get(str(real))
            if entry is None or entry[:2] != [state.st_size, state.st_mtime_ns]:
                with real.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                entry = fresh[str(real)] = [state.st_size, state.st_mtime_ns, digest]
            answer[name] = str(entry[2])
        if fresh:
            self._write(self._read() | fresh)
        return answer

    def _read(self) -> dict[str, list[str | int]]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or a torn disk: hashing again is all that it costs
            return {}
        whole = isinstance(kept, dict) and all(isinstance(entry, list) and len(entry) == 3 for entry in kept.values())
        return kept if whole else {}

    def _write(self, entries: Mapping[str, list[str | int]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        draft.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        draft.replace(self._path)


def fingerprint(spec: ModelSpec, weights: Path | str, hashes: Hashes) -> Fingerprint:
    """The fingerprint of a model whose weights are on this machine. Blocking, the first time for as long as reading
    all of them takes; uses no network. A file that can't be read is said in `error`, not raised: the model runs."""
    try:
        files, revision = checkpoint_files(spec, weights)
        configuration = {name: path for name, path in files.items() if path.suffix in _CONFIGURATION}
        digests = hashes.of({name: path for name, path in files.items() if name not in configuration})
        if configuration:
            lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.of(configuration).items())]
            digests[CONFIGURATION] = hashlib.sha256("".join(lines).encode()).hexdigest()
    except (OSError, ValueError) as error:
        return Fingerprint(spec.revision, error=f"the weights could not be read again ({type(error).__name__})")
    if not digests:
        return Fingerprint(revision, error="no weights were found where the model was loaded from")
    return Fingerprint(revision, digests)


def checkpoint_files(spec: ModelSpec, weights: Path | str) -> tuple[dict[str, Path], str | None]:
    """The files that a loader reads of a checkpoint, by their names in it, and the commit that they belong to."""
    root, revision = _root(weights, spec.single_file, spec.revision)
    if root is None:
        return {}, revision
    files = {root.name: root} if root.is_file() else _of_folder(root, spec.variant)
    if spec.vae is not None:  # loaded instead of the checkpoint's own
        files = {name: path for name, path in files.items() if not name.startswith("vae/")}
        vae, _ = _root(spec.vae, None, None)
        files |= {f"vae:{name}": path for name, path in (_of_folder(vae, None) if vae is not None else {}).items()}
    for field_name, guide in spec.guides.items():
        files |= {f"{field_name}:{name}": path for name, path in _of_guide(guide).items()}
    merged = _of_few_step_lora(spec)
    return files | ({} if merged is None else {f"few_step_lora:{merged.name}": merged}), revision


def sample(spec: ModelSpec, weights: Path | str) -> str:
    """A hash over the size and the beginning, middle and end of every file: read in milliseconds, the same on every
    machine, and another one for other weights in files of the same form. Raises `OSError` and `ValueError`."""
    digest = hashlib.sha256()
    for name, path in sorted(checkpoint_files(spec, weights)[0].items()):
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _of_few_step_lora(spec: ModelSpec) -> Path | None:
    lora = spec.acceleration.few_step_lora
    if lora is None:
        return None
    local, name = Path(lora.source).expanduser(), lora.weight_name or "pytorch_lora_weights.safetensors"
    if local.exists():
        return local if local.is_file() else local / name
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(lora.source, name)
    return Path(found) if isinstance(found, str) else None


def _of_guide(guide: Guide) -> dict[str, Path]:
    """The files of what lets references steer the model. Tiny ones are built from this very version: they are left
    out."""
    if guide.source == TINY:
        return {}
    if isinstance(guide, IpAdapter):
        found = {name: file_of(guide, name) for name in adapter_files(guide)}
        return {name: path for name, path in found.items() if path is not None}
    root, _ = _root(guide.source, None, guide.revision)
    return {} if root is None else _of_folder(root, guide.variant)


def _root(weights: Path | str, single_file: str | None, revision: str | None) -> tuple[Path | None, str | None]:
    """Where a checkpoint lies: its folder, or its one file."""
    local = Path(weights).expanduser()
    if local.exists():
        return (local / single_file if single_file and local.is_dir() else local), revision
    from huggingface_hub import try_to_load_from_cache

    for name in (single_file,) if single_file else ("model_index.json", "config.json"):
        found = try_to_load_from_cache(str(weights), name, revision=revision)
        if isinstance(found, str):
            path = Path(found)
            folder = path.parents[len(Path(name).parts) - 1]  # …/snapshots/COMMIT
            return (path if single_file else folder), folder.name
    return None, revision


def _of_folder(root: Path, variant: str | None) -> dict[str, Path]:
    """A pipeline's components, or the one component that lies in the folder itself."""
    index = root / "model_index.json"
    if not index.is_file():
        return _of_component(root, root, variant)
    entries = json.loads(index.read_text(encoding="utf-8"))
    files = {index.name: index}
    for name, entry in entries.items():
        if isinstance(entry, list) and (root / name).is_dir():
            files |= _of_component(root, root / name, variant)
    return files


def _of_component(root: Path, folder: Path, variant: str | None) -> dict[str, Path]:
    present = sorted(path for path in folder.iterdir() if path.is_file())
    chosen = [path for path in present if path.suffix in _CONFIGURATION and ".index." not in path.name]
    for kind in WEIGHTS:
        of_kind = [path for path in present if path.suffix == kind]
        # `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`; a component without it falls back
        varied = [path for path in of_kind if variant and path.stem.partition(".")[2].partition("-")[0] == variant]
        plain = [path for path in of_kind if "." not in path.stem]
        if varied or plain:
            chosen += varied or plain
            break
    return {path.relative_to(root).as_posix(): path for path in chosen}
