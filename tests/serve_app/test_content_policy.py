"""The content policy on every route: a text that is never made is refused wherever a text can go in.

The OpenAPI document says where that is. Each of its free-text fields is tried with such a text, in a body that is right
otherwise, or stands below with the reason why it needs no check; a field that is in neither list fails the test.
"""

import asyncio
import copy
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from db.jobs import Status
from models.prompting.signs import Signs
from serve_app.admission import signs_off_loop
from serve_app.app import api, openapi_document
from tests.db.test_queue import asset
from tests.serve_app.conftest import InProcess, a_job, in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED = "a n u d e  c h i l d"
FREE = "a lighthouse at dusk"

REFERENCE = "names a file or a row, which is looked up; nothing of it is drawn or shown"
CHOICE = "one of a list of words; any other is refused, and none is repeated"
ADDRESS = "an address, which is fetched or called and shown to its owner only"
OWN = "is shown to its own user and to admins only, and reaches no model"
GUARD = "says what must not appear; guard terms are wanted there"
OUTSIDE = "of providers and operators with a secret of the installation's; reaches no model and no other user"

# by the last name of a field, wherever it stands
SPARED: Mapping[str, str] = {
    **dict.fromkeys(("job_type", "jobType", "scheduler", "aspect_ratio", "quality", "context_type"), CHOICE),
    **dict.fromkeys(("model_provider", "model_variant", "enhancementModel"), CHOICE),
    **dict.fromkeys(("enhancement_model", "selectedModel"), CHOICE),
    **dict.fromkeys(("reference_image_url", "mask_image_url", "image", "mask"), ADDRESS),
    **dict.fromkeys(("callback_url", "url", "workerUrl", "worker_url"), ADDRESS),
    **dict.fromkeys(("start_reference_url", "end_reference_url"), ADDRESS),
    **dict.fromkeys(("conversation_id", "project_id", "character_id", "prompt_template_id"), REFERENCE),
    **dict.fromkeys(("apiModelId", "predictionId", "job_id", "jobId"), REFERENCE),
    "negative_prompt": GUARD,
}
# by route and field; "*" is all fields of the route
SPARED_HERE: Mapping[tuple[str, str], str] = {
    ("POST /v1/jobs", "loras.0.name"): REFERENCE,
    ("POST /v1/jobs/batch", "jobs.0.loras.0.name"): REFERENCE,
    ("POST /v1/keys", "*"): OWN,
    ("POST /v1/callbacks/endpoints", "description"): OWN,
    ("PATCH /v1/callbacks/endpoints/{endpoint_id}", "description"): OWN,
    ("POST /v1/moderation/{asset_id}", "*"): "is of moderators, who must be able to say what they saw",
    ("POST /functions/v1/job-callback", "*"): OUTSIDE,
    ("POST /functions/v1/replicate-webhook", "*"): OUTSIDE,
    ("POST /functions/v1/register-chat-worker", "*"): OUTSIDE,
    ("POST /functions/v1/update-worker-url", "*"): OUTSIDE,
    ("POST /functions/v1/generate-admin-image", "mode"): "a word of an admin's own, given back and kept in metadata",
    ("POST /functions/v1/generate-avatars", "names.0"): "the name of a character that must be there already",
    ("POST /functions/v1/enhance-prompt", "selectedPresets.0"): CHOICE,
}

