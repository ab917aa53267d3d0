import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.media import MANIFEST_KEY, describe_mp4, encode_mp4, encode_png, probe, read_manifest, read_xmp
from models.origin.manifest import TRAINED_ALGORITHMIC_MEDIA, xmp
from models.origin.pixels import decode
from models.origin.provenance import ContentSigner, SigningUnavailable
from tests.models.signing import Signing, issue

c2pa = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return issue(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def signer(signing: Signing) -> ContentSigner:
    return ContentSigner.load(signing.certificate, signing.key, "es256")


def a_file(kind: str) -> bytes:
    text = {MANIFEST_KEY: '{"a": 1}'}
    if kind == "image/png":
        return encode_png(Image.new("RGB", (32, 24), "teal"), text, xmp())
    frames = np.random.default_rng(1).integers(0, 256, (5, 32, 48, 3)).astype("uint8")
    return describe_mp4(encode_mp4(frames, 16), text, xmp())


@pytest.mark.parametrize("kind", ["image/png", "video/mp4"])
def test_a_signed_file_is_valid_and_says_that_a_model_made_it(signer: ContentSigner, kind: str) -> None:
    signed = signer.sign(a_file(kind), kind, "tiny-sdxl")
    with c2pa.Reader(kind, io.BytesIO(signed)) as reader:
        assert reader.get_validation_state() == "Valid"
        manifest = reader.get_active_manifest()
    assert manifest["signature_info"]["common_name"] == "Signer"
    assert manifest["claim_generator_info"][0]["name"] == "ourvidz-serve"
    (actions,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    assert actions[0]["action"] == "c2pa.created"
    assert actions[0]["digitalSourceType"] == TRAINED_ALGORITHMIC_MEDIA
    assert "tiny-sdxl" in json.dumps(actions[0])


@pytest.mark.parametrize("kind", ["image/png", "video/mp4"])
def test_signing_leaves_pixels_and_metadata_as_they_are(signer: ContentSigner, kind: str) -> None:
    plain = a_file(kind)
    signed = signer.sign(plain, kind, "tiny")
    assert np.array_equal(decode(plain), decode(signed))
    assert (read_manifest(signed), read_xmp(signed)) == ('{"a": 1}', xmp())
    assert probe(signed).mime_type == kind
    assert len(signed) - len(plain) < 20_000, "no thumbnail is put in"


@pytest.mark.parametrize("kind", ["image/png", "video/mp4"])
def test_a_file_that_was_changed_is_no_longer_valid(signer: ContentSigner, kind: str) -> None:
    signed = bytearray(signer.sign(a_file(kind), kind, "tiny"))
    place = signed.index(b'{"a": 1}')
    signed[place + 6] = ord("2")
    with c2pa.Reader(kind, io.BytesIO(bytes(signed))) as reader:
        assert reader.get_validation_state() == "Invalid"


def test_a_key_of_another_certificate_is_refused(signing: Signing, tmp_path: Path) -> None:
    other = issue(tmp_path)
    with pytest.raises(SigningUnavailable, match="certificate and key"):
        ContentSigner.load(signing.certificate, other.key, "es256")


@pytest.mark.parametrize("which", ["certificate", "key"])
def test_a_missing_file_is_named(signing: Signing, tmp_path: Path, which: str) -> None:
    files = {"certificate": signing.certificate, "key": signing.key} | {which: tmp_path / "nothing.pem"}
    with pytest.raises(SigningUnavailable, match=r"nothing\.pem"):
        ContentSigner.load(**files, algorithm="es256")


@pytest.mark.parametrize("which", ["certificate", "key"])
def test_what_is_no_certificate_or_key_is_refused(signing: Signing, tmp_path: Path, which: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("a secret that is not a key")
    files = {"certificate": signing.certificate, "key": signing.key} | {which: bad}
    with pytest.raises(SigningUnavailable) as caught:
        ContentSigner.load(**files, algorithm="es256")
    assert "a secret" not in str(caught.value)


def test_an_algorithm_that_does_not_fit_the_key_is_refused(signing: Signing) -> None:
    with pytest.raises(SigningUnavailable):
        ContentSigner.load(signing.certificate, signing.key, "ed25519")


def test_without_the_package_it_says_what_to_install(signing: Signing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(SigningUnavailable, match="c2pa-python is not installed"):
        ContentSigner.load(signing.certificate, signing.key, "es256")
