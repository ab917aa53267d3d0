"""schemathesis over the OpenAPI document: whatever a body, a query or a path holds, and also what the document forbids,
the answer is one that it names, and no fault of ours. On the real API on a socket, with a key of an admin, who gets
everywhere."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckContext, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from db.access import Access
from serve_app.api import admin_images
from serve_app.app import openapi_document
from tests.conftest import fresh_database
from tests.serve_app.running import Site, running

# for each operation, the same in every run
EXAMPLES = {GenerationMode.POSITIVE: 8, GenerationMode.NEGATIVE: 10}
# without a cluster the language model is away, which its routes say with a code
AWAY = {
    "language_model_unavailable",
    "webhook_not_configured",
    "model_not_installed",
    "reference_type_unavailable",
    "not_implemented",
    "not_ready",
}
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.check
def no_fault_of_ours(context: CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """No 5xx, but for what is not installed or away, which is said by its code."""
    said = response.json() if response.status_code in (501, 503) else {}
    if said.get("code") in AWAY or said.get("ready") is False:
        return
    not_a_server_error(context, response, case)


@pytest.fixture(scope="module")
def site(postgres_url: str, template_database: str) -> Iterator[tuple[Site, str]]:
    """The API in a thread of its own, and an admin's key: schemathesis calls from this one, and blocks."""
    ready, over = threading.Event(), threading.Event()
    made: list[Any] = []

    async def serve(folder: Path) -> None:
        async with opened(postgres_url, template_database, folder) as (site, key):
            made.append((site, key))
            ready.set()
            await asyncio.to_thread(over.wait)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(admin_images, "WAIT_SECONDS", 0.3)  # nobody makes the picture that it waits for
        thread = threading.Thread(target=lambda: asyncio.run(serve(Path(name))), daemon=True)
        thread.start()
        assert ready.wait(60)
        yield made[0]
        over.set()
        thread.join(60)


@contextlib.asynccontextmanager
async def opened(postgres_url: str, template: str, folder: Path) -> AsyncIterator[tuple[Site, str]]:
    async with fresh_database(postgres_url, template) as database, running(database, folder) as site:
        access = Access(database.pool)
        key = await access.create_key(await access.ensure_user("root", "admin"), "fuzz")
        assert key.secret is not None
        yield site, key.secret


DOCUMENT = schemathesis.openapi.from_dict(openapi_document())
OPERATIONS = {found.ok().label: found.ok() for found in DOCUMENT.get_all_operations()}
ASKS_NOTHING = {"GET /healthz", "GET /readyz", "GET /metrics"}  # so that nothing about it can be wrong
CASES = [
    pytest.param(label, mode, id=f"{label} {mode.value}")
    for mode in EXAMPLES
    for label in OPERATIONS
    if mode is GenerationMode.POSITIVE or label not in ASKS_NOTHING
]


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_every_answer_is_in_the_document(label: str, mode: GenerationMode, site: tuple[Site, str]) -> None:
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES[mode],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case) -> None:
        headers = {"Authorization": f"Bearer {site[1]}"}
        case.call_and_validate(base_url=site[0].url, headers=headers, timeout=60, checks=[*CHECKS, no_fault_of_ours])

    ask()
