"""From a generation to stored files: encode, look at what was encoded, put it into the object store.

Files go under a key with the attempt in it, before any row speaks of them; so a late replica can't overwrite the
winner's file, and what a loser left is found by its key.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, Self, TypeVar
from uuid import UUID, uuid4

import structlog

from db.blobs import BlobStore, StorageUnavailable, UrlSigner
from db.queue import Claim, NewAsset
from deployments.settings import Settings, SettingsError
from models.engine import Generation, GenerationError, GenerationFailed
from models.media import MANIFEST_KEY, describe_mp4, encode_mp4, encode_png, probe, thumbnail
from models.moderation import ClassifierUnavailable, ContentRefused, Decision, Judge, Judgement, load_classifier
from models.origin.manifest import SOFTWARE, Manifest, Origin, Pixels, describe, xmp
from models.origin.pixels import decode, pixel_hash, samples_of
from models.origin.provenance import ContentSigner, SigningUnavailable
from models.policy import signs_kept
from models.prompting.signs import ACCOUNT, Signs

log = structlog.get_logger()

T = TypeVar("T")

BUCKET = "workspace-temp"  # results, under the attempt that made them
REFERENCE_BUCKET = "reference_images"
PROBES = "probes"  # in BUCKET, where nothing of a user is
PATIENCE_SECONDS = 60.0  # for a store that is away, with the finished work in hand
RETRY_SECONDS = (0.2, 1.0, 2.0, 4.0)  # between the tries; the last one over and over


class StorageFailed(GenerationError):
    """The object store was away for longer than a run waits for it. Nothing was made known, and no failure counted."""

    code = "storage_unavailable"
    retryable = True


@dataclass(frozen=True)
class EncodedFile:
    """One output as bytes, with its thumbnail and the facts that decoding showed."""

    asset_type: str
    extension: str
    data: bytes
    thumbnail: bytes
    facts: Any
    seed: int | None  # None where nobody knows it
    manifest: Manifest | None  # None where an outside provider made it
    judgement: Judgement | None = None  # of the operator's classifier, where there is one


@dataclass(frozen=True)
class Marking:
    """What files say of where they come from, beside their manifest: an XMP packet, and a signature."""

    xmp: str | None = None
    signer: ContentSigner | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings want it. Blocking. Raises `SettingsError` where files would have to go unsigned."""
        if settings.provenance != "c2pa":
            return cls(xmp() if settings.provenance == "iptc" else None)
        assert settings.c2pa_certificate is not None  # checked with the settings
        assert settings.c2pa_key is not None
        try:
            signer = ContentSigner.load(settings.c2pa_certificate, settings.c2pa_key, settings.c2pa_algorithm)
        except SigningUnavailable as error:
            raise SettingsError(f"OURVIDZ_PROVENANCE=c2pa: {error}") from error
        return cls(xmp(), signer)

    def signed(self, data: bytes, mime_type: str, model_name: str) -> bytes:
        """The file as it may leave the house."""
        return data if self.signer is None else self.signer.sign(data, mime_type, model_name)


def encode(generation: Generation, origin: Origin, marking: Marking) -> list[EncodedFile]:
    """Encode what a model made, with its manifest inside, and look at what came out. Blocking; run it off the event
    loop."""
    if generation.frames is not None:
        return [_encode_video(generation, generation.frames, origin, marking)]
    return [_encode_image(generation, index, origin, marking) for index in range(len(generation.images or []))]


def _encode_image(generation: Generation, index: int, origin: Origin, marking: Marking) -> EncodedFile:
    assert generation.images is not None
    image = generation.images[index]
    made = Pixels(sha256=pixel_hash(samples_of(image)), width=image.width, height=image.height)
    manifest = describe(origin, generation, index, "image/png", made)
    data = encode_png(image, _texts(manifest), marking.xmp)
    data = marking.signed(data, manifest.media_type, origin.model_name)
    return EncodedFile("image", "png", data, thumbnail(image), probe(data), manifest.seed, manifest)


