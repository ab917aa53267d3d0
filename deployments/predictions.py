"""How long a run will take: by the measured profile of the model that will do it, else by the runs there were."""

import time

import structlog

from db.costs import CostProfiles
from db.jobs import Jobs
from models.catalog import JobType
from models.denoising.costs import Costs
from models.params import GenerationParams

log = structlog.get_logger()

FRESH_SECONDS = 30.0
LEAST_SECONDS = 0.001  # a cost is above zero


class Predictions:
    """Fair sharing, ETA and autoscaling all count in these seconds. Profiles are read at most every 30 seconds."""

    def __init__(self, profiles: CostProfiles, jobs: Jobs) -> None:
        self._profiles, self._jobs = profiles, jobs
        self._costs: dict[str, Costs] = {}
        self._read = float("-inf")

    async def seconds(self, job_type: JobType, params: GenerationParams) -> float:
        """What a run costs: by its sizes and steps where the model was measured; else the type's mean run; and before
        the first run, the catalog's guess."""
        known = await self.known(job_type, params)
        return max(known if known is not None else job_type.initial_seconds, LEAST_SECONDS)

    async def known(self, job_type: JobType, params: GenerationParams) -> float | None:
        """The same from measurements alone; None where there are none."""
        await self._refresh()
        costs = self._costs.get(job_type.family.value)
        predicted = costs.job_seconds(params) if costs is not None else None
        return predicted if predicted is not None else await self._jobs.run_seconds(job_type.name)

    async def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read < FRESH_SECONDS:
            return
        self._read = now
        for queue, (model_name, document) in (await self._profiles.read()).items():
            try:
                self._costs[queue] = Costs.from_document(document)
            except (ValueError, KeyError, TypeError):
                log.warning("cost_profile_unreadable", queue=queue, model=model_name)
                self._costs.pop(queue, None)
