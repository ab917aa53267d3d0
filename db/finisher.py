"""Finishing in small batches: settlements that come within a few milliseconds go to Postgres as one statement.

A commit costs about the same for one job as for fifty, so a busy process ends several times as many jobs this way.
Nothing is promised early: a caller waits until the statement with its job is committed, and gets the outcome of its
own job only.
"""

import asyncio
from dataclasses import dataclass, field

import asyncpg

from db.pool import CONNECTION_FAULTS
from db.queue import Queue, Settled, Settlement

GATHER_SECONDS = 0.002
MAX_BATCH = 200


@dataclass(frozen=True)
class _Waiting:
    settlement: Settlement
    outcome: asyncio.Future[Settled | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Finisher:
    """Settles for all tasks of one event loop. One statement is under way at a time; the rest gathers meanwhile."""

    def __init__(self, queue: Queue, gather_seconds: float = GATHER_SECONDS, max_batch: int = MAX_BATCH) -> None:
        """A settlement waits up to `gather_seconds` for company, and for the statement before it."""
        self._queue, self._gather_seconds, self._max_batch = queue, gather_seconds, max_batch
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def settle(self, settlement: Settlement) -> Settled | None:
        """End a job, as `Queue.settle` does. None: it is not ours to end, and nothing was changed.

        An error of the data is raised to the caller that brought it. A lost connection is raised to every caller of
        the batch, as nobody knows whether it was committed. A caller that is cancelled before its statement was sent
        takes its settlement back; afterwards the job may have ended all the same.
        """
        waiting = _Waiting(settlement)
        self._waiting.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        return await waiting.outcome

    async def _flush(self) -> None:
        await asyncio.sleep(self._gather_seconds)
        while self._waiting:
            taken, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            batch = [waiting for waiting in taken if not waiting.outcome.done()]
            if batch:
                await self._send(batch)

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            ended = await self._queue.settle_each([waiting.settlement for waiting in batch])
        except CONNECTION_FAULTS as error:
            self._fail(batch, error)
        except asyncpg.PostgresError as error:
            if len(batch) == 1:
                self._fail(batch, error)
                return
            for waiting in batch:  # nothing was written; one of them is at fault, and only that one is to hear of it
                await self._send([waiting])
        except BaseException as error:
            self._fail(batch, error)
            raise
        else:
            for waiting, outcome in zip(batch, ended, strict=True):
                if not waiting.outcome.done():
                    waiting.outcome.set_result(outcome)

    @staticmethod
    def _fail(batch: list[_Waiting], error: BaseException) -> None:
        for waiting in batch:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(error)
