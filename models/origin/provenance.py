"""C2PA: a signed statement inside a file that an AI model made it. Optional: `pip install 'ourvidz-serve[c2pa]'`.

The certificate, its chain and the key are the operator's own. Files are signed last, as a signature covers every byte.
"""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path
from typing import Any, Literal, Self

from models.origin.manifest import SOFTWARE, TRAINED_ALGORITHMIC_MEDIA

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]


class SigningUnavailable(Exception):
    """Files can't be signed: the package is missing, or the certificate and key do not work. The message says which."""

    code = "signing_unavailable"


class ContentSigner:
    """Signs files by C2PA. May be called from any thread."""

    def __init__(self, chain: bytes, key: bytes, algorithm: Algorithm) -> None:
        self._chain, self._key, self._algorithm = chain, key, algorithm

    @classmethod
    def load(cls, certificate: Path, key: Path, algorithm: Algorithm) -> Self:
        """Reads the certificate chain (PEM, the signer's first, without the root if it is kept elsewhere) and the key
        (PEM, PKCS#8, without a passphrase), and signs a picture on trial. Raises `SigningUnavailable`."""
        try:
            import c2pa
        except ImportError as error:
            raise SigningUnavailable("the package c2pa-python is not installed (extra: c2pa)") from error
        try:
            signer = cls(certificate.read_bytes(), key.read_bytes(), algorithm)
        except OSError as error:
            raise SigningUnavailable(f"{error.filename} can't be read ({error.strerror})") from error
        try:
            signer._try()
        except c2pa.C2paError as error:
            # the library's words about the certificate; of a key it says what is wrong with its form, never its text
            raise SigningUnavailable(f"nothing can be signed with this certificate and key: {error}") from error
        return signer

    def sign(self, data: bytes, mime_type: str, model_name: str) -> bytes:
        """The file with a C2PA manifest in it. Its pixels and other metadata stay as they are."""
        import c2pa

        statement: dict[str, Any] = {
            "claim_generator_info": [{"name": SOFTWARE, "version": importlib.metadata.version(SOFTWARE)}],
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
                                "softwareAgent": {"name": model_name},
                            }
                        ]
                    },
                }
            ],
        }
        # no time stamp: it would need a server on the internet for every file
        info = c2pa.C2paSignerInfo(
            alg=self._algorithm.encode(), sign_cert=self._chain, private_key=self._key, ta_url=None
        )
        signed = io.BytesIO()
        # files would grow by a thumbnail of themselves
        settings = {"builder": {"thumbnail": {"enabled": False}}}
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(statement, context) as builder,
        ):
            builder.sign(signer, mime_type, io.BytesIO(data), signed)
        return signed.getvalue()

    def _try(self) -> None:
        import c2pa
        from PIL import Image

        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        signed = self.sign(picture.getvalue(), "image/png", "trial")
        with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
            # "Valid" is whole and signed by this certificate; "Trusted" would need a list of roots to trust
            if reader.get_validation_state() not in ("Valid", "Trusted"):
                raise c2pa.C2paError("the signature does not hold; does the key belong to the first certificate?")
