"""Profiles: which models an installation serves, from where, on which hardware, and what they need.

A profile is a YAML file, by name from `configs/profiles/` or by path. Reading one loads no weights, and
`fits` and `weights_present` answer from figures and files alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.catalog import FAMILIES, Family, FamilyDefaults, default_for
from models.denoising.acceleration import Acceleration
from models.guiding.guides import ControlNet, ImageToVideo, IpAdapter
from models.guiding.reference import Method, Methods, ReferenceKind
from models.guiding.steering import FAMILY_METHODS
from models.lora.loras import LoraName, LoraSource
from models.weights import guide_present, located

TINY = "tiny"
_MEDIA_FAMILIES = (Family.SDXL, Family.WAN, Family.RV51)

_ENGINE_FIELDS = ("slots", "state_steps", "hosted_by")
_GUIDES = ("ip_adapter", "controlnet", "image_to_video")
_LORA_FIELDS = ("loras", "lora_cache_gib", "mix_loras")

# Fields that a family's loader has no use for; a profile that sets one is refused, not half obeyed.
_NOT_OF = {
    Family.SDXL: {"image_to_video"},
    Family.RV51: {"image_to_video", "ip_adapter", "controlnet"},
    Family.WAN: {"single_file", "vae", "ip_adapter", "controlnet"},
    Family.QWEN: {
        "single_file",
        "vae",
        "variant",
        "vae_slicing",
        "vae_tiling",
        "offload",
        "attention",
        *_LORA_FIELDS,
        *_ENGINE_FIELDS,
        *_GUIDES,
    },
}

_LANGUAGE_ONLY = {"backend", "sequences", "cache_tokens"}


class ModelSpec(BaseModel):
    """One model of a profile: its weights, how they are held and run, and the room they take.

    `source` is a Hugging Face repository, a local path, or "tiny" (random weights built on the spot). A
    `single_file` is one checkpoint file inside the source. `vae` names a repository whose VAE replaces the
    checkpoint's; with `vae_slicing` a batch is decoded picture by picture, with `vae_tiling` a large picture tile
    by tile, which needs less memory and shows seams at worst. `memory_gib` is the peak on the device (0 where it
    runs on the CPU), `disk_gib` the download. `offload` "model" keeps on the device only the part that runs.
    `attention` is the kernel tried first. `acceleration` holds the switches of `models.denoising.acceleration`.
    `num_gpus` is the share of one card that the scheduler reserves. The language model's `backend` writes up to
    `sequences` answers at a time, which share a cache of `cache_tokens` tokens. `loras` are those that requests may
    name beside the ones in production in the training registry; `lora_cache_gib`, a part of `memory_gib`, is the room
    for loaded ones, and without it there are none; with `mix_loras`, requests with different ones share a forward. A
    replica runs up to `slots` jobs at a time; every `state_steps` steps a job's state is stored, 0 for never. A model
    that is `hosted_by` another family has no replicas of its own but shares the engine of
    that one's, step by step. `ip_adapter`, `controlnet` and `image_to_video` let references steer it; their weights
    are a part of `memory_gib` and `disk_gib`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    family: Family
    model_name: str
    source: str
    revision: str | None = None
    single_file: str | None = None
    variant: str | None = None
    vae: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    offload: Literal["none", "model"] = "none"
    attention: Literal["default", "cudnn", "flash", "efficient"] = "default"
    vae_slicing: bool = False
    vae_tiling: bool = False
    acceleration: Acceleration = Field(default_factory=Acceleration)
    defaults: FamilyDefaults | None = None
    memory_gib: float = Field(ge=0)
    disk_gib: float = Field(ge=0)
    num_gpus: float = Field(default=0, ge=0, le=1)
    slots: int = Field(default=1, ge=1, le=64)
    state_steps: int = Field(default=0, ge=0, le=100)
    hosted_by: Family | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    sequences: int = Field(default=16, ge=1, le=256)
    cache_tokens: int = Field(default=8192, ge=1024)
    loras: Mapping[LoraName, LoraSource] = Field(default={})
    lora_cache_gib: float = Field(default=0, ge=0)
    mix_loras: bool = True
    ip_adapter: IpAdapter | None = None
    controlnet: ControlNet | None = None
    image_to_video: ImageToVideo | None = None

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if (self.defaults is None) is (self.family in _MEDIA_FAMILIES):
            raise ValueError(f"{self.family}: media families have defaults, the language model has none")
        if self.device == "cpu" and (self.num_gpus or self.offload != "none" or self.dtype == "float16"):
            raise ValueError(f"{self.family}: on the CPU there is no GPU share, no offload and no float16")
        if self.device == "cpu" and self.attention != "default":
            raise ValueError(f"{self.family}: the attention kernels to choose from are those of a card")
        if self.device == "cuda" and not (self.num_gpus and self.memory_gib):
            raise ValueError(f"{self.family}: a model on a card states num_gpus and memory_gib")
        used = self.model_fields_set - {"family", "defaults"}
        not_of = _NOT_OF.get(self.family, set()) | (set() if self.family is Family.QWEN else _LANGUAGE_ONLY)
        if unused := sorted(used & not_of):
            raise ValueError(f"{self.family}: {', '.join(unused)} would have no effect")
        if self.backend == "vllm" and (self.device != "cuda" or self.source == TINY):
            raise ValueError(f"{self.family}: the backend vllm needs a card and real weights")
        if self.loras and not self.lora_cache_gib:
            raise ValueError(f"{self.family}: loras need lora_cache_gib")
        if not self.lora_cache_gib and "mix_loras" in self.model_fields_set:
            raise ValueError(f"{self.family}: mix_loras would have no effect without lora_cache_gib")
        if self.lora_cache_gib and (unfit := self.acceleration.refuses_loras()):
            raise ValueError(f"{self.family}: loras: {unfit}")
        if self.device == "cuda" and self.lora_cache_gib >= self.memory_gib:
            raise ValueError(f"{self.family}: lora_cache_gib is a part of memory_gib")
        if unfit := self._unfit_guides():
            raise ValueError(f"{self.family}: {unfit}")
        if self.source == TINY and (self.single_file or self.vae or self.variant or self.revision):
            raise ValueError(f"{self.family}: tiny weights have no revision, variant, single_file or vae")
        if refused := self.acceleration.refusals(self.family, self.device, self.dtype, self.offload):
            raise ValueError(f"{self.family}: acceleration: {'; '.join(refused)}")
        return self

    @property
    def reference_methods(self) -> Methods:
        """How it runs each kind of reference that it takes."""
        facts = FAMILIES.get(self.family)
        methods: dict[ReferenceKind, Method] = {}
        if facts is not None and facts.takes_reference:
            methods |= FAMILY_METHODS
        if self.ip_adapter is not None:
            methods |= dict.fromkeys(self.ip_adapter.files, "ip_adapter")
        if self.controlnet is not None:
            methods["composition"] = "controlnet"
        if self.image_to_video is not None:
            methods |= self.image_to_video.methods
        return methods

    @property
    def guides(self) -> dict[str, IpAdapter | ControlNet | ImageToVideo]:
        """The weights beside the checkpoint, by the name of their field."""
        named = {name: getattr(self, name) for name in _GUIDES}
        return {name: guide for name, guide in named.items() if guide is not None}

    def _unfit_guides(self) -> str | None:
        if any((guide.source == TINY) is not (self.source == TINY) for guide in self.guides.values()):
            return "tiny weights and real ones do not go together"
        if self.ip_adapter is not None and self.acceleration.fuse_qkv:
            return "ip_adapter: fuse_qkv replaces the attention that the adapters are a part of"
        if self.image_to_video is not None and self.offload != "none":
            return "image_to_video: with offload, the parts that both checkpoints share would be moved by both"
        return None


