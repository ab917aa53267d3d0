"""`python -m benchmarks.cluster.litserve_server <port>`: the stock pipeline behind LitServe, batched as its manual
shows: requests wait for one another for a moment, and are answered together."""

import sys
from typing import Any

import litserve
from fastapi import Response

from benchmarks.cluster.stock import BATCH, Stock, png

BATCH_TIMEOUT_SECONDS = 0.05


class Pictures(litserve.LitAPI):  # type: ignore[misc]
    """Text in JSON, PNG out."""

    def setup(self, device: str) -> None:
        self._stock = Stock()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, requests: list[dict[str, Any]]) -> list[Any]:
        return self._stock.pictures(requests)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, picture: Any) -> Response:
        return Response(content=png(picture), media_type="image/png")


if __name__ == "__main__":
    api = Pictures(max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
