"""Taking over the jobs that still wait in the queues of an older system: each once, in their order, under their own id.

Every line goes the way of a request: the same reading, the same checks, the same content policy. A line that is refused
leaves nothing behind and stops no other. An import that died is run again with the same file, and goes on.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import asyncpg
import structlog

from db.access import Principal
from db.blobs import StorageUnavailable
from db.imports import Imports
from db.pool import CONNECTION_FAULTS, DatabaseUnavailable
from serve_app.admission import Submission, check
from serve_app.api.problems import Problem, problem_of
from serve_app.api.queue_requests import read_submission
from serve_app.edge import Edge
from serve_app.messages import Message, read_message
from serve_app.submission import submit

log = structlog.get_logger()


class Outcome(StrEnum):
    """What became of a line."""

    TAKEN = "taken"  # or would be, in a dry run
    THERE = "there"  # an earlier import took it in
    REFUSED = "refused"


@dataclass(frozen=True)
class Line:
    """One line's outcome. `field`, `code` and `message` say why it was refused, and never what stood there."""

    number: int
    outcome: Outcome
    job_id: str | None = None
    field: str | None = None
    code: str | None = None
    message: str | None = None


class Takeover:
    """One import. `create_users` makes users who are not known here; with `dry_run` nothing is written at all."""

    def __init__(self, edge: Edge, *, dry_run: bool = False, create_users: bool = False) -> None:
        self._edge, self._imports = edge, Imports(edge.pool)
        self._dry_run, self._create_users = dry_run, create_users
        self._seen: dict[object, bytes] = {}  # of a dry run, which leaves no other trace

    async def run(self, lines: Iterable[bytes | None]) -> AsyncIterator[Line]:
        """The outcome of each line that is not empty; None stands for one that was too long to read.

        Raises `DatabaseUnavailable` and `StorageUnavailable`: then what was not told yet was not taken, but for the
        line at hand, about which the next import will know.
        """
        for number, line in enumerate(lines, 1):
            if line is None or line.strip():
                yield await self._line(number, line)

    async def _line(self, number: int, line: bytes | None) -> Line:
        job_id = None
        try:
            if line is None:
                raise Problem(413, "body_too_large", "is longer than a request may be", field="line")
            message = read_message(line)
            job_id = str(message.job_id)
            return Line(number, await self._take(message), job_id)
        except (DatabaseUnavailable, StorageUnavailable, asyncpg.UndefinedTableError):
            raise  # it is not this line's fault, and would be every line's
        except Exception as error:
            # a value that fits no column is an interface error of asyncpg as well; that is no lost connection
            if isinstance(error, CONNECTION_FAULTS) and not isinstance(error, ValueError):
                raise DatabaseUnavailable(f"the connection to Postgres was lost: {type(error).__name__}") from error
            problem = problem_of(error)
            field = problem.errors[0].field if problem.errors else None
            log.info("import_refused", line=number, field=field, code=problem.code, error=type(error).__name__)
            return Line(number, Outcome.REFUSED, job_id, field, problem.code, problem.detail)

    async def _take(self, message: Message) -> Outcome:
        if await self._is_there(message):
            return Outcome.THERE
        known = await self._edge.access.principal(message.user_id)
        if known is None and not self._create_users:
            raise Problem(422, "unknown_user", "there is no such user; --create-users makes them", field="user_id")
        user = known or Principal(message.user_id, None, frozenset({"basic_user"}), age_verified=False)
        _, asked = await read_submission(self._edge, message.body, worded=message.enhanced)
        asked = replace(asked, job_id=message.job_id)
        if message.enhanced and asked.enhance:
            asked = replace(asked, enhance=None)  # that was done, and the prompt in the message is the outcome
        await check(self._edge, user, asked)
        if self._dry_run:
            self._seen[message.job_id] = message.text
            return Outcome.TAKEN
        return await self._accept(message, user, asked, adopt=known is None)

    async def _is_there(self, message: Message) -> bool:
        """Whether the job was taken in before. Raises `Problem` when its id belongs to something else."""
        # the job before its note, which is written first: so a job without a note is not one that an import beside this
        # one has just taken in
        exists = await self._edge.jobs.read_bare(message.job_id) is not None
        noted = await self._imports.find(message.job_id, message.text)
        seen = self._seen.get(message.job_id)
        if (noted is not None and not noted.same) or (seen is not None and seen != message.text):
            raise Problem(409, "import_conflict", "another message had this id", field="id")
        if seen is not None or (noted is not None and noted.taken):
            return True
        if not exists:
            return False
        if noted is None:
            raise Problem(409, "id_taken", "there is a job of this id that was not imported", field="id")
        if not self._dry_run:
            await self._imports.end(message.job_id, message.text)  # the last import died just before this
        return True

    async def _accept(self, message: Message, user: Principal, asked: Submission, *, adopt: bool) -> Outcome:
        adopted = adopt and await self._edge.access.adopt_user(message.user_id)
        try:
            if not await self._imports.begin(message.job_id, message.text):
                raise Problem(409, "import_conflict", "another message had this id", field="id")
            await submit(self._edge, user, asked)
        except asyncpg.UniqueViolationError:
            # another import of the same file was faster
            if await self._is_there(message):
                return Outcome.THERE
            raise
        except Exception as error:
            if not isinstance(error, CONNECTION_FAULTS) or isinstance(error, ValueError):
                await self._imports.drop(message.job_id)
                if adopted:
                    await self._edge.access.abandon_user(message.user_id)
            raise
        await self._imports.end(message.job_id, message.text)
        return Outcome.TAKEN
