"""Errors as clients see them: RFC 9457 problem documents, and the one table from our errors to HTTP.

A problem names the field that is wrong and never repeats what was in it.
"""

from typing import Any

import asyncpg
import structlog
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from db.blobs import BlobNotFound, StorageUnavailable
from db.idempotency import IdempotencyConflict, IdempotencyInFlight
from db.limits import LimitReached
from db.pool import CONNECTION_FAULTS, DatabaseUnavailable
from deployments.destinations import EgressError
from models.catalog import RequestRefused
from models.engine import InvalidInput
from models.params import InvalidParams
from serve_app.api.wire import FieldProblem, FunctionProblem
from serve_app.api.wire import Problem as ProblemDocument

log = structlog.get_logger()

TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    402: "Not enough credits",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    410: "Gone",
    413: "Too large",
    415: "Unsupported media type",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    501: "Not implemented",
    503: "Not available",
}


class Problem(Exception):
    """An answer that is an error. Raise it anywhere in a handler."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        errors: list[FieldProblem] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers or {}
        self.errors = errors or ([FieldProblem(field=field, message=detail, code=code)] if field else [])

    def document(self, path: str) -> ProblemDocument:
        """The body of the answer."""
        return ProblemDocument(
            title=TITLES.get(self.status, "Error"),
            status=self.status,
            detail=self.detail,
            instance=path,
            code=self.code,
            errors=self.errors,
        )


UNAVAILABLE = {"Retry-After": "5"}


def problem_of(error: Exception) -> Problem:
    """The problem that an error is to a client. What is not in the table is our fault: 500, with nothing told."""
    match error:
        case Problem():
            return error
        case InvalidParams():
            errors = [FieldProblem(field=e.field, message=e.message, code=e.code) for e in error.errors]
            return Problem(422, error.code, error.message, errors=errors)
        case RequestRefused(code="unknown_job_type"):
            return Problem(422, error.code, error.message, field="job_type")
        case RequestRefused():
            return Problem(422, error.code, error.message, field="prompt")
        case InvalidInput():
            return Problem(422, error.code, error.message, field="reference_image_url")
        case IdempotencyConflict():
            return Problem(422, error.code, "this Idempotency-Key was used with another body", field="Idempotency-Key")
        case IdempotencyInFlight():
            return Problem(
                409, error.code, "a request with this Idempotency-Key is being accepted", headers={"Retry-After": "1"}
            )
        case LimitReached():
            status = {"maintenance": 503, "credits_exhausted": 402}.get(error.code, 429)
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return Problem(status, error.code, error.message, field=error.setting, headers=headers)
        case EgressError():
            return Problem(422, error.code, str(error))
        case BlobNotFound():
            return Problem(404, "not_found", "there is no such file")
        case StorageUnavailable():
            return Problem(503, error.code, "the object store is not available", headers=UNAVAILABLE)
        case DatabaseUnavailable() | asyncpg.TooManyConnectionsError() | asyncpg.CannotConnectNowError():
            return Problem(503, "database_unavailable", "the database is not available", headers=UNAVAILABLE)
        case RequestValidationError():
            return _validation(error)
        case HTTPException(status_code=400):
            # of FastAPI's own, for a body that it can't parse
            return Problem(400, "invalid_json", "the body is not JSON", field="body")
        case HTTPException():
            return Problem(
                error.status_code, f"http_{error.status_code}", str(error.detail), headers=dict(error.headers or {})
            )
        # asyncpg calls a value that does not fit its column an interface error as well; that is no lost connection
        case _ if isinstance(error, CONNECTION_FAULTS) and not isinstance(error, ValueError):
            return Problem(503, "database_unavailable", "the database is not available", headers=UNAVAILABLE)
        case _:
            return Problem(500, "internal", "something went wrong here; nothing was accepted")


def _validation(error: RequestValidationError) -> Problem:
    errors = []
    for detail in error.errors():
        kind = str(detail["type"])
        if kind == "json_invalid":
            return Problem(400, "invalid_json", "the body is not JSON", field="body")
        place = [str(part) for part in detail["loc"] if part not in ("body", "query", "path", "header")]
        errors.append(FieldProblem(field=".".join(place) or "body", message=str(detail["msg"]), code=kind))
    return Problem(422, "invalid_request", "; ".join(f"{e.field}: {e.message}" for e in errors), errors=errors)


def respond(problem: Problem, path: str) -> Response:
    """The answer of a problem: a problem document, or under /functions/ the older shape that its clients read."""
    if path.startswith("/functions/"):
        document = FunctionProblem(
            error=problem.detail, details=problem.detail, code=problem.code, errors=problem.errors
        ).model_dump()
        # those clients know no 422: what is wrong with a request is 400 there
        status = 400 if problem.status == 422 else problem.status
        return JSONResponse(document, status_code=status, headers=problem.headers)
    return JSONResponse(
        problem.document(path).model_dump(),
        status_code=problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )


def install(app: Starlette) -> None:
    """Answer every error of an app as a problem."""

    async def handle(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("request_failed", path=request.url.path, code=problem.code, error=type(error).__name__)
        return respond(problem, request.url.path)

    for kind in (
        Problem,
        RequestRefused,
        InvalidInput,
        IdempotencyConflict,
        IdempotencyInFlight,
        LimitReached,
        EgressError,
        BlobNotFound,
        StorageUnavailable,
        RequestValidationError,
        HTTPException,
        DatabaseUnavailable,
        *CONNECTION_FAULTS,
        asyncpg.PostgresError,  # its text may quote the row that it refused, prompt included: not for the server's log
        Exception,  # this one alone is raised again after the answer, for the server to log
    ):
        app.add_exception_handler(kind, handle)


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": TITLES[status]}
    for status in (400, 401, 402, 403, 404, 409, 413, 415, 422, 429, 503)
}
"""The errors that any operation may answer, for the OpenAPI document."""


def name_media_type(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document what errors look like, which FastAPI can't be told: application/problem+json, and the
    older shape under /functions/."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, item in document["paths"].items():
        older = path.startswith("/functions/")
        for operation in item.values():
            answers = operation.get("responses", {})
            if older:
                answers.pop("422", None)  # `respond` makes it 400
                schemas["FunctionProblem"] = FunctionProblem.model_json_schema(ref_template=_REFERENCE)
                schemas["FunctionProblem"].pop("$defs")  # the other errors have it too
            for answer in answers.values():
                content = answer.get("content", {})
                for media_type, body in list(content.items()):
                    if body.get("schema", {}).get("$ref", "").endswith("/Problem"):
                        del content[media_type]
                        if older:
                            content["application/json"] = {
                                "schema": {"$ref": _REFERENCE.format(model="FunctionProblem")}
                            }
                        else:
                            content["application/problem+json"] = body


_REFERENCE = "#/components/schemas/{model}"
