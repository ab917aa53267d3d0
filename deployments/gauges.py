"""What an engine's own counters become as metrics: what was added since the last look."""

from collections.abc import Mapping
from typing import Any

from deployments.metrics import Metrics
from models.denoising.costs import Costs


class EngineGauges:
    """The counters of one model in this process. Call `report` now and then, from one task."""

    def __init__(self, family: str, costs: Costs, model: Any, metrics: Metrics) -> None:
        self._family, self._costs, self._model, self._metrics = family, costs, model, metrics
        self._said: dict[str, float] = {}

    def report(self) -> None:
        costs = self._costs
        new = self._since({"forwards": costs.forwards, "rows": costs.rows, "seconds": costs.busy_seconds})
        if new["forwards"]:
            self._metrics.forwarded(self._family, int(new["forwards"]), int(new["rows"]), new["seconds"])
        adapters = getattr(self._model, "adapters", None)
        if adapters is not None:
            counts = {"load": adapters.loads, "hit": adapters.hits, "eviction": adapters.evictions}
            events = {name: int(count) for name, count in self._since(counts).items() if count}
            self._metrics.loras(self._family, events, adapters.bytes_loaded)

    def _since(self, totals: Mapping[str, float]) -> dict[str, float]:
        added = {name: total - self._said.get(name, 0) for name, total in totals.items()}
        self._said |= totals
        return added
