"""/functions/v1: the family of worker addresses, what there is, and what every function has in common."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import pytest_asyncio

from db.jobs import Status
from db.workers import Workers
from serve_app.api.absent import INSTEAD
from tests.serve_app.conftest import InProcess, a_job, in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")

FUNCTIONS = "/functions/v1/"
ADMINS = (
    "register-chat-worker",
    "update-worker-url",
    "system-metrics",
    "get-schema-info",
    "refresh-prompt-cache",
    "generate-admin-image",
    "generate-avatars",
)
ANYBODYS = ("get-negative-prompt", "get-active-worker-url", "health-check-workers", "generate-content")
URL = "https://worker.example:8443/path"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(
    shared_database: Any, state_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[InProcess]:
    """One API for the whole module."""
    async with in_process(shared_database, tmp_path_factory.mktemp("live"), state_dir=state_dir) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def server(opened: InProcess) -> InProcess:
    """The API, with no job, replica or registration of an earlier test."""
    await opened.pool.execute(
        """DELETE FROM jobs; DELETE FROM workers; DELETE FROM queues; DELETE FROM run_times;
           DELETE FROM user_activity_log; UPDATE system_config SET config = '{}'"""
    )
    return opened


@pytest_asyncio.fixture(loop_scope="module")
async def alice(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an ordinary user."""
    return await server.user("alice")


@pytest_asyncio.fixture(loop_scope="module")
async def root(server: InProcess) -> httpx2.AsyncClient:
    """A client in the name of an admin."""
    return await server.user("root", "admin")


async def call(client: httpx2.AsyncClient, name: str, body: Any = None, status: int = 200) -> Any:
    answer = await client.post(FUNCTIONS + name, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def enter(server: InProcess, queue: str, state: str = "ready", slots: int = 2) -> UUID:
    """A replica as it registers itself."""
    worker = uuid4()
    await Workers(server.worker_pool).enter(worker, queue, state, model_name=f"tiny-{queue}", slots=slots)
    return worker


# ------------------------------------------------------------------------------------------------ who may call


@pytest.mark.parametrize("name", [*ADMINS, *ANYBODYS, *INSTEAD, "replicate-callback"])
async def test_a_function_is_closed_without_a_key(server: InProcess, name: str) -> None:
    answer = await (await server.client()).post(FUNCTIONS + name, json={})
    assert (answer.status_code, answer.json()["success"], answer.json()["code"]) == (401, False, "missing_key")
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("name", ADMINS)
async def test_the_admins_functions_are_closed_to_others(alice: httpx2.AsyncClient, name: str) -> None:
    assert (await call(alice, name, {}, 403))["code"] == "admin_only"


async def test_polling_leaves_no_audit_rows_and_registering_does(server: InProcess, root: httpx2.AsyncClient) -> None:
    for name in ("system-metrics", "health-check-workers"):
        await call(root, name, {})
    await call(root, "register-chat-worker", {"worker_url": URL})
    rows = await server.pool.fetch("SELECT action FROM user_activity_log")
    assert [row["action"] for row in rows] == ["request.registerChatWorker"]


# -------------------------------------------------------------------------------------------------------- CORS


@pytest.mark.parametrize("name", ["queue-job", "system-metrics", "fal-image", "no-such-function"])
async def test_options_of_every_function_is_200(server: InProcess, name: str) -> None:
    client = await server.client()
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for headers in ({}, preflight):
        answer = await client.options(FUNCTIONS + name, headers=headers)
        assert (answer.status_code, answer.text) == (200, "ok")
        assert answer.headers["access-control-allow-origin"] == "*"
        allowed = answer.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "x-client-info", "apikey", "content-type"} <= set(allowed)


async def test_an_unknown_function_is_404_in_json(alice: httpx2.AsyncClient) -> None:
    answer = await alice.post(f"{FUNCTIONS}no-such-function", json={}, headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.json()["success"]) == (404, False)
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]


async def test_even_an_unexpected_error_can_be_read_across_origins(server: InProcess) -> None:
    client = await server.client(await server.key(), raise_app_exceptions=False)
    await server.pool.execute("ALTER TABLE workers RENAME COLUMN slots TO spoons")
    try:
        answer = await client.post(f"{FUNCTIONS}health-check-workers", json={})
    finally:
        await server.pool.execute("ALTER TABLE workers RENAME COLUMN spoons TO slots")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.headers["access-control-allow-origin"] == "*"


# --------------------------------------------------------------------------------------------- the live cluster


