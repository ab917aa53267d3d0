"""/functions/v1/get-schema-info: tables, buckets and functions, for admins. It runs no statement of its caller's."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from db.blobs import BUCKETS
from db.inventory import Inventory
from serve_app.api.auth import Admin, EdgeDep
from serve_app.api.bodies import dialect, json_object, one_of
from serve_app.api.problems import Problem

router = APIRouter(prefix="/functions/v1", tags=["functions"])

ASKED = one_of(dialect("action", ("action",), action={"type": "string", "enum": ["schema"]}))


@router.post("/get-schema-info", operation_id="getSchemaInfo", openapi_extra=ASKED)
async def get_schema_info(request: Request, edge: EdgeDep, admin: Admin) -> dict[str, Any]:
    """What there is, from the catalog of the database: every table with its columns. `query` is refused."""
    body = await json_object(request)
    if body.get("action") != "schema":
        message = "must be schema; statements of a caller's own are not run" if "action" in body else "is required"
        raise Problem(400, "choice" if "action" in body else "missing", message, field="action")
    tables = await Inventory(edge.pool).tables()
    paths = request.app.openapi()["paths"]
    return {
        "tables": [vars(table) for table in tables],
        "buckets": [{"id": name, "name": name, "public": False} for name in BUCKETS],
        "edgeFunctions": sorted(
            path.removeprefix(f"{router.prefix}/") for path in paths if path.startswith(router.prefix)
        ),
        "timestamp": datetime.now(UTC),
    }
