import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from pydantic import ValidationError

from models.generation import Generation
from models.guiding.reference import StoredImage
from models.origin.fingerprint import Fingerprint
from models.origin.manifest import (
    TRAINED_ALGORITHMIC_MEDIA,
    Difference,
    Manifest,
    Origin,
    Pixels,
    describe,
    differences,
    xmp,
)
from models.params import GenerationParams, Reference

PROMPT, ENHANCED, NEGATIVE = "a very private lighthouse", "a red mill on a hill", "nothing blurry"
PIXELS = Pixels(sha256="a" * 64, width=64, height=48)


def params(**changes: Any) -> GenerationParams:
    values = {
        "prompt": ENHANCED,
        "negative_prompt": NEGATIVE,
        "seed": 7,
        "num_images": 3,
        "width": 64,
        "height": 48,
        "frames": 1,
        "steps": 4,
        "guidance_scale": 6.0,
        "scheduler": "euler",
        "previews": True,
    }
    return GenerationParams(**values | changes)


@pytest.fixture
def origin() -> Origin:
    return Origin(
        job_id="job-1",
        attempt=2,
        params=params(),
        original_prompt=PROMPT,
        enhanced_prompt=ENHANCED,
        model_name="paint",
        device="cpu",
        fingerprint=Fingerprint("c" * 40, {"unet.safetensors": "b" * 64}),
    )


@pytest.fixture
def generation() -> Generation:
    settings = {
        "model": "paint",
        "source": "someone/paint",
        "steps": 4,
        "width": 64,
        "scheduler": "euler",
        "scheduler_class": "EulerDiscreteScheduler",
        "dtype": "float32",
        "fallback_used": False,
        "prompt": ENHANCED,
        "seeds": [7, 8, 9],
        "libraries": {"torch": "0"},
        "loras": [{"name": "ink", "sha256": "d" * 64, "weight": 0.5}],
    }
    image = Image.new("RGB", (64, 48))
    return Generation([image] * 3, None, None, [7, 8, 9], settings, {"total": 1.0})


def made(origin: Origin, generation: Generation, index: int = 1) -> Manifest:
    return describe(origin, generation, index, "image/png", PIXELS)


def test_the_manifest_says_what_the_pixels_depend_on(origin: Origin, generation: Generation) -> None:
    manifest = made(origin, generation)
    assert (manifest.job_id, manifest.attempt, manifest.asset_index, manifest.seed) == ("job-1", 2, 1, 8)
    assert (manifest.model.name, manifest.model.source, manifest.model.revision) == ("paint", "someone/paint", "c" * 40)
    assert manifest.model.files == {"unet.safetensors": "b" * 64}
    assert list(manifest.model.loras) == [{"name": "ink", "sha256": "d" * 64, "weight": 0.5}]
    assert manifest.parameters["steps"] == 4
    assert manifest.parameters["scheduler"] == "euler"
    assert manifest.used["scheduler_class"] == "EulerDiscreteScheduler"
    assert manifest.used["fallback_used"] is False
    assert set(manifest.libraries) >= {"torch", "diffusers", "transformers", "numpy", "pillow", "av"}
    assert (manifest.device.type, manifest.device.capability != "") == ("cpu", True)
    assert manifest.digital_source_type == TRAINED_ALGORITHMIC_MEDIA


def test_the_manifest_holds_prompts_by_reference_only(origin: Origin, generation: Generation) -> None:
    manifest = made(origin, generation)
    text = manifest.model_dump_json()
    for prompt in (PROMPT, ENHANCED, NEGATIVE):
        assert prompt not in text
        assert hashlib.sha256(prompt.encode()).hexdigest() in text
    without = made(replace(origin, enhanced_prompt=None, params=params(negative_prompt="")), generation)
    assert (without.prompts.enhanced, without.prompts.negative) == (None, None)