class Profile(BaseModel):
    """What one installation serves. `laptop` relaxes what only a public installation needs (secrets, TLS)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    description: str
    laptop: bool = False
    nsfw_allowed: bool = False
    models: Mapping[Family, ModelSpec] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _complete_models(cls, raw: Any) -> Any:
        """Each entry learns its family from its key, and its `defaults` are changes to the specification's."""
        if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
            return raw
        models: dict[Any, Any] = {}
        for name, entry in raw["models"].items():
            if isinstance(entry, dict):
                entry = {**entry, "family": name}
                if name in _MEDIA_FAMILIES:
                    entry["defaults"] = default_for(Family(name)).with_overrides(entry.get("defaults") or {})
            models[name] = entry
        return {**raw, "models": models}

    @model_validator(mode="after")
    def _hosts_exist(self) -> Self:
        for family, spec in self.models.items():
            if spec.hosted_by is None:
                continue
            host = self.models.get(spec.hosted_by)
            if host is None or host.hosted_by is not None or host.family not in _MEDIA_FAMILIES:
                raise ValueError(
                    f"{family}: hosted_by names another media model of the profile with replicas of its own"
                )
            if host.device != spec.device:
                raise ValueError(f"{family}: a model and its host are on the same device")
            if host.attention != spec.attention:
                raise ValueError(f"{family}: a model and its host share the process's attention kernels")
        return self

    def hosted(self, family: Family) -> list[Family]:
        """The families whose models one replica of this family holds: its own, and those that it is the host of."""
        return [family, *(other for other, spec in self.models.items() if spec.hosted_by is family)]


