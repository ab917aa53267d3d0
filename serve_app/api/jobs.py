"""/v1/jobs: submit, list, read, cancel, retry."""

from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import RedirectResponse

from db.access import Principal
from db.idempotency import canonical_body
from db.jobs import JobRecord, Stage, Status
from db.pool import as_user
from db.providers import PROVIDER_QUEUE
from deployments.storing import BUCKET, REFERENCE_BUCKET
from models.catalog import Family, resolve
from models.denoising.costs import rows_of, shape_name
from models.params import GenerationParams, GivenParams
from models.policy import signs_beside
from serve_app.admission import Submission, check_content_mode, check_words
from serve_app.api.auth import EdgeDep, User
from serve_app.api.problems import Problem
from serve_app.api.views import job_view, preview_view
from serve_app.api.wire import Job, JobBatch, JobList, JobPage, JobRequest, Preview
from serve_app.edge import Edge
from serve_app.references import LISTED, AskedReference, single_reference
from serve_app.submission import ENHANCE_SECONDS, numbered, submit, submit_together

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="Repeats of a request with one key make one job.")
]
BatchKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=250,
        description="Repeats of a request with one key make its jobs once.",
    ),
]
PARAMETERS = tuple((GivenParams.model_fields.keys() & JobRequest.model_fields.keys()) - {"references"})


