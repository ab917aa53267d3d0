"""The manifest of a file: everything that its pixels depend on, so that it can be made again or told why not.

It travels inside the file and stands in the file's row. Files get shared, so it holds no prompt and no name of a user:
prompts are there as SHA-256, and the job's id leads whoever may read the job to their text. A short prompt can be found
from its hash by guessing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.generation import Generation
from models.guiding.reference import Reference
from models.origin.fingerprint import Fingerprint
from models.params import GenerationParams

SOFTWARE = "ourvidz-serve"
# https://cv.iptc.org/newscodes/digitalsourcetype: every pixel comes out of the model, with a reference too
TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# whose version may change a pixel, on its way through the model or into the file
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "torchao",
    "compel",
    "numpy",
    "pillow",
    "av",
)
_ELSEWHERE = {
    "model",
    "source",
    "revision",
    "device",
    "libraries",
    "loras",
    "seed",
}  # settings with a place of their own
_INCIDENTAL = ("job_id", "attempt", "created_at", "pixels")  # what two runs differ in, or what is to be explained


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Pixels(_Part):
    """What the file shows. `sha256` is over the decoded file, see `models.origin.pixels.pixel_hash`.

    `source_sha256` is over the frames of a video before it was encoded; None for pictures, which lose nothing.
    """

    sha256: str
    source_sha256: str | None = None
    width: int
    height: int
    frames: int = 1


class PromptHashes(_Part):
    """SHA-256 of the UTF-8 of each prompt, whose texts are in the job. Where there is an enhanced one, it was used."""

    original: str
    enhanced: str | None = None
    negative: str | None = None


class UsedModel(_Part):
    """The weights. `files` maps names in the checkpoint to SHA-256; `files_error` says why there are none."""

    name: str
    source: str | None = None
    revision: str | None = None
    files: Mapping[str, str]
    files_error: str | None = None
    loras: tuple[Mapping[str, Any], ...] = ()


class Device(_Part):
    """What computed it. Kernels, and with them the last bits of a result, depend on all of this."""

    type: str
    name: str
    capability: str
    runtime: Mapping[str, str] = Field(default_factory=dict)


class Manifest(_Part):
    """One file's manifest. `parameters` is what the job asked for; `used` is what the run says beyond that."""

    manifest_version: Literal[1] = 1
    software: str = SOFTWARE
    software_version: str
    digital_source_type: str = TRAINED_ALGORITHMIC_MEDIA
    job_id: str
    attempt: int
    asset_index: int
    created_at: datetime
    media_type: str
    pixels: Pixels
    seed: int
    prompts: PromptHashes
    parameters: Mapping[str, Any]
    used: Mapping[str, Any]
    model: UsedModel
    libraries: Mapping[str, str]
    device: Device


@dataclass(frozen=True)
class Origin:
    """The run that a file comes from. `files` holds the bytes of its references by their kinds, and of a "mask"."""

    job_id: str
    attempt: int
    params: GenerationParams
    original_prompt: str
    enhanced_prompt: str | None
    model_name: str
    device: str
    fingerprint: Fingerprint
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One value that two manifests do not agree on, by its dotted name."""

    field: str
    before: Any
    after: Any


def describe(origin: Origin, generation: Generation, index: int, media_type: str, pixels: Pixels) -> Manifest:
    """The manifest of one file of a generation. The first call in a process takes a while: off the event loop."""
    settings, params = generation.settings, origin.params
    asked = params.model_dump(mode="json", exclude={"prompt", "negative_prompt", "previews"})
    if params.compel_weights is not None and params.compel_weights.terms:
        # words of the prompt, of which a manifest has no more than a hash
        asked["compel_weights"]["terms"] = _text_hash(repr(params.compel_weights.terms))
    asked["references"] = {one.kind: _reference(one, origin.files) for one in params.references}
    beyond = {name: value for name, value in settings.items() if name not in asked or asked[name] != value}
    print_of = origin.fingerprint
    return Manifest(
        software_version=importlib.metadata.version(SOFTWARE),
        job_id=origin.job_id,
        attempt=origin.attempt,
        asset_index=index,
        created_at=datetime.now(UTC),
        media_type=media_type,
        pixels=pixels,
        seed=generation.seeds[index],
        prompts=PromptHashes(
            original=_text_hash(origin.original_prompt),
            enhanced=_text_hash(origin.enhanced_prompt) if origin.enhanced_prompt else None,
            negative=_text_hash(params.negative_prompt) if params.negative_prompt else None,
        ),
        parameters=asked,
        used={name: value for name, value in beyond.items() if name not in _ELSEWHERE | {"prompt", "negative_prompt"}},
        model=UsedModel(
            name=origin.model_name,
            source=settings.get("source"),
            revision=print_of.revision,
            files=print_of.files,
            files_error=print_of.error,
            loras=tuple(settings.get("loras") or ()),
        ),
        libraries=_versions(),
        device=_device(origin.device),
    )


def differences(before: Manifest, after: Manifest) -> list[Difference]:
    """Everything recorded that could make two files differ, in the order of the manifest. Job, attempt, time and the
    pixels themselves are left out."""
    old, new = _flat(before), _flat(after)
    names = [name for name in {**old, **new} if name.partition(".")[0] not in _INCIDENTAL]
    return [Difference(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def xmp(source_type: str = TRAINED_ALGORITHMIC_MEDIA) -> str:
    """An XMP packet that says by IPTC's `DigitalSourceType` where the media comes from."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        '  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"\n'
        f'   Iptc4xmpExt:DigitalSourceType="{source_type}"/>\n'
        " </rdf:RDF>\n"
        "</x:xmpmeta>\n"
        '<?xpacket end="w"?>'
    )


def _flat(manifest: Manifest) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else key, inner)
        elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
            for item in value:
                walk(name, {item["name"]: {key: inner for key, inner in item.items() if key != "name"}})
        else:
            flat[name] = value

    walk("", manifest.model_dump(mode="json"))
    return flat


def _reference(reference: Reference, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Where it is stored names the user; what it shows is what matters."""
    told = {"sha256": _hash(files.get(reference.kind))} | reference.model_dump(include={"strength", "asked_as"})
    return told if reference.mask is None else told | {"mask_sha256": _hash(files.get("mask"))}


def _hash(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _versions() -> Mapping[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _device(kind: str) -> Device:
    import torch

    runtime = {"matmul_precision": torch.get_float32_matmul_precision(), "python": platform.python_version()}
    if kind.startswith("cuda"):
        about = torch.cuda.get_device_properties(kind)
        runtime |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        return Device(type="cuda", name=about.name, capability=f"{about.major}.{about.minor}", runtime=runtime)
    # sums are split among threads, and so may end in other last bits
    runtime |= {"threads": str(torch.get_num_threads())}
    name = f"{platform.machine()} {platform.processor()}".strip()
    return Device(type=kind, name=name, capability=torch.backends.cpu.get_cpu_capability(), runtime=runtime)
