"""The applications that Ray Serve runs: the API with everything behind it, and the event streams.

`build` and `build_events` are what serve_config.yaml names; they take its `args` as settings.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray import serve

from deployments.logs import configure_logs
from deployments.serving import (
    STOP_MARGIN_SECONDS,
    CallbackDeliverer,
    EnhancerReplica,
    MediaReplica,
    ProviderReplica,
    UpkeepDuty,
)
from deployments.settings import GENERATED, Settings
from models.catalog import Family
from serve_app import events
from serve_app.api import (
    absent,
    admin_images,
    assets,
    config,
    content,
    conversations,
    endpoints,
    enhancement,
    files,
    functions,
    health,
    jobs,
    keys,
    library,
    live_workers,
    loras,
    me,
    moderation,
    operations,
    playground,
    problems,
    prompt_rows,
    providers,
    replicate,
    replicate_webhook,
    reruns,
    schema_info,
    uploads,
    users,
    workspace,
)
from serve_app.api.cors import FunctionsCors
from serve_app.api.limits import BodyLimit, FileBodies
from serve_app.api.wire import CallbackBody
from serve_app.bootstrap import prepare
from serve_app.edge import open_edge
from serve_app.version import VERSION
from serve_app.watches import Watches

DESCRIPTION = """Images and video from durable, called-back jobs on your own GPUs.

Authenticate with `Authorization: Bearer …`: an API key (`ovz_…`), or a user's token of the auth service that the
operator named. Errors are problem documents (RFC 9457) with a stable `code`. Callbacks are signed after Standard
Webhooks."""


callbacks = APIRouter(tags=["callbacks"])


@callbacks.post("job", operation_id="onJob")
def on_job(body: CallbackBody) -> None:
    """A job of yours has started or ended. Verify the signature, answer 2xx; anything else is tried again for days."""


def api(settings: Settings, enhancer: Any = None) -> FastAPI:
    """The API. `enhancer` is the language model's handle; without it prompts are enhanced by rules."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_edge(settings, enhancer) as edge:
            app.state.edge = edge
            yield

    app = FastAPI(
        title="ourvidz-serve",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        servers=[{"url": settings.public_url}],
        separate_input_output_schemas=False,
    )
    problems.install(app)
    modules = (
        jobs,
        assets,
        library,
        moderation,
        uploads,
        reruns,
        loras,
        keys,
        users,
        endpoints,
        files,
        operations,
        config,
        me,
        functions,
        workspace,
        enhancement,
        playground,
        conversations,
        providers,
        replicate,
        replicate_webhook,
        live_workers,
        prompt_rows,
        admin_images,
        content,
        schema_info,
        absent,
        health,
    )
    for module in modules:
        app.include_router(module.router, responses=problems.DOCUMENTED)
    app.webhooks.include_router(callbacks)
    _document_problems(app)
    files_of = FileBodies(uploads.router.prefix, settings.max_reference_bytes)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, files=files_of)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_headers=["authorization", "x-client-info", "apikey", "content-type", "idempotency-key"],
        allow_methods=["GET", "POST", "PATCH", "DELETE", "OPTIONS"],
    )
    app.add_middleware(FunctionsCors)
    return app


def _document_problems(app: FastAPI) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        problems.name_media_type(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI documents are extended


def event_streams(settings: Settings) -> FastAPI:
    """The event streams."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_edge(settings, name="ourvidz events") as edge:
            app.state.edge = edge
            app.state.watches = Watches(edge, await asyncio.to_thread(settings.postgres))
            app.state.watches.start()
            yield
            await app.state.watches.close()

    app = FastAPI(title="ourvidz-serve events", version=VERSION, lifespan=lifespan)
    problems.install(app)
    app.include_router(events.router, responses=problems.DOCUMENTED)
    _document_problems(app)
    return app


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document of the whole HTTP interface, without starting anything."""
    settings = Settings.load()
    document = api(settings).openapi()
    streams = event_streams(settings).openapi()
    for path, item in streams["paths"].items():
        document["paths"][f"/v1/events{path}"] = item
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= streams.get("components", {}).get("schemas", {})
    return document


@serve.ingress()
class Api:
    """The API's ingress. It takes the handles of all deployments, which is what makes them one application, and calls
    the language model's only. Serve's default of 5 requests at once would let a few slow ones starve everybody."""

    def __init__(self, shared: dict[str, Any], enhancer: Any, *others: Any) -> None:
        configure_logs()
        self._settings, self._enhancer = Settings.in_deployment(shared), enhancer

    def __serve_build_asgi_app__(self) -> FastAPI:
        return api(self._settings, self._enhancer)


@serve.ingress()
class Events:
    """The event streams' ingress: every open stream is one request that lasts as long as its job."""

    def __init__(self, shared: dict[str, Any]) -> None:
        configure_logs()
        self._settings = Settings.in_deployment(shared)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return event_streams(self._settings)


def build(args: dict[str, Any]) -> Any:
    """The API, the replicas of the profile's models, the callback deliverer and upkeep, as one application.

    Migrates and seeds the database first. Which models there are comes from the profile; how many replicas each
    gets, and on what resources, from the Serve config.
    """
    settings = _settings(args)
    shared, stop = settings.shared(), settings.drain_seconds + STOP_MARGIN_SECONDS
    models = settings.loaded_profile.models
    media = [family for family, spec in models.items() if family is not Family.QWEN and spec.hosted_by is None]
    return _deployment(Api, "api", max_ongoing_requests=1000).bind(
        shared,
        _deployment(EnhancerReplica, "qwen", _resources(settings, Family.QWEN), stop).bind(shared),
        *(
            _deployment(MediaReplica, family.value, _resources(settings, family), stop).bind(shared, family.value)
            for family in media
        ),
        _deployment(CallbackDeliverer, "callbacks").bind(shared),
        _deployment(UpkeepDuty, "upkeep").bind(shared),
        _deployment(ProviderReplica, "provider").bind(shared),
    )


def build_events(args: dict[str, Any]) -> Any:
    """The event streams as an application of their own."""
    return _deployment(Events, "events", max_ongoing_requests=2000).bind(_settings(args).shared())


def _settings(args: dict[str, Any]) -> Settings:
    """The settings, with the database prepared; a missing secret stops the deployment, not the first request."""
    configure_logs()
    settings = Settings.load(args)
    for name in GENERATED:
        settings.secret(name)
    settings.token_secret()
    asyncio.run(prepare(settings))
    return settings


def _deployment(
    shell: type,
    name: str,
    resources: dict[str, float] | None = None,
    stop_seconds: float = STOP_MARGIN_SECONDS,
    max_ongoing_requests: int = 100,
) -> Any:
    """A shell as a deployment. Serve kills a replica that has not stopped after `stop_seconds`."""
    return serve.deployment(
        shell,
        name=name,
        ray_actor_options=resources or {"num_cpus": 0.1},
        graceful_shutdown_timeout_s=stop_seconds,
        max_ongoing_requests=max_ongoing_requests,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )


def _resources(settings: Settings, family: Family) -> dict[str, float]:
    """What one replica of a family reserves, by the profile. A Serve config may say otherwise."""
    profile = settings.loaded_profile
    gpus = sum(profile.models[hosted].num_gpus for hosted in profile.hosted(family) if hosted in profile.models)
    return {"num_gpus": gpus, "num_cpus": 1.0 if gpus else 0.1}
