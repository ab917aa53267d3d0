"""A job's enhancement strategy: read, in the row, and against what else is said."""

from typing import Any

import httpx2
import pytest

from models.catalog import resolve
from models.params import InvalidParams
from serve_app.strategies import STRATEGIES, read_strategy
from tests.serve_app.conftest import InProcess, a_job

SDXL, WAN, ALWAYS = "sdxl_image_fast", "video_fast", "image7b_fast_enhanced"


@pytest.mark.parametrize(("strategy", "both"), STRATEGIES.items())
def test_a_strategy_says_what_two_switches_say(strategy: str, both: tuple[bool, bool]) -> None:
    assert read_strategy(strategy, resolve(SDXL), None, None, enhanced=False) == both
    assert read_strategy(strategy, resolve(SDXL), *both, enhanced=False) == both


def test_without_a_strategy_the_switches_are_as_they_were() -> None:
    assert read_strategy(None, resolve(SDXL), True, None, enhanced=True) == (True, None)


@pytest.mark.parametrize(
    ("strategy", "job_type", "enhance", "compel", "enhanced", "code"),
    [
        ("best", SDXL, None, None, False, "choice"),
        ("compel", WAN, None, None, False, "unsupported"),
        ("hybrid", WAN, None, None, False, "unsupported"),
        ("none", ALWAYS, None, None, False, "conflict"),
        ("qwen", SDXL, None, None, True, "conflict"),
        ("none", SDXL, True, None, False, "conflict"),
        ("hybrid", SDXL, None, False, False, "conflict"),
    ],
)
def test_a_strategy_that_can_not_be_is_refused_by_name(
    strategy: str, job_type: str, enhance: bool | None, compel: bool | None, enhanced: bool, code: str
) -> None:
    with pytest.raises(InvalidParams) as refused:
        read_strategy(strategy, resolve(job_type), enhance, compel, enhanced=enhanced)
    assert [(error.field, error.code) for error in refused.value.errors] == [("enhancement_strategy", code)]


async def test_the_row_says_what_was_asked(server: InProcess, alice: httpx2.AsyncClient) -> None:
    weights = {"quality": 1.2, "nsfw": 0.5}
    asked: list[tuple[dict[str, Any], tuple[str, bool, str]]] = [
        ({}, ("none", False, "sdxl")),
        ({"enhance": True}, ("qwen", False, "qwen")),
        ({"enhancement_strategy": "none"}, ("none", False, "sdxl")),
        ({"enhancement_strategy": "qwen"}, ("qwen", False, "qwen")),
        ({"enhancement_strategy": "compel", "compel_weights": weights}, ("compel", True, "sdxl")),
        ({"enhancement_strategy": "hybrid", "compel_weights": "(fog:1.2)"}, ("hybrid", True, "qwen")),
    ]
    for route, key in (("/v1/jobs", "id"), ("/functions/v1/queue-job", "jobId")):
        for changes, (strategy, compel, queue) in asked:
            if "enhance" in changes and route != "/v1/jobs":
                continue  # the older dialect has another word for it
            answer = await alice.post(route, json=a_job(**changes))
            assert answer.status_code < 300, (route, changes, answer.text)
            row = await server.pool.fetchrow(
                """SELECT j.enhancement_strategy, (j.params ->> 'compel_enabled')::boolean, q.queue
                   FROM jobs j JOIN job_queue q ON q.job_id = j.id WHERE j.id = $1::text::uuid""",
                answer.json()[key],
            )
            assert tuple(row) == (strategy, compel, queue), (route, changes)
            job = (await alice.get(f"/v1/jobs/{answer.json()[key]}")).json()
            assert job["enhancement_strategy"] == strategy
    kept = await server.pool.fetch("SELECT compel_weights FROM jobs WHERE compel_weights IS NOT NULL ORDER BY id")
    terms = {"terms": [{"term": "fog", "weight": 1.2}]}
    assert [row["compel_weights"] for row in kept] == [weights, terms] * 2


async def test_weights_are_refused_by_name_and_judged_by_their_words(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    before = await server.stored()
    compel = {"enhancement_strategy": "compel"}
    refused: list[tuple[dict[str, Any], str]] = [
        (compel | {"compel_weights": {"quality": 3}}, "compel_weights.quality"),
        (compel | {"compel_weights": {"charm": 1}}, "compel_weights.charm"),
        (compel | {"compel_weights": "fog"}, "compel_weights"),
        ({"compel_weights": {"quality": 1.2}}, "compel_weights"),
        (compel | {"compel_enabled": False}, "enhancement_strategy"),
    ]
    for route, status in (("/v1/jobs", 422), ("/functions/v1/queue-job", 400)):
        for changes, field in refused:
            answer = await alice.post(route, json=a_job(**changes))
            assert answer.status_code == status, (changes, answer.text)
            assert [error["field"] for error in answer.json()["errors"]] == [field]
        answer = await alice.post(
            route, json=a_job(prompt="a portrait of a toddler", compel_weights="(nude:1.2)", **compel)
        )
        assert answer.json()["code"] == "content_minors"
    assert await server.stored() == before
