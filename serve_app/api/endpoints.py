"""Registered endpoints: who is told of a user's jobs, how they verify it, and what was delivered to them."""

import json
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response

from db.access import Principal
from db.endpoints import MOST_OF_USER
from db.endpoints import Endpoint as Registered
from deployments.callbacks import send
from deployments.egress import EgressError
from serve_app.api.auth import EdgeDep, User
from serve_app.api.problems import Problem
from serve_app.api.wire import Delivered
from serve_app.api.wire_callbacks import (
    CallbackState,
    ChangeEndpoint,
    CreateEndpoint,
    Endpoint,
    EndpointDeliveries,
    EndpointDelivery,
    EndpointList,
    EndpointTest,
    EndpointWithKeys,
    Replayed,
    ReplayRange,
)
from serve_app.edge import Edge

router = APIRouter(prefix="/v1/callbacks/endpoints", tags=["callbacks"])

TEST_PAUSE_SECONDS = 5
TEST_TIMEOUT_SECONDS = 15.0
TEST_RESPONSE_BYTES = 2048


@router.post("", status_code=201, operation_id="createEndpoint")
async def create_endpoint(body: CreateEndpoint, edge: EdgeDep, user: User, response: Response) -> EndpointWithKeys:
    """Register an endpoint, which from now on hears of every job of yours that reaches one of its `events`."""
    await _check(edge, body.url)
    made = await edge.endpoints.create(user.user_id, body.url, body.description, body.events, body.signature)
    if made is None:
        raise Problem(409, "too_many_endpoints", f"you have {MOST_OF_USER} endpoints; delete one first")
    response.headers["Location"] = f"{router.prefix}/{made.id}"
    return _with_keys(edge, made, user)


@router.get("", operation_id="listEndpoints")
async def list_endpoints(edge: EdgeDep, user: User) -> EndpointList:
    """Your endpoints, without their secrets."""
    return EndpointList(data=[_view(endpoint) for endpoint in await edge.endpoints.of_user(user.user_id)])


@router.get("/{endpoint_id}", operation_id="getEndpoint")
async def get_endpoint(endpoint_id: UUID, edge: EdgeDep, user: User) -> EndpointWithKeys:
    """One of your endpoints, with what verifies its signatures."""
    return _with_keys(edge, await _owned(edge, user, endpoint_id), user)


@router.patch("/{endpoint_id}", operation_id="changeEndpoint")
async def change_endpoint(endpoint_id: UUID, body: ChangeEndpoint, edge: EdgeDep, user: User) -> Endpoint:
    """Change an endpoint, or disable or enable it. What is due already goes to the new URL."""
    await _owned(edge, user, endpoint_id)
    changes = body.model_dump(exclude_unset=True)
    if "url" in changes:
        await _check(edge, body.url)
    await edge.endpoints.change(endpoint_id, user.user_id, **changes)
    return _view(await _owned(edge, user, endpoint_id))


@router.delete("/{endpoint_id}", status_code=204, operation_id="deleteEndpoint")
async def delete_endpoint(endpoint_id: UUID, edge: EdgeDep, user: User) -> None:
    """Delete an endpoint. What waits for it is not sent any more; what was sent is still told by its jobs."""
    await _owned(edge, user, endpoint_id)
    await edge.endpoints.remove(endpoint_id, user.user_id)


@router.post("/{endpoint_id}/rotate", operation_id="rotateEndpointSecret")
async def rotate_endpoint_secret(endpoint_id: UUID, edge: EdgeDep, user: User) -> EndpointWithKeys:
    """Make a new secret or pair of keys. Callbacks carry the old signature beside the new one for 24 hours."""
    await _owned(edge, user, endpoint_id)
    await edge.endpoints.rotate(endpoint_id)
    return _with_keys(edge, await _owned(edge, user, endpoint_id), user)


