"""What the API refuses: each bad request gets a 4xx problem that names the field, and leaves nothing behind.

All tests share one database and one folder, in which every one of them counts all rows and all files.
"""

import contextlib
import gzip
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from PIL import Image

from models.samples.tiny import ensure_tiny
from tests.deployments import hostile
from tests.serve_app.conftest import InProcess, a_job, in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROFILE = """
name: adults
description: a laptop that may make nsfw content
laptop: true
nsfw_allowed: true
models:
  sdxl: {model_name: tiny-sdxl, source: tiny, dtype: float32, device: cpu, memory_gib: 0, disk_gib: 0.01,
         defaults: {sizes: [[128, 128]], width: 128, height: 128}}
"""


@dataclass
class Site:
    """The API, a user of it, and a receiver on loopback that the operator has allowed."""

    server: InProcess
    alice: httpx2.AsyncClient
    bob: httpx2.AsyncClient
    bobs_job: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Path) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("api")
    async with in_process(
        shared_database, folder, max_reference_bytes=20_000, max_reference_pixels=10_000, state_dir=state_dir
    ) as server:
        alice, bob = await server.user("alice"), await server.user("bob")
        job = (await bob.post("/v1/jobs", json=a_job())).json()["id"]
        yield Site(server, alice, bob, job)


@contextlib.asynccontextmanager
async def storing_nothing(server: InProcess) -> AsyncIterator[None]:
    """Whatever happens inside leaves every table and the object store as they were; but that an admin asked is told."""
    before = await server.stored()
    yield
    assert await server.stored() | {"user_activity_log": 0} == before | {"user_activity_log": 0}


def problem(answer: httpx2.Response, status: int | tuple[int, ...] = 422) -> dict[str, Any]:
    """The problem document of a refusal, of that status."""
    expected = (status,) if isinstance(status, int) else status
    assert answer.status_code in expected, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == answer.status_code
    assert document["code"]
    assert document["title"]
    return document


def legacy(answer: httpx2.Response, status: int | tuple[int, ...] = 400) -> dict[str, Any]:
    """The error of a function, of that status."""
    expected = (status,) if isinstance(status, int) else status
    assert answer.status_code in expected, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    assert document["success"] is False
    assert document["error"]
    assert document["code"]
    return document


def fields(document: dict[str, Any]) -> set[str]:
    return {error["field"] for error in document["errors"]}


# --------------------------------------------------------------------------------------------------- fields


