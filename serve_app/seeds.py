"""The presets, providers and models that the product comes with, from `configs/`."""

from importlib.resources import files
from typing import Any

import yaml

from db.offers import ModelRow, Offered, PresetRow, ProviderRow


def offered() -> Offered:
    """Every row of `configs/presets.yaml` and `configs/providers.yaml`."""
    providers, models = [], []
    for entry in _read("providers")["providers"]:
        models += [ModelRow(provider=entry["name"], **model) for model in entry.pop("models")]
        providers.append(ProviderRow(**entry))
    return Offered(
        presets=[PresetRow(**entry) for entry in _read("presets")["presets"]], providers=providers, models=models
    )


def _read(name: str) -> Any:
    return yaml.safe_load((files("configs") / f"{name}.yaml").read_text(encoding="utf-8"))
