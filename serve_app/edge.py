"""What every request handler works with, opened once per process and passed along."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from db.access import Access
from db.blobs import BlobStore, UrlSigner
from db.callbacks import Callbacks
from db.costs import CostProfiles
from db.endpoints import Endpoints
from db.jobs import Jobs
from db.notify import Notifier
from db.pool import open_pool
from db.prompts import Prompts
from db.queue import Queue
from db.training import Trainings
from db.workers import Workers
from deployments.egress import Egress
from deployments.predictions import Predictions
from deployments.settings import Settings
from deployments.signatures import CallbackSecrets
from serve_app.counters import Counters
from serve_app.tokens import Tokens


@dataclass(frozen=True)
class Edge:
    """The parts of the API. `pool` acts as the owner of the tables; reads in a user's name go through `as_user`.

    `enhancer` is a Serve handle of the language model's deployment, or None where there is no cluster.
    """

    settings: Settings
    pool: asyncpg.Pool
    access: Access
    tokens: Tokens
    jobs: Jobs
    queue: Queue
    workers: Workers
    prompts: Prompts
    counters: Counters
    blobs: BlobStore
    signer: UrlSigner
    egress: Egress
    notifier: Notifier
    callbacks: Callbacks
    endpoints: Endpoints
    callback_secrets: CallbackSecrets
    predictions: Predictions
    trainings: Trainings
    enhancer: Any = None


@asynccontextmanager
async def open_edge(settings: Settings, enhancer: Any = None, name: str = "ourvidz api") -> AsyncIterator[Edge]:
    """Connect, by that name in Postgres, and close at the end. Raises `DatabaseUnavailable`, `SettingsError`."""
    url = await asyncio.to_thread(settings.postgres)
    tokens = Tokens.of(settings)
    pool = await open_pool(url, min_size=2, max_size=20, name=name)
    notifier = Notifier(pool)
    try:
        yield Edge(
            settings=settings,
            pool=pool,
            access=Access(pool),
            tokens=tokens,
            jobs=Jobs(pool),
            queue=Queue(pool),
            workers=Workers(pool),
            prompts=Prompts(pool),
            counters=Counters(settings),
            blobs=BlobStore.from_url(settings.blobs()),
            signer=UrlSigner(settings.secret("signing_secret"), settings.public_url),
            egress=Egress(settings.egress_policy()),
            notifier=notifier,
            predictions=Predictions(CostProfiles(pool), Jobs(pool)),
            trainings=Trainings(pool),
            callbacks=Callbacks(pool),
            endpoints=Endpoints(pool),
            callback_secrets=CallbackSecrets(settings.secret("callback_secret")),
            enhancer=enhancer,
        )
    finally:
        await tokens.close()
        await notifier.close()
        await pool.close()
