"""What SDXL and WAN have in common: loading a diffusers pipeline onto a device and running one request on it.

Each request gets a shallow copy of the pipeline with a scheduler of its own: schedulers keep state from
`set_timesteps` on (`init_noise_sigma`, the history of multistep solvers), and the pipelines keep the guidance of
the current call as attributes. Weights are shared by all copies. In the place of denoiser and VAE a copy has stand-ins,
which leave it to the request's `Control` how and when their work is done.
"""

from __future__ import annotations

import contextlib
import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from models.costs import Costs
from models.denoiser import AsideStandIn, Call, StandIn
from models.embeddings import Embeddings
from models.generation import (
    Control,
    Generation,
    GenerationRequest,
    InvalidInput,
    ModelLoadFailed,
    Phase,
)
from models.lanes import LaneName
from models.libraries import library_versions, quiet_libraries
from models.measuring import measured
from models.params import GenerationParams
from models.preview import Snapshots
from models.profile import ModelSpec

T = TypeVar("T")

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
        self._active = 0

    def load(self) -> None:
        """Loads the weights onto the device, downloading them if they are not here. Raises `ModelLoadFailed`."""
        import torch

        quiet_libraries()
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelLoadFailed(f"{self.model_name}: the profile asks for a CUDA device and there is none")
        if self.device == "cpu" and (self.spec.dtype == "float16" or self.spec.offload != "none"):
            raise ModelLoadFailed(f"{self.model_name}: float16 and offload need a card")
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
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            # the pipelines would cast it to and fro for each request, under the feet of the others
            pipeline.vae.to(torch.float32)
        if self.spec.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        else:
            pipeline.to(self.device)
        self._pipeline = pipeline
        self.loaded = True

    def warm_up(self) -> None:
        """One step at the default size, so that the first job does not pay for lazy initialisation."""
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

    def generate(self, request: GenerationRequest, control: Control) -> Generation:
        """Runs one request to its pictures. Raises `InvalidInput` before any work where it can't be run."""
        import torch

        if not self.loaded:
            raise ModelLoadFailed(f"{self.model_name} is not loaded")
        if request.params.seed is None:
            raise InvalidInput("the request has no seed")
        watch = Stopwatch(control, request.snapshots, inline=self.spec.offload != "none")
        self._active += 1
        try:
            with torch.no_grad():
                return self._generate(request, watch)
        finally:
            self._active -= 1
            if self.spec.offload != "none" and self._active == 0:
                self._pipeline.maybe_free_model_hooks()

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
                parts[name] = StandIn(module, watch, request.job_id, alone=request.params.reproducible, adapters=())
        parts["vae"] = AsideStandIn(pipeline.vae, watch, ("encode", "decode"))
        for name, method in (("image_processor", "postprocess"), ("video_processor", "postprocess_video")):
            if name in parts:
                parts[name] = AsideStandIn(parts[name], watch, (method,))
        return own

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
            "libraries": dict(library_versions()),
        }


class Stopwatch:
    """Measures the phases of one generation while it reports them to the caller's `Control`, and its latents to
    `snapshots`. `inline` keeps everything on the calling thread."""

    def __init__(self, control: Control, snapshots: Snapshots | None = None, inline: bool = False) -> None:
        self._control = control
        self._snapshots = snapshots
        self._inline = inline
        self._phase: str | None = None
        self._batch, self._batches = 0, 1
        self._started = self._phase_started = time.perf_counter()
        self._timings_ms: dict[str, float] = {}

    def forward(self, call: Call) -> Any:
        return self._control.forward(call)

    def aside(self, work: Callable[[], T], lane: LaneName = "pixels") -> T:
        # parts that move between host and card can't be used by two threads
        return work() if self._inline else self._control.aside(work, lane)

    def phase(self, name: Phase) -> None:
        self._close_phase()
        self._phase = name
        self._control.phase(name)

    def batch(self, number: int, of: int) -> None:
        """The denoising of a batch begins, the first being 0: steps are counted through all of them."""
        self._batch, self._batches = number, of
        self.phase("denoise")

    def on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The `callback_on_step_end` of every diffusers pipeline; the decode begins after the last step."""
        done, of = index + 1, pipeline.num_timesteps
        through, all_steps = self._batch * of + done, self._batches * of
        self._control.step(through, all_steps)
        if self._snapshots is not None:
            self._snapshots.offer(tensors["latents"], through, all_steps)
        if done == of:
            self.phase("decode")
        return tensors

    def stop(self) -> dict[str, float]:
        """Wall time in milliseconds of each phase and of the whole."""
        self._close_phase()
        total = (time.perf_counter() - self._started) * 1000
        return {**self._timings_ms, "total": round(total, 3)}

    def _close_phase(self) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            before = self._timings_ms.get(self._phase, 0.0)
            self._timings_ms[self._phase] = round(before + (now - self._phase_started) * 1000, 3)
        self._phase, self._phase_started = None, now


def seeds_from(seed: int, count: int) -> list[int]:
    """The seed of each image of a batch: seed, seed + 1, ..., wrapping to 0 after the largest."""
    return [(seed + number) % SEED_RANGE for number in range(count)]


def generators(seeds: list[int]) -> list[Any]:
    """One generator for each seed. On the CPU also for a card, so that the noise does not depend on the hardware."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
