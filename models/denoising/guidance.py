"""The guidance interval: a stock pipeline that is guided in a part of its steps, and runs half the rows in the others.

Guidance matters least at both ends of a run (Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves
Sample and Distribution Quality in Diffusion Models", 2024). Step k of n is guided where start <= k / n < stop; k counts
the calls of the scheduler, n is the pipeline's `num_timesteps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the SDXL pipelines hold twice, negative half first, while they guide.
_DOUBLED = (
    "prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "mask",
    "masked_image_latents",
)


def guidance_interval(pipeline: Any, arguments: Mapping[str, Any], start: float, stop: float) -> dict[str, Any]:
    """The arguments for a call of `pipeline` that is guided from `start` to `stop`, fractions of its steps.

    `pipeline` is the request's own copy of an SDXL or WAN pipeline, the very object that is called, with stand-ins for
    its modules where it has a ControlNet; `arguments` those of the wholly guided call with embeddings for both prompts;
    a callback among them is still called. Raises `ValueError` where 0 <= start < stop <= 1 does not hold, the call is
    not guided, or an embedding of the negative prompt is missing.
    """
    if not 0 <= start < stop <= 1:
        raise ValueError("a guidance interval needs 0 <= start < stop <= 1")
    if arguments.get("guidance_scale", 0) <= 1:
        raise ValueError("a guidance interval needs a guidance scale above 1")
    kinds = {"controlnet": _ControlNetInterval, "unet": _UNetInterval, "transformer": _TransformerInterval}
    interval = next(kind for name, kind in kinds.items() if hasattr(pipeline, name))
    return interval(arguments, start, stop).prepare(pipeline)


class _Interval:
    def __init__(self, arguments: Mapping[str, Any], start: float, stop: float) -> None:
        self.arguments = dict(arguments)
        self.scale = self.arguments["guidance_scale"]
        self.start, self.stop = start, stop
        self.inner = self.arguments.get("callback_on_step_end")
        self.inner_names = list(self.arguments.get("callback_on_step_end_tensor_inputs") or ["latents"])
        self.arguments["callback_on_step_end"] = self.on_step_end

    def guided(self, step: int, of: int) -> bool:
        # rounded because 0.7 x 10 is a little more than 7
        return round(self.start * of, 6) <= step < round(self.stop * of, 6)

    def prepare(self, pipeline: Any) -> dict[str, Any]:
        return self.arguments

    def turn(self, guided: bool, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors that change when guidance goes on or off."""
        return {}

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        if self.inner is not None:
            seen = {name: tensors[name] for name in self.inner_names}
            changed = self.inner(pipeline, index, timestep, seen)
        was = pipeline.do_classifier_free_guidance
        will = self.guided(index + 1, pipeline.num_timesteps)
        if will is not was and index + 1 < pipeline.num_timesteps:
            pipeline._guidance_scale = self.scale if will else 1.0
            changed = changed | self.turn(will, tensors | changed)
        return changed


class _UNetInterval(_Interval):
    """SDXL: one forward holds both halves. A run that starts unguided is called so and gets its negative half later."""

    names: list[str]
    negative: Mapping[str, Any]

    def prepare(self, pipeline: Any) -> dict[str, Any]:
        known = pipeline._callback_tensor_inputs
        self.names = [name for name in _DOUBLED if name in known]
        self.arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys([*self.inner_names, *self.names]))
        if self.start > 0:
            self.negative = {
                "prompt_embeds": self.arguments.get("negative_prompt_embeds"),
                "add_text_embeds": self.arguments.get("negative_pooled_prompt_embeds"),
            }
            if any(value is None for value in self.negative.values()):
                raise ValueError("a guidance interval that starts later needs embeddings of the negative prompt")
            if getattr(pipeline.config, "requires_aesthetics_score", False):
                raise ValueError("a refiner's negative half has other time ids; it can't start unguided")
            self.arguments["guidance_scale"] = 1.0
        return self.arguments

    def turn(self, guided: bool, tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        held = {name: tensors[name] for name in self.names if tensors.get(name) is not None}
        if not guided:
            return {name: value.chunk(2)[1] for name, value in held.items()}
        doubled = {}
        for name, value in held.items():
            negative = self.negative.get(name)
            if negative is None:
                negative = value
            else:  # one for each prompt, while the pipeline has repeated the positive one for each image
                negative = negative.to(value).repeat_interleave(value.shape[0] // negative.shape[0], dim=0)
            doubled[name] = torch.cat([negative, value])
        return doubled


class _ControlNetInterval(_Interval):
    """SDXL with a ControlNet, whose pipelines keep the scale that they were called with, and one of them its halves:
    they run as if always guided, and outside of the interval the positive half's answer stands for both."""

    def prepare(self, pipeline: Any) -> dict[str, Any]:
        self.step = 0
        for name in ("unet", "controlnet"):
            stand_in = pipeline.__dict__[name]
            stand_in.halved = lambda: not self.guided(self.step, pipeline.num_timesteps)
        return self.arguments

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = index + 1
        return {} if self.inner is None else self.inner(pipeline, index, timestep, tensors)


class _TransformerInterval(_Interval):
    """WAN: the negative half is a forward of its own, which the pipeline makes or not by its guidance scale."""

    def prepare(self, pipeline: Any) -> dict[str, Any]:
        if self.arguments.get("negative_prompt_embeds") is None:
            raise ValueError("a guidance interval needs embeddings of the negative prompt")
        if self.start > 0:
            stock = pipeline.progress_bar

            # the last thing that the pipeline calls before its first step
            def progress_bar(*args: Any, **kwargs: Any) -> Any:
                pipeline._guidance_scale = 1.0
                return stock(*args, **kwargs)

            pipeline.progress_bar = progress_bar
        return self.arguments