def _encode_video(generation: Generation, frames: Any, origin: Origin, marking: Marking) -> EncodedFile:
    data = encode_mp4(frames, generation.fps or 16)
    count, height, width = frames.shape[:3]
    made = Pixels(
        sha256=pixel_hash(decode(data)), source_sha256=pixel_hash(frames), width=width, height=height, frames=count
    )
    manifest = describe(origin, generation, 0, "video/mp4", made)
    data = describe_mp4(data, _texts(manifest), marking.xmp)
    data = marking.signed(data, manifest.media_type, origin.model_name)
    return EncodedFile("video", "mp4", data, thumbnail(frames), probe(data), manifest.seed, manifest)


def _texts(manifest: Manifest) -> dict[str, str]:
    return {"Software": SOFTWARE, "Model": manifest.model.name, MANIFEST_KEY: manifest.model_dump_json()}


@dataclass(frozen=True)
class Finishing:
    """From what a model made to files that may be stored: judged, marked, encoded."""

    marking: Marking
    judge: Judge | None = None
    keep_rejected: bool = True

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings want it. Blocking. Raises `SettingsError` where a signer or a classifier is not to be had."""
        marking, path = Marking.of(settings), settings.image_classifier
        if path is None:
            return cls(marking)
        try:
            return cls(marking, Judge(load_classifier(path)), settings.on_reject == "hold")
        except ClassifierUnavailable as error:
            raise SettingsError(f"OURVIDZ_IMAGE_CLASSIFIER: {error}") from error

    def files(self, generation: Generation, origin: Origin) -> list[EncodedFile]:
        """Blocking; run it off the event loop. Raises `ContentRefused` for what is not kept, and `GenerationFailed`."""
        judgements: list[Judgement | None] = [None] * (1 if generation.images is None else len(generation.images))
        if self.judge is not None:
            judgements = [*self.judge.judge(generation)]
        for judgement in judgements:
            if judgement is not None and judgement.decision is Decision.REJECT and not self.keep_rejected:
                raise ContentRefused("the installation's classifier rejects what was made")
        try:
            files = encode(generation, origin, self.marking)
        except Exception as error:
            raise GenerationFailed(f"encoding failed: {type(error).__name__}") from error
        return [replace(file, judgement=judgement) for file, judgement in zip(files, judgements, strict=True)]


class Storing:
    """Puts encoded files into the object store and describes them.

    `away` says that the store failed when it was last tried; whoever begins work that will be stored should ask
    `is_back` first.
    """

    def __init__(
        self,
        blobs: BlobStore,
        signer: UrlSigner,
        callback_url_seconds: int,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """A store that is away is tried again for `patience_seconds`, counted anew for each attempt of a job."""
        self._blobs, self._signer, self._url_seconds = blobs, signer, callback_url_seconds
        self._patience = patience_seconds
        self.away = False

    async def put(
        self,
        claim: Claim,
        files: Sequence[EncodedFile],
        settings: dict[str, Any],
        model_name: str,
        stop: Callable[[], None],
    ) -> list[NewAsset]:
        """Store the files of one attempt; `stop` is called before every try and may raise. Raises `StorageFailed`.

        With the settings of each are kept the signs of what it was made from, for whatever is made from it.
        """
        settings = settings | {ACCOUNT: (await asyncio.to_thread(_signs, claim.job)).model_dump()}
        until = time.monotonic() + self._patience
        prefix = attempt_prefix(claim.job["user_id"], claim.job_id, claim.attempt)
        assets = []
        for index, file in enumerate(files):
            key, thumbnail_key = f"{prefix}{index}.{file.extension}", f"{prefix}{index}.thumb.webp"
            for name, data, kind in (
                (key, file.data, file.facts.mime_type),
                (thumbnail_key, file.thumbnail, "image/webp"),
            ):
                await self._patiently(partial(self._blobs.put, BUCKET, name, data, kind), until, stop)
            assets.append(
                NewAsset(
                    id=uuid4(),
                    asset_index=index,
                    asset_type=file.asset_type,
                    key=key,
                    thumbnail_key=thumbnail_key,
                    mime_type=file.facts.mime_type,
                    file_size_bytes=file.facts.size_bytes,
                    width=file.facts.width,
                    height=file.facts.height,
                    frames=file.facts.frames,
                    fps=file.facts.fps,
                    duration_seconds=file.facts.duration_seconds,
                    seed=file.seed,
                    model_used=model_name,
                    settings=settings,
                    manifest=None if file.manifest is None else file.manifest.model_dump(mode="json"),
                    moderation_status=file.judgement.status if file.judgement else "pending",
                    moderation_reason=file.judgement.reason if file.judgement else None,
                )
            )
        stop()
        return assets

    async def read(self, bucket: str, key: str, stop: Callable[[], None]) -> bytes:
        """A blob that a job needs, as patiently. Raises `BlobNotFound`, `StorageFailed`."""
        until = time.monotonic() + self._patience
        return await self._patiently(partial(self._blobs.get, bucket, key), until, stop)

    async def _patiently(self, work: Callable[[], Awaitable[T]], until: float, stop: Callable[[], None]) -> T:
        waits = chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1]))
        while True:
            stop()
            try:
                done = await work()
            except StorageUnavailable as error:
                self.away = True
                left = until - time.monotonic()
                if left <= 0:
                    raise StorageFailed("the object store is not available") from error
                log.warning("store_retried", seconds_left=round(left, 1))
                await asyncio.sleep(min(next(waits), left))
            else:
                self.away = False
                return done

    async def is_back(self, name: str) -> bool:
        """Try a store that was away with a small file of that name, which is deleted again."""
        try:
            await self._blobs.put(BUCKET, f"{PROBES}/{name}.json", b"{}", "application/json")
            await self._blobs.delete(BUCKET, [f"{PROBES}/{name}.json"])
        except StorageUnavailable:
            return False
        self.away = False
        return True

    async def discard(self, claim: Claim) -> None:
        """Delete what this attempt stored, because nothing will speak of it. Best effort; a sweep finds the rest."""
        prefix = attempt_prefix(claim.job["user_id"], claim.job_id, claim.attempt)
        try:
            keys = [info.key async for info in self._blobs.list(BUCKET, prefix.removesuffix("/"))]
            await self._blobs.delete(BUCKET, keys)
        except StorageUnavailable:
            log.warning("discard_failed", job_id=str(claim.job_id), attempt=claim.attempt)

    def references(self, assets: Sequence[NewAsset]) -> list[dict[str, Any]]:
        """The assets as a callback carries them: where they lie, a signed URL, and facts. Never media."""
        return [
            {
                "id": str(asset.id),
                "type": asset.asset_type,
                "bucket": BUCKET,
                "key": asset.key,
                "url": self._signer.sign(BUCKET, asset.key, self._url_seconds),
                "thumbnail_key": asset.thumbnail_key,
                "thumbnail_url": self._signer.sign(BUCKET, asset.thumbnail_key, self._url_seconds)
                if asset.thumbnail_key
                else None,
                "metadata": {
                    "asset_index": asset.asset_index,
                    "mime_type": asset.mime_type,
                    "format": asset.key.rpartition(".")[2],
                    "width": asset.width,
                    "height": asset.height,
                    "frames": asset.frames,
                    "fps": asset.fps,
                    "duration_seconds": asset.duration_seconds,
                    "file_size_bytes": asset.file_size_bytes,
                    "seed": asset.seed,
                    "steps": asset.settings.get("steps"),
                    "guidance_scale": asset.settings.get("guidance_scale"),
                },
            }
            for asset in assets
        ]


def attempt_prefix(user_id: object, job_id: UUID, attempt: int) -> str:
    """Where the files of one attempt lie in the bucket `workspace-temp`."""
    return f"{user_id}/{job_id}/{attempt}/"


def _signs(job: Mapping[str, Any]) -> Signs:
    return signs_kept(job["params"], job["original_prompt"], job["enhanced_prompt"])
