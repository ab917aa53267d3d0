"""What SDXL and WAN have in common: loading a diffusers pipeline onto a device and running one request on it.

Each request gets a shallow copy of the pipeline with a scheduler of its own: schedulers keep state from
`set_timesteps` on (`init_noise_sigma`, the history of multistep solvers), and the pipelines keep the guidance of
the current call as attributes. Weights are shared by all copies. In the place of denoiser and VAE a copy has stand-ins,
which leave it to the request's `Control` how and when their work is done.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from models.denoising.acceleration import Applied, apply, warm
from models.denoising.costs import Costs
from models.denoising.denoiser import AsideStandIn, StandIn, forget_context
from models.denoising.embeddings import Embeddings
from models.denoising.guidance import guidance_interval
from models.denoising.measuring import measured
from models.denoising.resumption import identity_of
from models.denoising.stopwatch import Stopwatch
from models.generation import (
    Control,
    Generation,
    GenerationRequest,
    InvalidInput,
    ModelLoadFailed,
)
from models.lora.adapters import Adapters, Lease
from models.lora.files import ProfileLoras
from models.origin.fingerprint import sample
from models.origin.libraries import library_versions, quiet_libraries
from models.params import GenerationParams
from models.profile import ModelSpec

SEED_RANGE = 2**63
DENOISERS = ("unet", "transformer", "transformer_2")


class PipelineModel(ABC):
    """A `models.generation.Model` around one diffusers pipeline. `loaded` is False until `load` has returned.

    `weights` is a folder, a checkpoint file or a repository name; see `models.profile.resolve_weights`.
    """

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        self.spec = spec
        self.weights = weights
        self.model_name = spec.model_name
        self.revision = spec.revision
        self.device: str = spec.device
        self.loaded = False
        self._pipeline: Any = None
        self._embeddings = Embeddings()
        self._applied = Applied(spec.acceleration)
        self.adapters: Adapters | None = None  # once loaded
        self.registry = ProfileLoras(spec.loras)
        self._active = 0
        self._sample = ""  # of the files, once loaded

    def load(self) -> None:
        """Loads the weights onto the device, downloading them if they are not here. Raises `ModelLoadFailed`."""
        import torch

        quiet_libraries()
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelLoadFailed(f"{self.model_name}: the profile asks for a CUDA device and there is none")
        unfit = self.spec.dtype == "float16" or self.spec.offload != "none" or self.spec.attention != "default"
        if self.device == "cpu" and unfit:
            raise ModelLoadFailed(f"{self.model_name}: float16, offload and attention kernels need a card")
        if isinstance(self.weights, Path) and not self.weights.exists():
            raise ModelLoadFailed(f"{self.model_name}: there is nothing at {self.weights}")
        try:
            pipeline = self._load_pipeline(getattr(torch, self.spec.dtype))
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadFailed(f"{self.model_name}: {type(error).__name__}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        if self.spec.vae_slicing:
            pipeline.vae.enable_slicing()
        if self.spec.vae_tiling:
            pipeline.vae.enable_tiling()
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            # the pipelines would cast it to and fro for each request, under the feet of the others
            pipeline.vae.to(torch.float32)
        if self.spec.offload == "none":
            pipeline.to(self.device)
        self._applied = apply(pipeline, self.spec.acceleration, self.spec.family, self.device, self.spec.dtype)
        if self.spec.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        self._pipeline = pipeline
        self.adapters = self._make_adapters(pipeline)
        try:
            self._sample = sample(self.spec, self.weights)
        except (OSError, ValueError):  # what can't be told apart from other weights is resumed by this load alone
            self._sample = secrets.token_hex(16)
        self.loaded = True

    def warm_up(self) -> None:
        """One step at the default size, so that the first job does not pay for lazy initialisation."""
        import torch

        defaults = self.spec.defaults
        assert defaults is not None  # a spec of a media family always has them
        with self.session(), torch.no_grad():  # compiled graphs are for the kernels and the grad mode that they meet
            self._applied = warm(self._pipeline, self._applied, defaults.sizes[:2], defaults.frames or 1)
        self.generate(self.sample_request(frames=1), Control())

    def measure(self, folder: Path | None) -> Costs:
        """What a forward costs here, by rows: from the file of an earlier start, or measured now."""
        return measured(self, folder)

    def sample_request(self, frames: int | None = None) -> GenerationRequest:
        """One unguided step at the default size."""
        defaults = self.spec.defaults
        assert defaults is not None  # a spec of a media family always has them
        params = GenerationParams(
            prompt="warm up",
            seed=0,
            num_images=1,
            width=defaults.width,
            height=defaults.height,
            frames=frames or defaults.frames or 1,
            fps=defaults.fps,
            steps=1,
            guidance_scale=1.0,
            scheduler=defaults.scheduler,
            shift=defaults.shift,
        )
        return GenerationRequest("warm-up", params)

    def steered_samples(self) -> list[GenerationRequest]:
        """The sample with each reference that changes what a step is made of."""
        return []

    def generate(self, request: GenerationRequest, control: Control) -> Generation:
        """Runs one request to its pictures. Raises `InvalidInput` before any work where it can't be run."""
        import torch

        if not self.loaded:
            raise ModelLoadFailed(f"{self.model_name} is not loaded")
        if request.params.seed is None:
            raise InvalidInput("the request has no seed")
        watch = Stopwatch(control, request, inline=self.spec.offload != "none")
        self._active += 1
        try:
            with torch.no_grad(), self._lease(request.params, watch) as lease:
                watch.adapters = lease.adapters
                # what a step cache has kept is in no state, so a run with one begins anew
                cached = self.spec.acceleration.step_cache is not None
                if (request.states is not None or request.resume is not None) and not cached:
                    model = [*self._identity(), lease.adapters]
                    watch.identity = identity_of(request.params, request.files, request.batch_size, model)
                    watch.read_state(request.resume)
                generation = self._generate(request, watch)
                generation.settings["loras"] = lease.settings
                return generation
        finally:
            self._active -= 1
            for module in (getattr(pipeline, name, None) for pipeline in self._pipelines() for name in DENOISERS):
                if module is not None and getattr(module, "is_cache_enabled", False):
                    forget_context(module, watch.name)
            if self.spec.offload != "none" and self._active == 0:
                self._pipeline.maybe_free_model_hooks()

    def _pipelines(self) -> list[Any]:
        """All that have denoisers of their own."""
        return [self._pipeline]

    def _make_adapters(self, pipeline: Any) -> Adapters:
        # compiled code would be compiled anew for each new mixture
        mixes = self.spec.mix_loras and self.spec.acceleration.compile == "none"
        room = round(self.spec.lora_cache_gib * 2**30)
        adapters = Adapters(pipeline, self.registry, room, mixes=mixes)
        adapters.fetch_all()
        return adapters

    def _lease(self, params: GenerationParams, watch: Stopwatch) -> Lease:
        assert self.adapters is not None  # made by load()
        adapters = self.adapters
        fetched = {}
        if params.loras:  # files are read aside; what changes modules must happen between forwards, so on this thread
            fetched = watch.aside(lambda: adapters.fetch(params.loras), "files")
        return adapters.acquire(params.loras, fetched)

    @abstractmethod
    def _load_pipeline(self, dtype: Any) -> Any:
        """The diffusers pipeline with its weights in host memory."""

    @abstractmethod
    def _generate(self, request: GenerationRequest, watch: Stopwatch) -> Generation:
        """The family's own way from a request to pictures."""

    def _own(self, pipeline: Any, scheduler: Any, request: GenerationRequest, watch: Stopwatch) -> Any:
        """The copy of a pipeline that one request runs."""
        own = copy.copy(pipeline)
        # written past the pipeline's own __setattr__, which would take the stand-ins down in its configuration
        parts = own.__dict__
        parts["scheduler"] = scheduler
        parts["_all_hooks"] = []  # or a request that ends would offload the modules under the others
        for name in DENOISERS:
            module = parts.get(name)
            if module is not None:
                mixes = self.adapters is None or self.adapters.mixes
                alone = request.params.reproducible
                own_parts: dict[str, Any] = {"alone": alone, "adapters": watch.adapters, "mixes": mixes}
                parts[name] = StandIn(module, watch, watch.name, **own_parts, prompts=watch.prompts)
        parts["vae"] = AsideStandIn(pipeline.vae, watch, ("encode", "decode"))
        for name, method in (("image_processor", "postprocess"), ("video_processor", "postprocess_video")):
            if name in parts:
                parts[name] = AsideStandIn(parts[name], watch, (method,))
        return own

    def _call(self, own: Any, params: GenerationParams, arguments: dict[str, Any], settings: dict[str, Any]) -> Any:
        """Run the copy with its arguments, guided in the part of its steps that is asked for, or of the profile."""
        interval = params.guidance_interval or self.spec.acceleration.guidance_interval
        if params.guidance_scale <= 1:
            interval = None
        settings["guidance_interval"] = interval
        return own(**(guidance_interval(own, arguments, *interval) if interval else arguments))

    def _identity(self) -> list[Any]:
        """What the bits of a result depend on beside the request: the files as they were loaded, and how they run."""
        spec = self.spec
        fields = {"source", "dtype", "variant", "single_file", "vae", "vae_tiling", "vae_slicing", "attention"}
        how = spec.model_dump(mode="json", include=fields | {"acceleration"})
        guides = {name: guide.model_dump(mode="json") for name, guide in spec.guides.items()}
        return [self.model_name, self.revision, self._sample, self.device, how, dict(library_versions()), guides]

    def forward_rows(self, request: GenerationRequest) -> int:
        """All images of a batch, and each once more where guidance compares with a second branch."""
        params = request.params
        images = min(request.batch_size or params.num_images, params.num_images)
        return images * (2 if params.guidance_scale > 1 else 1)

    def session(self) -> contextlib.AbstractContextManager[Any]:
        """Scaled dot product attention with the spec's kernel first; the others stay for shapes it can't do.

        The preference is the process's, not a thread's: it is set once around all generations.
        """
        if self.spec.attention == "default":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernels = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        wanted = kernels.pop(self.spec.attention)
        order = [wanted, *kernels.values(), SDPBackend.MATH]
        context: contextlib.AbstractContextManager[Any] = sdpa_kernel(order, set_priority=True)
        return context

    def _public_source(self) -> str:
        """The repository, or the last part of a local path: callers need not know the folders of the server."""
        local = Path(self.spec.source).expanduser()
        return local.name if local.exists() else self.spec.source

    def _settings(self, pipeline: Any, params: GenerationParams) -> dict[str, Any]:
        """The part of a generation's settings that every family records."""
        return {
            "model": self.model_name,
            "source": self._public_source(),
            "revision": self.revision,
            "pipeline": type(pipeline).__name__,
            "width": params.width,
            "height": params.height,
            "num_images": params.num_images,
            "frames": params.frames,
            "steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "negative_prompt_used": bool(params.negative_prompt) and params.guidance_scale > 1,
            "scheduler": params.scheduler,
            "scheduler_class": type(pipeline.scheduler).__name__,
            "seed": params.seed,
            "device": self.device,
            "dtype": self.spec.dtype,
            "offload": self.spec.offload,
            "attention": self.spec.attention,
            "vae_tiling": self.spec.vae_tiling,
            "acceleration": self._applied.settings(),
            "libraries": dict(library_versions()),
        }


def seeds_from(seed: int, count: int) -> list[int]:
    """The seed of each image of a batch: seed, seed + 1, ..., wrapping to 0 after the largest."""
    return [(seed + number) % SEED_RANGE for number in range(count)]


def generators(seeds: list[int]) -> list[Any]:
    """One generator for each seed. On the CPU also for a card, so that the noise does not depend on the hardware."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
