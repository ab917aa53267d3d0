"""What pictures show, judged by the operator's own classifier.

The classifier is a class or a callable that a dotted path names, `package.module:Name`. It is called with a picture at
a time, from one thread, and answers with a `Verdict`:

    class NoLogos:
        def __init__(self) -> None: ...                       # loads what it needs; once for each replica
        def classify(self, image: PIL.Image.Image) -> Verdict: ...

A function `classify(image)` will do as well. Of a video some frames are shown to it, and the gravest verdict is the
video's. A classifier that fails, answers with something else or takes too long approves nothing: the verdict is
`UNJUDGED`, and a person has to look.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Overdue
from dataclasses import dataclass
from enum import IntEnum
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import structlog

from models.generation import Generation, GenerationError

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

SAMPLED_FRAMES = 8  # of a video: the first, the last, and as many between them
CLASSIFY_SECONDS = 60.0  # for all that one job made
_LABEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ClassifierUnavailable(RuntimeError):
    """The dotted path names no classifier, or it could not be made."""

    code = "classifier_unavailable"


class ContentRefused(GenerationError):
    """The classifier rejects what was made, and the installation keeps nothing of that."""

    code = "content_rejected"
    retryable = False


class Decision(IntEnum):
    """What is to become of a result, the milder before the graver."""

    APPROVE = 0  # it may be published
    UNJUDGED = 1  # the classifier failed: a person decides
    REVIEW = 2  # a person should look
    REJECT = 3  # it may not be published


@dataclass(frozen=True)
class Verdict:
    """What a classifier says of a picture. `label` names what it saw (lower case, up to 64 letters, digits, `_`, `.`,
    `-`), `score` how sure it is, from 0 to 1. Raises `ValueError` for anything else."""

    decision: Decision
    label: str
    score: float

    def __post_init__(self) -> None:
        if not isinstance(self.decision, Decision) or self.decision is Decision.UNJUDGED:
            raise ValueError("the decision of a classifier is APPROVE, REVIEW or REJECT")
        if not isinstance(self.label, str) or not _LABEL.fullmatch(self.label):
            raise ValueError("a label has up to 64 lower-case letters, digits, '_', '.' and '-'")
        if not 0 <= self.score <= 1:
            raise ValueError("a score is between 0 and 1")


@runtime_checkable
class ImageClassifier(Protocol):
    """What an operator plugs in. It need not be safe for several threads."""

    def classify(self, image: Image) -> Verdict:
        """The verdict about one picture in RGB. May raise whatever it likes; then a person has to look."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What becomes of one file. `reason` is the code that its owner and the moderators see."""

    decision: Decision
    reason: str
    score: float | None = None

    @property
    def status(self) -> str:
        """As a moderation status of the database."""
        return ("approved", "pending", "flagged", "rejected")[self.decision]


def load_classifier(path: str) -> Callable[[Image], Verdict]:
    """The classifier of a dotted path, made. May take long. Raises `ClassifierUnavailable`."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ClassifierUnavailable("a classifier is named as package.module:Name")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever somebody else's code may raise
        raise ClassifierUnavailable(f"{path} can't be loaded: {type(error).__name__}") from error
    if isinstance(made, ImageClassifier):
        return made.classify
    if callable(made):
        classify: Callable[[Image], Verdict] = made
        return classify
    raise ClassifierUnavailable(f"{path} has no classify(image)")


class Judge:
    """A classifier with a thread of its own, so that one that hangs holds up nothing but itself."""

    def __init__(self, classify: Callable[[Image], Verdict], seconds: float = CLASSIFY_SECONDS) -> None:
        """`seconds` is how long it may take for what one job made."""
        self._classify, self._seconds = classify, seconds
        self._given: SimpleQueue[tuple[Sequence[Image], Future[list[Verdict]]]] = SimpleQueue()
        self._overdue: Future[list[Verdict]] | None = None
        # a daemon: a classifier that never returns must not keep the process from ending
        threading.Thread(target=self._run, name="classifier", daemon=True).start()

    def judge(self, generation: Generation) -> list[Judgement]:
        """A judgement for each file that a generation becomes. Blocking; never raises for what the classifier does."""
        files = list(_pictures(generation))
        pictures = [picture for pictures in files for picture in pictures]
        if self._overdue is not None and not self._overdue.done():
            log.error("classifier_hangs")
            return [Judgement(Decision.UNJUDGED, "classifier_failed")] * len(files)
        answer: Future[list[Verdict]] = Future()
        self._given.put((pictures, answer))
        try:
            verdicts = iter(answer.result(self._seconds))
        except Overdue:
            self._overdue = answer
            log.error("classifier_hangs", seconds=self._seconds)
            return [Judgement(Decision.UNJUDGED, "classifier_failed")] * len(files)
        except Exception as error:  # whatever somebody else's code may raise
            log.error("classifier_failed", error=type(error).__name__)
            return [Judgement(Decision.UNJUDGED, "classifier_failed")] * len(files)
        return [_gravest([next(verdicts) for _ in pictures]) for pictures in files]

    def _run(self) -> None:
        while True:
            pictures, answer = self._given.get()
            try:
                verdicts = [self._classify(picture.convert("RGB")) for picture in pictures]
                if not all(isinstance(verdict, Verdict) for verdict in verdicts):
                    raise TypeError("a classifier answers with a Verdict")
                answer.set_result(verdicts)
            except BaseException as error:
                answer.set_exception(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))


def _gravest(verdicts: Sequence[Verdict]) -> Judgement:
    gravest = max(verdicts, key=lambda verdict: (verdict.decision, verdict.score))
    return Judgement(gravest.decision, f"classifier:{gravest.label}", gravest.score)


def _pictures(generation: Generation) -> Iterator[list[Image]]:
    """For each file the pictures that stand for it."""
    if generation.frames is None:
        yield from ([image] for image in generation.images or [])
        return
    from PIL import Image

    frames = generation.frames
    last = len(frames) - 1
    count = min(SAMPLED_FRAMES, len(frames))
    chosen = sorted({round(number * last / max(1, count - 1)) for number in range(count)})
    yield [Image.fromarray(frames[index]) for index in chosen]