@router.post("/{endpoint_id}/test", operation_id="testEndpoint")
async def send_test(endpoint_id: UUID, edge: EdgeDep, user: User) -> EndpointTest:
    """Send a signed `endpoint.test` now and tell what came of it. It is tried once, and never counts as a failure."""
    endpoint = await _owned(edge, user, endpoint_id)
    if not await edge.endpoints.note_test(endpoint_id, TEST_PAUSE_SECONDS):
        raise Problem(429, "tested_lately", "it was tested just now", headers={"Retry-After": str(TEST_PAUSE_SECONDS)})
    message_id, now = f"msg_{secrets.token_hex(16)}", datetime.now(UTC)
    message = {
        "id": message_id,
        "type": "endpoint.test",
        "timestamp": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "endpoint_id": str(endpoint_id),
    }
    body = json.dumps(message).encode()
    headers = edge.callback_secrets.sign(message_id, body, endpoint.key, now)
    sent = await send(edge.egress, endpoint.url, body, headers, TEST_TIMEOUT_SECONDS, TEST_RESPONSE_BYTES)
    return EndpointTest(
        id=message_id,
        delivered=sent.outcome == "delivered",
        status=sent.attempt.status,
        error=sent.attempt.error,
        elapsed_ms=sent.attempt.elapsed_ms,
        response_excerpt=sent.attempt.excerpt,
    )


@router.get("/{endpoint_id}/deliveries", operation_id="listDeliveries")
async def list_deliveries(
    endpoint_id: UUID,
    edge: EdgeDep,
    user: User,
    state: CallbackState | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> EndpointDeliveries:
    """What was and will be sent to one of your endpoints, newest first, with every attempt that is still on record."""
    await _owned(edge, user, endpoint_id)
    callbacks = await edge.callbacks.for_endpoint(endpoint_id, state, limit)
    attempts: dict[str, list[Delivered]] = {callback.id: [] for callback in callbacks}
    for attempt in await edge.callbacks.attempts_of(*attempts):
        attempts[attempt.callback_id].append(Delivered.model_validate(attempt, from_attributes=True))
    return EndpointDeliveries(
        data=[
            EndpointDelivery(
                id=callback.id,
                job_id=callback.job_id,
                event=callback.event_type,
                url=callback.url,
                state=callback.state,
                error=callback.last_error,
                attempts=attempts[callback.id],
                created_at=callback.created_at,
                next_at=callback.next_at if callback.state == "due" else None,
                delivered_at=callback.delivered_at,
            )
            for callback in callbacks
        ]
    )


@router.post("/{endpoint_id}/replay", operation_id="replayDeliveries")
async def replay_deliveries(endpoint_id: UUID, body: ReplayRange, edge: EdgeDep, user: User) -> Replayed:
    """Send the callbacks of a time once more, each under its old id and with the same bytes."""
    endpoint = await _owned(edge, user, endpoint_id)
    if endpoint.disabled_at is not None:
        raise Problem(409, "endpoint_disabled", "enable the endpoint first")
    until = body.until or datetime.now(UTC)
    if until <= body.since:
        raise Problem(422, "range", "must be after since", field="until")
    count = await edge.callbacks.replay_range(endpoint_id, body.since, until, body.states)
    edge.notifier.queue("callbacks")
    return Replayed(replayed=count)


async def _owned(edge: Edge, user: Principal, endpoint_id: UUID) -> Registered:
    endpoint = await edge.endpoints.read(user.user_id, endpoint_id)
    if endpoint is None or (endpoint.user_id != user.user_id and not user.is_admin()):
        raise Problem(404, "endpoint_not_found", "there is no such endpoint")
    return endpoint


async def _check(edge: Edge, url: str) -> None:
    try:
        await edge.egress.check(url)
    except EgressError as error:
        raise Problem(422, error.code, str(error), field="url") from None


def _view(endpoint: Registered) -> Endpoint:
    return Endpoint(**_facts(endpoint))


def _with_keys(edge: Edge, endpoint: Registered, user: Principal) -> EndpointWithKeys:
    """Secrets are their owner's alone: an admin who looks after somebody else's endpoint does not see them."""
    owner = endpoint.user_id == user.user_id
    keys = edge.callback_secrets.verifying(endpoint.key) if owner else []
    current, previous = (*keys, None, None)[:2]
    shared = endpoint.signature == "v1"
    return EndpointWithKeys(
        **_facts(endpoint),
        secret=current if shared else None,
        public_key=None if shared else current,
        previous=previous,
    )


def _facts(endpoint: Registered) -> dict[str, Any]:
    facts = {name: getattr(endpoint, name) for name in Endpoint.model_fields if name != "enabled"}
    return facts | {"enabled": endpoint.disabled_at is None}
