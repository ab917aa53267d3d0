"""The bare loop: the engine of a replica in this process, its slots always full; each image is encoded as a replica
does it, and thrown away."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster.fixed_step import fix_step_time
from benchmarks.cluster.workload import GUIDANCE, SIZE, Lap, Tally, Work
from deployments.storing import EncodedFile, Marking, encode
from models.catalog import Family
from models.engine import Engine, Generation, GenerationRequest
from models.origin.fingerprint import Fingerprint
from models.origin.manifest import Origin, xmp
from models.params import GenerationParams
from models.profile import load_profile
from models.samples.tiny import ensure_tiny
from models.sdxl import SDXL


class FixedStepSDXL(SDXL):
    """The model of the laptop profile with a denoiser of a fixed step time."""

    step_seconds: float
    tally: Path

    def _load_pipeline(self, dtype: Any) -> Any:
        pipeline = super()._load_pipeline(dtype)
        fix_step_time(pipeline.unet, self.step_seconds, self.tally)
        return pipeline


class Bare:
    """An engine with as many slots as a replica has; None as `step_seconds` leaves the denoiser as it is."""

    def __init__(self, folder: Path, step_seconds: float | None) -> None:
        spec = load_profile("laptop").models[Family.SDXL]
        weights = ensure_tiny("sdxl", folder)
        self._tally = folder / f"bare-{step_seconds}.tally"
        if step_seconds is None:
            self._model = SDXL(spec, weights)
        else:
            self._model = model = FixedStepSDXL(spec, weights)
            model.step_seconds, model.tally = step_seconds, self._tally
        self.slots = spec.slots
        self._engine = Engine(self._model, slots=spec.slots)
        self._marking = Marking(xmp())

    async def start(self) -> None:
        """Load and warm."""
        import torch

        torch.set_num_threads(1)  # as the replica, for which Ray sets it
        self._engine.start()
        await self._engine.ready()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    async def run(self, works: Sequence[Work]) -> Lap:
        """All of them. A slot is given on when its image is there; the encoding happens beside the next."""
        tally, slots = Tally(self._tally), asyncio.Semaphore(self.slots)
        clock = asyncio.get_running_loop().time
        started = clock()
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(self._one(work, slots))
        return tally.lap(len(works), clock() - started)

    async def _one(self, work: Work, slots: asyncio.Semaphore) -> None:
        params = params_of(work)
        async with slots:
            generation = await self._engine.submit(GenerationRequest(str(work.number), params)).result()
        await asyncio.to_thread(self._encode, generation, params)

    def _encode(self, generation: Generation, params: GenerationParams) -> list[EncodedFile]:
        origin = Origin(
            job_id="00000000-0000-0000-0000-000000000000",
            attempt=1,
            params=params,
            original_prompt=params.prompt,
            enhanced_prompt=None,
            model_name=self._model.model_name,
            device=self._model.device,
            fingerprint=Fingerprint(error="not asked for"),
        )
        return encode(generation, origin, self._marking)


def params_of(work: Work) -> GenerationParams:
    """A work as the engine takes it."""
    return GenerationParams(
        prompt=work.prompt,
        seed=work.number,
        num_images=1,
        width=SIZE,
        height=SIZE,
        frames=1,
        steps=work.steps,
        guidance_scale=GUIDANCE,
        scheduler="euler",
    )
