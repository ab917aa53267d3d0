"""Frames that a WAN video starts or ends with: the image-to-video pipeline beside the one for text.

Its checkpoint has a transformer of its own, which is never run together with the other one's requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.denoising.acceleration import apply
from models.denoising.stopwatch import Stopwatch
from models.generation import GenerationRequest, InvalidInput, ModelLoadFailed, ReferenceTypeUnavailable
from models.guiding.reference import FRAMES, ReferenceKind
from models.media import open_reference
from models.profile import TINY, ModelSpec

MAX_REFERENCE_BYTES = 32 * 1024 * 1024
MAX_REFERENCE_PIXELS = 50_000_000

_SHARED = ("text_encoder", "tokenizer", "vae")
_ARGUMENTS: dict[ReferenceKind, str] = {"start_frame": "image", "end_frame": "last_image"}


class Frames:
    """The image-to-video side of one WAN model. `pipeline` is None where the profile has no such checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        self._spec, self._weights = spec, weights
        self.pipeline: Any = None

    def load(self, text: Any, dtypes: dict[str, Any]) -> None:
        """Loads the pipeline around parts of the one for text. Raises what the loader raises, and `ValueError` where
        the checkpoint is not what the profile says of it."""
        entry = self._spec.image_to_video
        if entry is None:
            return
        from diffusers import WanImageToVideoPipeline

        if self.shares_transformer:
            config = {name: text.config[name] for name in ("boundary_ratio", "expand_timesteps")}
            self.pipeline = WanImageToVideoPipeline(**text.components, **config)
        else:
            shared = {} if entry.own_encoders else {name: getattr(text, name) for name in _SHARED}
            self.pipeline = WanImageToVideoPipeline.from_pretrained(
                self._source(entry.source, entry.end_frame),
                revision=entry.revision,
                variant=entry.variant,
                dtype=dtypes | {"image_encoder": dtypes["vae"]},
                **shared,
            )
        self._check_end(entry.end_frame)

    def complete(self, device: str) -> None:
        """Moves it to the device, with the profile's acceleration."""
        if self.pipeline is None:
            return
        import torch

        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        if self._spec.vae_slicing:  # its own VAE has not been told yet
            self.pipeline.vae.enable_slicing()
        if self._spec.vae_tiling:
            self.pipeline.vae.enable_tiling()
        self.pipeline.to(device)
        if self.pipeline.transformer is not None and not self.shares_transformer:
            apply(self.pipeline, self._spec.acceleration, self._spec.family, device, self._spec.dtype)

    @property
    def shares_transformer(self) -> bool:
        """Whether one checkpoint does for both, as WAN 2.2's 5B."""
        entry, spec = self._spec.image_to_video, self._spec
        return entry is not None and (entry.source, entry.revision) == (spec.source, spec.revision) != (TINY, None)

    def check(self, request: GenerationRequest) -> None:
        """Raises `InvalidInput` for references without their bytes, or the other way round, and for what this model
        can't honour."""
        params = request.params
        kinds = {one.kind for one in params.references}
        if request.reference is not None or request.mask is not None or "image" in kinds:
            raise InvalidInput("a video takes frames as references, and no image")
        if kinds != set(request.guides):
            raise InvalidInput("each reference needs both its parameters and its bytes")
        for kind in kinds - set(self._spec.reference_methods):
            raise ReferenceTypeUnavailable(f"this model has nothing loaded for {kind} references")
        if not kinds:
            return
        if params.frames == 1:
            raise InvalidInput("a single image has no frames to start or end with")
        required = "first_and_last_frame" in self._spec.reference_methods.values()
        if "start_frame" not in kinds or (required and "end_frame" not in kinds):
            raise InvalidInput("this model needs a start frame" + (" and an end frame" if required else ""))
        if params.loras:
            raise InvalidInput("LoRAs are for the text-to-video checkpoint, and frames run another one")

    def fit(self, request: GenerationRequest, facts: dict[str, Any]) -> dict[str, Any]:
        """The frames of a checked request as arguments of the pipeline, and what they were. Raises `InvalidInput`."""
        from PIL import Image, ImageOps

        size = (request.params.width, request.params.height)
        arguments = {}
        for kind in FRAMES:
            if kind in request.guides:
                image = open_reference(request.guides[kind], MAX_REFERENCE_PIXELS, MAX_REFERENCE_BYTES)
                facts[kind] = {"width": image.width, "height": image.height, "resize_policy": "center_crop"}
                arguments[_ARGUMENTS[kind]] = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        return arguments

    def settings(self) -> dict[str, Any]:
        """Which checkpoint it was, for the settings of a result; callers need not know the folders of the server."""
        entry = self._spec.image_to_video
        assert entry is not None  # or there is nothing to tell
        local = Path(entry.source).expanduser()
        return {"source": local.name if local.exists() else entry.source, "revision": entry.revision}

    def settle(self, own: Any, watch: Stopwatch) -> None:
        """Has a request's own pipeline look at its frames aside."""
        # this processor is the image encoder's, and nothing of it is worth another thread
        own.__dict__["image_processor"] = self.pipeline.image_processor
        encode = self.pipeline.encode_image
        own.__dict__["encode_image"] = lambda *args: watch.aside(lambda: encode(*args), "text")

    def _check_end(self, said: str) -> None:
        config = (self.pipeline.transformer or self.pipeline.transformer_2).config
        if config.get("pos_embed_seq_len") is not None:
            fits: tuple[str, ...] = ("required",)
        elif config.get("image_dim") is not None or self.pipeline.config.expand_timesteps:
            fits = ("never",)
        else:
            fits = ("never", "optional")
        if said not in fits:
            raise ModelLoadFailed(f"image_to_video: end_frame is {' or '.join(fits)} with this checkpoint, not {said}")

    def _source(self, source: str, end_frame: str) -> str:
        if source == TINY:
            from models.samples.tiny import Variant, ensure_tiny

            variants: dict[str, Variant] = {
                "never": "image_to_video",
                "optional": "image_to_video_latents",
                "required": "first_and_last_frame",
            }
            return str(ensure_tiny(self._spec.family.value, Path(self._weights).parent, variants[end_frame]))
        local = Path(source).expanduser()
        return str(local) if local.exists() else source
