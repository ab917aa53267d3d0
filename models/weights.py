"""Weights: whether the files of a checkpoint lie on this machine. Looks at folders and the cache; uses no network."""

from __future__ import annotations

import json
from pathlib import Path

from models.guiding.guides import ControlNet, ImageToVideo, IpAdapter

Guide = IpAdapter | ControlNet | ImageToVideo


def located(
    source: str, revision: str | None = None, variant: str | None = None, single_file: str | None = None
) -> str | None:
    """Where a checkpoint lies: a folder with all of its parts, or its one file; None where it is not all here."""
    local = Path(source).expanduser()
    if single_file is not None:
        if (local / single_file).is_file():
            return str(local / single_file)
        return _cached(source, single_file, revision)
    if local.is_file():
        return str(local)
    if local.is_dir():
        return str(local) if _complete(local, variant) else None
    for index in ("model_index.json", "config.json"):
        found = _cached(source, index, revision)
        if found is not None and _complete(Path(found).parent, variant):
            return str(Path(found).parent)
    return None


def guide_present(guide: Guide) -> bool:
    """Whether all files of it are here."""
    if isinstance(guide, IpAdapter):
        return all(file_of(guide, name) is not None for name in adapter_files(guide))
    return located(guide.source, guide.revision, guide.variant) is not None


def adapter_files(guide: IpAdapter) -> list[str]:
    """The names of its files in the source: the image encoder's weights and configuration, and the adapters."""
    folder = f"{guide.subfolder}/" if guide.subfolder else ""
    encoder = guide.image_encoder if "/" in guide.image_encoder else folder + guide.image_encoder
    return [f"{encoder}/config.json", f"{encoder}/model.safetensors", *(folder + file for file in guide.files.values())]


def file_of(guide: Guide, name: str) -> Path | None:
    """Where one file of it lies on this machine."""
    local = Path(guide.source).expanduser()
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    found = _cached(guide.source, name, guide.revision)
    return None if found is None else Path(found)


def _cached(repository: str, filename: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, filename, revision=revision)
    except HFValidationError:  # a path that does not exist here, such as ~/models/x
        return None
    return found if isinstance(found, str) and Path(found).exists() else None


# Parts of a pipeline that are configuration only.
_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "ImageProcessor", "FeatureExtractor")


def _complete(folder: Path, variant: str | None) -> bool:
    """Whether every part that has weights has them, shards included."""
    index = folder / "model_index.json"
    parts = [folder]
    if index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        parts = [
            folder / name
            for name, entry in entries.items()
            if isinstance(entry, list) and entry[1] is not None and not str(entry[1]).endswith(_WITHOUT_WEIGHTS)
        ]
    return all(_has_weights(part, variant) for part in parts)


def _has_weights(part: Path, variant: str | None) -> bool:
    infix = f".{variant}" if variant else ""
    for shards in part.glob(f"*.safetensors.index{infix}.json"):
        names = set(json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values())
        return all((part / name).exists() for name in names)
    return any((part / f"{stem}{infix}.safetensors").exists() for stem in ("diffusion_pytorch_model", "model"))