NESTED: Any = "x"
for _ in range(300):
    NESTED = [NESTED]

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("no job type", {"job_type": None}, "job_type"),
    ("unknown job type", {"job_type": "sdxl_image_best"}, "job_type"),
    ("job type of another type", {"job_type": ["sdxl_image_fast"]}, "job_type"),
    ("job type with NUL", {"job_type": "sdxl_image_fast\0"}, "job_type"),
    ("no prompt", {"prompt": None}, "prompt"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("blank prompt", {"prompt": " \t\n"}, "prompt"),
    ("prompt of 100 kB", {"prompt": "a" * 100_000}, "prompt"),
    ("prompt with NUL", {"prompt": "a\0b"}, "prompt"),
    ("prompt with a bell", {"prompt": "a\x07b"}, "prompt"),
    ("prompt that is a number", {"prompt": 5}, "prompt"),
    ("prompt that is a list", {"prompt": ["a"]}, "prompt"),
    ("negative prompt of 100 kB", {"negative_prompt": "a" * 100_000}, "negative_prompt"),
    ("negative prompt without effect", {"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt"),
    ("4 images", {"num_images": 4}, "num_images"),
    ("0 images", {"num_images": 0}, "num_images"),
    ("images as text", {"num_images": "3"}, "num_images"),
    ("images as a boolean", {"num_images": True}, "num_images"),
    ("3 videos", {"job_type": "video_fast", "num_images": 3}, "num_images"),
    ("0 steps", {"steps": 0}, "steps"),
    ("-1 steps", {"steps": -1}, "steps"),
    ("101 steps", {"steps": 101}, "steps"),
    ("half a step", {"steps": 1.5}, "steps"),
    ("seed of 2^70", {"seed": 2**70}, "seed"),
    ("seed of 2^63", {"seed": 2**63}, "seed"),
    ("seed below 0", {"seed": -1}, "seed"),
    ("seed as text", {"seed": "7"}, "seed"),
    ("guidance above 20", {"guidance_scale": 20.5}, "guidance_scale"),
    ("guidance below 0", {"guidance_scale": -0.5}, "guidance_scale"),
    ("guidance of 10^400", {"guidance_scale": 10**400}, "guidance_scale"),
    ("a size that is none", {"width": 123, "height": 77}, "width"),
    ("half a size", {"width": 128}, "height"),
    ("a size of 2^40", {"width": 2**40, "height": 2**40}, "width"),
    ("frames of an image", {"frames": 17}, "frames"),
    ("rate of an image", {"fps": 16}, "fps"),
    ("too long a video", {"job_type": "video_fast", "frames": 1000}, "frames"),
    ("too short a video", {"job_type": "video_fast", "frames": 2}, "frames"),
    ("shift of an image", {"shift": 3.0}, "shift"),
    ("unknown scheduler", {"scheduler": "magic"}, "scheduler"),
    ("weights in a video", {"job_type": "video_fast", "compel_enabled": True}, "compel_enabled"),
    ("unknown content mode", {"content_mode": "any"}, "content_mode"),
    ("unknown field", {"hires_fix": True}, "hires_fix"),
    ("a field of somebody else's", {"status": "completed"}, "status"),
    ("a user of somebody else's", {"user_id": "00000000-0000-0000-0000-000000000000"}, "user_id"),
    ("unknown priority", {"priority": "vip"}, "priority"),
    ("unknown destination", {"destination": "moon"}, "destination"),
    ("no delay at all", {"start_after_seconds": 0}, "start_after_seconds"),
    ("a delay of a year", {"start_after_seconds": 365 * 86400}, "start_after_seconds"),
    ("a deadline in the past", {"deadline_seconds": -1}, "deadline_seconds"),
    ("unknown callback event", {"callback_url": "https://8.8.8.8/", "callback_events": ["started"]}, "callback_events"),
    ("no callback event", {"callback_url": "https://8.8.8.8/", "callback_events": []}, "callback_events"),
    ("events without a callback", {"callback_events": ["failed"]}, "callback_url"),
    ("callback that is a number", {"callback_url": 5}, "callback_url"),
    ("callback of 3 kB", {"callback_url": "https://8.8.8.8/" + "a" * 3000}, "callback_url"),
    ("metadata that is a list", {"metadata": [1]}, "metadata"),
    ("too much metadata", {"metadata": {"a": "x" * 17_000}}, "metadata"),
    ("metadata with NUL", {"metadata": {"a": "x\0"}}, "metadata"),
    ("metadata with NUL in a name", {"metadata": {"\0": 1}}, "metadata"),
    ("metadata with half a character", {"metadata": {"a": "\ud800"}}, "metadata"),
    ("deep metadata", {"metadata": {"a": NESTED}}, "metadata"),
    ("strength without a reference", {"reference_strength": 0.5}, "reference_strength"),
    ("kind without a reference", {"reference_type": "composition"}, "reference_type"),
    ("enhance as text", {"enhance": "yes"}, "enhance"),
    ("no enhancement of an enhanced type", {"job_type": "image7b_fast_enhanced", "enhance": False}, "enhance"),
]


@pytest.mark.parametrize(("changes", "field"), [row[1:] for row in BAD_FIELDS], ids=[row[0] for row in BAD_FIELDS])
async def test_a_bad_field_is_named_and_nothing_is_stored(site: Site, changes: dict[str, Any], field: str) -> None:
    async with storing_nothing(site.server):
        body = json.dumps(a_job(**changes))  # as ASCII, which can carry half a character
        headers = {"Content-Type": "application/json"}
        answer = await site.alice.post("/v1/jobs", content=body, headers=headers)
        named = fields(problem(answer))
    assert any(name == field or name.startswith(f"{field}.") for name in named), named


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["guidance_scale", "shift", "reference_strength", "deadline_seconds"])
async def test_a_number_that_is_none_is_refused(site: Site, field: str, value: str) -> None:
    body = json.dumps(a_job(**{field: "@"})).replace('"@"', value)
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert fields(problem(answer)) == {field}


