"""What the tests of jobs at outside providers share: settings, a replica, jobs as the API would accept them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from deployments.metrics import Metrics
from deployments.provider.claims import ProviderClaims
from deployments.provider.run import Pace
from deployments.settings import Settings
from models.catalog import default_for, resolve
from models.params import GivenParams, resolve_params
from tests.deployments.conftest import Desk
from tests.provider_standin import TOKEN, Standin

PROMPT = "a very private lighthouse"
PACE = Pace(poll=0.05, patience=2.0, settling=0.2)


def settings_for(database: Any, folder: Path, provider: Standin) -> Settings:
    """Of an installation that may reach the stand-in."""
    return Settings(
        database_url=database.url,
        state_dir=folder / "state",
        blob_url=f"file://{folder / 'blobs'}",
        public_url="http://127.0.0.1:8000",
        signing_secret="s" * 40,
        egress_allow=(provider.origin,),
        renew_seconds=0.2,
        lease_seconds=30,
        poll_seconds=0.1,
    )


@asynccontextmanager
async def claiming(settings: Settings, pace: Pace = PACE, token: str = TOKEN) -> AsyncIterator[ProviderClaims]:
    claims = ProviderClaims(settings, Metrics(), pace=pace, environment={"TEST_API_TOKEN": token})
    await claims.start()
    try:
        yield claims
    finally:
        await claims.stop(0)


async def submit(desk: Desk, model: UUID, **changes: Any) -> UUID:
    """A job as the API would accept it."""
    own = {name: changes.pop(name) for name in ("max_attempts", "deadline_seconds") if name in changes}
    job_type = resolve("rv51_fast")
    given = GivenParams(**({"prompt": PROMPT, "seed": 7, "steps": 12} | changes))
    params = resolve_params(job_type, given, default_for(job_type.family)).params
    (job_id,) = await desk.accept(
        job_type="rv51_fast",
        model_type="rv51",
        queue="provider",
        provider="replicate",
        api_model_id=model,
        original_prompt=PROMPT,
        params=params.model_dump(mode="json"),
        **own,
    )
    return job_id


async def ended(desk: Desk, job_id: UUID) -> tuple[str, str | None]:
    await desk.until("SELECT status IN ('completed', 'failed', 'cancelled') FROM current_jobs WHERE id = $1", job_id)
    return await desk.status(job_id)


async def usage(desk: Desk) -> list[Any]:
    await desk.until("SELECT NOT EXISTS (SELECT FROM ourvidz.provider_predictions WHERE ended_at IS NULL)")
    return await desk.database.pool.fetch("SELECT * FROM api_usage_logs ORDER BY created_at")


async def run_now(desk: Desk, job_id: UUID) -> None:
    """The wait after a failure is over."""
    await desk.database.pool.execute(
        "UPDATE job_queue SET state = 'ready', run_at = now() WHERE job_id = $1 AND state = 'scheduled'", job_id
    )
