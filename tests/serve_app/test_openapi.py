"""The HTTP interface as a whole: its document, and that no route is open by accident."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.routing import Route

from deployments.settings import Settings
from serve_app.api.auth import authenticate
from serve_app.app import api, event_streams, openapi_document
from tests.serve_app.conftest import InProcess

# whoever may reach these without a key, and what guards them instead
OPEN = {
    "/healthz": "nothing to guard",
    "/readyz": "nothing to guard",
    "/metrics": "a token of its own, names no user",
    "/docs": "the document",
    "/docs/oauth2-redirect": "the document",
    "/redoc": "the document",
    "/openapi.json": "the document",
    "/v1/files/{bucket}/{key:path}": "signed URLs",
    "/functions/v1/job-callback": "signed bodies",
    "/functions/v1/replicate-webhook": "signed bodies",
}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("OURVIDZ_STATE_DIR", str(tmp_path))
    return openapi_document()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def flat(app: FastAPI) -> list[tuple[str, Any]]:
    """Every route of an app with its path, those of included routers too."""
    found = []

    def walk(routes: Any, prefix: str = "") -> None:
        for route in routes:
            inner = getattr(route, "original_router", None)
            if inner is not None:
                walk(inner.routes, prefix + getattr(route, "prefix", ""))
            else:
                found.append((prefix + route.path, route))

    walk(app.routes)
    return found


def depends_on(dependant: Dependant, function: Any) -> bool:
    return dependant.call is function or any(depends_on(inner, function) for inner in dependant.dependencies)


@pytest.mark.parametrize("make", [api, event_streams])
def test_every_route_asks_who_is_calling(tmp_path: Path, make: Any) -> None:
    routes = flat(make(Settings(state_dir=tmp_path)))
    open_ones = {
        path
        for path, route in routes
        if not (isinstance(route, APIRoute) and depends_on(route.dependant, authenticate))
    }
    assert open_ones <= OPEN.keys()
    assert sum(isinstance(route, APIRoute) for _, route in routes) > (15 if make is api else 0)
    assert all(isinstance(route, Route) for _, route in routes), "a mount would hide routes from this test"


async def test_every_operation_but_the_open_ones_answers_401_without_a_key(server: InProcess) -> None:
    client = await server.client()
    asked = 0
    for method, path, _ in operations(server.app.openapi()):
        if path in OPEN or path.replace("{key}", "{key:path}") in OPEN:
            continue
        answer = await client.request(method, path.replace("{", "").replace("}", ""))
        assert answer.status_code == 401, (method, path)
        asked += 1
    assert asked > 15


async def test_the_admins_operations_are_closed_to_users(server: InProcess, alice: httpx2.AsyncClient) -> None:
    moderator = await server.user("mod", "moderator")
    for method, path, body in (
        ("POST", "/v1/keys", {"username": "eve"}),
        ("GET", "/v1/queues", None),
        ("GET", "/v1/workers", None),
        ("POST", "/v1/queues/sdxl/pause", None),
        ("POST", "/v1/queues/sdxl/resume", None),
    ):
        for client in (alice, moderator):
            assert (await client.request(method, path, json=body)).status_code == 403, path


def test_document_names_every_operation_once(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    assert {"createJob", "listJobs", "getJob", "cancelJob", "retryJob", "queueJob", "enhancePrompt", "streamJob"} <= {
        *ids
    }


def test_document_declares_the_key_where_it_is_wanted(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    for method, path, operation in operations(document):
        open_one = path in OPEN or path.replace("{key}", "{key:path}") in OPEN
        assert bool(operation.get("security")) is not open_one, (method, path)
        for requirement in operation.get("security", []):
            assert requirement.keys() <= schemes.keys()


def test_document_describes_every_operation(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        assert operation.get("description"), (method, path)


def test_document_resolves_its_references(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    seen = set(references(document))
    assert seen
    for reference in seen:
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


async def test_document_is_served(server: InProcess) -> None:
    client = await server.client()
    assert (await client.get("/openapi.json")).json()["info"]["title"] == "ourvidz-serve"
    assert (await client.get("/docs")).status_code == 200