async def test_metadata_with_a_number_that_is_none_is_refused(site: Site) -> None:
    body = json.dumps(a_job(metadata={"a": [{"b": float("nan")}]}))
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert fields(problem(answer)) == {"metadata"}


async def test_every_wrong_field_is_named_at_once(site: Site) -> None:
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", json=a_job(steps=0, num_images=4, seed=-1, prompt=""))
        assert fields(problem(answer)) == {"steps", "num_images", "seed", "prompt"}


async def test_a_refusal_does_not_repeat_the_prompt(site: Site) -> None:
    answer = await site.alice.post("/v1/jobs", json=a_job(prompt="a very private wish \0", steps=0))
    assert "private" not in answer.text


async def test_a_type_that_the_profile_lacks_is_not_available(site: Site) -> None:
    async with storing_nothing(site.server):
        document = problem(await site.alice.post("/v1/jobs", json=a_job(job_type="rv51_fast")), 503)
    assert (document["code"], fields(document)) == ("model_not_installed", {"job_type"})


@pytest.mark.parametrize("kind", ["style", "character"])
async def test_a_reference_kind_that_the_profile_lacks_is_not_available(site: Site, tmp_path: Path, kind: str) -> None:
    body = a_job(reference_image_url="https://8.8.8.8/a.png", reference_type=kind)
    async with adults(site, tmp_path) as (_, other), storing_nothing(site.server):
        document = problem(await other.post("/v1/jobs", json=body), 503)
    assert (document["code"], fields(document)) == ("reference_type_unavailable", {"reference_type"})


# ----------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"nonsense", b'{"job_type": "sdxl_image_fast",}', b"\xff\xfe{}", b'{"prompt": "\xff"}', b"{'a': 1}"],
)
async def test_broken_json_is_refused(site: Site, body: bytes) -> None:
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert fields(problem(answer, (400, 422))) == {"body"}


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"null", b"true"])
async def test_json_that_is_no_object_is_refused(site: Site, body: bytes) -> None:
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert fields(problem(answer, (400, 422))) == {"body"}


