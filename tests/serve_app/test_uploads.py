"""Uploads through HTTP: what is taken, what is stored of it, and its limits."""

import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from db.uploads import MOST_UPLOADS, UPLOAD_BUCKET
from tests.serve_app.conftest import InProcess, in_process

PATH = "/v1/uploads"
MOST_BYTES, MOST_PIXELS = 60_000, 40_000


@pytest.fixture
async def server(database: Any, tmp_path: Path, state_dir: Path) -> AsyncIterator[InProcess]:
    """The API with small limits; the pictures may be larger than other bodies."""
    limits = {"max_reference_bytes": MOST_BYTES, "max_reference_pixels": MOST_PIXELS, "max_body_bytes": 2000}
    async with in_process(database, tmp_path, state_dir=state_dir, **limits) as opened:
        yield opened


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 20), mode: str = "RGB", **options: Any) -> bytes:
    image = Image.linear_gradient("L").resize(size)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    """A camera that was turned, and where it was."""
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees
    tags[0x010F] = "Camera"
    tags.get_ifd(0x8825)[2] = (48.0, 8.0, 14.0)
    return tags


async def send(client: httpx2.AsyncClient, data: bytes, kind: str = "image/png") -> httpx2.Response:
    return await client.post(PATH, content=data, headers={"Content-Type": kind})


async def stored(server: InProcess, upload: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(await server.blobs.get(upload["bucket"], upload["key"])))
    image.load()
    return image


async def files(server: InProcess) -> list[str]:
    return [info.key async for info in server.blobs.list(UPLOAD_BUCKET)]


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp")])
async def test_a_picture_is_stored_as_its_owners(
    server: InProcess, alice: httpx2.AsyncClient, kind: str, ending: str
) -> None:
    answer = await send(alice, picture(kind), f"image/{ending}")
    assert answer.status_code == 201, answer.text
    upload = answer.json()
    owner = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'alice'")
    assert upload["storage_path"] == f"reference_images/{owner}/uploads/{upload['id']}.{ending}"
    assert (upload["width"], upload["height"], upload["mime_type"]) == (40, 20, f"image/{ending}")
    image = await stored(server, upload)
    assert (image.format, image.size) == (kind, (40, 20))
    assert len(await server.blobs.get(upload["bucket"], upload["key"])) == upload["file_size_bytes"]
    nobody = await server.client()
    assert (await nobody.get(upload["url"])).headers["content-type"] == f"image/{ending}"


async def test_a_form_gives_the_same(server: InProcess, alice: httpx2.AsyncClient) -> None:
    answer = await alice.post(PATH, files={"file": ("my holiday.png", picture(), "text/plain")})
    assert answer.status_code == 201, answer.text
    assert "holiday" not in answer.json()["key"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_nothing_but_pixels_is_stored_and_they_are_upright(
    server: InProcess, alice: httpx2.AsyncClient, kind: str
) -> None:
    options: dict[str, Any] = {"comment": b"me"} if kind == "JPEG" else {}
    data = picture(kind, exif=exif(), **options) + b"<script>trailing</script>"
    upload = (await send(alice, data, "image/jpeg")).json()  # what it is shows when it is decoded
    image = await stored(server, upload)
    assert (image.format, image.size) == (kind, (20, 40))
    assert not image.getexif()
    assert not image.info.keys() & {"exif", "xmp", "comment", "XML:com.adobe.xmp"}
    kept = await server.blobs.get(upload["bucket"], upload["key"])
    assert b"Camera" not in kept
    assert b"script" not in kept


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
async def test_a_png_keeps_its_pixels_whatever_its_mode(
    server: InProcess, alice: httpx2.AsyncClient, mode: str
) -> None:
    data = picture(mode=mode)
    upload = (await send(alice, data)).json()
    expected = Image.open(io.BytesIO(data)).convert("RGBA")
    assert (await stored(server, upload)).convert("RGBA").tobytes() == expected.tobytes()


async def test_the_same_bytes_are_the_same_upload_of_their_sender(server: InProcess, alice: httpx2.AsyncClient) -> None:
    first, again = await send(alice, picture()), await send(alice, picture())
    assert (first.status_code, again.status_code, again.json()["id"]) == (201, 200, first.json()["id"])
    eve = await server.user("eve")
    assert (await send(eve, picture())).status_code == 201
    assert len(await files(server)) == 2
    # and where its file was lost, it is back
    await server.blobs.delete(UPLOAD_BUCKET, [first.json()["key"]])
    assert (await send(alice, picture())).json()["id"] == first.json()["id"]
    assert (await stored(server, first.json())).size == (40, 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a" + bytes(100), "no readable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no readable"),
        (picture()[:-30], "no readable"),
        (b"\x89PNG\r\n\x1a\n", "no readable"),
        (picture(size=(300, 200)), "more than 40000 pixels"),
        (picture(mode="I;16"), "more than 8 bits"),
    ],
)
async def test_what_is_no_usable_picture_is_refused(
    server: InProcess, alice: httpx2.AsyncClient, data: bytes, message: str
) -> None:
    answer = await send(alice, data)
    assert answer.status_code == 422, answer.text
    document = answer.json()
    assert document["errors"][0]["field"] == "file"
    assert message in document["detail"]
    assert (await files(server), await server.pool.fetchval("SELECT count(*) FROM reference_uploads")) == ([], 0)


