"""The API from the caller's side: submit jobs, wait for them, fetch what they made.

ClientError
├── CannotConnect         nothing usable answers at the address; another try may succeed
│   └── UnexpectedAnswer  something answers there, but not this API
├── ApiError              the API refused; holds the fields of its problem document
├── NoSuchJob             an abbreviated id fits no recent job, or several
└── DownloadFailed        a file could not be fetched whole
"""

import asyncio
import mimetypes
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self, TypeVar
from uuid import UUID, uuid4

import httpx2
from pydantic import BaseModel, ValidationError

from serve_app.api.wire import (
    Asset,
    CallbackSecret,
    CreateKey,
    FieldProblem,
    Job,
    JobPage,
    JobRequest,
    Key,
    KeyList,
    Problem,
)
from serve_app.endpoint import Endpoint

TERMINAL = frozenset({"completed", "failed", "cancelled"})
RECENT_JOBS = 100  # as many as one page holds; abbreviated ids are looked for among these
STREAM_SILENCE_SECONDS = 45.0  # three of the server's keep-alives

Wire = TypeVar("Wire", bound=BaseModel)


class ClientError(Exception):
    """A request that did not give what was asked for. The message is fit for a terminal."""

    code = "client_error"


class CannotConnect(ClientError):
    """Nothing usable answers at the address. Whether a request was carried out is unknown once it was sent."""

    code = "cannot_connect"


class UnexpectedAnswer(CannotConnect):
    """What answers at the address is not this API, or another version of it."""

    code = "unexpected_answer"


class ApiError(ClientError):
    """The API refused. `code` is the problem's own; `errors` names the fields that are wrong."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail or problem.title)
        self.code = problem.code
        self.status = problem.status
        self.title = problem.title
        self.detail = problem.detail
        self.errors: tuple[FieldProblem, ...] = tuple(problem.errors)


class NoSuchJob(ClientError):
    """An abbreviated id fits none of the caller's recent jobs, or more than one."""

    code = "no_such_job"


class DownloadFailed(ClientError):
    """A file of a job could not be fetched whole; nothing of it was left on disk."""

    code = "download_failed"


@dataclass(frozen=True)
class Submission:
    """An accepted job; `replayed` when the same idempotency key had made it before."""

    job: Job
    replayed: bool


