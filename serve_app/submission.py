"""Accepting a job: from what a caller said, in whatever dialect, to a row. The order of the checks is the order
of the code; nothing is stored before all of them have passed, but for reference images just before the row.
"""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from uuid import UUID

from uuid6 import uuid7

from db.access import Principal
from db.jobs import Accepted, NewJob, Stage
from db.pool import CONNECTION_FAULTS
from db.providers import PROVIDER_QUEUE
from models.catalog import Family
from models.denoising.costs import rows_of, shape_name
from models.prompting.enhancement import strategy_of
from serve_app.admission import Checked, Submission, check
from serve_app.api.problems import Problem, problem_of
from serve_app.api.wire import FieldProblem
from serve_app.edge import Edge
from serve_app.references import forget_references, keep_references

ENHANCE_SECONDS = 3.0  # of predicted work, until runs have been measured
MAX_BATCH_REFERENCES = 5


async def submit(
    edge: Edge, user: Principal, asked: Submission, *, idempotency_key: str | None = None, body: bytes = b""
) -> Accepted:
    """Accept a job. Raises `Problem`, `RequestRefused`, `InvalidInput` or `EgressError`; then nothing is stored."""
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body)
        if earlier is not None:
            return earlier[0]
    job, stored = await _prepare(edge, user, asked, await check(edge, user, asked))
    async with kept_references(edge, stored) as keep:
        accepted = await edge.jobs.accept(job, idempotency_key=idempotency_key, body=body)
        keep(not accepted.replayed)
    if not accepted.replayed:
        edge.notifier.queue(job.queue)
    return accepted


async def submit_together(
    edge: Edge, user: Principal, asked: Sequence[Submission], *, idempotency_key: str | None = None, body: bytes = b""
) -> list[Accepted]:
    """Accept several jobs, all or none. A `Problem` of one of them has `jobs.N` before its fields."""
    if idempotency_key is not None:
        earlier = await edge.jobs.accepted_before(user.user_id, idempotency_key, body, len(asked))
        if earlier is not None:
            return earlier
    if sum(len(one.references) for one in asked) > MAX_BATCH_REFERENCES:
        message = f"the jobs of a batch may have {MAX_BATCH_REFERENCES} references together, which are read first"
        raise Problem(422, "too_many_references", message, field="jobs")
    checked, jobs, stored = [], [], list[str]()
    for n, one in enumerate(asked):
        with numbered(n):
            checked.append(await check(edge, user, one))
    async with kept_references(edge, stored) as keep:
        for n, one in enumerate(asked):
            with numbered(n):
                job, keys = await _prepare(edge, user, one, checked[n])
            jobs.append(job)
            stored += keys
        accepted = await edge.jobs.accept_together(jobs, idempotency_key=idempotency_key, body=body)
        keep(not accepted[0].replayed)
    if not accepted[0].replayed:
        for queue in {job.queue for job in jobs}:
            edge.notifier.queue(queue)
    return accepted


@contextlib.asynccontextmanager
async def kept_references(edge: Edge, references: list[str]) -> AsyncIterator[Callable[[bool], None]]:
    """Keeps stored references if the body says so, and deletes them if not, or if it fails."""
    keep = False

    def decide(value: bool) -> None:
        nonlocal keep
        keep = value

    try:
        yield decide
    except CONNECTION_FAULTS:
        # nobody knows whether the jobs were accepted, and they would need them; where they were not, the sweep finds
        # the files. The same holds for a caller that is gone
        raise
    except Exception:
        await forget_references(edge, references)
        raise
    if not keep:
        await forget_references(edge, references)


@contextlib.contextmanager
def numbered(n: int) -> Iterator[None]:
    """Problems of one job among several, with its number before the field."""
    try:
        yield
    except Exception as error:
        problem = problem_of(error)
        if problem.status >= 500 and not isinstance(error, Problem):
            raise
        errors = [e.model_copy(update={"field": f"jobs.{n}.{e.field}"}) for e in problem.errors]
        errors = errors or [FieldProblem(field=f"jobs.{n}", message=problem.detail, code=problem.code)]
        raise Problem(problem.status, problem.code, problem.detail, errors=errors) from None


async def _prepare(edge: Edge, user: Principal, asked: Submission, checked: Checked) -> tuple[NewJob, list[str]]:
    """The row of a job, and the keys of the references and masks that were stored for it."""
    job_type, params, stored = checked.job_type, checked.resolved.params, list[str]()
    if params.seed is None:
        params = params.model_copy(update={"seed": secrets.randbelow(2**32)})
    job_id = asked.job_id or UUID(int=uuid7().int)
    if checked.located:
        # where the id is not a new one, another job may have it, whose file must not be written over
        name = f"{job_id}.{secrets.token_hex(8)}" if asked.job_id else str(job_id)
        made_here = params.content_mode == "nsfw"
        references = await keep_references(
            edge, checked.located, f"{user.user_id}/{name}", params.references, made_here=made_here
        )
        params = params.model_copy(update={"references": references})
        stored = [key for one in references for key in one.keys]
    outside = checked.outside
    adjustments = (*asked.adjustments, *checked.resolved.adjustments, *(outside.adjustments if outside else ()))
    job = NewJob(
        id=job_id,
        user_id=user.user_id,
        job_type=job_type.name,
        format=job_type.format.value,
        quality=job_type.quality.value,
        model_type=job_type.family.value,
        stage=Stage.ENHANCE if checked.enhances else Stage.GENERATE,
        queue=Family.QWEN.value if checked.enhances else PROVIDER_QUEUE if outside else job_type.family.value,
        provider=outside.model.provider.name if outside else "local",
        api_model_id=outside.model.id if outside else None,
        cost=ENHANCE_SECONDS if checked.enhances else await edge.predictions.seconds(job_type, params),
        credits=job_type.credits,
        exempt=user.is_admin() or asked.job_id is not None,  # what another system had accepted is taken over as it is
        original_prompt=params.prompt,
        enhanced_prompt=checked.enhanced,
        template_name=asked.template_name,
        enhancement_strategy=strategy_of(checked.enhances, params.compel_enabled),
        params=params.model_dump(mode="json"),
        shape=shape_name(params),
        rows=rows_of(params),
        loras=[use.name for use in params.loras],
        content_mode=params.content_mode,
        metadata=asked.metadata,
        adjustments=[dict(vars(a)) for a in adjustments],
        klass=int(asked.interactive),
        max_attempts=edge.settings.max_attempts,
        callback_url=asked.callback_url,
        callback_events=asked.callback_events or ("processing", "completed", "failed", "cancelled"),
        traceparent=asked.traceparent,
        start_after_seconds=asked.start_after_seconds,
        start_deadline_seconds=asked.start_deadline_seconds,
        deadline_seconds=asked.deadline_seconds,
    )
    return job, stored
