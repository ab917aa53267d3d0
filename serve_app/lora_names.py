"""Which LoRAs a job may name: those of the profile, and those that the training registry has in production."""

from collections.abc import Collection, Sequence

from models.lora.loras import LoraUse
from models.profile import ModelSpec
from serve_app.edge import Edge


async def known_loras(edge: Edge, spec: ModelSpec, uses: Sequence[LoraUse]) -> Collection[str]:
    """The names that a request to this model may use. The registry is asked only when the profile lacks one of them.

    A model whose profile has no room for LoRAs has none.
    """
    if not spec.lora_cache_gib or all(use.name in spec.loras for use in uses):
        return spec.loras.keys()
    registered = await edge.trainings.production_loras(spec.family.value)
    return spec.loras.keys() | {lora.name for lora in registered}
