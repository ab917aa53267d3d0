"""The HTTP interface as tables, from the OpenAPI document and the dependencies of its routes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tables import bounds, code, sentence, table

from deployments.settings import Settings
from serve_app.api.auth import authenticate, require_admin
from serve_app.app import api, event_streams, openapi_document

WITHOUT_KEY = {"getFile": "a signed URL", "jobCallback": "a signed body"}


def operations() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every operation of the OpenAPI document: method, path, operation."""
    for path, item in openapi_document()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def admin_operations() -> set[str]:
    """The ids of the operations that only an admin may call."""

    def depends(dependant: Any, on: Callable[..., Any]) -> bool:
        return dependant.call is on or any(depends(child, on) for child in dependant.dependencies)

    found = set()
    for app in (api(Settings.load()), event_streams(Settings.load())):
        routers = [route.original_router for route in app.routes if hasattr(route, "original_router")]
        for route in [*app.routes, *(route for router in routers for route in router.routes)]:
            dependant = getattr(route, "dependant", None)
            if dependant is not None and depends(dependant, require_admin):
                assert depends(dependant, authenticate)
                found.add(route.operation_id)
    return found


def operations_table() -> str:
    """Every operation, who may call it, and what it is for."""
    admin, rows = admin_operations(), []
    for method, path, operation in operations():
        name = operation["operationId"]
        keyed = "an admin's key" if name in admin else "an API key"
        who = keyed if operation.get("security") else WITHOUT_KEY.get(name, "anybody")
        success = ", ".join(status for status in operation["responses"] if status < "400")
        rows.append((code(f"{method} {path}"), code(name), who, success, sentence(operation.get("description"))))
    return table(("Operation", "Id", "Needs", "Success", "What it does"), rows)


def parameters_table() -> str:
    """The query parameters and headers of all operations."""
    rows = []
    for _, _, operation in operations():
        for given in operation.get("parameters", ()):
            if given["in"] != "path":
                schema = given["schema"]
                note = given.get("description", "")
                default = schema.get("default")
                rows.append(
                    (
                        code(operation["operationId"]),
                        code(given["name"]),
                        given["in"],
                        type_of(schema),
                        "required" if given["required"] else code("" if default is None else default),
                        note,
                    )
                )
    return table(("Operation", "Name", "Where", "Type", "Default", "Meaning"), rows)


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(type_of(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return " ".join(filter(None, (schema.get("format", kind), bounds(schema))))


def schema_table(name: str) -> str:
    """The fields of one schema of the OpenAPI document."""
    schema = openapi_document()["components"]["schemas"][name]
    required = set(schema.get("required", ()))
    rows = []
    for field, about in schema["properties"].items():
        default = about.get("default")
        shown = "required" if field in required else code("" if default is None else default)
        kind = type_of(about) if field in required else type_of(about).removesuffix(" or null")
        rows.append((code(field), kind, shown, about.get("description", "")))
    if all(row[2] == "required" for row in rows):
        return table(("Field", "Type", "Meaning"), (row[:2] + row[3:] for row in rows))
    return table(("Field", "Type", "Default", "Meaning"), rows)