async def test_the_health_of_workers_is_that_of_the_replicas(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await enter(server, "qwen")
    await enter(server, "sdxl", "loading")
    results = (await call(alice, "health-check-workers"))["healthResults"]
    assert {name: (one["isHealthy"], one["healthError"]) for name, one in results.items()} == {
        "chatWorker": (True, None),
        "sdxlWorker": (False, "no replica is ready: loading"),
        "wanWorker": (False, "no replica has shown life within the last minute"),
    }
    assert (results["chatWorker"]["lastChecked"] is None, results["wanWorker"]["lastChecked"]) == (False, None)
    assert {one["responseTimeMs"] for one in results.values()} == {None}


async def test_a_paused_queue_is_not_healthy(server: InProcess, alice: httpx2.AsyncClient) -> None:
    await enter(server, "wan")
    await server.queue.pause("wan", True)
    told = (await call(alice, "health-check-workers"))["healthResults"]["wanWorker"]
    assert (told["isHealthy"], told["healthError"]) == (False, "the queue is paused")


@pytest.mark.parametrize(("body", "kind"), [(None, "wan"), ({}, "wan"), ({"worker_type": "sdxl"}, "sdxl")])
async def test_the_active_worker_is_this_api(
    server: InProcess, alice: httpx2.AsyncClient, body: dict[str, str] | None, kind: str
) -> None:
    await enter(server, kind, slots=3)
    answer = await alice.post(f"{FUNCTIONS}get-active-worker-url", **({} if body is None else {"json": body}))
    told = answer.json()
    assert told["worker_url"] == told["workerUrl"] == server.settings.public_url
    assert (told["worker_type"], told["isHealthy"], told["registrationInfo"]) == (kind, True, None)
    facts = told["workerCapabilities"]
    assert (facts["models"], facts["ready_replicas"], facts["slots"]) == ([f"tiny-{kind}"], 1, 3)
    assert all(name in facts["job_types"] for name in ({"wan": "video_fast", "sdxl": "sdxl_image_fast"}[kind],))
    assert not any(word in answer.text for word in ("pid", "node"))


async def test_an_unknown_kind_of_worker_is_refused(alice: httpx2.AsyncClient) -> None:
    assert (await call(alice, "get-active-worker-url", {"worker_type": "gpu"}, 400))["code"] == "choice"


async def test_metrics_count_what_waits_and_say_who_is_there(server: InProcess, root: httpx2.AsyncClient) -> None:
    worker = await enter(server, "sdxl")
    for _ in range(4):
        await root.post("/v1/jobs", json=a_job())
    claim = await server.claim()
    told = await call(root, "system-metrics")
    assert told["queues"] == {"chat_queue": 0, "sdxl_queue": 3, "wan_queue": 0}
    assert told["running"]["sdxl_queue"] == 1
    assert told["etaEstimates"] == {"sdxl": "under 1 min", "wan": "immediate"}
    assert told["etaSeconds"] == {"sdxl": None, "wan": None}, "nothing has been measured yet"
    (shown,) = told["workers"]["sdxl"]
    assert (shown["id"], shown["type"], shown["status"], shown["responseTime"]) == (
        str(worker),
        "sdxl",
        "healthy",
        None,
    )
    assert (told["workers"]["chat"], told["workers"]["wan"], told["deployments"]) == ([], [], None)
    await server.end(claim, status=Status.COMPLETED, generation_time_ms=4000)
    measured = (await call(root, "system-metrics"))["etaSeconds"]
    assert measured["sdxl"] > 0
    assert measured["wan"] is None


@pytest.mark.parametrize(("jobs", "band"), [(0, "immediate"), (11, "3-10 min"), (21, "more than 10 min")])
async def test_bands_follow_the_length_of_the_queue(
    server: InProcess, root: httpx2.AsyncClient, jobs: int, band: str
) -> None:
    for _ in range(jobs):
        assert (await root.post("/v1/jobs", json=a_job())).status_code == 202
    assert (await call(root, "system-metrics"))["etaEstimates"]["sdxl"] == band


async def test_registering_keeps_the_address_and_redirects_nothing(
    server: InProcess, root: httpx2.AsyncClient, alice: httpx2.AsyncClient
) -> None:
    await server.pool.execute("""UPDATE system_config SET config = '{"kept": 1}'""")
    body = {"worker_url": URL, "auto_registered": True, "registration_method": "startup"}
    told = await call(root, "register-chat-worker", body)
    assert (told["workerUrl"], told["redirected"], told["responseTimeMs"]) == (URL, False, None)
    assert told["healthStatus"] == "unhealthy"
    told = await call(root, "update-worker-url", {"workerUrl": URL})
    assert (told["worker_url"], told["auto_registered"], told["redirected"]) == (URL, False, False)
    config = await server.pool.fetchval("SELECT config FROM system_config")
    assert (config["kept"], config["chatWorkerUrl"], config["workerUrl"], config["worker_url"]) == (1, URL, URL, URL)
    told = await call(alice, "get-active-worker-url", {"worker_type": "chat"})
    assert told["worker_url"] == server.settings.public_url
    assert (told["registrationInfo"]["worker_url"], told["registrationInfo"]["registration_method"]) == (URL, "startup")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "worker_url"),
        ({"worker_url": ""}, "worker_url"),
        ({"worker_url": 5}, "worker_url"),
        ({"worker_url": "worker.example"}, "worker_url"),
        ({"worker_url": "ftp://worker.example"}, "worker_url"),
        ({"worker_url": "https://me:secret@worker.example"}, "worker_url"),
        ({"worker_url": "https://[worker"}, "worker_url"),
        ({"worker_url": URL, "auto_registered": "yes"}, "auto_registered"),
        ({"worker_url": URL, "detection_method": ["x"]}, "detection_method"),
    ],
)
async def test_what_is_no_address_is_refused(
    server: InProcess, root: httpx2.AsyncClient, body: dict[str, Any], field: str
) -> None:
    for name in ("register-chat-worker", "update-worker-url"):
        told = await call(root, name, body, 400)
        assert [error["field"] for error in told["errors"]] == [field]
    assert await server.pool.fetchval("SELECT config FROM system_config") == {}


