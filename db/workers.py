"""The replicas that are, and were lately, there."""

import os
import socket
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from db.pool import queries


@dataclass(frozen=True)
class Worker:
    """A replica. `state` is loading, ready, draining, stopped or failed; `seen_at` its last sign of life."""

    id: UUID
    queue: str
    model_name: str | None
    device: str | None
    node: str
    pid: int
    state: str
    slots: int
    running: int
    load_ms: int | None
    error: str | None
    started_at: datetime
    seen_at: datetime


class Workers:
    """The register of replicas."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._sql = queries("queue")

    async def enter(
        self,
        worker: UUID,
        queue: str,
        state: str,
        *,
        model_name: str | None = None,
        device: str | None = None,
        slots: int = 1,
        load_ms: int | None = None,
        error: str | None = None,
    ) -> None:
        """Say what this process serves and how it is."""
        await self._sql.enter_worker(
            self._pool,
            id=worker,
            queue=queue,
            model_name=model_name,
            device=device,
            node=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            slots=slots,
            load_ms=load_ms,
            error=error,
        )

    async def seen(self, worker: UUID, running: int) -> None:
        """A sign of life."""
        await self._sql.see_worker(self._pool, id=worker, running=running)

    async def list(self, within_seconds: float = 60.0) -> list[Worker]:
        """The replicas seen within that time."""
        rows = self._sql.list_workers(self._pool, within_seconds=within_seconds)
        return [Worker(**dict(row)) async for row in rows]