def profile_names() -> list[str]:
    """The names of the profiles that come with the project."""
    folder = files("configs") / "profiles"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile of that name, or the one in that file (anything with a path separator or a .yaml ending).

    Raises `FileNotFoundError` naming the known profiles, and `ValueError` for a file that is no profile.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        content = Path(text).expanduser().read_text(encoding="utf-8")
    elif text in profile_names():
        content = (files("configs") / "profiles" / f"{text}.yaml").read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"no profile {text!r}; known: {', '.join(profile_names())}, or give a path")
    raw = yaml.safe_load(content)
    if not isinstance(raw, dict):
        raise ValueError(f"{text}: a profile is a mapping")
    return Profile.model_validate(raw)


def resolve_weights(spec: ModelSpec, state_folder: Path) -> Path | str:
    """What a model class takes as `weights`: a local folder or file, or the name of a repository.

    Builds the tiny checkpoint under `state_folder` if that is what the spec asks for; downloads nothing.
    """
    if spec.source == TINY:
        from models.samples.tiny import ensure_tiny

        return ensure_tiny(spec.family.value, state_folder)
    local = _local_path(spec)
    return spec.source if local is None else local


def weights_present(spec: ModelSpec) -> str | None:
    """Where the weights lie on this machine, or None if they would have to be downloaded. Uses no network.

    "tiny" for weights that are built on the spot. A download that broke off counts as absent.
    """
    if spec.source == TINY:
        return TINY
    if spec.vae is not None and located(spec.vae) is None:
        return None
    if any(not guide_present(guide) for guide in spec.guides.values()):
        return None
    return located(spec.source, spec.revision, spec.variant, spec.single_file)


def _local_path(spec: ModelSpec) -> Path | None:
    path = Path(spec.source).expanduser()
    return path if path.exists() else None


@dataclass(frozen=True)
class Card:
    """One accelerator of this machine."""

    name: str
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class FitReport:
    """Whether one model has room: `place` is the card's index, or None for the CPU or no place; `reason` says why."""

    family: Family
    model_name: str
    fits: bool
    place: int | None
    needed_gib: float
    reason: str


def fits(profile: Profile, cards: Iterable[Card]) -> list[FitReport]:
    """Places the profile's models on the cards, largest first, each on the first card with room for it.

    Room is free memory, and the card's share (`num_gpus` sums to at most 1 a card). Pure arithmetic on the
    profile's figures; nothing is loaded or asked. One report per model, in the profile's order.
    """
    cards = list(cards)
    free = [(card.free_gib, 1.0) for card in cards]
    reports: dict[Family, FitReport] = {}
    for spec in sorted(profile.models.values(), key=lambda spec: spec.memory_gib, reverse=True):
        place, reason = None, "runs on the CPU"
        on_cpu = spec.device == "cpu" or (spec.device == "auto" and not cards)
        if not on_cpu:
            # shares such as 0.4 and 0.6 do not sum to exactly 1
            room = (gib >= spec.memory_gib and share + 1e-9 >= spec.num_gpus for gib, share in free)
            place = next((number for number, enough in enumerate(room) if enough), None)
            reason = _why_no_card(spec, cards, free)
        if place is not None:
            gib, share = free[place]
            free[place] = (gib - spec.memory_gib, share - spec.num_gpus)
            reason = f"card {place} ({cards[place].name}), {free[place][0]:.1f} GiB left"
        reports[spec.family] = FitReport(
            family=spec.family,
            model_name=spec.model_name,
            fits=on_cpu or place is not None,
            place=place,
            needed_gib=0.0 if on_cpu else spec.memory_gib,
            reason=reason,
        )
    return [reports[family] for family in profile.models]


def _why_no_card(spec: ModelSpec, cards: list[Card], free: list[tuple[float, float]]) -> str:
    if not cards:
        return "there is no card"
    largest = max(card.total_gib for card in cards)
    if largest < spec.memory_gib:
        return f"needs {spec.memory_gib:g} GiB, the largest card has {largest:.1f}"
    left = ", ".join(f"{gib:.1f} GiB and {max(share, 0):.2g} of card {i}" for i, (gib, share) in enumerate(free))
    return f"needs {spec.memory_gib:g} GiB and {spec.num_gpus:g} of a card; left: {left}"
