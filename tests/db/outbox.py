"""Rows of the outbox to test with."""

from typing import Any, Self
from uuid import UUID, uuid4

from db.callbacks import Callbacks, Delivery
from db.endpoints import Endpoint, Endpoints
from db.jobs import Jobs, NewJob, Stage

LEASE_SECONDS = 30.0
EVENTS = ("processing", "completed", "failed", "cancelled")


class Outbox:
    """Rows on one user's one job unless told otherwise; and the outbox over the replicas' pool."""

    def __init__(self, database: Any, user_id: UUID) -> None:
        self.pool = database.pool
        self.callbacks = Callbacks(database.worker_pool)
        self.user_id = user_id
        self.job_id = UUID(int=0)

    @classmethod
    async def open(cls, database: Any) -> Self:
        fresh = cls(database, await database.user())
        fresh.job_id = await fresh.job()
        return fresh

    async def job(self, user_id: UUID | None = None) -> UUID:
        job_id = uuid4()
        await Jobs(self.pool).accept(
            NewJob(
                id=job_id,
                user_id=user_id or self.user_id,
                job_type="sdxl_image_fast",
                format="image",
                quality="fast",
                model_type="sdxl",
                stage=Stage.GENERATE,
                queue="sdxl",
                cost=1,
                credits=0,
                original_prompt="a lighthouse",
                params={},
            )
        )
        return job_id

    async def endpoint(
        self, url: str = "https://a.example/hook", user_id: UUID | None = None, **values: Any
    ) -> Endpoint:
        """A registered endpoint of the user."""
        asked: dict[str, Any] = {"description": "", "events": EVENTS, "signature": "v1"}
        made = await Endpoints(self.pool).create(user_id or self.user_id, url, **(asked | values))
        assert made is not None
        return made

    async def failing(self, endpoint_id: UUID, failures: int, days: float) -> None:
        """Make an endpoint fail since so many days, by the database's own clock."""
        await self.pool.execute(
            """UPDATE callback_endpoints SET failures = $2, failing_since = now() - make_interval(secs => $3)
               WHERE id = $1""",
            endpoint_id,
            failures,
            days * 86400,
        )

    async def add(
        self,
        name: str,
        seq: int = 1,
        job_id: UUID | None = None,
        url: str = "https://a.example/hook",
        age: float = 1,
        endpoint_id: UUID | None = None,
    ) -> str:
        """A due row; `name` beginning with `end` makes it terminal. `age` is how many seconds it has been due."""
        return await self.pool.fetchval(
            """INSERT INTO callback_outbox (id, job_id, user_id, seq, event_type, terminal, url, body, next_at,
                                            endpoint_id)
               SELECT $1, id, user_id, $3, CASE WHEN $4 THEN 'job.completed' ELSE 'job.processing' END, $4, $5, '{}',
                      now() - make_interval(secs => $6), $7 FROM jobs WHERE id = $2 RETURNING id""",
            name,
            job_id or self.job_id,
            seq,
            name.startswith("end"),
            url,
            float(age),
            endpoint_id,
        )

    async def claim(self, limit: int = 100, per_host: int = 100, per_user: int = 100) -> list[Delivery]:
        return await self.callbacks.claim_due(limit, LEASE_SECONDS, per_host, per_user)

    async def claimed(self, **caps: int) -> list[str]:
        return sorted(delivery.id for delivery in await self.claim(**caps))

    async def one(self) -> Delivery:
        (delivery,) = await self.claim()
        return delivery

    async def expire(self, name: str) -> None:
        """Let a lease run out, by the database's own clock."""
        await self.pool.execute(
            "UPDATE callback_outbox SET lease_until = now() - interval '1 second' WHERE id = $1", name
        )

    async def states(self) -> dict[str, str]:
        return dict(await self.pool.fetch("SELECT id, state FROM callback_outbox"))

    async def row(self, name: str) -> Any:
        return await self.pool.fetchrow("SELECT * FROM callback_outbox WHERE id = $1", name)
