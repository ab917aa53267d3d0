"""SDXL: images from text and references, or into the masked part of one, in batches of up to six.

A request runs through the stock pipelines of diffusers, so its pixels are those of the stock pipeline with the
same parameters: bitwise when it runs alone, but for rounding when it shares forwards with others. Image i of a request
has a generator of its own with seed + i, so it may be made in a batch with the others or alone: it differs by rounding
at most, since kernels add up in another order for another batch size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from models.denoising.denoiser import AsideStandIn
from models.denoising.embeddings import Encoded
from models.denoising.stopwatch import Stopwatch
from models.generation import Generation, GenerationFailed, GenerationRequest, InvalidInput
from models.guiding.sdxl_references import References
from models.lora.rows import AdapterSet
from models.params import GenerationParams
from models.pipeline import PipelineModel, generators, seeds_from
from models.profile import ModelSpec
from models.prompting.emphasis import emphasise
from models.prompting.weighting import Weighting, WeightingFailed
from models.samples.sample_pictures import sample_mask, with_sample

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

SMALLER_BATCH = "oom: an earlier run had no room for a larger batch"

SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
}


class SDXL(PipelineModel):
    """A `models.generation.Model` for Stable Diffusion XL and checkpoints of its architecture.

    A checkpoint that was trained to repaint, whose UNet takes nine channels, does nothing else.
    """

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        super().__init__(spec, weights)
        self._references = References(spec, weights)
        self._weighting: Weighting | None = None

    def load(self) -> None:
        super().load()
        self._references.complete(self._pipeline, self.device)
        self._weighting = Weighting(self._pipeline)

    @property
    def repaints_only(self) -> bool:
        """Whether the UNet needs mask and masked image beside the latents."""
        unet, vae = self._pipeline.unet, self._pipeline.vae
        return bool(unet.config.in_channels != vae.config.latent_channels)

    def sample_request(self, frames: int | None = None) -> GenerationRequest:
        request = super().sample_request(frames)
        return sample_mask(request) if self.repaints_only else request

    def steered_samples(self) -> list[GenerationRequest]:
        if self.spec.controlnet is None or self.repaints_only:
            return []
        return [with_sample(self.sample_request(), "composition")]

    def _load_pipeline(self, dtype: Any) -> Any:
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline

        # the watermarker would change pixels wherever its package happens to be installed
        options: dict[str, Any] = {"dtype": dtype, "add_watermarker": False}
        if self.spec.vae is not None:
            options["vae"] = AutoencoderKL.from_pretrained(self.spec.vae, dtype=dtype)
        file = self._checkpoint_file()
        if file is not None:
            pipeline = StableDiffusionXLPipeline.from_single_file(str(file), **options)
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                str(self.weights), revision=self.spec.revision, variant=self.spec.variant, **options
            )
        self._references.load_into(pipeline, dtype)
        return pipeline

    def _checkpoint_file(self) -> Path | None:
        """The one file that holds everything, fetched if need be; None for a checkpoint in folders."""
        if self.spec.single_file is None:
            return Path(self.weights) if Path(self.weights).is_file() else None
        if Path(self.weights).is_dir():
            return Path(self.weights) / self.spec.single_file
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(self.weights), self.spec.single_file, revision=self.spec.revision))

    def _generate(self, request: GenerationRequest, watch: Stopwatch) -> Generation:
        params = request.params
        if params.frames != 1:
            raise InvalidInput("SDXL makes images, not video")
        self._references.check(request, repaints_only=self.repaints_only)
        pipeline = self._references.pipeline_for(request)
        own = self._own(pipeline, self._scheduler(params), request, watch)
        seeds = seeds_from(params.seed or 0, params.num_images)
        size = min(request.batch_size or params.num_images, params.num_images)
        settings = self._settings(own, params) | {
            "seeds": seeds,
            "batch_size": size,
            "batch_reason": SMALLER_BATCH if size < params.num_images else None,
        }
        arguments: dict[str, Any] = {
            "num_inference_steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "callback_on_step_end": watch.on_step_end,
            "output_type": "np",
        }

        watch.phase("encode")
        fit = partial(self._references.fit, request)
        # whoever waits for a lane waits for the end of a forward as well: not where there is nothing to do
        fitted = watch.aside(fit) if params.references else fit()
        arguments |= fitted.arguments
        settings["references"] = fitted.facts
        encoded = watch.aside(lambda: self._encode(own, params, watch.adapters), "text")
        arguments |= encoded.arguments
        settings |= encoded.facts

        pictures: list[Image] = []
        batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
        for number, batch in enumerate(batches):
            if fitted.encoded:
                watch.prompts = watch.aside(partial(self._references.prompts, fitted, params, len(batch)), "text")
            own = self._own(pipeline, self._scheduler(params), request, watch)
            watch.batch(number, len(batches))
            chances = generators(batch)
            watch.resumable(own.scheduler, chances)
            batched = arguments | {"num_images_per_prompt": len(batch), "generator": chances}
            images = self._call(own, params, batched, settings).images
            pictures += watch.aside(partial(_to_pictures, images))
        settings |= {"denoise_steps": own.num_timesteps, **watch.facts}
        return Generation(
            images=pictures,
            frames=None,
            fps=None,
            seeds=seeds,
            settings=settings,
            timings_ms=watch.stop(),
        )

    def _own(self, pipeline: Any, scheduler: Any, request: GenerationRequest, watch: Stopwatch) -> Any:
        own = super()._own(pipeline, scheduler, request, watch)
        self._references.stand_in(own, request.params, watch)
        for name in ("image_processor", "mask_processor", "control_image_processor"):
            if name in own.__dict__:
                own.__dict__[name] = AsideStandIn(own.__dict__[name], watch, ("preprocess",))
        return own

    def _scheduler(self, params: GenerationParams) -> Any:
        import diffusers

        if params.scheduler not in SCHEDULERS:
            raise InvalidInput(f"SDXL has no scheduler {params.scheduler!r}")
        return getattr(diffusers, SCHEDULERS[params.scheduler]).from_config(self._pipeline.scheduler.config)

    def _encode(self, own: Any, params: GenerationParams, adapters: AdapterSet) -> Encoded:
        """Prompt embeddings as arguments of the pipeline: with Compel if asked for, else, or if it fails, plain."""
        assert self.adapters is not None  # made by load()
        guided = params.guidance_scale > 1
        # None lets the pipeline use what the checkpoint was trained with (zeros), an empty text would not
        negative = params.negative_prompt or None if guided else None
        parts = (params.prompt, negative, guided, params.compel_enabled, params.compel_weights, adapters)
        with self.adapters.encoding(adapters):
            return self._embeddings.get(parts, lambda: self._encode_anew(own, params, negative, guided))

    def _encode_anew(self, own: Any, params: GenerationParams, negative: str | None, guided: bool) -> Encoded:
        facts: dict[str, Any] = {
            "compel_enabled": params.compel_enabled,
            "compel_success": None,
            "fallback_used": False,
        }
        if params.compel_enabled:
            assert self._weighting is not None  # made by load()
            try:
                emphasised = emphasise(params.prompt, params.compel_weights)
                weighted = self._weighting.encode(emphasised.text, negative, own._execution_device)
            except WeightingFailed as failure:
                log.warning("compel_failed", model=self.model_name, reason=failure.reason)
                facts |= {
                    "compel_success": False,
                    "fallback_used": True,
                    "fallback_reason": f"compel_failed: {failure.reason}; the plain prompt was used",
                }
            else:
                cut = {"prompt_tokens_cut": weighted.tokens_cut, "negative_tokens_cut": weighted.tokens_cut}
                facts |= {"compel_success": True, **cut}
                facts |= {"compel_weights_applied": emphasised.applied}
                if emphasised.reason is not None:
                    facts |= {"fallback_used": True, "fallback_reason": f"compel_weights: {emphasised.reason}"}
                return Encoded(weighted.arguments, facts)
        facts["prompt_tokens_cut"] = self._tokens_cut(params.prompt)
        facts["negative_tokens_cut"] = self._tokens_cut(negative or "")
        embeds, negative_embeds, pooled, negative_pooled = own.encode_prompt(
            prompt=params.prompt,
            negative_prompt=negative,
            device=own._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        arguments = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        return Encoded(arguments, facts)

    def _tokens_cut(self, prompt: str) -> int:
        """How many tokens of the prompt lie outside CLIP's window and have no effect."""
        tokenizer = self._pipeline.tokenizer
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        return max(0, tokens - int(tokenizer.model_max_length))


def _to_pictures(images: Any) -> list[Image]:
    """Float images (N, H, W, 3) in 0..1 as PIL images. Raises `GenerationFailed` where the model made NaN."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(images).all():
        raise GenerationFailed("the model made numbers that are not finite (overflow of its dtype?)")
    return [Image.fromarray(picture) for picture in (images * 255).round().astype("uint8")]
