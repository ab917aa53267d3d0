"""Retention: what is forgotten by itself, and after how long.

Events, the log of deliveries, expired idempotency keys and replicas that are gone. Jobs are none of it: they are kept
until an archive holds them (`db.archives`) or their owner is erased (`db.erasures`).
"""

from dataclasses import dataclass

import asyncpg

from db.pool import queries

BATCH = 5000  # rows of a kind that one statement deletes, so that none holds its locks for long
EVENTS_PER_JOB = 5  # of which a history goes as a whole: accepted, started and ended, and now and then a failure


@dataclass(frozen=True)
class RetentionPolicy:
    """How many days each kind of row is kept."""

    event_days: int = 30  # the history of a job, counted from its end
    delivery_days: int = 30  # each try to deliver a callback; the callback itself stays with its job


class Retention:
    """Pruning by a policy. The replicas' role is enough."""

    def __init__(self, pool: asyncpg.Pool, policy: RetentionPolicy | None = None, batch: int = BATCH) -> None:
        self._pool, self._policy, self._batch = pool, policy or RetentionPolicy(), batch
        self._sql = queries("retention")

    async def prune(self) -> bool:
        """Delete at most one batch of each kind. True when there may be more: call again."""
        pool, batch = self._pool, self._batch
        jobs = max(1, batch // EVENTS_PER_JOB)
        told = await self._sql.prune_events(pool, days=self._policy.event_days, jobs=jobs)
        counts = (
            await self._sql.prune_deliveries(pool, days=self._policy.delivery_days, batch=batch),
            await self._sql.prune_idempotency_keys(pool, batch=batch),
            await self._sql.prune_workers(pool, batch=batch),
        )
        return told == jobs or any(count == batch for count in counts)