@pytest.mark.parametrize("path", ["/v1/jobs", "/functions/v1/queue-job", "/functions/v1/enhance-prompt"])
@pytest.mark.parametrize("opening", [b"[", b'{"metadata":'])
async def test_very_deep_json_is_refused(site: Site, path: str, opening: bytes) -> None:
    deep = opening * 60_000
    async with storing_nothing(site.server):
        answer = await site.alice.post(path, content=deep, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert fields(answer.json()) == {"body"}


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/functions/v1/queue-job", "/functions/v1/enhance-prompt", "/v1/keys"])
async def test_another_content_type_is_refused(site: Site, path: str, content_type: str) -> None:
    body = json.dumps(a_job()).encode()
    async with storing_nothing(site.server):
        answer = await site.alice.post(path, content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 415
    assert fields(answer.json()) == {"Content-Type"}


async def test_a_body_that_says_it_is_too_large_is_not_read(site: Site) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"Content-Type": "application/json", "Content-Length": "1000001"}
    async with storing_nothing(site.server):
        request = site.alice.build_request("POST", "/v1/jobs", content=chunks(), headers=headers)
        request.headers.pop("transfer-encoding", None)
        assert fields(problem(await site.alice.send(request), 413)) == {"body"}


async def test_a_body_that_grows_too_large_is_cut_off(site: Site) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100_000
            yield b" " * 100_000

    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", content=chunks(), headers={"Content-Type": "application/json"})
        assert fields(problem(answer, 413)) == {"body"}
    assert sent <= 1_200_000


async def test_a_body_of_just_the_limit_is_read(site: Site) -> None:
    body = json.dumps(a_job(prompt=""))
    body += " " * (1_000_000 - len(body))
    answer = await site.alice.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert fields(problem(answer)) == {"prompt"}


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_bad_idempotency_key_is_refused(site: Site, key: str) -> None:
    async with storing_nothing(site.server):
        answer = await site.alice.post("/v1/jobs", json=a_job(), headers={"Idempotency-Key": key})
        assert {name.lower() for name in fields(problem(answer))} == {"idempotency-key"}


# ---------------------------------------------------------------------------------------------------- callers


async def revoked(server: InProcess) -> str:
    key = await server.key("eve")
    await server.pool.execute(
        "UPDATE api_keys SET revoked_at = now() WHERE user_id = (SELECT id FROM profiles WHERE username = 'eve')"
    )
    return key


PROTECTED = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("POST", "/v1/keys"),
    ("GET", "/v1/callbacks/secret"),
    ("POST", "/functions/v1/queue-job"),
    ("POST", "/functions/v1/enhance-prompt"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_no_caller_without_a_valid_key(site: Site, method: str, path: str) -> None:
    server = site.server
    expired = await server.key("old", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    good = await server.key("alice")
    given = {
        "none": {},
        "not bearer": {"Authorization": f"Basic {good}"},
        "empty": {"Authorization": "Bearer "},
        "bare": {"Authorization": good},
        "wrong": {"Authorization": "Bearer ovz_" + "A" * 43},
        "shortened": {"Authorization": f"Bearer {good[:-1]}"},
        "extended": {"Authorization": f"Bearer {good}A"},
        "other case": {"Authorization": f"Bearer {good.upper()}"},
        "no prefix": {"Authorization": f"Bearer {good[4:]}"},
        "long": {"Authorization": "Bearer ovz_" + "A" * 5000},
        "a hash": {"Authorization": "Bearer ovz_' OR 1=1 --"},
        "revoked": {"Authorization": f"Bearer {await revoked(server)}"},
        "expired": {"Authorization": f"Bearer {expired}"},
        "in the query": {},
    }
    client = await server.client()
    async with storing_nothing(server):
        for name, headers in given.items():
            query = {"api_key": good, "access_token": good} if name == "in the query" else {}
            body = a_job() if method == "POST" else None
            answer = await client.request(method, path, json=body, headers=headers, params=query)
            assert answer.status_code == 401, name
            assert answer.headers["www-authenticate"].split()[0] == "Bearer", name
            assert answer.json()["code"] in ("missing_key", "invalid_key", "invalid_token"), name


async def test_a_refused_key_is_asked_for_before_the_body_is_judged(site: Site) -> None:
    client = await site.server.client()
    problem(await client.post("/v1/jobs", json={"nonsense": 1}), 401)


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events")])
@pytest.mark.parametrize("job_id", ["bobs", "not-a-uuid", "0", "../../etc/passwd", "%00"])
async def test_a_job_id_that_is_not_mine_gives_nothing(site: Site, method: str, path: str, job_id: str) -> None:
    async with storing_nothing(site.server):
        answer = await site.alice.request(method, f"/v1/jobs/{site.bobs_job if job_id == 'bobs' else job_id}{path}")
        problem(answer, (404, 422))


# -------------------------------------------------------------------------------------- URLs that a user gives


HOSTILE_URLS = [
    "http://example.com/",
    "https://127.0.0.1/hook",
    "https://127.1/hook",
    "https://2130706433/hook",
    "https://0x7f000001/hook",
    "https://0177.0.0.1/hook",
    "https://0/hook",
    "https://localhost/hook",
    "https://LOCALHOST./hook",
    "https://10.0.0.8/hook",
    "https://172.16.0.1/hook",
    "https://192.168.1.1/hook",
    "https://169.254.169.254/latest/meta-data",
    "https://100.64.0.1/hook",
    "https://0.0.0.0/hook",
    "https://224.0.0.1/hook",
    "https://255.255.255.255/hook",
    "https://[::1]/hook",
    "https://[::]/hook",
    "https://[::ffff:127.0.0.1]/hook",
    "https://[::ffff:7f00:1]/hook",
    "https://[fe80::1]/hook",
    "https://[fc00::1]/hook",
    "https://[64:ff9b::7f00:1]/hook",
    "https://[2002:7f00:1::]/hook",
    "https://①②⑦.⓪.⓪.①/hook",
    "https://127。0。0。1/hook",
    "https://user:word@8.8.8.8/hook",
    "https://8.8.8.8@127.0.0.1/hook",
    "https://127.0.0.1\\@8.8.8.8/hook",
    "https://8.8.8.8:22/hook",
    "https://8.8.8.8:8000/hook",
    "ftp://8.8.8.8/hook",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "//8.8.8.8/hook",
    "/hook",
    "hook",
    "",
    " https://8.8.8.8/",
    "https://8.8.8.8/\r\nX: y",
    "https://8.8.8.8/\0",
    "gopher://127.0.0.1:5432/_x",
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
@pytest.mark.parametrize("field", ["callback_url", "reference_image_url"])
async def test_a_url_that_leads_inside_is_refused(site: Site, field: str, url: str) -> None:
    async with storing_nothing(site.server):
        document = problem(await site.alice.post("/v1/jobs", json=a_job(**{field: url})))
    assert document["code"] in ("url_refused", "url_failed")
    assert fields(document) == {field}


@pytest.mark.parametrize("url", [*HOSTILE_URLS[1:12], 5, ["https://8.8.8.8/"], {"a": 1}, True])
@pytest.mark.parametrize("field", ["callback_url", "reference_image_url"])
@pytest.mark.parametrize("inside", [False, True])
async def test_a_url_that_leads_inside_is_refused_by_the_function(
    site: Site, field: str, url: Any, inside: bool
) -> None:
    body: dict[str, Any] = {"job_type": "sdxl_image_fast", "prompt": "a mill"}
    (body.setdefault("metadata", {}) if inside else body)[field] = url
    async with storing_nothing(site.server):
        document = legacy(await site.alice.post("/functions/v1/queue-job", json=body))
    assert fields(document) == {field}


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def pixel_bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 by 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png(4, 4)[33:]


REFERENCES: list[tuple[str, bytes]] = [
    ("missing", hostile.answer(404, content_type="image/png")),
    ("broken", hostile.answer(500, content_type="image/png")),
    ("elsewhere", hostile.answer(302, location="https://8.8.8.8/a.png")),
    ("text", hostile.answer(200, b"<html>", content_type="text/html")),
    ("svg", hostile.answer(200, b"<svg/>", content_type="image/svg+xml")),
    ("text that says png", hostile.answer(200, b"<html>", content_type="image/png")),
    ("half a png", hostile.answer(200, png(64, 64)[:40], content_type="image/png")),
    ("empty", hostile.answer(200, b"", content_type="image/png")),
    ("too many bytes", hostile.answer(200, png(8, 8) + b"\0" * 20_000, content_type="image/png")),
    ("too many pixels", hostile.answer(200, png(200, 200), content_type="image/png")),
    ("a pixel bomb", hostile.answer(200, pixel_bomb(), content_type="image/png")),
    (
        "a gzip bomb",
        hostile.answer(200, gzip.compress(b"\0" * 50_000_000), content_type="image/png", content_encoding="gzip"),
    ),
]


@pytest.mark.parametrize("answer", [row[1] for row in REFERENCES], ids=[row[0] for row in REFERENCES])
async def test_a_reference_that_is_no_image_is_refused_and_not_kept(site: Site, tmp_path: Path, answer: bytes) -> None:
    async with hostile.receiving(answer) as receiver, allowing(site, receiver, tmp_path) as alice:
        async with storing_nothing(site.server):
            refused = await alice.post("/v1/jobs", json=a_job(reference_image_url=receiver.url))
            assert fields(problem(refused)) == {"reference_image_url"}
        assert len(receiver.requests) == 1


@contextlib.asynccontextmanager
async def allowing(site: Site, receiver: hostile.Receiver, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API over the same rows and files, whose operator trusts the receiver."""
    settings = site.server.settings
    changes = {
        "egress_allow": (f"http://127.0.0.1:{receiver.port}",),
        "blob_url": settings.blobs(),
        "max_reference_bytes": 20_000,
        "max_reference_pixels": 10_000,
    }
    database = type("Database", (), {"url": settings.postgres(), "pool": site.server.pool})()
    database.worker_pool = site.server.worker_pool
    async with in_process(database, folder, **changes) as trusting:
        yield await trusting.user("alice")


async def test_a_good_reference_is_kept_beside_its_job(site: Site, tmp_path: Path) -> None:
    picture = png(64, 64)
    good = hostile.answer(200, picture, content_type="image/png")
    async with hostile.receiving(good) as receiver, allowing(site, receiver, tmp_path) as alice:
        answer = await alice.post("/v1/jobs", json=a_job(reference_image_url=receiver.url, reference_strength=0.5))
    assert answer.status_code == 202, answer.text
    kept = answer.json()["params"]["references"][0]
    assert await site.server.blobs.get(kept["bucket"], kept["key"]) == picture


async def test_a_reference_is_not_fetched_for_a_request_that_is_refused(site: Site, tmp_path: Path) -> None:
    good = hostile.answer(200, png(64, 64), content_type="image/png")
    async with hostile.receiving(good) as receiver, allowing(site, receiver, tmp_path) as alice:
        for changes in ({"steps": 0}, {"prompt": "a nude child"}, {"callback_url": "https://127.0.0.1/"}):
            body = a_job(reference_image_url=receiver.url) | changes
            problem(await alice.post("/v1/jobs", json=body))
        assert receiver.connections == 0


async def test_a_repeat_does_not_keep_its_reference_twice(site: Site, tmp_path: Path) -> None:
    good = hostile.answer(200, png(64, 64), content_type="image/png")
    async with hostile.receiving(good) as receiver, allowing(site, receiver, tmp_path) as alice:
        headers = {"Idempotency-Key": "with a reference"}
        body = a_job(reference_image_url=receiver.url)
        first = await alice.post("/v1/jobs", json=body, headers=headers)
        async with storing_nothing(site.server):
            again = await alice.post("/v1/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reference_strength": 0.05}, "reference_strength"),
        ({"reference_strength": 1.0}, "reference_strength"),
        ({"reference_type": "mood"}, "reference_type"),
        ({"job_type": "video_fast"}, "reference_image_url"),
    ],
)
async def test_a_reference_that_can_not_be_honoured_is_named_as_it_was_given(
    site: Site, changes: dict[str, Any], field: str
) -> None:
    async with storing_nothing(site.server):
        body = a_job(reference_image_url="https://8.8.8.8/a.png") | changes
        assert fields(problem(await site.alice.post("/v1/jobs", json=body))) == {field}


# ----------------------------------------------------------------------------------------------------- content


CONTENT = "a nude child"
ADULT = "a portrait of a nude woman"
ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("job", "/v1/jobs", {"job_type": "sdxl_image_fast", "prompt": "@"}),
    ("video", "/v1/jobs", {"job_type": "video_fast", "prompt": "@"}),
    ("enhanced", "/v1/jobs", {"job_type": "image7b_fast_enhanced", "prompt": "@"}),
    ("queue-job", "/functions/v1/queue-job", {"job_type": "sdxl_image_fast", "prompt": "@"}),
    ("queue-job's original", "/functions/v1/queue-job", {"job_type": "sdxl_image_fast", "original_prompt": "@"}),
    (
        "queue-job's enhanced",
        "/functions/v1/queue-job",
        {"job_type": "sdxl_image_fast", "prompt": "a mill", "enhanced_prompt": "@"},
    ),
    ("old queue-job", "/functions/v1/queue-job", {"jobType": "sdxl_image_fast", "metadata": {"prompt": "@"}}),
    (
        "old queue-job's enhanced",
        "/functions/v1/queue-job",
        {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a mill"}, "enhancedPrompt": "@"},
    ),
    ("enhance-prompt", "/functions/v1/enhance-prompt", {"prompt": "@", "jobType": "sdxl_image_fast"}),
    ("enhance-prompt's other", "/functions/v1/enhance-prompt", {"original_prompt": "@", "job_type": "video_fast"}),
]


@pytest.mark.parametrize("text", [CONTENT, "a n u d e  c h i l d", "nude 15 year old", ADULT])
@pytest.mark.parametrize(("path", "body"), [row[1:] for row in ROUTES], ids=[row[0] for row in ROUTES])
async def test_content_that_is_never_made_is_refused_everywhere(
    site: Site, path: str, body: dict[str, Any], text: str
) -> None:
    body = json.loads(json.dumps(body).replace("@", text))
    async with storing_nothing(site.server):
        answer = await site.alice.post(path, json=body)
    document = answer.json()
    assert 400 <= answer.status_code < 500, answer.text
    assert document["code"] == ("content_sexual_in_sfw" if text == ADULT else "content_minors")
    assert len(fields(document)) == 1
    assert "nude" not in answer.text


async def test_nsfw_is_refused_where_the_operator_does_not_allow_it(site: Site) -> None:
    async with storing_nothing(site.server):
        document = problem(await site.alice.post("/v1/jobs", json=a_job(content_mode="nsfw")), 403)
    assert (document["code"], fields(document)) == ("nsfw_not_allowed", {"content_mode"})


NSFW_ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/jobs", {"job_type": "sdxl_image_fast", "prompt": ADULT, "content_mode": "nsfw"}),
    (
        "/functions/v1/queue-job",
        {"job_type": "sdxl_image_fast", "prompt": ADULT, "metadata": {"contentType": "nsfw"}},
    ),
    ("/functions/v1/queue-job", {"jobType": "sdxl_image_fast", "metadata": {"prompt": ADULT, "contentType": "nsfw"}}),
    ("/functions/v1/enhance-prompt", {"prompt": ADULT, "jobType": "sdxl_image_fast", "contentType": "nsfw"}),
]


@contextlib.asynccontextmanager
async def adults(site: Site, folder: Path) -> AsyncIterator[tuple[httpx2.AsyncClient, httpx2.AsyncClient]]:
    """Clients of an API that allows nsfw content: of a user whose age is verified, and of one whose is not."""
    profile = folder / "adults.yaml"
    profile.write_text(PROFILE)
    ensure_tiny("sdxl", folder / "state" / "weights")
    settings = site.server.settings
    database = type("Database", (), {"url": settings.postgres(), "pool": site.server.pool})()
    database.worker_pool = site.server.worker_pool
    async with in_process(database, folder, profile=str(profile), blob_url=settings.blobs()) as open_to_adults:
        verified, other = await open_to_adults.user("verified"), await open_to_adults.user("alice")
        await site.server.pool.execute("UPDATE profiles SET age_verified = true WHERE username = 'verified'")
        yield verified, other


@pytest.mark.parametrize(("path", "body"), NSFW_ROUTES)
async def test_nsfw_needs_an_age_verified_user(site: Site, tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with adults(site, tmp_path) as (verified, other):
        async with storing_nothing(site.server):
            refused = await other.post(path, json=body)
            assert refused.status_code == 403
            assert len(fields(refused.json())) == 1
        assert (await verified.post(path, json=body)).status_code in (200, 202)


@pytest.mark.parametrize(("path", "body"), NSFW_ROUTES)
async def test_minors_are_refused_in_nsfw_mode_too(site: Site, tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    body = json.loads(json.dumps(body).replace(ADULT, "a child playing football"))
    async with adults(site, tmp_path) as (verified, _), storing_nothing(site.server):
        answer = await verified.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) in ((422, "content_minors"), (400, "content_minors"))


async def test_nsfw_takes_no_reference_from_outside(site: Site, tmp_path: Path) -> None:
    body = a_job(content_mode="nsfw", reference_image_url="https://8.8.8.8/a.png")
    async with adults(site, tmp_path) as (verified, _), storing_nothing(site.server):
        document = problem(await verified.post("/v1/jobs", json=body), 403)
    assert (document["code"], fields(document)) == ("reference_not_allowed", {"reference_image_url"})


# --------------------------------------------------------------------------------------------- other requests


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("POST", "/v1/jobs/x/y/z", 404),
        ("PUT", "/v1/jobs", 405),
        ("DELETE", "/v1/jobs", 405),
        ("PATCH", "/healthz", 405),
        ("POST", "/metrics", 405),
        ("GET", "/v1/callbacks/secret/rotate", 405),
    ],
)
async def test_what_is_not_there_is_a_problem_too(site: Site, method: str, path: str, status: int) -> None:
    document = problem(await site.alice.request(method, path), status)
    assert document["instance"] == path


async def test_a_method_that_is_not_allowed_names_those_that_are(site: Site) -> None:
    answer = await site.alice.request("PUT", "/v1/jobs")
    assert {method.strip() for method in answer.headers["allow"].split(",")} >= {"POST"}


BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({}, "username"),
    ({"username": ""}, "username"),
    ({"username": "a" * 101}, "username"),
    ({"username": "a\0b"}, "username"),
    ({"username": "a", "name": "\0"}, "name"),
    ({"username": "a\ud800"}, "username"),
    ({"username": "a", "role": "owner"}, "role"),
    ({"username": "a", "expires_in_days": 0}, "expires_in_days"),
    ({"username": "a", "expires_in_days": 10**9}, "expires_in_days"),
    ({"username": "a", "key": "ovz_mine"}, "key"),
]


@pytest.mark.parametrize(("body", "field"), BAD_KEYS)
async def test_a_bad_key_request_is_refused(site: Site, body: dict[str, Any], field: str) -> None:
    admin = await site.server.user("root", "admin")
    async with storing_nothing(site.server):
        headers = {"Content-Type": "application/json"}
        answer = await admin.post("/v1/keys", content=json.dumps(body), headers=headers)
        assert fields(problem(answer)) == {field}


@pytest.mark.parametrize("value", ["x" * 17_000, "\0", "\ud800", float("nan"), NESTED])
@pytest.mark.parametrize("place", ["metadata", "model_key"])
async def test_what_a_function_carries_can_be_kept(site: Site, place: str, value: Any) -> None:
    carried = {"model_key": value} if place == "model_key" else {"metadata": {"a": value}}
    body = json.dumps({"job_type": "sdxl_image_fast", "prompt": "a mill"} | carried)
    async with storing_nothing(site.server):
        headers = {"Content-Type": "application/json"}
        answer = await site.alice.post("/functions/v1/queue-job", content=body, headers=headers)
        assert fields(legacy(answer)) == {"metadata"}
