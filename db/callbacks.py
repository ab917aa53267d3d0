"""The outbox of callbacks: what must be told to whom, how often it was tried, and who is trying now.

A row comes to be in the statement that changed the job, so that neither is without the other. It moves like this:

    due ── claim ──> sending ── delivered ──> delivered
     ^                  |─────── dead ───────> dead
     |                  |
     └───── failed ─────┘        a progress event that is due when its job ends: superseded

due         Waits for `next_at`, and for the earlier events of its job. If every process dies here, nothing is lost.
sending     A deliverer holds it until `lease_until`, under `lease_no`. If that process dies, the lease runs out and
            the row counts as due: the receiver may get the same callback twice, and knows it by its id. If it only
            sleeps and comes back late, its `lease_no` is old and no write of it has effect.
delivered   The receiver answered with 2xx.
dead        Given up by a rule. `replay` makes it due again, under the same id.
superseded  The job ended before this progress event was delivered.

A job's status has one row for each receiver that wants it: the URL that the job has, and every enabled endpoint of
its user (db/endpoints.py). Each row has an id of its own and goes its own way: order and supersession hold among the
rows of one job to one receiver.

`attempts` counts claims, so that a callback which kills its deliverer uses up its tries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self
from uuid import UUID

import asyncpg

from db.pool import queries


@dataclass(frozen=True)
class SigningKey:
    """Which key signs, of those that the operator's secret gives: a user's own, or an endpoint's.

    `scheme` is None for a user's key, and `v1` (HMAC) or `v1a` (ed25519) for an endpoint's. `age_seconds` counts from
    the last rotation, and is None where there was none.
    """

    owner_id: UUID
    scheme: str | None
    version: int
    age_seconds: float | None


@dataclass(frozen=True)
class Delivery:
    """A claimed callback: send `body`, unchanged, to `url`; not when `withdrawn` says why nobody wants it any more."""

    id: str
    job_id: UUID
    user_id: UUID
    url: str = field(repr=False)
    body: bytes = field(repr=False)
    event_type: str
    attempts: int  # this one included
    lease_no: int
    secret_version: int
    secret_age_seconds: float | None
    endpoint_id: UUID | None = None
    signature: str = "v1"
    withdrawn: str | None = None  # endpoint_disabled, endpoint_deleted

    @property
    def key(self) -> SigningKey:
        """What it is signed with."""
        if self.endpoint_id is None:
            return SigningKey(self.user_id, None, self.secret_version, self.secret_age_seconds)
        return SigningKey(self.endpoint_id, self.signature, self.secret_version, self.secret_age_seconds)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """A delivery from a row of `claim_due`."""
        return cls(**row)


@dataclass(frozen=True)
class Attempt:
    """What one try gave: a status of HTTP, or an error's stable name, or both; `excerpt` is of the answer's body.

    `elapsed_ms` is None where nothing was sent, which says nothing against the receiver.
    """

    status: int | None = None
    error: str | None = None
    elapsed_ms: int | None = None
    excerpt: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class LoggedAttempt:
    """An attempt as it was recorded."""

    callback_id: str
    attempt: int
    at: datetime
    status: int | None
    error: str | None
    elapsed_ms: int | None
    response_excerpt: str | None = field(repr=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """An attempt from a row of `callback_attempts`."""
        return cls(**row)


@dataclass(frozen=True)
class Callback:
    """A callback as its owner may see it. `endpoint_id` is None for the URL that the job itself has."""

    id: str
    job_id: UUID
    endpoint_id: UUID | None
    seq: int
    event_type: str
    terminal: bool
    url: str = field(repr=False)
    state: str
    attempts: int
    next_at: datetime
    last_status: int | None
    last_error: str | None
    created_at: datetime
    delivered_at: datetime | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """A callback from a row of `callback_outbox`."""
        return cls(**row)


class Callbacks:
    """The outbox in Postgres. The pool may act as the replicas' role."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("callbacks")

    async def claim_due(
        self, limit: int, lease_seconds: float, per_host: int, per_user: int | None = None
    ) -> list[Delivery]:
        """Lease up to `limit` callbacks, so that no receiver has more than `per_host` and no user more than `per_user`
        under way, of all deliverers together (claims at the same instant may go over it by what each of them adds).

        One claim looks at the oldest due ones only: call again until it gives none, as the receivers that are full by
        then are passed over.
        """
        rows = self._sql.claim_due(
            self._pool,
            limit=limit,
            lease_seconds=lease_seconds,
            per_host=per_host,
            per_user=limit if per_user is None else per_user,
            window=max(200, 10 * limit),
        )
        return [Delivery.from_row(row) async for row in rows]

    async def delivered(self, delivery: Delivery, attempt: Attempt) -> bool:
        """Record success. False, and nothing written, when the lease was lost."""
        return bool(await self._sql.delivered(self._pool, **_fence(delivery), **_facts(attempt)))

    async def failed(self, delivery: Delivery, attempt: Attempt, retry_in_seconds: float) -> bool:
        """Record a failure after which another try is worth it; an endpoint that fails for days is disabled by it.

        False, and nothing written, when the lease was lost.
        """
        ended = self._sql.failed(self._pool, retry_in_seconds=retry_in_seconds, **_fence(delivery), **_facts(attempt))
        return bool(await ended)

    async def dead(self, delivery: Delivery, attempt: Attempt) -> bool:
        """Record that we give up, `attempt.error` says why; an endpoint that answered 410 is disabled by it.

        False, and nothing written, when the lease was lost.
        """
        return bool(await self._sql.dead(self._pool, **_fence(delivery), **_facts(attempt)))

    async def replay(self, callback_id: str) -> bool:
        """Make a dead or delivered callback due again.

        False when it is neither, its job's end made it pointless, or its endpoint is not enabled.
        """
        return bool(await self._sql.replay(self._pool, id=callback_id))

    async def replay_range(self, endpoint_id: UUID, since: datetime, until: datetime, states: Sequence[str]) -> int:
        """The same for the callbacks of an endpoint that came to be from `since` on and before `until`. How many."""
        again = self._sql.replay_range(
            self._pool, endpoint_id=endpoint_id, since=since, until=until, states=list(states)
        )
        return int(await again)

    async def due_count(self) -> int:
        """How many callbacks should be under way by now and are not."""
        return int(await self._sql.due_count(self._pool))

    async def for_job(self, job_id: UUID) -> list[Callback]:
        """A job's callbacks in their order. Whose job it is, is the caller's to check."""
        return [Callback.from_row(row) async for row in self._sql.for_job(self._pool, job_id=job_id)]

    async def for_endpoint(self, endpoint_id: UUID, state: str | None, limit: int) -> list[Callback]:
        """An endpoint's callbacks, newest first. Whose endpoint it is, is the caller's to check."""
        rows = self._sql.for_endpoint(self._pool, endpoint_id=endpoint_id, state=state, limit=limit)
        return [Callback.from_row(row) async for row in rows]

    async def attempts_of(self, *callback_ids: str) -> list[LoggedAttempt]:
        """The recorded tries of callbacks, oldest first; none for an unknown one."""
        return [LoggedAttempt.from_row(row) async for row in self._sql.attempts_of(self._pool, ids=list(callback_ids))]


def _fence(delivery: Delivery) -> dict[str, Any]:
    return {"id": delivery.id, "lease_no": delivery.lease_no}


def _facts(attempt: Attempt) -> dict[str, Any]:
    return {
        "status": attempt.status,
        "error": attempt.error,
        "elapsed_ms": attempt.elapsed_ms,
        "excerpt": attempt.excerpt,
    }
