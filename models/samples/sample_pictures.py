"""Sample pictures: requests with references, by which a model is warmed and measured."""

from __future__ import annotations

import io
from dataclasses import replace

from models.generation import GenerationRequest
from models.guiding.reference import MIN_STRENGTH, Reference, ReferenceKind, StoredImage


def with_sample(request: GenerationRequest, *kinds: ReferenceKind) -> GenerationRequest:
    """The same request with a white picture for each of these kinds, none of which is an image to start from."""
    references = tuple(Reference.model_validate({"bucket": "-", "key": "-", "kind": kind}) for kind in kinds)
    params = request.params.model_copy(update={"references": references})
    return replace(request, params=params, guides=dict.fromkeys(kinds, _white()))


def sample_mask(request: GenerationRequest) -> GenerationRequest:
    """The same request as one that repaints a white picture."""
    reference = Reference(bucket="-", key="-", strength=MIN_STRENGTH, mask=StoredImage(bucket="-", key="-"))
    # of two steps one is run
    params = request.params.model_copy(update={"steps": 2, "references": (reference,)})
    return replace(request, params=params, reference=_white(), mask=_white())


def _white() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, format="PNG")
    return buffer.getvalue()
