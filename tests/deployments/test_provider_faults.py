"""Jobs at an outside provider that refuses, fails, is away, or makes what will not do."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from db.blobs import BlobStore
from db.providers import Providers
from deployments.metrics import Metrics
from deployments.provider.claims import ProviderClaims
from deployments.provider.run import Pace
from deployments.settings import Settings
from tests.deployments.conftest import Desk
from tests.deployments.providing import PACE, PROMPT, claiming, ended, run_now, settings_for, submit, usage
from tests.provider_standin import TOKEN, Standin, document, picture, standing_in, turn_on


@pytest.fixture
async def provider() -> AsyncIterator[Standin]:
    async with standing_in() as standin:
        yield standin


@pytest.fixture
def settings(database: Any, tmp_path: Path, provider: Standin) -> Settings:
    return settings_for(database, tmp_path, provider)


def refusing(status: int, **headers: str) -> Callable[[Any], Any]:
    return lambda request: document(status, {"detail": "x"}, **headers) if request.method == "POST" else None


async def test_a_refusal_ends_the_job(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    statuses = {400: "refused", 402: "refused", 422: "refused", 401: "misconfigured", 403: "misconfigured"}
    async with claiming(settings):
        for status, code in statuses.items():
            provider.fault = refusing(status)
            job_id = await submit(desk, model)
            assert await ended(desk, job_id) == ("failed", f"provider_{code}")
            message = await desk.database.pool.fetchval("SELECT error_message FROM jobs WHERE id = $1", job_id)
            assert TOKEN not in message
        logs = await usage(desk)
    assert [(log["response_status"], log["cost_usd"]) for log in logs] == [(status, None) for status in statuses]


async def test_a_busy_provider_is_asked_again_when_it_says(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.fault = refusing(429, **{"retry-after": "77"})
    async with claiming(settings):
        job_id = await submit(desk, model, max_attempts=1)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        wait = "SELECT extract(epoch FROM run_at - clock_timestamp()) BETWEEN 40 AND 77.5 FROM job_queue"
        assert await desk.database.pool.fetchval(wait)
        assert await desk.queued(job_id) == ("scheduled", 0)  # no failure is counted
        provider.fault = None
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("completed", None)


async def test_a_prediction_that_fails_fails_the_job(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    async with claiming(settings):
        for number, how in enumerate(("failed", "canceled", "aborted"), 1):
            end = {"status": how, "error": f"about {PROMPT}"}
            provider.after_create = lambda end=end: provider.created[-1].update(end)  # type: ignore[misc]
            job_id = await submit(desk, model)
            assert await ended(desk, job_id) == ("failed", "provider_failed")
            message = await desk.database.pool.fetchval("SELECT error_message FROM jobs WHERE id = $1", job_id)
            assert PROMPT not in message
            assert len(provider.created) == number  # and is not paid for again
            assert await Providers(desk.database.pool).open_prediction(job_id) is None


async def test_a_provider_out_of_reach_costs_an_attempt_and_no_second_prediction(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)
    provider.at_once = False
    away = True

    def fault(request: Any) -> Any:
        return document(503, {}) if away and request.target.startswith("/v1/predictions/") else None

    provider.fault = fault
    async with claiming(settings, Pace(poll=0.02, patience=0.2, settling=0.2)):
        job_id = await submit(desk, model)
        await desk.until("SELECT state = 'scheduled' FROM job_queue WHERE job_id = $1", job_id)
        assert await desk.queued(job_id) == ("scheduled", 1)
        away = False
        provider.succeed(provider.created[0]["id"])
        await run_now(desk, job_id)
        assert await ended(desk, job_id) == ("completed", None)
    assert len(provider.created) == 1


async def test_an_output_that_will_not_do_fails_the_job(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    limits = {"max_output_bytes": 150_000, "max_reference_pixels": 1_000_000}
    cases: tuple[tuple[str, list[tuple[str, bytes]], str], ...] = (
        ("no picture", [("image/png", b"not a picture")], "provider_output_unreadable"),
        ("a page", [("text/html", b"<p>")], "provider_output_refused"),
        ("too large", [("image/png", picture() + bytes(200_000))], "provider_output_refused"),
        ("too many pixels", [("image/png", picture(size=(2000, 2000)))], "provider_output_unreadable"),
        ("none", [], "provider_failed"),
        ("too many", [("image/png", picture())] * 17, "provider_failed"),
    )
    async with claiming(settings.model_copy(update=limits)):
        for name, made, code in cases:
            provider.makes = made
            assert await ended(desk, await submit(desk, model)) == ("failed", code), name
        logs = await usage(desk)
    assert [log["error_message"].partition(":")[0] for log in logs] == [code for _, _, code in cases]
    assert await desk.database.pool.fetchval("SELECT count(*) FROM workspace_assets") == 0
    assert [info.key async for info in BlobStore.from_url(settings.blobs()).list("workspace-temp", "")] == []


async def test_outputs_are_fetched_from_allowed_hosts_only(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    await desk.database.pool.execute("UPDATE api_providers SET output_hosts = '{*.delivery.example,127.0.0.2}'")
    async with claiming(settings):
        assert await ended(desk, await submit(desk, model)) == ("failed", "provider_output_refused")
    assert provider.asked("GET", "/files/") == []


async def test_a_private_base_url_is_not_called_unless_the_operator_allows_it(
    desk: Desk, settings: Settings, provider: Standin
) -> None:
    model = await turn_on(desk.database.pool, provider)
    async with claiming(settings.model_copy(update={"egress_allow": ()})):
        assert await ended(desk, await submit(desk, model)) == ("failed", "provider_misconfigured")
    assert provider.requests == []


async def test_other_secrets_of_the_process_are_not_sent(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    names = ("OURVIDZ_SIGNING_API_KEY", "DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "TEST_API_KEY")
    environment = dict.fromkeys(names[:3], "hidden")
    claims = ProviderClaims(settings, Metrics(), pace=PACE, environment=environment)
    await claims.start()
    try:
        for name in names:
            await desk.database.pool.execute("UPDATE api_providers SET secret_name = $1", name)
            assert await ended(desk, await submit(desk, model)) == ("failed", "provider_misconfigured"), name
    finally:
        await claims.stop(0)
    assert provider.requests == []


async def test_what_was_turned_off_meanwhile_is_not_asked(desk: Desk, settings: Settings, provider: Standin) -> None:
    model = await turn_on(desk.database.pool, provider)
    await desk.database.pool.execute("UPDATE api_providers SET is_active = false")
    async with claiming(settings):
        assert await ended(desk, await submit(desk, model)) == ("failed", "provider_refused")
    assert provider.created == []
