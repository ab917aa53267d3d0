"""Reference images: fetched, looked at and stored when a job is accepted, so that replicas read them from us and never
from the internet.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from db.blobs import StorageUnavailable
from deployments.destinations import EgressError
from deployments.storing import REFERENCE_BUCKET
from models.media import open_reference
from models.params import GenerationParams, Reference
from serve_app.api.problems import Problem
from serve_app.edge import Edge

FETCH_SECONDS = 20.0
TYPES = ("image/png", "image/jpeg", "image/webp")
# decoding a large reference takes a second and hundreds of megabytes: off the event loop, and few at a time
_decoding = asyncio.Semaphore(2)


async def keep_reference(edge: Edge, url: str, name: str, params: GenerationParams) -> tuple[GenerationParams, str]:
    """Fetch and store a reference under `name` with the ending of its type.

    Returns the parameters that speak of the stored file, and its key. Raises `Problem`, `InvalidInput`.
    """
    assert params.reference is not None
    settings = edge.settings
    try:
        fetched = await edge.egress.fetch(url, settings.max_reference_bytes, FETCH_SECONDS, TYPES)
    except EgressError as error:
        raise Problem(422, error.code, str(error), field="reference_image_url") from None
    async with _decoding:
        await asyncio.to_thread(
            open_reference, fetched.data, settings.max_reference_pixels, settings.max_reference_bytes
        )
    key = f"{name}.{fetched.content_type.partition('/')[2]}"
    await edge.blobs.put(REFERENCE_BUCKET, key, fetched.data, fetched.content_type)
    reference = Reference(**(params.reference.model_dump() | {"bucket": REFERENCE_BUCKET, "key": key}))
    return params.model_copy(update={"reference": reference}), key


async def forget_references(edge: Edge, keys: Sequence[str]) -> None:
    """Delete references that no job speaks of. Where the store is away, the sweep does it."""
    if keys:
        with contextlib.suppress(StorageUnavailable):
            await edge.blobs.delete(REFERENCE_BUCKET, list(keys))
