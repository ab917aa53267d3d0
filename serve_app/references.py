"""Reference images and their masks: fetched, looked at and stored when a job is accepted, so that replicas read them
from us and never from the internet.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from db.blobs import StorageUnavailable
from deployments.destinations import EgressError
from deployments.egress import Fetched
from deployments.storing import REFERENCE_BUCKET
from models.generation import InvalidInput
from models.masks import open_mask
from models.media import open_reference
from models.reference import Reference, StoredImage
from serve_app.api.problems import Problem
from serve_app.edge import Edge

FETCH_SECONDS = 20.0
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}  # by the endings of keys
# decoding a large reference takes a second and hundreds of megabytes: off the event loop, and few at a time
_decoding = asyncio.Semaphore(2)


async def keep_reference(edge: Edge, url: str, mask_url: str | None, name: str, reference: Reference) -> Reference:
    """Fetch and store a reference under `name`, and its mask under `name.mask`, with the endings of their types.

    Returns the reference that speaks of the stored files. Nothing is stored before all that was fetched could be
    opened. Raises `Problem`, `InvalidInput`.
    """
    settings = edge.settings
    limits = (settings.max_reference_pixels, settings.max_reference_bytes)
    fetched = await _fetch(edge, url, "reference_image_url")
    async with _decoding:
        size = (await asyncio.to_thread(open_reference, fetched.data, *limits)).size
    files = {f"{name}.{_ending(fetched)}": fetched}
    if mask_url is not None:
        mask = await _fetch(edge, mask_url, "mask_image_url")
        try:
            async with _decoding:
                await asyncio.to_thread(open_mask, mask.data, *limits, size)
        except InvalidInput as error:
            raise Problem(422, error.code, error.message, field="mask_image_url") from None
        files[f"{name}.mask.{_ending(mask)}"] = mask
    try:
        for key, file in files.items():
            await edge.blobs.put(REFERENCE_BUCKET, key, file.data, file.content_type)
    except StorageUnavailable:
        await forget_references(edge, list(files))
        raise
    places = [StoredImage(bucket=REFERENCE_BUCKET, key=key) for key in files]
    changes = {**places[0].model_dump(), "mask": places[1] if len(places) > 1 else None}
    return reference.model_copy(update=changes)


async def copy_reference(edge: Edge, reference: Reference, name: str) -> Reference:
    """A reference with files of its own under `name`, since erasing one job must not take them from another.

    Raises `BlobNotFound` where one of them is no longer stored.
    """
    images = [reference] if reference.mask is None else [reference, reference.mask]
    held = [await edge.blobs.get(image.bucket, image.key) for image in images]
    keys = []
    for image, stem, data in zip(images, (name, f"{name}.mask"), held, strict=False):
        ending = image.key.rpartition(".")[2]
        keys.append(f"{stem}.{ending}")
        await edge.blobs.put(image.bucket, keys[-1], data, TYPES.get(ending, "application/octet-stream"))
    mask = reference.mask and reference.mask.model_copy(update={"key": keys[1]})
    return reference.model_copy(update={"key": keys[0], "mask": mask})


async def _fetch(edge: Edge, url: str, field: str) -> Fetched:
    try:
        return await edge.egress.fetch(url, edge.settings.max_reference_bytes, FETCH_SECONDS, tuple(TYPES.values()))
    except EgressError as error:
        raise Problem(422, error.code, str(error), field=field) from None


def _ending(fetched: Fetched) -> str:
    return fetched.content_type.partition("/")[2]


async def forget_references(edge: Edge, keys: Sequence[str]) -> None:
    """Delete references that no job speaks of. Where the store is away, the sweep does it."""
    if keys:
        with contextlib.suppress(StorageUnavailable):
            await edge.blobs.delete(REFERENCE_BUCKET, list(keys))
