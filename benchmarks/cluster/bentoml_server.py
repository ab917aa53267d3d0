"""The stock pipeline behind BentoML with its adaptive batching. Answers are JSON, since a batchable endpoint gives a
list: one PNG in base64 for each request."""

import base64
from typing import Any

import bentoml

from benchmarks.cluster.stock import BATCH, Stock, png


@bentoml.service(workers=1, traffic={"timeout": 120})
class Pictures:
    """Text in JSON, PNG in base64 out."""

    def __init__(self) -> None:
        self._stock = Stock()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def generate(self, requests: list[dict[str, Any]]) -> list[str]:
        """A picture for each request."""
        return [base64.b64encode(png(picture)).decode() for picture in self._stock.pictures(requests)]
