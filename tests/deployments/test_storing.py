"""Files of an attempt in the object store."""

from uuid import uuid4

from PIL import Image

from db.blobs import BlobStore, UrlSigner
from db.queue import Claim
from deployments.storing import BUCKET, Storing, encode
from models.engine import Generation


async def test_discard_deletes_the_files_of_its_attempt_and_no_other() -> None:
    blobs = BlobStore.from_url("memory://")
    storing = Storing(blobs, UrlSigner(b"s" * 32, "http://127.0.0.1"), 60)
    image = Image.new("RGB", (16, 16))
    generation = Generation(images=[image, image], frames=None, fps=None, seeds=[1, 2], settings={}, timings_ms={})
    job = {"id": str(uuid4()), "user_id": str(uuid4())}
    claims = [Claim(job, attempt, failures=0, max_attempts=3) for attempt in (1, 2, 10)]
    for claim in claims:
        await storing.put(claim, encode(generation, "tiny"), {}, "tiny", lambda: None)

    await storing.discard(claims[0])

    left = {info.key.split("/")[2] async for info in blobs.list(BUCKET)}
    assert left == {"2", "10"}