# ------------------------------------------------------------------------------------------------ what there is


async def test_the_schema_is_that_of_the_database(root: httpx2.AsyncClient) -> None:
    told = await call(root, "get-schema-info", {"action": "schema"})
    tables = {(table["schema"], table["name"]): table for table in told["tables"]}
    columns = {column["name"]: column for column in tables["public", "jobs"]["columns"]}
    assert (columns["id"]["type"], columns["id"]["nullable"]) == ("uuid", False)
    assert ("lora", "training_runs") in tables
    assert tables["public", "job_destinations"]["row_security"] is True
    assert {"workspace-temp", "user-library", "avatars"} <= {bucket["name"] for bucket in told["buckets"]}
    assert {"queue-job", "get-schema-info", "fal-image", "replicate-callback"} <= set(told["edgeFunctions"])


@pytest.mark.parametrize("body", [{"action": "query", "query": "SELECT 1"}, {"action": 1}, {}, [], None])
async def test_no_statement_of_a_callers_own_is_run(root: httpx2.AsyncClient, body: Any) -> None:
    assert (await call(root, "get-schema-info", body, 400))["success"] is False


@pytest.mark.parametrize("name", INSTEAD)
async def test_what_is_not_implemented_says_so(alice: httpx2.AsyncClient, name: str) -> None:
    told = await call(alice, name, {"prompt": "x"}, 501)
    assert (told["success"], told["code"]) == (False, "not_implemented")
    assert name in told["error"]


async def test_the_older_providers_callback_is_gone(alice: httpx2.AsyncClient) -> None:
    assert (await call(alice, "replicate-callback", {}, 410))["code"] == "gone"


# ------------------------------------------------------------------------------------------------- prompt rows


async def test_the_negative_prompt_comes_from_the_rows_as_they_are_now(
    server: InProcess, alice: httpx2.AsyncClient
) -> None:
    told = await call(alice, "get-negative-prompt", {"modelType": "sdxl", "contentMode": "sfw"})
    assert (told["modelType"], told["contentMode"], told["generationMode"]) == ("sdxl", "sfw", "txt2img")
    assert "worst quality" in told["baseNegativePrompt"]
    row = {"model_type": "sdxl", "generation_mode": "i2i", "negative_prompt": "a seam", "priority": 99, "name": "i"}
    await server.pool.execute(
        """INSERT INTO negative_prompts (name, model_type, generation_mode, negative_prompt, priority)
           SELECT name, model_type, generation_mode, negative_prompt, priority
           FROM jsonb_populate_record(NULL::negative_prompts, $1)""",
        row,
    )
    same = await call(alice, "get-negative-prompt", {})
    assert same["baseNegativePrompt"] == told["baseNegativePrompt"]
    other = await call(alice, "get-negative-prompt", {"generationMode": "i2i"})
    await server.pool.execute("DELETE FROM negative_prompts WHERE name = 'i'")
    terms = other["baseNegativePrompt"].split(", ")
    assert "a seam" not in told["baseNegativePrompt"]
    assert terms.index("a seam") < terms.index("worst quality"), "by priority"


@pytest.mark.parametrize("body", [{"modelType": "dalle"}, {"contentMode": 1}, {"generationMode": "video"}])
async def test_a_negative_prompt_of_nothing_is_refused(alice: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    told = await call(alice, "get-negative-prompt", body, 400)
    assert [error["field"] for error in told["errors"]] == [*body]


async def test_refreshing_tells_of_the_rows_and_of_the_cache(server: InProcess, root: httpx2.AsyncClient) -> None:
    first = await call(root, "refresh-prompt-cache", {})
    stats, data = first["cache_stats"], first["cached_data"]
    templates = await server.pool.fetchval("SELECT count(*) FROM prompt_templates WHERE is_active")
    assert (stats["templateCount"], stats["nsfwTermCount"]) == (templates, None)
    assert "enhancement" in data["template_categories"]
    assert ("sdxl" in data["model_types"], "sdxl" in data["negative_prompt_categories"]) == (True, True)
    await call(root, "get-negative-prompt", {})
    await server.pool.execute("UPDATE negative_prompts SET description = 'x'")
    second = (await call(root, "refresh-prompt-cache", {"force_refresh": True}))["cache_stats"]
    assert second["integrityHash"] != stats["integrityHash"]
    assert (second["misses"] > stats["misses"], int(second["version"]) > int(stats["version"])) == (True, True)
    assert (await call(root, "refresh-prompt-cache", {"force_refresh": 1}, 400))["code"] == "type"
    assert json.dumps(second).isprintable()
