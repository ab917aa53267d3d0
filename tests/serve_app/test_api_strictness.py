"""Input that is refused in words, where it used to be a fault of ours."""

from typing import Any

import httpx2
import pytest

from tests.serve_app.conftest import InProcess, a_job


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