def test_a_reference_is_told_by_its_bytes_and_not_by_its_place(origin: Origin, generation: Generation) -> None:
    reference = Reference(bucket="reference_images", key="user-17/r.png", strength=0.25, kind="style")
    manifest = made(replace(origin, params=params(references=(reference,)), files={"style": b"picture"}), generation)
    digest = hashlib.sha256(b"picture").hexdigest()
    assert manifest.parameters["references"] == {"style": {"sha256": digest, "strength": 0.25, "asked_as": None}}
    assert "user-17" not in manifest.model_dump_json()


def test_a_mask_is_told_by_its_bytes_as_well(origin: Origin, generation: Generation) -> None:
    mask = StoredImage(bucket="reference_images", key="user-17/r.mask.png")
    reference = Reference(bucket="reference_images", key="user-17/r.png", mask=mask)
    repainted = replace(origin, params=params(references=(reference,)), files={"image": b"picture", "mask": b"mask"})
    manifest = made(repainted, generation)
    assert manifest.parameters["references"]["image"]["mask_sha256"] == hashlib.sha256(b"mask").hexdigest()
    assert "user-17" not in manifest.model_dump_json()


def test_no_value_stands_in_two_places(origin: Origin, generation: Generation) -> None:
    manifest = made(origin, generation)
    assert not set(manifest.used) & (set(manifest.parameters) | {"model", "source", "libraries", "loras", "prompt"})
    changed = made(origin, replace(generation, settings=generation.settings | {"steps": 5}))
    assert (changed.parameters["steps"], changed.used["steps"]) == (4, 5), "what was used otherwise is told"


def test_the_manifest_survives_json(origin: Origin, generation: Generation) -> None:
    manifest = made(origin, generation)
    assert differences(manifest, Manifest.model_validate_json(manifest.model_dump_json())) == []
    assert differences(manifest, Manifest.model_validate(json.loads(manifest.model_dump_json()))) == []


def test_a_manifest_of_another_version_is_refused(origin: Origin, generation: Generation) -> None:
    document = made(origin, generation).model_dump(mode="json")
    with pytest.raises(ValidationError):
        Manifest.model_validate(document | {"manifest_version": 2})


def test_two_runs_of_one_job_do_not_differ(origin: Origin, generation: Generation) -> None:
    again = describe(
        replace(origin, job_id="job-2", attempt=5),
        generation,
        1,
        "image/png",
        PIXELS.model_copy(update={"sha256": "e"}),
    )
    assert differences(made(origin, generation), again) == []


def test_differences_name_what_differs(origin: Origin, generation: Generation) -> None:
    before = made(origin, generation)
    other = replace(
        origin, params=params(steps=5), fingerprint=Fingerprint("c" * 40, {"unet.safetensors": "f" * 64, "x": "1"})
    )
    settings = generation.settings | {
        "dtype": "float16",
        "loras": [{"name": "ink", "sha256": "d" * 64, "weight": 0.75}],
    }
    after = made(other, replace(generation, settings=settings))
    found = differences(before, after)
    assert set(found) == {
        Difference("parameters.steps", 4, 5),
        Difference("used.steps", None, 4),  # these settings were of four steps
        Difference("used.dtype", "float32", "float16"),
        Difference("model.files.unet.safetensors", "b" * 64, "f" * 64),
        Difference("model.files.x", None, "1"),
        Difference("model.loras.ink.weight", 0.5, 0.75),
    }


def test_the_xmp_packet_names_the_source_type() -> None:
    packet = xmp()
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    body = packet.partition("?>")[2].rpartition("<?")[0]
    tree = ElementTree.fromstring(body)  # noqa: S314 - of our own making
    (description,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.attrib[name] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_the_reference_names_every_field(origin: Origin, generation: Generation) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/manifest.md").read_text(encoding="utf-8")
    for name, value in made(origin, generation).model_dump().items():
        parts = [f"{name}.{part}" for part in value] if name in ("pixels", "prompts", "model") else [name]
        for part in parts:
            assert f"`{part}`" in page, part
