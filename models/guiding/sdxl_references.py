"""References of SDXL: which stock pipeline runs a request, what it gets of its images, and what else steers its UNet.

Image and mask choose between text-to-image, image-to-image and inpainting; a composition takes each of them with a
ControlNet. Style and character go past the pipelines, as `models.guiding.image_prompts` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.denoising.denoiser import ControlStandIn
from models.denoising.embeddings import Embeddings, Encoded
from models.denoising.stopwatch import Stopwatch
from models.generation import GenerationRequest, InvalidInput, ReferenceTypeUnavailable
from models.guiding.guides import IMAGE_PROMPTS
from models.guiding.image_prompts import ImagePrompt, ImagePrompts
from models.guiding.masks import fit_mask, open_mask
from models.guiding.outlines import outlines
from models.guiding.reference import Reference, ReferenceKind
from models.media import open_reference
from models.params import GenerationParams
from models.profile import TINY, ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_REFERENCE_BYTES = 32 * 1024 * 1024
MAX_REFERENCE_PIXELS = 50_000_000
CROPPED = "center_crop"


@dataclass
class Fitted:
    """A request's references: `arguments` of its pipeline, `encoded` images to attend to, and `facts` for the settings,
    all by kind."""

    arguments: dict[str, Any] = field(default_factory=dict)
    encoded: dict[ReferenceKind, Any] = field(default_factory=dict)
    facts: dict[ReferenceKind, dict[str, Any]] = field(default_factory=dict)


class References:
    """What one SDXL model needs for its references, beside its text-to-image pipeline."""

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        self._spec, self._weights = spec, weights
        self._prompts: ImagePrompts | None = None
        self._controlnet: Any = None
        self._pipelines: dict[tuple[bool, bool, bool], Any] = {}  # by image, mask, composition
        self._encoded = Embeddings()

    def load_into(self, pipeline: Any, dtype: Any) -> None:
        """Loads adapters and ControlNet, before anything is moved. Raises what their loaders raise."""
        spec = self._spec
        if spec.ip_adapter is not None:
            source = self._source(spec.ip_adapter.source, "ip_adapter")
            compiled = spec.acceleration.compile != "none"
            self._prompts = ImagePrompts(pipeline, spec.ip_adapter, source, compiled=compiled)
        if spec.controlnet is not None:
            from diffusers import ControlNetModel

            net = spec.controlnet
            self._controlnet = ControlNetModel.from_pretrained(
                self._source(net.source, "controlnet"), revision=net.revision, variant=net.variant, dtype=dtype
            )

    def complete(self, pipeline: Any, device: str) -> None:
        """Makes the sibling pipelines around the parts of the loaded one, which is on its device by now."""
        import diffusers

        options = {"force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt}

        def sibling(kind: str, **parts: Any) -> Any:
            made = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
                **pipeline.components, **parts, **options, add_watermarker=False
            )
            made.set_progress_bar_config(disable=True)
            return made

        self._pipelines = {
            (False, False, False): pipeline,
            (True, False, False): sibling("Img2Img"),
            (True, True, False): sibling("Inpaint"),
        }
        if self._prompts is not None:
            self._prompts.place(device)
        if self._controlnet is not None:
            net = self._controlnet.to(device).eval()
            self._pipelines |= {
                (False, False, True): sibling("ControlNet", controlnet=net),
                (True, False, True): sibling("ControlNetImg2Img", controlnet=net),
                (True, True, True): sibling("ControlNetInpaint", controlnet=net),
            }

    def check(self, request: GenerationRequest, *, repaints_only: bool) -> None:
        """Raises `InvalidInput` for references without their bytes, or the other way round, and for what this model
        can't honour."""
        params = request.params
        reference = params.reference
        if (reference is None) is not (request.reference is None):
            raise InvalidInput("a reference needs both its parameters and its bytes")
        if (reference is None or reference.mask is None) is not (request.mask is None):
            raise InvalidInput("a mask needs both its parameters and its bytes")
        guides = {one.kind for one in params.references if one.kind != "image"}
        if guides != set(request.guides):
            raise InvalidInput("each reference needs both its parameters and its bytes")
        available = set[ReferenceKind]() if self._prompts is None else set(self._prompts.kinds)
        if self._controlnet is not None:
            available.add("composition")
        for kind in guides - available:
            raise ReferenceTypeUnavailable(f"this model has nothing loaded for {kind} references")
        if repaints_only and (request.mask is None or "composition" in guides):
            raise InvalidInput("this checkpoint only repaints: it needs a reference image and a mask")

    def pipeline_for(self, request: GenerationRequest) -> Any:
        """The stock pipeline that runs a checked request."""
        composed = request.params.of_kind("composition") is not None
        return self._pipelines[request.reference is not None, request.mask is not None, composed]

    def stand_in(self, own: Any, params: GenerationParams, watch: Stopwatch) -> None:
        """Puts a stand-in in the place of the ControlNet of a request's own pipeline, if it has one."""
        if "controlnet" in own.__dict__:
            alone = params.reproducible
            own.__dict__["controlnet"] = ControlStandIn(self._controlnet, watch, watch.name, alone=alone)

    def fit(self, request: GenerationRequest) -> Fitted:
        """Opens, fits and encodes the images of a checked request. Raises `InvalidInput`."""
        fitted = Fitted()
        for reference in request.params.references:
            data = request.reference if reference.kind == "image" else request.guides[reference.kind]
            assert data is not None  # checked
            image = open_reference(data, MAX_REFERENCE_PIXELS, MAX_REFERENCE_BYTES)
            facts: dict[str, Any] = {
                "strength": reference.strength,
                "width": image.width,
                "height": image.height,
            }
            fitted.facts[reference.kind] = facts
            if reference.kind == "image":
                self._start_from(image, reference, request, fitted)
            elif reference.kind == "composition":
                self._compose(image, reference, request.params, fitted)
            else:
                assert self._prompts is not None  # checked
                encode = _encoding(self._prompts, reference.kind, image)
                kept = self._encoded.get((reference.kind, hashlib.sha256(data).hexdigest()), encode)
                fitted.encoded[reference.kind] = kept.arguments["halves"]
                assert self._spec.ip_adapter is not None
                facts["adapter"] = self._spec.ip_adapter.files[reference.kind]
        started, masked = request.reference is not None, request.mask is not None
        if masked or not started or "composition" in fitted.facts:  # image-to-image alone takes its size from the image
            fitted.arguments |= {"width": request.params.width, "height": request.params.height}
        return fitted

    def prompts(self, fitted: Fitted, params: GenerationParams, images: int) -> tuple[ImagePrompt, ...]:
        """What a batch of so many images attends to."""
        guided = params.guidance_scale > 1
        made = []
        for kind in IMAGE_PROMPTS:
            if kind in fitted.encoded:
                reference = params.of_kind(kind)
                assert reference is not None
                assert self._prompts is not None
                encoded = fitted.encoded[kind]
                made.append(self._prompts.prompt(kind, reference.strength, encoded, images, guided=guided))
        return tuple(made)

    def _start_from(self, image: Image, reference: Reference, request: GenerationRequest, fitted: Fitted) -> None:
        from PIL import Image as Images
        from PIL import ImageOps

        params, facts = request.params, fitted.facts["image"]
        # rounded because 1 - 0.8 is a little less than 0.2, and 25 steps of that would be 4 instead of 5
        strength = round(1 - reference.strength, 6)
        if int(params.steps * strength) < 1:
            raise InvalidInput("at this reference strength none of the steps would be run")
        facts |= {"denoise_strength": strength, "resize_policy": CROPPED}
        if reference.asked_as is not None:
            facts["asked_as"] = reference.asked_as
        size = (params.width, params.height)
        fitted.arguments |= {"image": ImageOps.fit(image, size, Images.Resampling.LANCZOS), "strength": strength}
        if request.mask is not None:
            mask = open_mask(request.mask, MAX_REFERENCE_PIXELS, MAX_REFERENCE_BYTES, image.size)
            cells = fit_mask(mask, *size, self._pipelines[True, True, False].vae_scale_factor)
            facts["mask"] = {"width": mask.width, "height": mask.height, "repainted": cells.repainted}
            fitted.arguments["mask_image"] = cells.image

    def _compose(self, image: Image, reference: Reference, params: GenerationParams, fitted: Fitted) -> None:
        from PIL import Image as Images
        from PIL import ImageOps

        assert self._spec.controlnet is not None
        reads = self._spec.controlnet.reads
        picture = ImageOps.fit(image, (params.width, params.height), Images.Resampling.LANCZOS)
        control = outlines(picture) if reads == "edges" else picture
        fitted.facts["composition"] |= {"resize_policy": CROPPED, "reads": reads}
        name = "image" if params.reference is None else "control_image"
        fitted.arguments |= {name: control, "controlnet_conditioning_scale": reference.strength}

    def _source(self, source: str, variant: Any) -> str:
        if source == TINY:
            from models.samples.tiny import ensure_tiny

            return str(ensure_tiny(self._spec.family.value, Path(self._weights).parent, variant))
        local = Path(source).expanduser()
        return str(local) if local.exists() else source


def _encoding(prompts: ImagePrompts, kind: ReferenceKind, image: Image) -> Callable[[], Encoded]:
    return lambda: Encoded({"halves": prompts.encode(kind, image)}, {})
