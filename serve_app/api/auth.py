"""Who is asking. Every route but health, documents and signed files depends on one of these.

A caller shows an API key, or a token of the auth service that the settings name. What an admin asks to change is
written into the audit log before it is done.
"""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from db.access import KEY_PREFIX, Principal
from serve_app.api.problems import UNAVAILABLE, Problem
from serve_app.edge import Edge
from serve_app.token_keys import KeysUnavailable
from serve_app.tokens import AnonymousToken, ServiceToken, TokenError, TokenExpired

bearer = HTTPBearer(
    auto_error=False,
    description="`Authorization: Bearer …` with an API key (`ovz_…`), or with a user's token of the auth service.",
)

CHALLENGE = {"WWW-Authenticate": "Bearer"}
REFUSED = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# Operations that touch nothing but the caller's own, whoever the caller is: no act of an admin, and too many to log.
OWN_ACTS = {
    "createJob": "a job of the caller's",
    "createJobs": "jobs of the caller's",
    "queueJob": "a job of the caller's",
    "enhancePrompt": "changes nothing",
    "playgroundChat": "the caller's conversation",
    "createConversation": "the caller's conversation",
    "changeConversation": "the caller's conversation",
    "deleteConversation": "the caller's conversation",
    "sendMessage": "the caller's conversation",
    "createUpload": "the caller's upload",
    "saveAsset": "the caller's asset",
    "discardAsset": "the caller's asset",
    "changeLibraryItem": "the caller's library",
    "removeLibraryItem": "the caller's library",
    "copyLibraryItem": "the caller's library",
    "workspaceActions": "the caller's workspace",
    "deleteWorkspaceItem": "the caller's workspace",
    "generateContent": "a job of the caller's, or nothing",
    "getNegativePrompt": "changes nothing",
    "getActiveWorkerUrl": "changes nothing",
    "healthCheckWorkers": "changes nothing",
    "systemMetrics": "changes nothing, and is asked every few seconds",
    "getSchemaInfo": "changes nothing",
}


def edge_of(request: Request) -> Edge:
    """The parts of this process' API."""
    edge: Edge = request.app.state.edge
    return edge


EdgeDep = Annotated[Edge, Depends(edge_of)]


async def authenticate(
    request: Request, edge: EdgeDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Principal:
    """The holder of the API key or token. 401 without one, or with one that opens nothing."""
    if credentials is None:
        raise Problem(401, "missing_key", "Missing authorization", headers=CHALLENGE)
    shown = credentials.credentials
    if shown.startswith(KEY_PREFIX) or shown.count(".") != 2:
        principal = await edge.access.authenticate(shown)
        if principal is None:
            raise Problem(401, "invalid_key", "Invalid authorization", headers=REFUSED)
    else:
        principal = await _holder(edge, shown)
    if request.method in CHANGING and principal.is_admin():
        await _note(request, edge, principal)
    return principal


async def _holder(edge: Edge, token: str) -> Principal:
    try:
        holder = await edge.tokens.read(token)
    except KeysUnavailable:
        problem = "the auth service's keys can't be fetched"
        raise Problem(503, "token_keys_unavailable", problem, headers=UNAVAILABLE) from None
    except TokenExpired:
        raise Problem(401, "token_expired", "the token has expired", headers=REFUSED) from None
    except AnonymousToken:
        raise Problem(401, "anonymous_token", "the token names nobody; sign in first", headers=REFUSED) from None
    except ServiceToken:
        problem = "a service key stands for no user; use the API key of an admin"
        raise Problem(401, "service_token", problem, headers=REFUSED) from None
    except TokenError as error:
        raise Problem(401, "invalid_token", f"the token is not accepted: {error}", headers=REFUSED) from None
    principal = await edge.access.token_holder(holder.user_id, holder.issued_at, holder.expires_at)
    if principal is None:
        raise Problem(401, "user_erased", "the user was erased; sign in anew to begin again", headers=REFUSED)
    return principal


async def _note(request: Request, edge: Edge, user: Principal) -> None:
    """Log what an admin asks for: the operation and what it is about, never what it holds."""
    operation = getattr(request.scope.get("route"), "operation_id", None) or request.url.path
    if operation in OWN_ACTS:
        return
    # before they are validated: Postgres takes no NUL, which a path may hold
    about = [str(value)[:200].replace("\0", "\ufffd") for value in request.path_params.values()]
    collection = [*request.url.path.split("/"), "", ""][2]
    metadata = {f"also_{number}": value for number, value in enumerate(about[1:], 1)}
    await edge.access.note_request(user.user_id, operation, (collection, about[0] if about else None), metadata)


User = Annotated[Principal, Depends(authenticate)]


async def require_admin(user: User) -> Principal:
    """The holder of the key, who must be an admin. 403 otherwise."""
    if not user.is_admin():
        raise Problem(403, "admin_only", "only an admin may do this")
    return user


Admin = Annotated[Principal, Depends(require_admin)]
