"""What a job says was done about its prompt, beside what was asked."""

from collections.abc import Mapping
from typing import Any

import pytest

from deployments.prompting import prompt_account
from deployments.settings import Settings
from tests.deployments.conftest import Desk
from tests.deployments.test_replica import ended, serving, settings, state_dir, submit

__all__ = ["settings", "state_dir"]  # fixtures

BY_MODEL = {"strategy": "qwen", "fallback_reason": None}
BY_RULES = {"strategy": "rule_based", "fallback_reason": "model_busy"}
OFF: dict[str, Any] = {"compel_enabled": False, "compel_success": None}
WEIGHED = {"compel_enabled": True, "compel_success": True}
PLAIN = {"compel_enabled": True, "compel_success": False, "fallback_reason": "compel_failed"}


@pytest.mark.parametrize(
    ("enhancement", "run", "asked", "used", "steps"),
    [
        ({}, OFF, "none", "none", []),
        ({}, {}, "none", "none", []),
        (BY_MODEL, OFF, "qwen", "qwen", []),
        (BY_RULES, OFF, "qwen", "none", ["qwen"]),
        ({}, WEIGHED, "compel", "compel", []),
        ({}, PLAIN, "compel", "none", ["compel"]),
        (BY_MODEL, WEIGHED, "hybrid", "hybrid", []),
        (BY_RULES, WEIGHED, "hybrid", "compel", ["qwen"]),
        (BY_MODEL, PLAIN, "hybrid", "qwen", ["compel"]),
        (BY_RULES, PLAIN, "hybrid", "none", ["qwen", "compel"]),
    ],
)
def test_what_fell_back_is_said_beside_what_was_done(
    enhancement: Mapping[str, Any], run: Mapping[str, Any], asked: str, used: str, steps: list[str]
) -> None:
    account = prompt_account(enhancement, run)
    assert (account["enhancement_asked"], account["enhancement_strategy"]) == (asked, used)
    assert [fallback["step"] for fallback in account["enhancement_fallbacks"]] == steps
    assert all(fallback["reason"] and fallback["instead"] for fallback in account["enhancement_fallbacks"])


async def test_the_end_of_a_job_writes_what_was_done(desk: Desk, settings: Settings) -> None:
    weighed = {"enhancement_strategy": "compel", "compel_enabled": True, "compel_weights": {"quality": 1.3}}
    async with serving(settings):
        good = await submit(desk, settings, **weighed)
        # of blends Compel takes no empty ones: the plain prompt is used
        bad = await submit(desk, settings, **(weighed | {"prompt": "()", "compel_weights": None}))
        for job_id in (good, bad):
            assert await ended(desk, job_id) == "completed"
    rows = {row["id"]: row for row in await desk.database.pool.fetch("SELECT * FROM jobs")}
    used = rows[good]["generation_settings"]
    assert (rows[good]["enhancement_strategy"], used["enhancement_asked"]) == ("compel", "compel")
    assert used["compel_weights_applied"] == {"quality": {"weight": 1.3, "places": 0, "added": 1}}
    assert rows[good]["compel_weights"] == {"quality": 1.3}
    fallen = rows[bad]["generation_settings"]
    assert (rows[bad]["enhancement_strategy"], fallen["enhancement_asked"]) == ("none", "compel")
    assert [fallback["step"] for fallback in fallen["enhancement_fallbacks"]] == ["compel"]
    assert rows[bad]["compel_weights"] is None
    manifest = await desk.database.pool.fetchval("SELECT manifest FROM workspace_assets WHERE job_id = $1", good)
    assert manifest["parameters"]["compel_weights"] == {"quality": 1.3}
    assert manifest["used"]["compel_weights_applied"]["quality"]["weight"] == 1.3
