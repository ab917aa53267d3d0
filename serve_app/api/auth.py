"""Who is asking. Every route but health, documents and signed files depends on one of these."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from db.access import Principal
from serve_app.api.problems import Problem
from serve_app.edge import Edge

bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer ovz_…`")


def edge_of(request: Request) -> Edge:
    """The parts of this process' API."""
    edge: Edge = request.app.state.edge
    return edge


EdgeDep = Annotated[Edge, Depends(edge_of)]


async def authenticate(
    edge: EdgeDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Principal:
    """The holder of the API key. 401 without one, or with one that is unknown, revoked or expired."""
    challenge = {"WWW-Authenticate": "Bearer"}
    if credentials is None:
        raise Problem(401, "missing_key", "Missing authorization", headers=challenge)
    principal = await edge.access.authenticate(credentials.credentials)
    if principal is None:
        raise Problem(401, "invalid_key", "Invalid authorization", headers=challenge)
    return principal


User = Annotated[Principal, Depends(authenticate)]


async def require_admin(user: User) -> Principal:
    """The holder of the key, who must be an admin. 403 otherwise."""
    if not user.is_admin():
        raise Problem(403, "admin_only", "only an admin may do this")
    return user


Admin = Annotated[Principal, Depends(require_admin)]
