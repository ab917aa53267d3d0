"""Input that is refused in words, where it used to be a fault of ours."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from db.access import Access
from models.media import open_reference
from tests.deployments import hostile
from tests.serve_app.conftest import InProcess, a_job, in_process
from tests.serve_app.running import running


@pytest.fixture
async def alice_with_a_picture(
    database: Any, tmp_path: Path, state_dir: Path
) -> AsyncIterator[tuple[httpx2.AsyncClient, str]]:
    """A user of an API that may fetch one picture from loopback, and the picture's address."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    async with hostile.receiving(hostile.answer(200, buffer.getvalue(), content_type="image/png")) as receiver:
        allowed = (f"http://127.0.0.1:{receiver.port}",)
        async with in_process(database, tmp_path, state_dir=state_dir, egress_allow=allowed) as server:
            yield await server.user("alice"), receiver.url


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "jobType": ["a"]}, "jobType"),
        ({"prompt": "x", "jobType": "image", "quality": {}}, "quality"),
        ({"prompt": "x", "model": []}, "model"),
        ({"prompt": "x", "contentType": {}}, "contentType"),
        ({"prompt": "a\u0000b"}, "prompt"),
        ({"prompt": "\u200b"}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
    ],
)
async def test_enhance_prompt_names_what_is_wrong(alice: httpx2.AsyncClient, body: dict[str, Any], field: str) -> None:
    answer = await alice.post("/functions/v1/enhance-prompt", json=body)
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize("value", ["\u0000", "x" * 20_000, float("inf")])
async def test_queue_job_keeps_its_limits_for_fields_that_it_does_not_know(
    server: InProcess, alice: httpx2.AsyncClient, value: object
) -> None:
    before = await server.stored()
    body = a_job(model_key=value) if not isinstance(value, float) else None
    if body is None:
        raw = b'{"job_type": "sdxl_image_fast", "prompt": "a", "model_key": NaN}'
        headers = {"content-type": "application/json"}
        answer = await alice.post("/functions/v1/queue-job", content=raw, headers=headers)
    else:
        answer = await alice.post("/functions/v1/queue-job", json=body)
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == ["metadata"]
    assert await server.stored() == before


async def test_list_refuses_a_time_that_can_not_be(alice: httpx2.AsyncClient) -> None:
    answer = await alice.get("/v1/jobs", params={"created_after": "0001-01-01T00:00:00+14:00"})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["created_after"]


async def test_a_prompt_that_shows_nothing_is_missing(server: InProcess, alice: httpx2.AsyncClient) -> None:
    answer = await alice.post("/v1/jobs", json=a_job(prompt=" \u200b\u2060 "))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "prompt")
    assert await server.pool.fetchval("SELECT count(*) FROM jobs") == 0


QUEUE = "/functions/v1/queue-job"
ENHANCE = "/functions/v1/enhance-prompt"