JOB = a_job()
OLD = {"jobType": "sdxl_image_fast", "metadata": {"prompt": FREE}}
NEW = {"job_type": "sdxl_image_fast", "prompt": FREE, "metadata": {"contentType": "sfw"}}
WEIGHTS = {"compel_enabled": True}
ENHANCE = {"prompt": FREE, "jobType": "sdxl_image_fast"}
# what a body has beside the field that is tried: by route, and by the field's first name where dialects differ
BODIES: Mapping[str, dict[str, dict[str, Any]]] = {
    "POST /v1/jobs": {"": JOB, "compel_weights": JOB | WEIGHTS},
    "POST /v1/jobs/batch": {"": {"jobs": [JOB | WEIGHTS]}},
    "POST /v1/assets/{asset_id}/save": {"": {}},
    "PATCH /v1/library/{item_id}": {"": {}},
    "POST /functions/v1/queue-job": {
        "": NEW,
        "compel_weights": NEW | WEIGHTS,
        "original_prompt": {"job_type": "sdxl_image_fast"},
        "metadata.original_prompt": {"job_type": "sdxl_image_fast"},
        "metadata": OLD | {"metadata": {"prompt": FREE} | WEIGHTS},
        "enhancedPrompt": OLD,
    },
    "POST /functions/v1/workspace-actions": {"": {"action": "save_to_library", "assetId": "{asset_id}"}},
    "POST /functions/v1/enhance-prompt": {
        "": ENHANCE,
        "original_prompt": {"job_type": "sdxl_image_fast"},
        "metadata": ENHANCE | {"metadata": {"reference_mode": "modify"}},
    },
    "POST /functions/v1/playground-chat": {"": {"message": FREE, "participants": [{"name": "Ada"}]}},
    "POST /v1/conversations": {"": {}},
    "PATCH /v1/conversations/{conversation_id}": {"": {}},
    "POST /v1/conversations/{conversation_id}/messages": {"": {}},
    "POST /functions/v1/replicate-image": {"": {"prompt": FREE, "job_type": "sdxl_image_fast"}},
    "POST /functions/v1/generate-admin-image": {
        "": {"prompt": FREE, "wait_seconds": 0},
        "compel_weights": {"prompt": FREE, "wait_seconds": 0} | WEIGHTS,
    },
    "POST /functions/v1/generate-content": {
        "": NEW,
        "compel_weights": NEW | WEIGHTS,
        "metadata": OLD | {"metadata": {"prompt": FREE} | WEIGHTS},
        "enhancedPrompt": OLD,
    },
}
# fields that the document does not show, as those bodies may have any
UNDOCUMENTED = (
    ("POST /functions/v1/queue-job", "original_prompt"),
    ("POST /functions/v1/queue-job", "metadata.original_prompt"),
    ("POST /functions/v1/generate-content", "original_prompt"),
)


