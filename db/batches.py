"""Writing in small batches: items that come while a statement is under way go to Postgres together as the next one.

A commit costs about the same for one job as for fifty, so a busy process accepts or ends several times as many jobs
this way. Nothing is promised early: a caller waits until the statement with its item is committed, and gets the outcome
of its own item only.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import asyncpg

from db.pool import CONNECTION_FAULTS

MAX_BATCH = 200
TRIES = 3  # of a statement that Postgres rolled back for somebody else's lock
GATHER_SECONDS = (
    0.002  # for what comes in bursts: the jobs of one batch end together, and their ends are to be one commit
)

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Item, Outcome]):
    item: Item
    outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Item, Outcome]):
    """Writes for all tasks of one event loop. One statement is under way at a time; the rest gathers meanwhile."""

    def __init__(
        self,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Outcome]]],
        *,
        gather_seconds: float = 0,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """`write` takes items, all or none, and gives their outcomes in the same order.

        An item waits for the statement before it, and up to `gather_seconds` for company when there is none.
        """
        self._write, self._gather_seconds, self._max_batch = write, gather_seconds, max_batch
        self._waiting: list[_Waiting[Item, Outcome]] = []
        self._task: asyncio.Task[None] | None = None

    async def put(self, item: Item) -> Outcome:
        """Write an item, and return when it is committed.

        An error of the data is raised to the caller that brought it. A lost connection is raised to every caller of
        the batch, as nobody knows whether it was committed. A caller that is cancelled before its statement was sent
        takes its item back; afterwards it may have been written all the same.
        """
        waiting: _Waiting[Item, Outcome] = _Waiting(item)
        self._waiting.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        return await waiting.outcome

    async def _flush(self) -> None:
        taken: list[_Waiting[Item, Outcome]] = []
        try:
            await asyncio.sleep(self._gather_seconds)
            while self._waiting:
                taken, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
                batch = [waiting for waiting in taken if not waiting.outcome.done()]
                if batch:
                    await self._send(batch)
        except BaseException as error:  # cancelled: nobody would come for those who wait
            self._fail([*taken, *self._waiting], error)
            self._waiting = []
            raise

    async def _send(self, batch: list[_Waiting[Item, Outcome]], tries: int = TRIES) -> None:
        try:
            outcomes = await self._write([waiting.item for waiting in batch])
        except asyncpg.exceptions.TransactionRollbackError as error:
            # a deadlock, of which this was the victim: nothing was written, and it is nobody's fault here
            if tries > 1:
                await self._send(batch, tries - 1)
            else:
                self._fail(batch, error)
        except CONNECTION_FAULTS as error:
            self._fail(batch, error)
        except asyncpg.PostgresError as error:
            if len(batch) == 1:
                self._fail(batch, error)
                return
            for waiting in batch:  # nothing was written; one of them is at fault, and only that one is to hear of it
                await self._send([waiting])
        except Exception as error:
            self._fail(batch, error)
        else:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if not waiting.outcome.done():
                    waiting.outcome.set_result(outcome)

    @staticmethod
    def _fail(batch: list[_Waiting[Item, Outcome]], error: BaseException) -> None:
        for waiting in batch:
            if not waiting.outcome.done():
                waiting.outcome.set_exception(error)
