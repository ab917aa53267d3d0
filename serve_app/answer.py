"""The answer to a message, piece by piece, and both messages in the database once it is whole.

    written ──> checked ──> sent ──> ... ──> whole, checked with everything before it ──> stored ──> told

Nothing is sent that was not checked together with all that came before it: in the answer, and in what it answers. An
answer that breaks the policy, fails or is broken off by its reader leaves nothing behind. From the moment it is whole
it is stored, whether or not somebody still listens.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import structlog
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from db.access import Principal
from db.conversations import ConversationGone, Conversations, Exchange
from models.catalog import Family
from models.generation import Cancelled, DeviceBroken, GenerationError, InvalidInput, ModelLoadFailed
from models.policy import ContentRejected, signs_in
from models.prompting.signs import Signs
from models.writing.language import Completion, LanguageModelBusy
from serve_app.api.problems import Problem
from serve_app.chat import RETRY, Turn, check_text, too_long
from serve_app.edge import Edge

log = structlog.get_logger()

ANSWER_SECONDS = 120.0  # from the question to the last word, waiting for a place included
_PIECE_CHARACTERS = 60  # are gathered before they are checked and sent
_TAIL_CHARACTERS = 200  # without a space between them: a script that has none, so nothing is gained by waiting for one
_storing: set[asyncio.Task[Exchange]] = set()


class Guard:
    """Holds an answer against the content policy while it is written, and says what of it may be sent."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._text, self._sent = "", 0
        self._before: Signs | None = None  # of all that it answers, which may be long: read once

    async def add(self, piece: str) -> str:
        """What may be sent now: whole words, checked with all that was said so far. Raises `Problem`."""
        self._text += piece.replace("\0", "\ufffd")  # Postgres stores no NUL
        waiting = len(self._text) - self._sent
        # the longer the answer, the more is gathered, so that checking stays linear in its length
        if waiting < max(_PIECE_CHARACTERS, len(self._text) // 10):
            return ""
        # a word that is cut in the middle may be another word
        end = max(self._text.rfind(space) for space in " \n\t") + 1
        if end <= self._sent:
            if waiting < _TAIL_CHARACTERS:
                return ""
            end = len(self._text)
        if self._before is None:
            self._before = await asyncio.to_thread(signs_in, "\n".join(self._answered()))
        so_far = f"{self._turn.message}\n{self._text[:end]}"  # together, as one's last words may go on in the other's
        await asyncio.to_thread(check_text, so_far, self._turn.mode, beside=self._before)
        ready, self._sent = self._text[self._sent : end], end
        return ready

    async def whole(self) -> tuple[str, str]:
        """The answer and what of it was not sent yet, checked with everything that it answers. Raises `Problem`."""
        await asyncio.to_thread(check_text, "\n".join([*self._answered(), self._text]), self._turn.mode)
        return self._text, self._text[self._sent :]

    def _answered(self) -> list[str]:
        turn = self._turn
        return [*turn.written_by_people, *(message.content for message in turn.history), turn.message]


async def answer(edge: Edge, user: Principal, turn: Turn) -> AsyncGenerator[str | Exchange, None]:
    """Pieces of the answer, and at last both messages as they were stored. Raises `Problem`.

    Closing it, or cancelling whoever reads it, stops the model.
    """
    began, guard = time.monotonic(), Guard(turn)
    completion: Completion | None = None
    async with contextlib.aclosing(_written(edge, turn)) as parts:
        async for part, used in parts:
            turn = used
            if isinstance(part, Completion):
                completion = part
            elif ready := await guard.add(part):
                yield ready
    if completion is None or completion.finish_reason == "cancelled":
        raise _unavailable()
    text, rest = await guard.whole()
    if not text.strip():
        raise Problem(502, "empty_answer", "the language model said nothing; ask again")
    if rest:
        yield rest
    spec = edge.settings.loaded_profile.models[Family.QWEN]
    account = turn.account | {
        "model": spec.model_name,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": completion.new_tokens,
        "cached": completion.cached,
        "generation_time_ms": round((time.monotonic() - began) * 1000),
    }
    yield await _store(edge, user, turn, text, account)


async def _store(edge: Edge, user: Principal, turn: Turn, text: str, account: dict[str, Any]) -> Exchange:
    """Both messages, in a task of its own: a reader who leaves now does not undo it."""
    kept = Conversations(edge.pool)
    storing = asyncio.create_task(kept.store(user.user_id, turn.store_in, turn.message, text, account, turn.key))
    _storing.add(storing)
    storing.add_done_callback(_settled)
    try:
        exchange = await asyncio.shield(storing)
    except ConversationGone:
        raise Problem(404, "conversation_not_found", "there is no such conversation") from None
    log.info("chat_answered", conversation_id=str(exchange.answer.conversation_id), new_tokens=account["new_tokens"])
    return exchange


def _settled(storing: asyncio.Task[Exchange]) -> None:
    _storing.discard(storing)
    if not storing.cancelled() and (error := storing.exception()) is not None:
        log.warning("chat_not_stored", error=type(error).__name__)


async def _written(edge: Edge, turn: Turn) -> AsyncGenerator[tuple[str | Completion, Turn], None]:
    """What the model writes, with the turn that it was given: one with less history, where it could not read more."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        stream = edge.enhancer.options(stream=True).chat.remote(turn.messages(), turn.sampling, turn.mode)
        try:
            while True:
                part = await asyncio.wait_for(anext(stream), max(0.0, deadline - time.monotonic()))
                yield part, turn
                if isinstance(part, Completion):
                    return
        except StopAsyncIteration:
            return
        except Exception as error:
            shorter = turn.shorter() if isinstance(_cause(error), InvalidInput) else None
            if shorter is None:
                raise _problem(error) from None
            turn = shorter
        finally:
            stream.cancel()


def _cause(error: Exception) -> Exception:
    """What went wrong in the replica."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, Exception) else error


def _problem(error: Exception) -> Exception:
    """What an answer that failed is to a client."""
    match cause := _cause(error):
        case ContentRejected():
            return Problem(422, cause.code, cause.message, field="message")
        case LanguageModelBusy():
            headers = {"Retry-After": str(math.ceil(cause.retry_after_seconds))}
            return Problem(503, "model_busy", "too much waits for the language model", headers=headers)
        case InvalidInput():
            return too_long()
        case TimeoutError():
            log.warning("chat_timed_out")
            return Problem(504, "answer_timeout", "the answer took too long; nothing was stored")
        case ModelLoadFailed() | DeviceBroken() | Cancelled():
            return _unavailable(cause)
        case GenerationError():
            log.warning("chat_failed", code=cause.code)
            return Problem(502, "language_model_failed", "the language model failed; nothing was stored")
        case RayError() | RayServeException():
            return _unavailable(cause)
        case _:
            return cause


def _unavailable(cause: Exception | None = None) -> Problem:
    if cause is not None:
        log.warning("language_model_away", error=type(cause).__name__)
    return Problem(503, "language_model_unavailable", "the language model is not available", headers=RETRY)
