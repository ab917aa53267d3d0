"""What goes over the wire under /v1/callbacks/endpoints: registered endpoints and what was delivered to them."""

from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from serve_app.api.wire import CallbackEvent, Delivered

CALLBACK_EVENTS: tuple[CallbackEvent, ...] = ("processing", "completed", "failed", "cancelled")
CallbackState = Literal["due", "sending", "delivered", "dead", "superseded"]


def _once(events: list[CallbackEvent]) -> list[CallbackEvent]:
    if len(set(events)) != len(events):
        raise ValueError("each event may be named once")
    return events


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("may have no line breaks or control characters")
    return text


def _in_range(at: datetime) -> datetime:
    # beyond it, not every time has an equivalent in UTC
    if not 1970 <= at.year <= 9998:
        raise ValueError("must be in the years 1970 to 9998")
    return at.astimezone(UTC)


Url = Annotated[str, Field(min_length=1, max_length=2048, description="Public https, as for jobs.")]
Description = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Events = Annotated[
    list[CallbackEvent],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}, description="What it hears of your jobs."),
    AfterValidator(_once),
]
Time = Annotated[AwareDatetime, AfterValidator(_in_range)]


class CreateEndpoint(BaseModel):
    """An endpoint to register. It hears of every job of yours, beside the `callback_url` that a job may have."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"url": "https://example.com/hooks/ourvidz", "events": ["completed", "failed"]}]
        },
    )

    url: Url
    description: Description = ""
    events: Events = list(CALLBACK_EVENTS)
    signature: Literal["v1", "v1a"] = Field(
        "v1", description="`v1`: HMAC with a secret that you share. `v1a`: ed25519, you get the public key only."
    )


class ChangeEndpoint(BaseModel):
    """What to change of an endpoint; what is left out stays."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Url = Field(default_factory=str)  # never used: only what was given is
    description: Description = Field(default_factory=str)
    events: Events = Field(default_factory=list)
    enabled: bool = Field(
        default_factory=bool,
        description="`false` sends nothing more, and what waits is dead. `true` begins again, without the failures.",
    )


class Endpoint(BaseModel):
    """A registered endpoint."""

    id: UUID
    url: str
    description: str
    events: list[CallbackEvent]
    signature: Literal["v1", "v1a"]
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: Literal["manual", "gone", "failing"] | None = Field(
        description="`manual`: somebody asked for it. `gone`: it answered 410. `failing`: only failures for 5 days."
    )
    failures: int = Field(description="Tries that failed since the last one that did not. From 10 on, one at a time.")
    failing_since: datetime | None
    secret_version: int
    secret_rotated_at: datetime | None
    created_at: datetime


class EndpointWithKeys(Endpoint):
    """A registered endpoint with what verifies its signatures, for its owner; null for anybody else."""

    secret: str | None = Field(description="`whsec_…`, the shared secret of `v1`.")
    public_key: str | None = Field(description="`whpk_…`, the public key of `v1a`.")
    previous: str | None = Field(description="The one before. It signs as well for 24 hours after a rotation.")


class EndpointList(BaseModel):
    """Your endpoints, oldest first."""

    data: list[Endpoint]


class EndpointTest(BaseModel):
    """What came of a test: a status of HTTP, or an error's stable name, or both."""

    id: str = Field(description="The `webhook-id` that was sent.")
    delivered: bool
    status: int | None
    error: str | None
    elapsed_ms: int | None
    response_excerpt: str | None


class EndpointDelivery(BaseModel):
    """One callback to an endpoint, with every attempt. `next_at` is when the next one is due."""

    id: str
    job_id: UUID
    event: str
    url: str = Field(description="Where it was sent last, or will be sent first.")
    state: str
    error: str | None = Field(description="Of the last attempt, or why none is made any more.")
    attempts: list[Delivered]
    created_at: datetime
    next_at: datetime | None
    delivered_at: datetime | None


class EndpointDeliveries(BaseModel):
    """Callbacks to an endpoint, newest first."""

    data: list[EndpointDelivery]


class ReplayRange(BaseModel):
    """Which callbacks to send once more: those that came to be from `since` on and before `until`."""

    model_config = ConfigDict(extra="forbid")

    since: Time
    until: Time | None = Field(None, description="Now, when left out.")
    states: list[Literal["dead", "delivered"]] = Field(["dead"], min_length=1)


class Replayed(BaseModel):
    """How many callbacks are due again. Those that their job's end has made pointless are left out."""

    replayed: int
