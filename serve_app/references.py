"""References and their masks: found, read, looked at and copied when a job is accepted, so that replicas read them from
us and never from the internet, and so that a job keeps its own whatever becomes of the picture that it was given.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from db.access import Principal
from db.blobs import BlobNotFound, StorageUnavailable
from deployments.destinations import EgressError
from deployments.egress import Fetched
from deployments.storing import REFERENCE_BUCKET
from models.generation import InvalidInput
from models.guiding.masks import open_mask
from models.guiding.reference import Reference, ReferenceKind, StoredImage
from models.media import open_reference
from models.origin.pixels import pixel_hash, samples_of
from models.params import FieldError, InvalidParams
from models.policy import NO_SIGNS
from models.prompting.signs import Signs
from serve_app.api.problems import Problem
from serve_app.edge import Edge
from serve_app.sources import Inside, Source, locate

FETCH_SECONDS = 20.0
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}  # by the endings of keys
# decoding a large reference takes a second and hundreds of megabytes: off the event loop, and few at a time
_decoding = asyncio.Semaphore(2)

SINGLE = MappingProxyType(
    {
        "image": "reference_image_url",
        "kind": "reference_type",
        "strength": "reference_strength",
        "mask": "mask_image_url",
    }
)
"""What a caller knows the parts of a single reference by."""
LISTED = MappingProxyType({"image": "image", "kind": "type", "strength": "strength", "mask": "mask"})
"""The same of one in a list."""


@dataclass(frozen=True, kw_only=True)
class AskedReference:
    """A reference as the caller gave it. `image` and `mask` are what `serve_app.sources` reads; `names` says which
    fields of the request the parts came from."""

    image: str
    kind: ReferenceKind | None = None
    strength: float | None = None
    mask: str | None = None
    names: Mapping[str, str] = field(default_factory=lambda: SINGLE)


@dataclass(frozen=True)
class Located:
    """A reference whose picture has been found, and not read yet."""

    asked: AskedReference
    image: Source
    mask: Source | None


def single_reference(
    image: str | None, kind: ReferenceKind | None, strength: float | None, mask: str | None
) -> tuple[AskedReference, ...]:
    """The one reference of a request, or none. Raises `InvalidParams` for parts of one that is not there."""
    if image is not None:
        return (AskedReference(image=image, kind=kind, strength=strength, mask=mask),)
    given = {"strength": strength, "kind": kind, "mask": mask}
    errors = [
        FieldError(SINGLE[part], "needs a reference_image_url", "conflict")
        for part, value in given.items()
        if value is not None
    ]
    if errors:
        raise InvalidParams(errors)
    return ()


async def locate_references(edge: Edge, user: Principal, asked: Sequence[AskedReference]) -> tuple[Located, ...]:
    """Find what the references are. Raises as `locate` does."""
    found = []
    for one in asked:
        image = await locate(edge, user, one.image, one.names["image"])
        mask = None if one.mask is None else await locate(edge, user, one.mask, one.names["mask"])
        found.append(Located(one, image, mask))
    return tuple(found)


async def keep_references(
    edge: Edge, located: Sequence[Located], name: str, references: Sequence[Reference], *, made_here: bool
) -> tuple[Reference, ...]:
    """Read references and store them under `name`, those after the first under `name.ref1` and so on; the mask of each
    under its name and `.mask`. All with the endings of their types.

    Returns the references that speak of the stored files. Nothing is stored before all that was read could be opened.
    With `made_here` a picture must be, pixel by pixel, what its row says that a model made. Raises `Problem`,
    `StorageUnavailable`.
    """
    files: dict[str, Fetched] = {}
    kept = []
    for place, (one, reference) in enumerate(zip(located, references, strict=True)):
        stem = f"{name}.ref{place}" if place else name
        image, mask = await _opened(edge, one, made_here)
        key = f"{stem}.{_ending(image)}"
        files[key] = image
        signs = one.image.signs if isinstance(one.image, Inside) else NO_SIGNS
        changes = {"bucket": REFERENCE_BUCKET, "key": key, "signs": signs}
        stored_mask = None
        if mask is not None:
            stored_mask = StoredImage(bucket=REFERENCE_BUCKET, key=f"{stem}.mask.{_ending(mask)}")
            files[stored_mask.key] = mask
        kept.append(reference.model_copy(update={**changes, "mask": stored_mask}))
    try:
        for key, file in files.items():
            await edge.blobs.put(REFERENCE_BUCKET, key, file.data, file.content_type)
    except StorageUnavailable:
        await forget_references(edge, list(files))
        raise
    return tuple(kept)


async def _opened(edge: Edge, one: Located, made_here: bool) -> tuple[Fetched, Fetched | None]:
    """The bytes of a reference and its mask, once both could be opened."""
    settings, names = edge.settings, one.asked.names
    limits = (settings.max_reference_pixels, settings.max_reference_bytes)
    image = await _read(edge, one.image, names["image"])
    async with _decoding:
        try:
            picture = await asyncio.to_thread(open_reference, image.data, *limits)
        except InvalidInput as error:
            raise Problem(422, error.code, error.message, field=names["image"]) from None
        if made_here and not await asyncio.to_thread(lambda: _is_as_made(one.image, pixel_hash(samples_of(picture)))):
            raise not_made_here(names["image"])
    if one.mask is None:
        return image, None
    mask = await _read(edge, one.mask, names["mask"])
    try:
        async with _decoding:
            await asyncio.to_thread(open_mask, mask.data, *limits, picture.size)
    except InvalidInput as error:
        raise Problem(422, error.code, error.message, field=names["mask"]) from None
    return image, mask


def signs_shown(located: Sequence[Located]) -> Signs:
    """The signs of all that the references were made from."""
    signs = NO_SIGNS
    for one in located:
        signs |= one.image.signs if isinstance(one.image, Inside) else NO_SIGNS
    return signs


def check_made_here(located: Sequence[Located]) -> None:
    """Raise `Problem` for a reference of which no row says that a model made it from words, or from what it so made."""
    for one in located:
        if not (isinstance(one.image, Inside) and one.image.made_here):
            raise not_made_here(one.asked.names["image"])


def check_sfw(located: Sequence[Located]) -> None:
    """Raise `Problem` for a reference that was made in nsfw mode: what is made from it would pass for sfw."""
    for one in located:
        if isinstance(one.image, Inside) and one.image.nsfw:
            message = "a picture that was made in nsfw mode is no reference of an sfw job"
            raise Problem(403, "reference_not_allowed", message, field=one.asked.names["image"])


def not_made_here(name: str) -> Problem:
    """The refusal of a reference in nsfw mode."""
    message = "in nsfw mode a reference must be an image that this system made"
    return Problem(403, "reference_not_allowed", message, field=name)


def _is_as_made(source: Source, pixels: str) -> bool:
    """Whether the file shows what its manifest says. Where users reach the store by themselves, it may be another."""
    if not isinstance(source, Inside) or source.manifest is None:
        return False
    made = source.manifest.get("pixels")
    return isinstance(made, Mapping) and made.get("sha256") == pixels


async def _read(edge: Edge, source: Source, name: str) -> Fetched:
    try:
        if isinstance(source, Inside):
            data = await edge.blobs.get(source.bucket, source.key)
            return Fetched(data, _type_of(data))
        most = edge.settings.max_reference_bytes
        return await edge.egress.fetch(source.url, most, FETCH_SECONDS, tuple(TYPES.values()))
    except BlobNotFound:
        raise Problem(422, "reference_not_found", "the picture is gone", field=name) from None
    except EgressError as error:
        raise Problem(422, error.code, str(error), field=name) from None


def _type_of(data: bytes) -> str:
    """By its first bytes: a name that another system gave says nothing. What is none of the three can't be opened."""
    if data.startswith(b"\x89PNG"):
        return TYPES["png"]
    return TYPES["webp"] if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else TYPES["jpeg"]


