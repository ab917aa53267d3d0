"""Watches: what open event streams show, read once for all streams that show the same.

A stream holds no connection and reads nothing. One task per job and viewer reads, in the viewer's name, and only when
there is something new. A notification says so; besides, one statement every two seconds compares all jobs that are
watched, since a notification is a hint only. So the load of a thousand streams is that of the changes, not of the
streams.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

import structlog

from db.access import Principal
from db.jobs import JobEvent
from db.notify import JOB_CHANNEL, Listener
from db.pool import DATABASE_FAULTS, as_user
from serve_app.api.jobs import eta, may_see, preview_of, view
from serve_app.api.problems import Problem
from serve_app.api.wire import Preview
from serve_app.edge import Edge

log = structlog.get_logger()

LOOK_SECONDS = 2.0
KEY_LOOKS = 5  # the keys that opened the streams are looked at again after so many looks
PLACE_LOOKS = 5  # and the place of a waiting job, which changes with other jobs
ENDS = ("completed", "failed", "cancelled")  # of jobs, and the events that tell it
PAGE = 200  # events of a job that are read at once


@dataclass(frozen=True)
class Sight:
    """What a viewer sees of a job, as it is streamed. `number` grows whenever a watch sees something new; `face` is
    what of the job makes it new, as URLs are signed anew at every read."""

    number: int
    events: tuple[JobEvent, ...]
    status: str
    job: str  # JSON
    face: str
    preview: Preview | None

    @property
    def what(self) -> tuple[object, ...]:
        """What makes a sight a new one."""
        return self.face, len(self.events), self.preview and (self.preview.attempt, self.preview.step)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDS


class Watch:
    """One job as one viewer sees it, for all of that viewer's streams."""

    def __init__(self, edge: Edge, viewer: Principal, job_id: UUID) -> None:
        self._edge, self._viewer, self.job_id = edge, viewer, job_id
        self.streams = 0
        self.over = False  # nothing can be read any more; whoever streams should come again
        self._sight: Sight | None = None
        self._rung = asyncio.Event()
        self._news = asyncio.Event()
        self._begun = self._read = 0  # the reads that were begun and that have ended
        self._task = asyncio.create_task(self._run())

    def ring(self) -> None:
        """Something may have changed."""
        self._rung.set()

    @property
    def waits(self) -> bool:
        """Whether the job waits in a queue, as far as is known."""
        return self._sight is not None and self._sight.status == "queued"

    async def fresh(self) -> None:
        """Returns when a read that began after this call has ended."""
        wanted = self._begun + 1
        self._rung.set()
        while self._read < wanted and not self.over:
            await self._news.wait()

    async def after(self, number: int) -> Sight | None:
        """The newest sight past that number, waiting for one; None when nothing can be read any more."""
        while not self.over:
            if self._sight is not None and self._sight.number > number:
                return self._sight
            await self._news.wait()
        return None

    def end(self) -> "asyncio.Task[None]":
        """Stop reading; returns what ends soon."""
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        try:
            while True:
                await self._rung.wait()
                self._rung.clear()
                self._begun += 1
                await self._look()
                self._read = self._begun
                self._tell()
        except (Problem, *DATABASE_FAULTS) as error:
            log.info("watch_ended", job_id=str(self.job_id), error=type(error).__name__)
        finally:
            self.over = True
            self._tell()

    def _tell(self) -> None:
        told, self._news = self._news, asyncio.Event()
        told.set()

    async def _look(self) -> None:
        edge, viewer, before = self._edge, self._viewer, self._sight
        events = list(before.events) if before else []
        async with as_user(edge.pool, viewer.user_id) as connection:
            # before the history, so that an end is never told without its event
            record = may_see(viewer, await edge.jobs.read(connection, self.job_id))
            full = True
            while full:
                page = await edge.jobs.events_after(connection, self.job_id, events[-1].id if events else 0, PAGE)
                events += page
                full = len(page) == PAGE
        if events and events[-1].kind in ENDS and not record.status.terminal:
            self._rung.set()  # it ended between the two; the next read sees both
            return
        job = view(edge, viewer, record, await eta(edge, record))
        now = Sight(
            before.number if before else 1,
            tuple(events),
            job.status,
            job.model_dump_json(),
            job.model_dump_json(exclude={"assets", "eta_seconds", "urls"}),
            preview_of(edge, viewer, record),
        )
        self._sight = replace(now, number=now.number + 1) if before and before.what != now.what else now