class Client:
    """One caller of one API. Use it as an async context manager; it may serve many tasks at once.

    Every method raises `CannotConnect` and `ApiError`.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float = 30, poll_seconds: float = 1) -> None:
        """`poll_seconds` is the pace of `watch` where no event stream can be had."""
        self.endpoint = endpoint
        self._poll_seconds = poll_seconds
        headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._http = httpx2.AsyncClient(base_url=endpoint.url, headers=headers, timeout=timeout_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, request: JobRequest, idempotency_key: str | None = None) -> Submission:
        """Hand in a job. It is durable on return.

        A key is made where none is given, so that a lost answer is asked for again without making a second job.
        """
        headers = {"idempotency-key": idempotency_key or str(uuid4())}
        body = request.model_dump(mode="json", exclude_unset=True)
        try:
            answer = await self._send("POST", "/v1/jobs", json=body, headers=headers)
        except CannotConnect as error:
            if not isinstance(error.__cause__, httpx2.ReadError | httpx2.RemoteProtocolError):
                raise
            answer = await self._send("POST", "/v1/jobs", json=body, headers=headers)
        replayed = answer.headers.get("idempotency-replayed") == "true"
        return Submission(self._parse(Job, answer), replayed)

    async def get(self, job_id: UUID) -> Job:
        """A job as it is now."""
        return self._parse(Job, await self._send("GET", f"/v1/jobs/{job_id}"))

    async def list_jobs(
        self, *, status: str | None = None, job_type: str | None = None, limit: int = 20, before: UUID | None = None
    ) -> JobPage:
        """A page of the caller's jobs, newest first; the next one begins `before` the last id of this one."""
        given = {"status": status, "job_type": job_type, "limit": limit, "before": before and str(before)}
        params = {name: value for name, value in given.items() if value is not None}
        return self._parse(JobPage, await self._send("GET", "/v1/jobs", params=params))

    async def find(self, text: str) -> UUID:
        """The job id that `text` is, or that begins or ends with it among the caller's recent jobs.

        Ids begin with a time stamp, so the end tells jobs of one minute apart. Raises `NoSuchJob`.
        """
        try:
            return UUID(text)
        except ValueError:
            wanted = text.lower().replace("-", "")
        if len(wanted) < 4 or not set(wanted) <= set("0123456789abcdef"):
            raise NoSuchJob(f"not a job id: {text!r} (at least 4 characters of its beginning or end)")
        recent = (await self.list_jobs(limit=RECENT_JOBS)).data
        fitting = [job.id for job in recent if job.id.hex.startswith(wanted) or job.id.hex.endswith(wanted)]
        if len(fitting) != 1:
            found = "none" if not fitting else f"{len(fitting)}"
            raise NoSuchJob(f"{found} of your last {len(recent)} jobs begin or end with {text!r}")
        return fitting[0]

    async def cancel(self, job_id: UUID) -> Job:
        """Ask for a job to stop; a running one does at its next step. Repeating it changes nothing."""
        return self._parse(Job, await self._send("POST", f"/v1/jobs/{job_id}/cancel"))

    async def retry(self, job_id: UUID) -> Job:
        """Queue a failed or cancelled job again, as a new attempt."""
        return self._parse(Job, await self._send("POST", f"/v1/jobs/{job_id}/retry"))

    async def wait(self, job_id: UUID, changed: Callable[[Job], None] | None = None) -> Job:
        """The job once it has ended, however it ended. `changed` is called with every state that is seen."""
        seen = None
        async with aclosing(self.watch(job_id)) as states:
            async for seen in states:
                if changed is not None:
                    changed(seen)
        assert seen is not None  # watch ends with a terminal state only
        return seen

    async def watch(self, job_id: UUID, patience_seconds: float = 60) -> AsyncGenerator[Job]:
        """The states of a job, the last one terminal.

        They come from the event stream. While there is none (an old proxy, a restart) the job is asked for every
        `poll_seconds`. Raises `CannotConnect`, or the API's last 5xx, only after `patience_seconds` without an answer.
        """
        stream = True
        last: Job | None = None
        answered = monotonic()
        while True:
            try:
                if stream:
                    async with aclosing(self._stream(job_id)) as states:
                        async for last in states:
                            answered = monotonic()
                            yield last
                if last is None or last.status not in TERMINAL:
                    now = await self.get(job_id)
                    answered = monotonic()
                    if now != last:
                        last = now
                        yield now
            except UnexpectedAnswer:
                if not stream:
                    raise
                stream = False  # whatever stands between does not pass event streams on
            except (CannotConnect, ApiError) as error:
                passing = isinstance(error, CannotConnect) or error.status >= 500 or error.status == 429
                if stream and isinstance(error, ApiError) and error.status in (404, 405, 406, 501):
                    stream = False  # the poll that follows tells whether it is the job or the stream that is missing
                elif not passing or monotonic() - answered > patience_seconds:
                    raise
            if last is not None and last.status in TERMINAL:
                return
            await asyncio.sleep(self._poll_seconds)

    async def _stream(self, job_id: UUID) -> AsyncGenerator[Job]:
        """The states that the event stream tells, until it ends. Raises `UnexpectedAnswer` where it is no such stream.

        The redirect to the stream is followed at our own address: the key goes nowhere else, and a tunnel works.
        """
        silence = httpx2.Timeout(STREAM_SILENCE_SECONDS, connect=10)
        path = f"/v1/jobs/{job_id}/events"
        try:
            for _ in range(3):
                async with self._http.sse(path, timeout=silence) as source:
                    answer = source.response
                    if answer.has_redirect_location:
                        target = answer.url.join(answer.headers["location"])
                        path = str(answer.url.copy_with(raw_path=target.raw_path))
                        continue
                    if not answer.is_success:
                        await answer.aread()
                        raise ApiError(_problem(answer))
                    async for event in source:
                        if event.event == "job":
                            yield Job.model_validate_json(event.data)
                    return
        except (httpx2.SSEError, ValidationError) as error:
            raise UnexpectedAnswer(f"no event stream at {self.endpoint.url}") from error
        except httpx2.TransportError as error:
            raise self._no_answer(error) from error
        raise UnexpectedAnswer(f"no event stream at {self.endpoint.url}: too many redirects")

    async def download(self, job: Job, folder: Path) -> list[Path]:
        """Fetch the files of a job into a folder, which is made where missing; returns their paths in order.

        Names are made here from the job's id. Each file is whole or not there. Raises `DownloadFailed`.
        """
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        return [await self._download(job, asset, folder) for asset in job.assets]

    async def _download(self, job: Job, asset: Asset, folder: Path) -> Path:
        ending = mimetypes.guess_extension(asset.mime_type, strict=True) or ".bin"
        path = folder / f"{job.job_type}-{short_id(job.id)}-{asset.index}{ending}"
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        file = await asyncio.to_thread(part.open, "wb")
        try:
            size = 0
            # the signature in the URL is the permission; the key is not sent along
            async with httpx2.AsyncClient(timeout=60) as http, http.stream("GET", asset.url) as answer:
                if answer.status_code != 200:
                    raise DownloadFailed(f"file {asset.index} of the job can't be fetched: HTTP {answer.status_code}")
                async for chunk in answer.aiter_bytes():
                    size += len(chunk)
                    await asyncio.to_thread(file.write, chunk)
            if size != asset.file_size_bytes:
                raise DownloadFailed(f"file {asset.index} of the job has {size} bytes, not {asset.file_size_bytes}")
            file.close()
            part.replace(path)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise DownloadFailed(f"file {asset.index} of the job can't be fetched: {type(error).__name__}") from error
        finally:
            file.close()
            part.unlink(missing_ok=True)
        return path

    async def callback_secret(self) -> CallbackSecret:
        """The secret that the caller's callbacks are signed with."""
        return self._parse(CallbackSecret, await self._send("GET", "/v1/callbacks/secret"))

    async def create_key(self, key: CreateKey) -> Key:
        """A new key, for admins. `key` of the answer is shown this once."""
        body = key.model_dump(mode="json", exclude_unset=True)
        return self._parse(Key, await self._send("POST", "/v1/keys", json=body))

    async def list_keys(self, *, everyone: bool = False) -> list[Key]:
        """The caller's keys; `everyone` gives all users' to an admin."""
        params = {"all": "true"} if everyone else {}
        return self._parse(KeyList, await self._send("GET", "/v1/keys", params=params)).data

    async def revoke_key(self, key_id: UUID) -> Key:
        """End a key at once."""
        return self._parse(Key, await self._send("DELETE", f"/v1/keys/{key_id}"))

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer of an operation that has no method of its own here; None when it answers nothing."""
        answer = await self._send(method, path, json=body)
        return answer.json() if answer.content else None

    async def _send(
        self,
        method: str,
        path: str,
        *,
        json: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        try:
            answer = await self._http.request(method, path, json=json, params=params, headers=headers)
        except httpx2.TransportError as error:
            raise self._no_answer(error) from error
        if answer.is_success:
            return answer
        raise ApiError(_problem(answer))

    def _no_answer(self, error: httpx2.TransportError) -> CannotConnect:
        return CannotConnect(f"no answer from {self.endpoint.url} ({type(error).__name__})")

    def _parse(self, model: type[Wire], answer: httpx2.Response) -> Wire:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise UnexpectedAnswer(f"what answers at {self.endpoint.url} is not this version of the API") from error


def short_id(job_id: UUID) -> str:
    """The end of a job id, enough to tell recent jobs apart. `Client.find` takes it."""
    return job_id.hex[-8:]


def _problem(answer: httpx2.Response) -> Problem:
    try:
        return Problem.model_validate_json(answer.content)
    except ValidationError:
        title = answer.reason_phrase or "error"
        return Problem(title=f"HTTP {answer.status_code} {title}", status=answer.status_code, code="http_error")
