"""The language model's replica: it enhances queued jobs as one durable stage; single prompts and chats by handle.

All of them are in one batch of one model. Half of its places are for jobs, and whoever calls by handle goes before jobs
that wait. It serves without its model too, by rules, and says so: a model that can't be loaded must not hold up every
job that wants a better prompt. It goes on trying to load it. A chat has no rules to fall back on, and fails then.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import structlog
from pydantic import ValidationError

from db.costs import CostProfiles
from db.jobs import Jobs
from db.notify import QUEUE_CHANNEL, Listener, Notifier
from db.pool import CONNECTION_FAULTS, WORKER_ROLE, open_pool
from db.prompts import Prompts
from db.queue import Queue, Requeue
from db.workers import Workers
from deployments.claims import ClaimLoop
from deployments.endings import Endings, Outcome
from deployments.held import Held
from deployments.metrics import Metrics
from deployments.predictions import Predictions
from deployments.prompting import EnhanceRequest as EnhanceRequest
from deployments.prompting import choose_template, enhancement_account, load_counter
from deployments.settings import Settings
from models.catalog import Family, JobType, resolve
from models.generation import GenerationError, ModelLoadFailed
from models.guiding.reference import WithReferences
from models.params import ContentMode, GenerationParams
from models.policy import ContentRejected, check_prompt, signs_beside
from models.profile import resolve_weights
from models.prompting.emphasis import CompelWeights
from models.prompting.enhancement import Enhancement, enhance, strategy_of
from models.prompting.prompts import TokenCounter
from models.prompting.weighting import MAX_WINDOWS
from models.writing.language import Answer, Completion, LanguageBackend, Message, Priority, Sampling, language_backend

log = structlog.get_logger()

RELOAD_SECONDS = 60.0
WITHOUT_MODEL_SLOTS = 8  # rules take no time; what counts is the way to Postgres and back
CALLS = 64  # enhancements by handle that are under way at a time; each blocks a thread while the model writes
QUEUE = Family.QWEN.value


class PolicyRefused(GenerationError):
    """The prompt breaks the content policy."""

    code = "content_rejected"
    retryable = False


class Enhancer:
    """One language model, one claim loop. No Ray in it. `slots` jobs are worked on at a time."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.worker: UUID = uuid4()
        self.model: LanguageBackend | None = None
        self.load_error: str | None = None
        spec = settings.loaded_profile.models.get(Family.QWEN)
        self.slots = max(1, spec.sequences // 2) if spec is not None else WITHOUT_MODEL_SLOTS
        self._threads = ThreadPoolExecutor(2 * self.slots + CALLS, thread_name_prefix="enhance")
        self._loop: ClaimLoop | None = None
        self._counters: dict[Family, TokenCounter] = {}
        self._counters_lock = asyncio.Lock()

    async def start(self) -> None:
        """Connect, try to load the model, and claim. Raises `DatabaseUnavailable`."""
        settings = self.settings
        url = await asyncio.to_thread(settings.postgres)
        self._pool = await open_pool(url, role=WORKER_ROLE, max_size=6, name="ourvidz qwen")
        self._workers = Workers(self._pool)
        self._prompts = Prompts(self._pool)
        self._notifier = Notifier(self._pool)
        jobs, queue = Jobs(self._pool), Queue(self._pool)
        self._predictions = Predictions(CostProfiles(self._pool), jobs)
        self._endings = Endings(queue, jobs, self.worker, settings.lease_seconds)
        await self._load()
        self._loop = ClaimLoop(
            queue,
            QUEUE,
            self.worker,
            self._work,
            slots=self.slots,
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.renew_seconds,
            poll_seconds=settings.poll_seconds,
            on_news=self._notifier.job,
            on_lost=lambda: self.metrics.lease_lost(QUEUE),
            may_claim=lambda: self.model is None or self.model.broken is None,
        )
        self._listener = Listener(url, QUEUE_CHANNEL, self._heard, role=WORKER_ROLE)
        self._listener.start()
        self._loop.start()
        self._life = asyncio.create_task(self._live())

    def health(self) -> str | None:
        """What is wrong beyond repair, or None. A model that is away is not: rules stand in. A device whose context is
        lost is: only a new process gets it back."""
        if self.model is not None and self.model.broken is not None:
            return self.model.broken
        return self._loop.fault if self._loop else "not started"

    async def stop(self, seconds: float) -> None:
        """Drain, as media replicas do."""
        if self._loop is None:
            return
        await self._workers.enter(self.worker, QUEUE, "draining")
        await self._loop.drain(seconds)
        self._life.cancel()
        await self._listener.close()
        await self._notifier.close()
        if self.model is not None:
            await asyncio.to_thread(self.model.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._workers.enter(self.worker, QUEUE, "stopped")
        await self._pool.close()

    async def enhance(self, request: EnhanceRequest) -> Enhancement:
        """Enhance one prompt, before all jobs that wait. Raises `ContentRejected`."""
        return await self._enhance(request, "chat", lambda answer: None)

    async def chat(
        self, messages: Sequence[Message], sampling: Sampling, content_mode: ContentMode = "sfw"
    ) -> AsyncIterator[str | Completion]:
        """An answer in pieces as they are written, and at last its `Completion`. Who stops reading cancels it.

        What users say is held against the content policy; what the model says is not. Raises `ContentRejected`,
        `InvalidInput`, `LanguageModelBusy` with a time to come back, `ModelLoadFailed` while the model is away.
        """
        for message in messages:
            if message.role == "user":
                check_prompt(message.content, content_mode)
        if self.model is None:
            raise ModelLoadFailed(self.load_error or "the language model is not loaded")
        answer = self.model.submit(messages, sampling, "chat")
        try:
            async for piece in answer:
                yield piece
            yield await answer.result()
        finally:
            answer.cancel()

    async def _load(self) -> None:
        spec = self.settings.loaded_profile.models.get(Family.QWEN)
        if spec is None:
            self.load_error = "the profile has no language model"
            await self._workers.enter(self.worker, QUEUE, "ready", error=self.load_error)
            return
        await self._workers.enter(self.worker, QUEUE, "loading", model_name=spec.model_name)
        started, model = time.monotonic(), None
        try:
            weights = await asyncio.to_thread(resolve_weights, spec, self.settings.state_dir / "weights")
            model = language_backend(spec, weights)
            await asyncio.to_thread(model.load)
            await asyncio.to_thread(model.warm_up)
        except GenerationError as error:
            self.load_error = f"{error.code}: {error.message}"
            log.error("model_load_failed", model=spec.model_name, reason=self.load_error)
            if model is not None:
                await asyncio.to_thread(model.close)
            await self._workers.enter(self.worker, QUEUE, "failed", error=self.load_error)
            return
        self.model, self.load_error = model, None
        seconds = time.monotonic() - started
        self.metrics.model_loaded(QUEUE, seconds)
        await self._workers.enter(
            self.worker, QUEUE, "ready", model_name=spec.model_name, device=model.device, load_ms=round(seconds * 1000)
        )

    def _heard(self, payload: str) -> None:
        if payload in ("", QUEUE) and self._loop is not None:
            self._loop.wake()

    async def _live(self) -> None:
        tried = time.monotonic()
        while True:
            await asyncio.sleep(self.settings.renew_seconds)
            try:
                await self._workers.seen(self.worker, self._loop.running if self._loop else 0)
                if self.load_error and time.monotonic() - tried > RELOAD_SECONDS:
                    tried = time.monotonic()
                    await self._load()
            except Exception as error:
                log.warning("sign_of_life_failed", error=type(error).__name__)

    async def _work(self, held: Held) -> None:
        """One job's enhancement stage, from claim to the next queue."""
        claim, outcome, queue = held.claim, Outcome.UNKNOWN, QUEUE
        started = time.monotonic()
        try:
            job_type = resolve(claim.job["job_type"])
            result = await self._enhance_job(held, job_type)
            queue = job_type.family.value
            outcome = await self._move_on(held, job_type, result)
        except GenerationError as error:
            outcome = await self._endings.failed(held, error)
            self.metrics.job_failed(QUEUE, error.code, outcome)
        finally:
            self._notifier.job(claim.job_id)
            self._notifier.queue(queue)
            self._notifier.queue("callbacks")
            self.metrics.job_ended(QUEUE, claim.job, outcome, time.monotonic() - started)
            log.info("stage_ended", job_id=str(claim.job_id), attempt=claim.attempt, outcome=outcome)

    async def _enhance_job(self, held: Held, job_type: JobType) -> Enhancement:
        job = held.claim.job

        def watch(answer: Answer) -> None:
            held.report("enhance", answer.new_tokens, None, answer.new_tokens)
            held.on_stop = answer.cancel
            if held.stop_reason is not None:
                answer.cancel()

        held.report("enhance")
        request = EnhanceRequest(
            prompt=job["original_prompt"],
            family=job_type.family.value,
            format=job_type.format.value,
            quality=job_type.quality.value,
            enhanced7b=job_type.enhanced,
            content_mode=job["content_mode"],
            seed=int(job["params"]["seed"] or 0),
            windows=MAX_WINDOWS if job["params"].get("compel_enabled") else 1,
            beside=CompelWeights.model_validate(job["params"].get("compel_weights") or {}).wording,
            signs=signs_beside(WithReferences.model_validate({"references": job["params"].get("references") or ()})),
        )
        try:
            return await self._enhance(request, "job", watch)
        except ContentRejected as error:
            raise PolicyRefused(error.message) from error

    async def _enhance(
        self, request: EnhanceRequest, priority: Priority, watch: Callable[[Answer], None]
    ) -> Enhancement:
        wanted = request.wanted
        chosen, hit = await choose_template(self._prompts, wanted)
        self.metrics.template_looked_up(hit)
        if chosen is None or chosen.misfits:
            log.info("template_fell_back", template=chosen.template.name if chosen else None)
        counter = await self._counter(wanted.target_model)
        begun: list[Answer] = []

        def watch_and_keep(answer: Answer) -> None:
            begun[:] = [answer]
            watch(answer)

        call = partial(
            enhance,
            request.prompt,
            chosen.template if chosen else None,
            self.model,
            counter,
            wanted.content_mode,
            request.seed,
            quality=wanted.quality,
            priority=priority,
            watch=watch_and_keep,
            seconds=request.seconds,
            windows=request.windows,
            beside=request.beside,
            signs=request.signs,
        )
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except asyncio.CancelledError:  # the caller has left
            for answer in begun:
                answer.cancel()
            raise
        self.metrics.enhanced(result.strategy, result.fallback_reason)
        selection = chosen.account() if chosen else None
        return replace(result, template_selection=selection, template_cache_hit=hit)

    async def _counter(self, family: Family) -> TokenCounter | None:
        """The tokenizer of the reader; None where it can't be read now, and then the prompt stays as it is."""
        async with self._counters_lock:
            if family not in self._counters:
                try:
                    self._counters[family] = await asyncio.to_thread(load_counter, self.settings, family)
                except (OSError, GenerationError) as error:
                    log.warning("tokenizer_unavailable", family=family.value, error=type(error).__name__)
            return self._counters.get(family)

    async def _move_on(self, held: Held, job_type: JobType, result: Enhancement) -> Outcome:
        expansion = None
        if result.original_prompt:
            expansion = round(100 * len(result.enhanced_prompt) / len(result.original_prompt), 2)
        account = enhancement_account(result)
        hop = Requeue(
            job_id=held.claim.job_id,
            attempt=held.claim.attempt,
            kind="enhanced",
            queue=job_type.family.value,
            cost=await self._cost(held.claim.job["params"], job_type),
            stage="generate",
            enhanced_prompt=result.enhanced_prompt,
            enhancement=account,
            enhancement_strategy=strategy_of(
                result.strategy == "qwen", bool(held.claim.job["params"].get("compel_enabled"))
            ),
            enhancement_time_ms=result.execution_time_ms,
            template_name=result.template_name,
            expansion=expansion,
        )
        held.settling = True
        moved = await self._endings.requeue(held, hop)
        return Outcome.ENHANCED if moved is Outcome.REQUEUED else moved

    async def _cost(self, params: Any, job_type: JobType) -> float:
        """The seconds that the generation will take, predicted as for a job that is not enhanced."""
        try:
            return await self._predictions.seconds(job_type, GenerationParams.model_validate(params))
        except (*CONNECTION_FAULTS, ValidationError) as error:
            # a guess will do for the fair share; the work that was done must not be lost for it
            log.info("cost_guessed", job_type=job_type.name, error=type(error).__name__)
            return job_type.initial_seconds
