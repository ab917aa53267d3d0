"""LoRAs of the training registry, as sources that a model can load from."""

from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg

from db.pool import DATABASE_FAULTS
from db.training import ProductionLora, Trainings
from models.lora.files import LoraUnavailable
from models.lora.loras import LoraSource, LoraUse


async def learn(pool: asyncpg.Pool, model: Any, family: str, uses: Sequence[LoraUse]) -> None:
    """Tell the model what is registered now, when a request names a LoRA that is not of its profile.

    Raises `LoraUnavailable` when the registry can't be read.
    """
    if all(use.name in model.spec.loras for use in uses):
        return
    try:
        registered = await Trainings(pool).production_loras(family)
    except DATABASE_FAULTS as error:
        raise LoraUnavailable(f"the registry can't be read: {type(error).__name__}") from error
    model.registry.renew(sources(registered))


def sources(registered: Iterable[ProductionLora]) -> dict[str, LoraSource]:
    """Where the file of each is, by name."""
    return {lora.name: source(lora) for lora in registered}


def source(lora: ProductionLora) -> LoraSource:
    """A file in a repository where the registry names one, else on this machine."""
    return LoraSource(
        source=lora.repository or lora.checkpoint_path,
        file=lora.checkpoint_path if lora.repository else None,
        revision=lora.revision,
        sha256=lora.sha256,
        trigger_words=lora.trigger_words,
    )