IGNORED_BEFORE: list[tuple[dict[str, Any], str]] = [
    ({"compel_weights": "(fog:1.2)"}, "compel_weights"),
    ({"compel_weights": "(fog:1.2)", "compel_enabled": False}, "compel_weights"),
    ({"quality": "high"}, "quality"),
    ({"quality": ["fast"]}, "quality"),
    ({"format": "mp4"}, "format"),
    ({"format": {"a": 1}}, "format"),
    ({"contentType": "NSFW"}, "contentType"),
    ({"contentType": ["nsfw"]}, "contentType"),
    ({"contentType": "image"}, "contentType"),
    ({"content_type": "video"}, "content_type"),
    ({"content_type": "gore"}, "content_type"),
    ({"contentType": "sfw", "metadata": {"contentType": "nsfw"}}, "contentType"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": {"a": 1}, "compel_enabled": True, "compel_weights": "(fog:1.2)"}, "prompt"),
    ({"denoise_strength": "much"}, "denoise_strength"),
    ({"reference_strength": 2}, "reference_strength"),
    ({"width": 128}, "height"),
    ({"width": "128", "height": 128}, "width"),
    ({"width": 128, "height": 128, "aspect_ratio": "1:1"}, "aspect_ratio"),
    ({"scheduler": "Nobody"}, "scheduler"),
    ({"frames": 17}, "frames"),
    ({"fps": 16}, "fps"),
    ({"shift": 3.0}, "shift"),
    ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt"),
    ({"metadata": {"skip_enhancement": "false"}}, "metadata.skip_enhancement"),
    ({"metadata": {"user_requested_enhancement": 1}}, "metadata.user_requested_enhancement"),
]


@pytest.mark.parametrize(("changes", "field"), IGNORED_BEFORE, ids=[str(row[0]) for row in IGNORED_BEFORE])
async def test_queue_job_ignores_nothing_that_it_can_not_honour(
    server: InProcess, alice: httpx2.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    before = await server.stored()
    answer = await alice.post(QUEUE, json=a_job() | changes)
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert await server.stored() == before


@pytest.mark.parametrize("field", ["prompt", "seed", "callback_url", "model_key"])
async def test_queue_job_refuses_what_is_nested_without_end(
    server: InProcess, alice: httpx2.AsyncClient, field: str
) -> None:
    before = await server.stored()
    raw = '{"job_type": "sdxl_image_fast", "prompt": "a", "%s": %s}' % (field, "[" * 450 + "]" * 450)  # noqa: UP031
    answer = await alice.post(QUEUE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert await server.stored() == before


@pytest.mark.parametrize("bad", ["\0", "\ud800"])
@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("prompt", "prompt"),
        ("enhanced_prompt", "enhanced_prompt"),
        ("negative_prompt", "negative_prompt"),
        ("callback_url", "callback_url"),
        ("reference_image_url", "reference_image_url"),
        ("scheduler", "scheduler"),
        ("aspect_ratio", "metadata.aspect_ratio"),
        ("model_key", "metadata"),
    ],
)
async def test_queue_job_refuses_characters_that_can_not_be_kept(
    server: InProcess, alice: httpx2.AsyncClient, field: str, named: str, bad: str
) -> None:
    before = await server.stored()
    value = f"https://8.8.8.8/{bad}" if field.endswith("_url") else f"a{bad}"
    raw = json.dumps(a_job() | {field: value})
    answer = await alice.post(QUEUE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [named]
    assert await server.stored() == before


async def test_queue_job_honours_what_agrees_with_the_job_type(alice: httpx2.AsyncClient) -> None:
    changes = {"quality": "fast", "format": "png", "content_type": "image", "contentType": "sfw"}
    size = {"width": 224, "height": 128}
    job = (await alice.post(QUEUE, json=a_job(**changes, **size))).json()["job"]
    assert (job["params"]["width"], job["params"]["height"]) == (224, 128)
    assert size.keys().isdisjoint(job["metadata"])


@pytest.mark.parametrize("old", [False, True])
async def test_queue_job_passes_on_what_a_video_takes(alice: httpx2.AsyncClient, old: bool) -> None:
    asked = {"prompt": "a mill", "frames": 19, "fps": 8, "shift": 4.0}
    body = {"jobType": "video_fast", "metadata": asked} if old else {"job_type": "video_fast"} | asked
    said = (await alice.post(QUEUE, json=body)).json()
    params = said["job"]["params"]
    assert (params["frames"], params["fps"], params["shift"]) == (17, 8, 4.0)
    assert [(a["field"], a["given"], a["used"]) for a in said["adjustments"]] == [("frames", 19, 17)]


async def test_queue_job_says_that_strengths_without_a_reference_are_not_used(alice: httpx2.AsyncClient) -> None:
    said = (await alice.post(QUEUE, json=a_job(reference_strength=0.85, denoise_strength=0.15))).json()
    assert [(a["field"], a["given"], a["used"]) for a in said["adjustments"]] == [
        ("reference_strength", 0.85, "none"),
        ("denoise_strength", 0.15, "none"),
    ]
    job = (await alice.get(f"/v1/jobs/{said['job_id']}")).json()
    assert job["adjustments"] == said["adjustments"]


async def test_queue_job_says_what_an_exact_copy_does_not_use(
    alice_with_a_picture: tuple[httpx2.AsyncClient, str],
) -> None:
    alice, picture = alice_with_a_picture
    body = {
        "job_type": "sdxl_image_fast",
        "reference_image_url": picture,
        "reference_strength": 0.5,
        "denoise_strength": 0.1,
        "guidance_scale": 7,
        "negative_prompt": "fog",
        "metadata": {"exact_copy_mode": True},
    }
    said = (await alice.post(QUEUE, json=body)).json()
    assert said["success"], said
    params = said["job"]["params"]
    assert (params["references"][0]["strength"], params["guidance_scale"], params["negative_prompt"]) == (0.9, 1.0, "")
    assert [(a["field"], a["given"], a["used"]) for a in said["adjustments"]] == [
        ("reference_strength", 0.5, 0.9),
        ("guidance_scale", 7, 1.0),
        ("negative_prompt", "3 characters", "none"),
    ]


async def test_enhance_prompt_leaves_the_prompt_of_an_exact_copy_as_it_is(alice: httpx2.AsyncClient) -> None:
    prompt = "a  lighthouse,\n as it is"
    said = (await alice.post(ENHANCE, json={"prompt": prompt, "metadata": {"exact_copy_mode": True}})).json()
    assert (said["enhanced_prompt"], said["enhancedPrompt"], said["original_prompt"]) == (prompt,) * 3
    assert (said["enhancement_strategy"], said["fallback_used"]) == ("none", False)
    assert said["analytics"]["enhancementMethod"] == "none"
    assert said["tokenCount"]["original"] == said["tokenCount"]["enhanced"] > 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "metadata": [1]}, "metadata"),
        ({"prompt": "x", "metadata": {"exact_copy_mode": "yes"}}, "metadata.exact_copy_mode"),
        ({"original_prompt": "a\0"}, "original_prompt"),
    ],
)
async def test_enhance_prompt_names_the_field_as_it_was_given(
    alice: httpx2.AsyncClient, body: dict[str, Any], field: str
) -> None:
    answer = await alice.post(ENHANCE, json=body)
    assert answer.status_code == 400, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_a_reference_is_decoded_off_the_event_loop(
    alice_with_a_picture: tuple[httpx2.AsyncClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def opening(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return open_reference(*arguments)

    monkeypatch.setattr("serve_app.references.open_reference", opening)
    alice, picture = alice_with_a_picture
    assert (await alice.post("/v1/jobs", json=a_job(reference_image_url=picture, steps=4))).status_code == 202
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("path", [QUEUE, ENHANCE, "/functions/v1/job-callback"])
async def test_the_document_tells_both_dialects_and_no_422(server: InProcess, path: str) -> None:
    operation = server.app.openapi()["paths"][path]["post"]
    dialects = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [shape["title"] for shape in dialects] == ["snake_case", "camelCase"]
    assert all(set(shape["required"]) <= shape["properties"].keys() for shape in dialects)
    assert "400" in operation["responses"]
    assert "422" not in operation["responses"]


async def test_a_stream_ends_when_its_key_is_revoked(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.watches.LOOK_SECONDS", 0.05)
    async with running(database, tmp_path) as site, asyncio.timeout(60):
        headers = {"Authorization": f"Bearer {site.api_key}"}
        async with httpx2.AsyncClient(base_url=site.url, headers=headers, timeout=30) as client:
            job = (await client.post("/v1/jobs", json=a_job())).json()
            async with client.stream("GET", f"/v1/events/jobs/{job['id']}") as stream:
                lines = stream.aiter_lines()
                while await anext(lines) != "event: job":
                    pass
                access = Access(database.pool)
                (key,) = [key for key in await access.list_keys() if site.api_key.startswith(key.prefix)]
                assert await access.keys_that_hold({key.id}) == {key.id}
                await access.revoke_key(key.id)
                assert await access.keys_that_hold({key.id}) == set()
                rest = [line async for line in lines]
        assert not any("cancelled" in line or "failed" in line for line in rest)
        assert await database.pool.fetchval("SELECT status FROM jobs") == "queued"


@pytest.mark.parametrize("folder", ["/proc/nope", "/proc"])
async def test_submit_makes_no_job_whose_files_have_nowhere_to_go(database: Any, tmp_path: Path, folder: str) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command("submit", "sdxl_image_fast", "a mill", "--out", folder)
    assert (code, out) == (2, "")
    assert f"--out {folder}" in err
    assert "Traceback" not in err
    assert await database.pool.fetchval("SELECT count(*) FROM jobs") == 0