async def test_an_animation_is_refused(alice: httpx2.AsyncClient) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:])
    assert (await send(alice, buffer.getvalue(), "image/webp")).status_code == 422


async def test_a_body_beyond_the_limit_is_cut_off(server: InProcess, alice: httpx2.AsyncClient) -> None:
    assert (await send(alice, bytes(MOST_BYTES + 1))).status_code == 413

    async def endless() -> AsyncIterator[bytes]:
        sent = 0
        while True:
            assert sent < 20 * MOST_BYTES, "nobody stopped reading"
            yield bytes(10_000)
            sent += 10_000

    answer = await alice.post(PATH, content=endless(), headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'

    async def endless_form() -> AsyncIterator[bytes]:
        yield form
        async for chunk in endless():
            yield chunk

    answer = await alice.post(PATH, content=endless_form(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert await files(server) == []


async def test_other_bodies_keep_the_limit_of_every_request(alice: httpx2.AsyncClient) -> None:
    answer = await alice.post("/v1/jobs", json={"prompt": "x" * 3000})
    assert answer.status_code == 413
    assert (await alice.post("/v1/jobs", content=picture(), headers={"Content-Type": "image/png"})).status_code == 415


async def test_a_picture_that_outgrows_the_limit_without_losses_is_refused(alice: httpx2.AsyncClient) -> None:
    noise = Image.frombytes("RGB", (190, 190), os.urandom(190 * 190 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, format="WEBP", quality=30)
    assert len(buffer.getvalue()) < MOST_BYTES
    answer = await send(alice, buffer.getvalue(), "image/webp")
    assert (answer.status_code, "without losses" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("kind", "body", "status", "field"),
    [
        ("application/json", b"{}", 415, "Content-Type"),
        ("", b"x", 415, "Content-Type"),
        ("image/gif", b"x", 415, "Content-Type"),
        ("image/png", b"", 422, "file"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422, "file"),
        ("multipart/form-data; boundary=x", b"nonsense", 422, "body"),
        ("multipart/form-data", b"x", 422, "body"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n',
            422,
            "body",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\ntext\r\n--x--\r\n',
            422,
            "file",
        ),
    ],
)
async def test_a_body_of_another_shape_is_refused_by_field(
    alice: httpx2.AsyncClient, kind: str, body: bytes, status: int, field: str
) -> None:
    answer = await send(alice, body, kind)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (status, field), answer.text


async def test_uploads_are_listed_read_and_deleted_by_their_owner(server: InProcess, alice: httpx2.AsyncClient) -> None:
    upload = (await send(alice, picture())).json()
    path = f"{PATH}/{upload['id']}"
    eve, root = await server.user("eve"), await server.user("root", "admin")
    assert [one["id"] for one in (await alice.get(PATH)).json()["data"]] == [upload["id"]]
    assert (await eve.get(PATH)).json()["data"] == []
    assert [(await client.get(path)).status_code for client in (alice, eve, root)] == [200, 404, 200]
    assert [(await client.delete(path)).status_code for client in (eve, root)] == [404, 404]
    assert len(await files(server)) == 1
    assert [(await alice.delete(path)).status_code for _ in range(2)] == [204, 404]
    assert await files(server) == []


async def test_a_user_has_a_number_of_uploads(server: InProcess, alice: httpx2.AsyncClient) -> None:
    user = await server.pool.fetchval("SELECT id FROM profiles WHERE username = 'alice'")
    await server.pool.execute(
        """INSERT INTO reference_uploads (id, user_id, storage_path, mime_type, file_size_bytes, width, height, sha256)
           SELECT gen_random_uuid(), $1, 'k' || n, 'image/png', 1, 1, 1, sha256(n::text::bytea)
           FROM generate_series(1, $2) n""",
        user,
        MOST_UPLOADS - 1,
    )
    first = await send(alice, picture())
    assert first.status_code == 201
    answer = await send(alice, picture(size=(8, 8)))
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_uploads")
    assert (await send(alice, picture())).status_code == 200  # one that is there is no other
    assert len(await files(server)) == 1


async def test_nobody_uploads_without_a_key(server: InProcess) -> None:
    nobody = await server.client()
    assert (await send(nobody, picture())).status_code == 401
    assert await files(server) == []
