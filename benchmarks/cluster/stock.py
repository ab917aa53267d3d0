"""The pipeline that the other servers serve: diffusers' own, with the same checkpoint, size and guidance. Runs in their
environment, so it needs nothing of this project but the denoiser of a fixed step time."""

import io
import os
from pathlib import Path
from typing import Any

from benchmarks.cluster.fixed_step import fix_step_time

BATCH = int(os.environ.get("BENCHMARK_BATCH", "4"))


class Stock:
    """Settings come from the environment: BENCHMARK_CHECKPOINT, _STEP_SECONDS, _TALLY, _SIZE, _GUIDANCE and _BATCH."""

    def __init__(self) -> None:
        import torch
        from diffusers import StableDiffusionXLPipeline

        torch.set_num_threads(1)
        told = os.environ
        pipeline = StableDiffusionXLPipeline.from_pretrained(told["BENCHMARK_CHECKPOINT"], add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        fix_step_time(pipeline.unet, float(told["BENCHMARK_STEP_SECONDS"]), Path(told["BENCHMARK_TALLY"]))
        self._pipeline: Any = pipeline
        self._size, self._guidance = int(told["BENCHMARK_SIZE"]), float(told["BENCHMARK_GUIDANCE"])

    def pictures(self, requests: list[dict[str, Any]]) -> list[Any]:
        """An image for each request, in their order. A call of the pipeline has one number of steps, so a batch with
        several takes several calls."""
        import torch

        made: dict[int, Any] = {}
        for steps in sorted({int(request["steps"]) for request in requests}):
            places = [n for n, request in enumerate(requests) if request["steps"] == steps]
            images = self._pipeline(
                prompt=[requests[n]["prompt"] for n in places],
                generator=[torch.Generator("cpu").manual_seed(requests[n]["seed"]) for n in places],
                num_inference_steps=steps,
                guidance_scale=self._guidance,
                width=self._size,
                height=self._size,
            ).images
            made |= dict(zip(places, images, strict=True))
        return [made[n] for n in range(len(requests))]


def png(picture: Any) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