class Watches:
    """All watches of this process, and what wakes them."""

    def __init__(self, edge: Edge, url: str) -> None:
        self._edge = edge
        self._watches: dict[tuple[UUID, UUID, frozenset[str]], Watch] = {}
        self._by_job: dict[UUID, set[Watch]] = {}
        self._keys: Counter[UUID] = Counter()
        self._closed_keys: set[UUID] = set()
        self._stamps: dict[UUID, str] = {}
        self._listener = Listener(url, JOB_CHANNEL, self._heard)
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen and to look."""
        self._listener.start()
        self._looking = asyncio.create_task(self._look_forever())

    async def close(self) -> None:
        """Stop everything; the streams end."""
        await self._listener.close()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*[watch.end() for watch in self._watches.values()], return_exceptions=True)

    def holds(self, viewer: Principal) -> bool:
        """Whether the key or token that opened a stream still opens it, as far as is known."""
        if viewer.expires_at is not None:
            return datetime.now(UTC) < viewer.expires_at
        return viewer.key_id is not None and viewer.key_id not in self._closed_keys

    @asynccontextmanager
    async def watching(self, viewer: Principal, job_id: UUID) -> AsyncIterator[Watch]:
        """The watch of a job, shared by all streams that would show the same."""
        key = (job_id, viewer.user_id, viewer.roles)
        watch = self._watches.get(key)
        if watch is None or watch.over:
            watch = self._watches[key] = Watch(self._edge, viewer, job_id)
            self._by_job.setdefault(job_id, set()).add(watch)
        watch.streams += 1
        if viewer.key_id is not None:
            self._keys[viewer.key_id] += 1
        try:
            yield watch
        finally:
            watch.streams -= 1
            if viewer.key_id is not None:
                self._keys[viewer.key_id] -= 1
            if not watch.streams:
                self._end(key, watch)

    def _end(self, key: tuple[UUID, UUID, frozenset[str]], watch: Watch) -> None:
        if self._watches.get(key) is watch:
            del self._watches[key]
        others = self._by_job[watch.job_id]
        others.discard(watch)
        if not others:
            del self._by_job[watch.job_id]
            self._stamps.pop(watch.job_id, None)
        watch.end()

    def _heard(self, payload: str) -> None:
        if not payload:
            for watch in self._watches.values():
                watch.ring()
            return
        with contextlib.suppress(ValueError):
            self._ring(UUID(payload))

    def _ring(self, job_id: UUID) -> None:
        for watch in self._by_job.get(job_id, ()):
            watch.ring()

    async def _look_forever(self) -> None:
        looks = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            looks += 1
            try:
                await self._look()
                if looks % KEY_LOOKS == 0:
                    await self._look_at_keys()
            except DATABASE_FAULTS as error:
                log.warning("look_failed", error=type(error).__name__)
            if looks % PLACE_LOOKS == 0:
                for watch in self._watches.values():
                    if watch.waits:
                        watch.ring()

    async def _look(self) -> None:
        watched = set(self._by_job)
        stamps = await self._edge.jobs.stamps(watched) if watched else {}
        for job_id in watched:
            # a job that is gone has none, and its watch ends when it looks
            if job_id not in stamps or self._stamps.get(job_id) != stamps[job_id]:
                self._ring(job_id)
        self._stamps = {job_id: stamp for job_id, stamp in stamps.items() if job_id in self._by_job}

    async def _look_at_keys(self) -> None:
        self._keys = +self._keys
        keys = set(self._keys)
        self._closed_keys = keys - await self._edge.access.keys_that_hold(keys) if keys else set()
