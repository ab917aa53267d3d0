"""WAN 2.1 and 2.2: video from text or from frames, and single images as runs of one frame.

A request runs through the stock pipelines of diffusers, so its frames are those of the stock pipelines with the same
parameters. The VAE stays in float32, as its documentation in diffusers asks for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from models.denoising.embeddings import Encoded
from models.denoising.stopwatch import Stopwatch
from models.generation import Generation, GenerationFailed, GenerationRequest, InvalidInput, ModelLoadFailed
from models.guiding.reference import FRAMES, ReferenceKind
from models.guiding.wan_frames import Frames
from models.params import GenerationParams
from models.pipeline import PipelineModel, generators
from models.profile import ModelSpec
from models.samples.sample_pictures import with_sample

MAX_PROMPT_TOKENS = 512

# Those of diffusers whose steps follow a flow-matching schedule, which is what WAN was trained with.
SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
}


class WAN(PipelineModel):
    """A `models.generation.Model` for WAN text-to-video checkpoints, with an image-to-video one beside it or without.

    Those of WAN 2.2 with two experts change from `transformer` to `transformer_2` where the noise falls below the
    checkpoint's `boundary_ratio`; both are guided alike. The 5B model, which gives every token a timestep of its own,
    is run from text, or from a start frame as well.
    """

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        super().__init__(spec, weights)
        self._frames = Frames(spec, weights)

    def load(self) -> None:
        super().load()
        self._frames.complete(self.device)

    def _load_pipeline(self, dtype: Any) -> Any:
        import torch
        from diffusers import WanPipeline

        # given at load: a later .to(dtype) would also cast the layers that from_pretrained keeps in float32
        dtypes = {"default": dtype, "vae": torch.float32}
        pipeline = WanPipeline.from_pretrained(
            str(self.weights), revision=self.spec.revision, variant=self.spec.variant, dtype=dtypes
        )
        if pipeline.transformer_2 is not None and self.spec.offload != "none" and self.spec.slots > 1:
            # each expert makes room for itself only, so that two requests on either side would need both on the card
            message = f"offload of a checkpoint with two experts needs slots: 1, not {self.spec.slots}"
            raise ModelLoadFailed(f"{self.model_name}: {message}")
        self._frames.load(pipeline, dtypes)
        return pipeline

    def _pipelines(self) -> list[Any]:
        return [pipeline for pipeline in (self._pipeline, self._frames.pipeline) if pipeline is not None]

    def steered_samples(self) -> list[GenerationRequest]:
        entry = self.spec.image_to_video
        if entry is None:
            return []
        kinds: tuple[ReferenceKind, ...] = FRAMES if entry.end_frame == "required" else FRAMES[:1]
        return [with_sample(self.sample_request(), *kinds)]

    def forward_rows(self, request: GenerationRequest) -> int:
        """One: the pipeline calls the two branches of guidance one after the other."""
        return 1

    def _generate(self, request: GenerationRequest, watch: Stopwatch) -> Generation:
        params = request.params
        self._frames.check(request)
        if params.num_images != 1:
            raise InvalidInput("WAN makes one video or one image for a request")
        multiple = self._size_multiple()
        if params.frames % 4 != 1 or params.width % multiple or params.height % multiple:
            raise InvalidInput(f"this model needs 4n+1 frames and sizes in multiples of {multiple}")
        pipeline = self._frames.pipeline if params.references else self._pipeline
        own = self._own(pipeline, self._scheduler(params, pipeline), request, watch)
        if params.references:
            self._frames.settle(own, watch)
        seed = params.seed or 0
        settings = self._settings(own, params) | {
            "seeds": [seed],
            "shift": params.shift,
            "experts": 1 if pipeline.transformer_2 is None else 2,
            "boundary_ratio": pipeline.config.boundary_ratio,
            "vae_dtype": "float32",
            "fallback_used": False,
        }

        watch.phase("encode")
        encoded = watch.aside(lambda: self._encode(own, params), "text")
        settings |= encoded.facts
        told: dict[str, Any] = {}
        fit = partial(self._frames.fit, request, told)
        frames_given = watch.aside(fit) if request.guides else fit()
        settings["references"] = told
        if told:
            settings["image_to_video"] = self._frames.settings()

        watch.phase("denoise")
        chance = generators([seed])[0]
        watch.resumable(own.scheduler, [chance])
        arguments: dict[str, Any] = (
            encoded.arguments
            | frames_given
            | {
                "width": params.width,
                "height": params.height,
                "num_frames": params.frames,
                "num_inference_steps": params.steps,
                "guidance_scale": params.guidance_scale,
                "generator": chance,
                "callback_on_step_end": watch.on_step_end,
                "output_type": "np",
            }
        )
        frames = self._call(own, params, arguments, settings).frames[0]
        settings |= {"denoise_steps": own.num_timesteps, **watch.facts}
        pictures = watch.aside(lambda: _to_bytes(frames, params.frames))
        return self._finish(pictures, params, settings, watch, seed)

    def _size_multiple(self) -> int:
        """Pixels of a patch: 16, or 32 for the 5B model of WAN 2.2. The pipeline would round other sizes down."""
        return int(self._pipeline.vae_scale_factor_spatial * self._pipeline.transformer.config.patch_size[1])

    def _encode(self, own: Any, params: GenerationParams) -> Encoded:
        guided = params.guidance_scale > 1
        negative = params.negative_prompt if guided else None

        def encode() -> Encoded:
            embeds, negative_embeds = own.encode_prompt(
                prompt=params.prompt,
                negative_prompt=negative,
                do_classifier_free_guidance=guided,
                max_sequence_length=MAX_PROMPT_TOKENS,
                device=own._execution_device,
            )
            arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
            cut = {"prompt_tokens_cut": params.prompt, "negative_tokens_cut": negative or ""}
            return Encoded(arguments, {name: self._tokens_cut(text) for name, text in cut.items()})

        # an image-to-video checkpoint may have an encoder of its own
        return self._embeddings.get((id(own.text_encoder), params.prompt, negative, guided), encode)

    def _finish(
        self, frames: Any, params: GenerationParams, settings: dict[str, Any], watch: Stopwatch, seed: int
    ) -> Generation:
        from PIL import Image

        still = params.frames == 1
        settings["fps"] = None if still else params.fps
        return Generation(
            images=[Image.fromarray(frames[0])] if still else None,
            frames=None if still else frames,
            fps=None if still else params.fps,
            seeds=[seed],
            settings=settings,
            timings_ms=watch.stop(),
        )

    def _scheduler(self, params: GenerationParams, pipeline: Any = None) -> Any:
        import diffusers

        if params.scheduler not in SCHEDULERS:
            raise InvalidInput(f"WAN has no scheduler {params.scheduler!r}")
        if params.shift is None:
            raise InvalidInput("WAN needs a timestep shift")
        if params.frames > 1 and params.fps is None:
            raise InvalidInput("a video needs a frame rate")
        trained = (pipeline or self._pipeline).scheduler.config
        kind = getattr(diffusers, SCHEDULERS[params.scheduler])
        if params.scheduler == "euler":
            return kind(num_train_timesteps=trained.num_train_timesteps, shift=params.shift)
        return kind.from_config(
            trained,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=params.shift,
        )

    def _tokens_cut(self, prompt: str) -> int:
        """How many tokens of the prompt lie outside the text encoder's window and have no effect."""
        tokens = self._pipeline.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return max(0, len(tokens) - MAX_PROMPT_TOKENS)


def _to_bytes(frames: Any, count: int) -> Any:
    """Float frames (F, H, W, 3) in 0..1 as uint8. Raises `GenerationFailed` where they are not what was asked for."""
    import numpy as np

    if not np.isfinite(frames).all():
        raise GenerationFailed("the model made numbers that are not finite (overflow of its dtype?)")
    if len(frames) != count:
        raise GenerationFailed(f"the model made {len(frames)} frames instead of {count}")
    return (frames * 255).round().astype("uint8")
