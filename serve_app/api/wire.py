"""What goes over the wire under /v1: the answers and their examples, and the names of the requests."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from serve_app.api.wire_moderation import ModerationStatus
from serve_app.api.wire_requests import CallbackEvent as CallbackEvent
from serve_app.api.wire_requests import CreateKey as CreateKey
from serve_app.api.wire_requests import JobBatch as JobBatch
from serve_app.api.wire_requests import JobRequest as JobRequest


class Progress(BaseModel):
    """Where a running job is. `step` of `steps` in the phase `denoise`; other phases have none."""

    phase: str
    step: int | None = None
    steps: int | None = None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str | None = None
    retryable: bool | None = None


class Asset(BaseModel):
    """One file of a job, with facts decoded from the file itself. URLs expire; ask the job again for new ones."""

    id: UUID
    index: int
    type: Literal["image", "video"]
    url: str
    thumbnail_url: str | None
    bucket: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int | None
    height: int | None
    frames: int | None
    fps: float | None
    duration_seconds: float | None
    seed: int | None
    model: str
    expires_at: datetime
    moderation_status: ModerationStatus = Field(description="What is not approved is seen by you and the moderators.")
    moderation_reason: str | None = Field(description="Why, as a code; null where nobody has judged it.")
    manifest_url: str | None = Field(None, description="What the file was made from and by. Wants your key.")


class Adjusted(BaseModel):
    """A value that could not be used as given."""

    field: str
    given: float | int | str
    used: float | int | str
    reason: str


class CallbackDelivery(BaseModel):
    """One callback of a job: due, sending, delivered, dead or superseded."""

    id: str
    event: str
    state: str
    attempts: int
    last_status: int | None
    last_error: str | None
    delivered_at: datetime | None


class JobUrls(BaseModel):
    """Where to go next; take these rather than building them."""

    self: str
    events: str
    cancel: str
    retry: str
    rerun: str | None = Field(None, description="POST makes a completed job again; null until it is one.")
    preview: str | None = Field(
        None,
        description="The latest preview, while the job runs with `previews`. It works for a minute, for its owner.",
    )


class Preview(BaseModel):
    """A picture of a running job after `step` of `of` denoise steps: WebP, at most 256 pixels wide and high.

    The URL works for a minute, and until the job ends.
    """

    job_id: UUID
    attempt: int
    step: int
    of: int
    url: str
    width: int
    height: int


class Job(BaseModel):
    """A job as its owner sees it."""

    id: UUID
    job_type: str
    status: Literal["queued", "processing", "completed", "failed", "cancelled"]
    stage: Literal["enhance", "generate"]
    format: Literal["image", "video"]
    quality: Literal["fast", "high"]
    model: str
    content_mode: Literal["sfw", "nsfw"]
    prompt: str
    enhanced_prompt: str | None
    enhancement_strategy: str | None = Field(
        None, description="none, qwen, compel or hybrid: what was asked, and once the job has run, what was done."
    )
    enhancement: dict[str, Any] | None = Field(description="How the prompt was enhanced, and whether that fell back.")
    params: dict[str, Any]
    adjustments: list[Adjusted]
    settings: dict[str, Any] | None = Field(description="What was really used, once the job has run.")
    progress: Progress | None
    position: int | None = Field(description="Jobs ahead in the queue; null when it does not wait.")
    eta_seconds: float | None = Field(description="From measured run times; null while there are none.")
    cancelling: bool
    attempt: int
    failures: int
    max_attempts: int
    error: JobError | None
    assets: list[Asset]
    callback_url: str | None
    callbacks: list[CallbackDelivery]
    metadata: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    queue_wait_seconds: float | None
    generation_seconds: float | None
    enhancement_seconds: float | None
    urls: JobUrls


class JobPage(BaseModel):
    """Jobs, newest first. The next page begins `before` the `last_id` of this one."""

    data: list[Job]
    first_id: UUID | None
    last_id: UUID | None
    has_more: bool


class JobList(BaseModel):
    """Jobs, in the order in which they were given."""

    data: list[Job]


class CallbackSecret(BaseModel):
    """The secret that your callbacks are signed with (Standard Webhooks)."""

    secret: str
    version: int
    previous: str | None = Field(description="Signs as well for 24 hours after a rotation.")


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable; `errors` names the fields."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    code: str
    errors: list["FieldProblem"] = []


class FunctionProblem(BaseModel):
    """An error of the /functions routes, in the shape that their clients read. `details` repeats `error`."""

    success: Literal[False] = False
    error: str
    details: str
    code: str
    errors: list["FieldProblem"] = []


class FieldProblem(BaseModel):
    """One thing wrong with one field of the request."""

    field: str
    message: str
    code: str


class Key(BaseModel):
    """An API key. `key` is there once, in the answer that made it."""

    id: UUID
    user_id: UUID
    username: str | None
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    key: str | None = None


class KeyList(BaseModel):
    """API keys, oldest first."""

    data: list[Key]


class QueueState(BaseModel):
    """One queue: how many jobs are in which state. `ready_cost_seconds` is the predicted work that waits."""

    name: str
    paused: bool
    ready: int
    scheduled: int
    blocked: int
    running: int
    oldest_ready_at: datetime | None
    ready_cost_seconds: float


class QueueList(BaseModel):
    """The queues of the profile."""

    data: list[QueueState]


class WorkerList(BaseModel):
    """The replicas seen lately."""

    data: list[dict[str, Any]]


class Delivered(BaseModel):
    """One attempt to deliver a callback: a status of HTTP, an error's stable name, or both."""

    attempt: int
    at: datetime
    status: int | None
    error: str | None
    elapsed_ms: int | None
    response_excerpt: str | None


class CallbackLog(BaseModel):
    """One callback with its attempts. `next_at` is when the next one is due."""

    id: str
    endpoint_id: UUID | None = Field(description="The registered endpoint that it goes to; null: the job's own URL.")
    event: str
    url: str
    state: str
    attempts: list[Delivered]
    next_at: datetime | None
    delivered_at: datetime | None


class CallbackList(BaseModel):
    """The callbacks of a job, in their order."""

    data: list[CallbackLog]


class CallbackBody(BaseModel):
    """What your callback URL receives, signed after Standard Webhooks. Media never comes along, only references."""

    id: str = Field(description="The same as the header `webhook-id`, in every attempt.")
    type: Literal["job.processing", "job.completed", "job.failed", "job.cancelled"]
    timestamp: datetime
    job_id: UUID
    status: Literal["processing", "completed", "failed", "cancelled"]
    assets: list[dict[str, Any]] = Field(description="`bucket`, `key`, a signed `url`, and decoded facts of each file.")
    error_message: str | None
    error_code: str | None
    metadata: dict[str, Any] = Field(
        description="`seed`, `generation_time` in seconds, `num_images`, `job_type`, `attempt`, and yours as `client`."
    )