@router.post("", status_code=202, operation_id="createJob", response_model=Job)
async def create_job(
    body: JobRequest,
    request: Request,
    response: Response,
    edge: EdgeDep,
    user: User,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Accept a job. It is durable when this answers; follow it at `urls.self` or `urls.events`."""
    accepted = await submit(
        edge,
        user,
        _asked(body, request),
        idempotency_key=idempotency_key,
        body=canonical_body(body.model_dump(exclude_unset=True)),
    )
    job = await read_job(edge, user, accepted.job_id)
    response.headers["Location"] = job.urls.self
    if accepted.replayed:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return job


@router.post("/batch", status_code=202, operation_id="createJobs", response_model=JobList)
async def create_jobs(
    body: JobBatch,
    request: Request,
    response: Response,
    edge: EdgeDep,
    user: User,
    idempotency_key: BatchKey = None,
) -> JobList:
    """Accept several jobs in one transaction: all of them, or none when one is refused."""
    asked = []
    for n, job in enumerate(body.jobs):
        with numbered(n):
            asked.append(_asked(job, request))
    accepted = await submit_together(
        edge,
        user,
        asked,
        idempotency_key=idempotency_key,
        body=canonical_body(body.model_dump(exclude_unset=True)),
    )
    if accepted[0].replayed:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    async with as_user(edge.pool, user.user_id) as connection:
        records = [await edge.jobs.read(connection, one.job_id) for one in accepted]
    return JobList(data=[view(edge, user, may_see(user, record)) for record in records])


@router.get("", operation_id="listJobs")
async def list_jobs(
    edge: EdgeDep,
    user: User,
    status: Literal["queued", "processing", "completed", "failed", "cancelled"] | None = None,
    job_type: str | None = None,
    created_after: datetime | None = None,
    before: Annotated[UUID | None, Query(description="Older than this job.")] = None,
    after: Annotated[UUID | None, Query(description="Newer than this job.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobPage:
    """Your jobs, newest first."""
    if job_type is not None:
        resolve(job_type)
    async with as_user(edge.pool, user.user_id) as connection:
        records = await edge.jobs.list_page(
            connection,
            user_id=user.user_id,
            status=status,
            job_type=job_type,
            created_after=_in_utc(created_after),
            before=before,
            after=after,
            page_size=limit + 1,
        )
    more = len(records) > limit
    page = records[1:] if more and after is not None and before is None else records[:limit]
    data = [view(edge, user, record) for record in page]
    return JobPage(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.get("/{job_id}", operation_id="getJob")
async def get_job(job_id: UUID, edge: EdgeDep, user: User) -> Job:
    """One of your jobs."""
    return await read_job(edge, user, job_id)


@router.delete("/{job_id}", status_code=204, operation_id="eraseJob")
async def erase_job(job_id: UUID, edge: EdgeDep, user: User) -> Response:
    """Erase an ended job: its row, files, history and undelivered callbacks. 409 while it is open: cancel it first."""
    record = await owned(edge, user, job_id)
    erased = await edge.jobs.erase(job_id, user.user_id)
    if erased is None:
        raise Problem(409, "job_open", f"a job that is {record.status} can't be erased; cancel it first")
    await edge.blobs.delete(BUCKET, list(erased.keys))
    if erased.reference_keys:
        await edge.blobs.delete(REFERENCE_BUCKET, list(erased.reference_keys))
    return Response(status_code=204)


@router.post("/{job_id}/cancel", operation_id="cancelJob")
async def cancel_job(job_id: UUID, edge: EdgeDep, user: User) -> Job:
    """Stop a job: a waiting one at once, a running one at its next step. Repeating it changes nothing."""
    await owned(edge, user, job_id)
    await edge.queue.cancel(job_id)
    edge.notifier.job(job_id)
    edge.notifier.queue("callbacks")
    return await read_job(edge, user, job_id)


@router.post("/{job_id}/retry", status_code=202, operation_id="retryJob")
async def retry_job(job_id: UUID, edge: EdgeDep, user: User) -> Job:
    """Queue a failed or cancelled job again, with a new budget of attempts."""
    record = await owned(edge, user, job_id)
    if record.status not in (Status.FAILED, Status.CANCELLED):  # what never ran here, as a copy, has no parameters
        raise Problem(409, "not_retryable", f"a job that is {record.status} can't be retried")
    job_type = resolve(record.job["job_type"])
    enhances = record.job["stage"] == Stage.ENHANCE
    made_here = record.job["provider"] == "local"
    queue = Family.QWEN.value if enhances else job_type.family.value if made_here else PROVIDER_QUEUE
    params = GenerationParams.model_validate(record.job["params"])
    # as of a rerun: the rules may have changed since it was accepted
    check_content_mode(edge, user, params.content_mode, with_upload=False)
    await check_words(params, params.prompt, record.job["enhanced_prompt"], beside=signs_beside(params))
    cost = ENHANCE_SECONDS if enhances else await edge.predictions.seconds(job_type, params)
    if not await edge.jobs.retry(
        job_id,
        queue=queue,
        cost=cost,
        shape=shape_name(params),
        rows=rows_of(params),
        loras=[use.name for use in params.loras],
        exempt=user.is_admin(),
    ):
        raise Problem(409, "not_retryable", f"a job that is {record.status} can't be retried")
    edge.notifier.queue(queue)
    edge.notifier.job(job_id)
    return await read_job(edge, user, job_id)


@router.get("/{job_id}/events", status_code=307, operation_id="redirectToEvents", response_class=RedirectResponse)
async def job_events(job_id: UUID, edge: EdgeDep, user: User) -> RedirectResponse:
    """Where the job's server-sent events are: a deployment of its own, so that open streams take no room here."""
    await owned(edge, user, job_id)
    # relative, so that it stays on the address that the client came by
    return RedirectResponse(f"/v1/events/jobs/{job_id}", status_code=307)


def _asked(body: JobRequest, request: Request) -> Submission:
    return Submission(
        job_type=body.job_type,
        given={name: getattr(body, name) for name in PARAMETERS},
        enhance=body.enhance,
        strategy=body.enhancement_strategy,
        references=_references(body),
        callback_url=body.callback_url,
        callback_events=list(body.callback_events) if body.callback_events else None,
        interactive=body.priority == "interactive",
        start_after_seconds=body.start_after_seconds,
        start_deadline_seconds=body.start_deadline_seconds,
        deadline_seconds=body.deadline_seconds,
        metadata=body.metadata,
        traceparent=request.headers.get("traceparent"),
    )


def _references(body: JobRequest) -> tuple[AskedReference, ...]:
    parts = (body.reference_image_url, body.reference_type, body.reference_strength, body.mask_image_url)
    if body.references is None:
        return single_reference(*parts)
    if any(part is not None for part in parts):
        raise Problem(422, "conflict", "is given beside a single reference", field="references")
    return tuple(
        AskedReference(
            image=one.image,
            kind=one.type,
            strength=one.strength,
            mask=one.mask,
            names={part: f"references.{n}.{name}" for part, name in LISTED.items()},
        )
        for n, one in enumerate(body.references)
    )


def _in_utc(moment: datetime | None) -> datetime | None:
    try:
        return None if moment is None else moment.astimezone(UTC)
    except (OverflowError, ValueError):
        raise Problem(422, "range", "is no time that can be", field="created_after") from None


async def owned(edge: Edge, user: Principal, job_id: UUID) -> JobRecord:
    """A job of the caller's own. 404 for anybody else's: that it exists is not theirs to know."""
    async with as_user(edge.pool, user.user_id) as connection:
        return may_see(user, await edge.jobs.read(connection, job_id))


def may_see(user: Principal, record: JobRecord | None) -> JobRecord:
    """The same of a record that was read already."""
    if record is None or (str(user.user_id) != record.job["user_id"] and not user.is_admin()):
        raise Problem(404, "job_not_found", "there is no such job")
    return record


async def read_job(edge: Edge, user: Principal, job_id: UUID) -> Job:
    """A job of the caller's own, with its ETA."""
    record = await owned(edge, user, job_id)
    return view(edge, user, record, await eta(edge, record))


def view(edge: Edge, user: Principal, record: JobRecord, seconds: float | None = None) -> Job:
    """A record as the caller sees it; `seconds` is its ETA."""
    settings = edge.settings
    preview = preview_of(edge, user, record)
    return job_view(record, edge.signer, settings.public_url, settings.signed_url_seconds, seconds, preview)


def preview_of(edge: Edge, user: Principal, record: JobRecord) -> Preview | None:
    """The latest preview of a running job, for its owner alone: what is not finished is nobody else's to see."""
    return preview_view(record, edge.signer) if str(user.user_id) == record.job["user_id"] else None


async def eta(edge: Edge, record: JobRecord) -> float | None:
    """Seconds until the end: what is predicted to run before, shared by the live replicas, and the job's own run."""
    if record.status is not Status.QUEUED or record.standing is None:
        return None
    params = GenerationParams.model_validate(record.job["params"])
    own = await edge.predictions.known(resolve(record.job["job_type"]), params)
    if own is None:
        return None
    queue = (record.queue or {}).get("queue")
    replicas = sum(worker.queue == queue and worker.state == "ready" for worker in await edge.workers.list())
    ahead = float(record.standing["ahead_cost"] or 0)
    return round(ahead / max(replicas, 1) + own, 1)
