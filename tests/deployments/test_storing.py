"""Files of an attempt: what they say of themselves, and how they lie in the object store."""

import io
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from db.blobs import BlobStore, UrlSigner
from db.queue import Claim
from deployments.settings import Settings, SettingsError
from deployments.storing import BUCKET, Marking, Storing, encode
from models.generation import Generation
from models.media import read_manifest, read_xmp
from models.origin.fingerprint import Fingerprint
from models.origin.manifest import Manifest, Origin, xmp
from models.origin.pixels import decode, pixel_hash
from models.params import GenerationParams
from tests.models.signing import issue

PROMPT = "a very private lighthouse"


def origin(**changes: Any) -> Origin:
    params = {"prompt": PROMPT, "seed": 1, "num_images": 3, "width": 16, "height": 16, "frames": 1, "steps": 2}
    values: dict[str, Any] = {
        "job_id": "job-1",
        "attempt": 1,
        "params": GenerationParams(**params, guidance_scale=5.0, scheduler="euler"),
        "original_prompt": PROMPT,
        "enhanced_prompt": None,
        "model_name": "tiny",
        "device": "cpu",
        "fingerprint": Fingerprint("r", {"unet.safetensors": "b" * 64}),
    }
    return Origin(**(values | changes))


def pictures(count: int = 2) -> Generation:
    noise = np.random.default_rng(2).integers(0, 256, (count, 16, 16, 3)).astype("uint8")
    seeds = list(range(1, count + 1))
    return Generation([Image.fromarray(one) for one in noise], None, None, seeds, {"seeds": seeds}, {})


def video() -> Generation:
    frames = np.random.default_rng(2).integers(0, 256, (5, 32, 48, 3)).astype("uint8")
    return Generation(None, frames, 16, [9], {}, {})


async def test_discard_deletes_the_files_of_its_attempt_and_no_other() -> None:
    blobs = BlobStore.from_url("memory://")
    storing = Storing(blobs, UrlSigner(b"s" * 32, "http://127.0.0.1"), 60)
    told = origin(original_prompt="a child at the beach")
    job = {"id": str(uuid4()), "user_id": str(uuid4()), "params": told.params.model_dump(mode="json")}
    job |= {"original_prompt": told.original_prompt, "enhanced_prompt": told.enhanced_prompt}
    claims = [Claim(job, attempt, failures=0, max_attempts=3) for attempt in (1, 2, 10)]
    files = encode(pictures(), told, Marking())
    for claim in claims:
        assets = await storing.put(claim, files, {"steps": 4}, "tiny", lambda: None)
        assert [asset.settings for asset in assets] == [{"steps": 4, "content_signs": {"minors": 2, "sexual": 0}}] * 2

    await storing.discard(claims[0])

    left = {info.key.split("/")[2] async for info in blobs.list(BUCKET)}
    assert left == {"2", "10"}


@pytest.mark.parametrize("generation", [pictures(), video()])
def test_a_file_carries_the_manifest_of_its_row(generation: Generation) -> None:
    files = encode(generation, origin(), Marking())
    assert len(files) == len(generation.seeds)
    for index, file in enumerate(files):
        text = read_manifest(file.data)
        assert text is not None
        assert Manifest.model_validate_json(text) == file.manifest
        assert json.loads(text) == file.manifest.model_dump(mode="json")
        assert (file.manifest.asset_index, file.manifest.seed) == (index, file.seed)
        assert file.manifest.media_type == file.facts.mime_type
        assert PROMPT.encode() not in file.data


@pytest.mark.parametrize("generation", [pictures(), video()])
def test_the_manifest_has_the_hash_of_the_decoded_file(generation: Generation) -> None:
    hashes = [file.manifest.pixels.sha256 for file in encode(generation, origin(), Marking())]
    assert hashes == [pixel_hash(decode(file.data)) for file in encode(generation, origin(), Marking(xmp()))]
    assert len(set(hashes)) == len(hashes)


def test_the_manifest_of_a_video_has_the_hash_of_what_went_into_the_encoder() -> None:
    generation = video()
    (file,) = encode(generation, origin(), Marking())
    assert file.manifest.pixels.source_sha256 == pixel_hash(generation.frames)
    assert (file.manifest.pixels.width, file.manifest.pixels.height, file.manifest.pixels.frames) == (48, 32, 5)


@pytest.mark.parametrize(("provenance", "packet"), [("none", None), ("iptc", xmp())])
def test_files_are_marked_as_the_settings_say(tmp_path: Path, provenance: str, packet: str | None) -> None:
    marking = Marking.of(Settings(state_dir=tmp_path, provenance=provenance))
    for generation in (pictures(1), video()):
        (file,) = encode(generation, origin(), marking)
        assert read_xmp(file.data) == packet


def test_files_are_signed_last_and_probed_as_they_are_stored(tmp_path: Path) -> None:
    c2pa = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")
    signing = issue(tmp_path)
    settings = Settings(
        state_dir=tmp_path, provenance="c2pa", c2pa_certificate=signing.certificate, c2pa_key=signing.key
    )
    marking = Marking.of(settings)
    for generation in (pictures(1), video()):
        (file,) = encode(generation, origin(), marking)
        with c2pa.Reader(file.facts.mime_type, io.BytesIO(file.data)) as reader:
            assert reader.get_validation_state() == "Valid"
        assert file.facts.size_bytes == len(file.data)
        assert file.manifest.pixels.sha256 == pixel_hash(decode(file.data))
        assert read_xmp(file.data) == xmp()


def test_nothing_goes_unsigned_where_signing_is_asked_for(tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path, provenance="c2pa", c2pa_certificate=tmp_path / "none.pem", c2pa_key=tmp_path / "k.pem"
    )
    with pytest.raises(SettingsError, match=r"OURVIDZ_PROVENANCE=c2pa: .*none\.pem|c2pa-python"):
        Marking.of(settings)
