"""The host: one process on a card with the engine of the models that share it, and a replica for each model's queue."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from deployments.settings import Settings
from models.catalog import Family
from models.engine import Engine, Model
from models.profile import ModelSpec, resolve_weights


class Host:
    """Loads the models of these families into one engine, once, whoever asks first.

    Models that share an engine share its card step by step: what is interactive goes first, and a long video waits no
    picture.
    """

    def __init__(self, settings: Settings, families: Sequence[str]) -> None:
        self.specs = [settings.loaded_profile.models[Family(family)] for family in families]
        self.weights: dict[str, Path | str] = {}
        self._settings = settings
        self._engine: Engine | None = None
        self._lock = asyncio.Lock()

    async def engine(self) -> Engine:
        """The engine with all models loaded and warm. Raises `ModelLoadFailed` or `DeviceBroken`."""
        async with self._lock:
            if self._engine is None:
                for spec in self.specs:
                    folder = self._settings.state_dir / "weights"
                    self.weights[spec.model_name] = await asyncio.to_thread(resolve_weights, spec, folder)
                models = [make_model(spec, self.weights[spec.model_name]) for spec in self.specs]
                slots = sum(spec.slots for spec in self.specs)
                self._engine = Engine(*models, slots=slots, costs_folder=self._settings.state_dir / "costs")
                self._engine.start()
        await self._engine.ready()
        return self._engine

    async def close(self) -> None:
        """End the engine. A forward or a decode that can't be interrupted ends with the process."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, 2.0)


def make_model(spec: ModelSpec, weights: Path | str) -> Model:
    """The model class of a family, around weights that are not loaded yet."""
    if spec.family is Family.WAN:
        from models.wan import WAN

        return WAN(spec, weights)
    from models.sdxl import SDXL

    return SDXL(spec, weights)