def strings(document: dict[str, Any], schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """The free-text fields of a schema: strings of no fixed form."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for way in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(way, ()):
            yield from strings(document, one, path)
    if "items" in schema:
        yield from strings(document, schema["items"], (*path, "0"))
    for name, inner in schema.get("properties", {}).items():
        yield from strings(document, inner, (*path, name))
    if schema.get("type") == "string" and not {"enum", "const", "format"} & schema.keys():
        yield ".".join(path)


def free_text() -> list[tuple[str, str]]:
    """Every route with each of its free-text fields."""
    document = openapi_document()
    found = set(UNDOCUMENTED)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                found |= {(f"{method.upper()} {path}", field) for field in strings(document, content["schema"])}
    return sorted(found)


def reason(route: str, field: str) -> str | None:
    """Why a field needs no check."""
    here = SPARED_HERE.get((route, field)) or SPARED_HERE.get((route, "*"))
    return here or SPARED.get(field.rpartition(".")[2])


FIELDS = free_text()
TRIED = [(route, field) for route, field in FIELDS if reason(route, field) is None]


def with_text(body: dict[str, Any], field: str) -> dict[str, Any]:
    """The body with the text in that place, in the form that the place has."""
    text = f"({REFUSED}:1.2)" if field.endswith("compel_weights") else REFUSED
    made: Any = copy.deepcopy(body)
    here, names = made, field.split(".")
    for name, following in zip(names, [*names[1:], None], strict=True):
        filler: Any = text if following is None else [] if following.isdigit() else {}
        if isinstance(here, list):
            here.extend([filler] if len(here) <= int(name) else [])
            key: Any = int(name)
        else:
            key = name
        if following is None or (not isinstance(here, list) and not isinstance(here.get(key), dict | list)):
            here[key] = filler
        here = here[key]
    return dict(made)


@dataclass
class Site:
    """The API with its users and what they have."""

    server: InProcess
    clients: dict[str, httpx2.AsyncClient]
    ids: dict[str, str]


class Silent:
    """A language model's handle that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("the language model was asked")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Path) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("api")
    async with in_process(shared_database, folder, state_dir=state_dir) as server:
        speaking = api(server.settings, Silent())
        async with speaking.router.lifespan_context(speaking):
            keys = {"user": await server.key("alice"), "admin": await server.key("root", "admin")}
            clients = {name: await server.client(key, speaking) for name, key in keys.items()}
            alice = clients["user"]
            await alice.post("/v1/jobs", json=JOB)
            claim = await server.claim()
            one = asset(claim.job_id, 1)
            made = type(one)(**{**vars(one), "key": f"{claim.job['user_id']}/{claim.job_id}/1/0.png"})
            await server.blobs.put("workspace-temp", made.key, b"0123456789", "image/png")
            await server.end(claim, status=Status.COMPLETED, assets=[made])
            item = (await alice.post(f"/v1/assets/{made.id}/save", json={})).json()["id"]
            talk = (await alice.post("/v1/conversations", json={})).json()["id"]
            yield Site(server, clients, {"asset_id": str(made.id), "item_id": item, "conversation_id": talk})


async def stored(site: Site) -> dict[str, int]:
    """What is stored of what users send; that an admin has tried something is in the log, without any text."""
    assert not await site.server.pool.fetchval(
        "SELECT count(*) FROM user_activity_log WHERE metadata::text LIKE '%' || $1 || '%'", REFUSED
    )
    counts = await site.server.stored()
    return {table: rows for table, rows in counts.items() if table != "user_activity_log"}


async def test_every_free_text_field_is_tried_or_spared_for_a_reason() -> None:
    assert [row for row in TRIED if row[0] not in BODIES] == []
    routes = {route for route, _ in FIELDS}
    assert {route for route, _ in SPARED_HERE} <= routes, "no reason for what is no more"
    assert BODIES.keys() <= routes
    assert len(TRIED) > 25


@pytest.mark.parametrize(
    ("route", "field"), TRIED, ids=lambda value: value.replace("/functions/v1/", "").split(" ")[-1]
)
async def test_what_is_never_made_is_refused(site: Site, route: str, field: str) -> None:
    method, _, path = route.partition(" ")
    bodies = BODIES[route]
    body = with_text(bodies.get(field) or bodies.get(field.partition(".")[0]) or bodies[""], field)
    body = {name: value.format(**site.ids) if value == "{asset_id}" else value for name, value in body.items()}
    assert str(body).count(REFUSED) == 1
    client = site.clients["admin" if "admin" in path else "user"]
    before = await stored(site)
    answer = await client.request(method, path.format(**site.ids), json=body)
    assert await stored(site) == before, "nothing was stored"
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["code"] == "content_minors", answer.text
    named = {error["field"] for error in answer.json()["errors"]}
    assert len(named) == 1, answer.text
    assert re.sub(r"\W", "", named.pop()), answer.text
    assert "n u d e" not in answer.text


@pytest.mark.parametrize("text", ["a lighthouse at dusk, " * 180, "\ufdfa" * 220])
async def test_a_long_text_is_judged_off_the_event_loop(text: str) -> None:
    judging, turns = asyncio.create_task(signs_off_loop(text)), 0
    while not judging.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1, "nothing else ran while it was read"
    assert await judging == Signs()


@pytest.mark.parametrize("field", ["prompt", "enhanced_prompt", "original_prompt"])
async def test_a_prompt_that_grows_when_it_is_read_is_refused_as_too_long(site: Site, field: str) -> None:
    grown = "\ufdfa" * 4000  # 72,000 letters
    answer = await site.clients["user"].post("/functions/v1/queue-job", json=a_job(prompt=FREE) | {field: grown})
    errors = [(error["field"], error["code"]) for error in answer.json()["errors"]]
    assert answer.status_code == 400
    assert errors == [("enhanced_prompt" if field == "enhanced_prompt" else "prompt", "length")]
