"""Autoscaling by the work that waits and runs in Postgres, not by open requests.

Serve calls a policy inside its controller, ten times a second: it must neither block nor raise. So the numbers are
read in a short task of their own, at most every `poll_seconds`, and the policy answers from what was read last. The
delays, factors and bounds of the deployment's autoscaling_config apply afterwards.
"""

import asyncio
import contextlib
import math
import time
from typing import Any

TARGET_SECONDS = 30.0


class QueueDepthPolicy:
    """Replicas wanted = enough to hold what runs and to start what waits within `target_seconds` of predicted work.

    Never fewer than those that hold jobs, because Serve may pick a busy replica to stop. Until the first reading, and
    while Postgres is away, it keeps what is there. `args` are the application's, which say where Postgres is; the
    environment of the head node overrules them, as everywhere.
    """

    def __init__(
        self,
        queue: str,
        target_seconds: float = TARGET_SECONDS,
        poll_seconds: float = 2.0,
        args: dict[str, Any] | None = None,
    ) -> None:
        self.queue, self.target_seconds, self.poll_seconds, self.args = queue, target_seconds, poll_seconds, args
        self._wanted: int | None = None
        self._asked = -math.inf
        self._task: asyncio.Task[None] | None = None

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, from what was read last."""
        now = time.monotonic()
        if now - self._asked >= self.poll_seconds and (self._task is None or self._task.done()):
            self._asked = now
            with contextlib.suppress(RuntimeError):  # no loop in this thread: keep what is there
                self._task = asyncio.get_running_loop().create_task(self._read())
        return (ctx.target_num_replicas if self._wanted is None else self._wanted), {}

    async def _read(self) -> None:
        # imported here, because Serve pickles this module by value into its controller
        import asyncpg

        from db.pool import WORKER_ROLE, queries
        from deployments.settings import Settings

        try:
            url = await asyncio.to_thread(Settings.load(self.args).postgres)
            connection = await asyncpg.connect(url, timeout=5, server_settings={"role": WORKER_ROLE})
            try:
                row = await queries("queue").work(connection, queue=self.queue)
            finally:
                await connection.close(timeout=2)
            self._wanted = replicas_for(row["ready"], row["busy"], row["ready_seconds"], self.target_seconds)
        except Exception:
            self._wanted = None  # unknown is not zero


def replicas_for(ready: int, busy: int, ready_seconds: float, target_seconds: float) -> int:
    """Replicas for that much work: the `busy` ones that hold jobs, and one for every `target_seconds` that wait.

    Never more than there are jobs: an idle replica helps none.
    """
    return min(ready + busy, busy + math.ceil(ready_seconds / target_seconds))