def _ending(fetched: Fetched) -> str:
    return fetched.content_type.partition("/")[2]


async def copy_references(edge: Edge, references: Sequence[Reference], name: str) -> tuple[Reference, ...]:
    """References with files of their own under `name`, since erasing one job must not take them from another.

    Raises `BlobNotFound` where one of them is no longer stored; then nothing was copied.
    """
    images = [image for one in references for image in ((one,) if one.mask is None else (one, one.mask))]
    held = {image.key: await edge.blobs.get(image.bucket, image.key) for image in images}
    copies = []
    for place, one in enumerate(references):
        stem = f"{name}.ref{place}" if place else name
        mask = one.mask and one.mask.model_copy(update={"key": f"{stem}.mask.{one.mask.key.rpartition('.')[2]}"})
        copy = one.model_copy(update={"key": f"{stem}.{one.key.rpartition('.')[2]}", "mask": mask})
        for old, new in zip(one.keys, copy.keys, strict=True):
            kind = TYPES.get(new.rpartition(".")[2], "application/octet-stream")
            await edge.blobs.put(REFERENCE_BUCKET, new, held[old], kind)
        copies.append(copy)
    return tuple(copies)


async def forget_references(edge: Edge, keys: Sequence[str]) -> None:
    """Delete references that no job speaks of. Where the store is away, the sweep does it."""
    if keys:
        with contextlib.suppress(StorageUnavailable):
            await edge.blobs.delete(REFERENCE_BUCKET, list(keys))
