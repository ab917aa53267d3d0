"""The operator's classifier: how it is found, what it is shown, and that nothing it fails at is approved."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.generation import Control, Generation
from models.moderation import (
    SAMPLED_FRAMES,
    ClassifierUnavailable,
    Decision,
    ImageClassifier,
    Judge,
    Judgement,
    Verdict,
    load_classifier,
)
from models.sdxl import SDXL
from models.wan import WAN

FAILED = Judgement(Decision.UNJUDGED, "classifier_failed")


class MeanColour:
    """Judges by the mean of a picture's red: dark is fine, bright is not."""

    def classify(self, image: Image.Image) -> Verdict:
        red = float(np.asarray(image)[..., 0].mean())
        decision = Decision.APPROVE if red < 64 else Decision.REVIEW if red < 192 else Decision.REJECT
        return Verdict(decision, ("dark", "medium", "bright")[(red >= 64) + (red >= 192)], red / 255)


def always(image: Image.Image) -> Verdict:
    return Verdict(Decision.APPROVE, "anything", 1.0)


class Broken:
    def __init__(self) -> None:
        raise OSError("no weights")


def made(*reds: int, frames: bool = False) -> Generation:
    """What a model made, in these shades of red: a picture for each, or one video."""
    pictures = [np.full((8, 8, 3), (red, 0, 0), dtype=np.uint8) for red in reds]
    images = None if frames else [Image.fromarray(picture) for picture in pictures]
    video = np.stack(pictures) if frames else None
    return Generation(images, video, 16 if frames else None, list(range(len(reds))), {}, {})


def test_each_picture_has_a_judgement_of_its_own() -> None:
    judged = Judge(MeanColour().classify).judge(made(0, 100, 255))
    assert [(one.status, one.reason) for one in judged] == [
        ("approved", "classifier:dark"),
        ("flagged", "classifier:medium"),
        ("rejected", "classifier:bright"),
    ]
    assert judged[2].score == 1.0


def test_a_video_has_the_gravest_verdict_of_the_frames_it_is_sampled_at() -> None:
    shown: list[int] = []

    def watching(image: Image.Image) -> Verdict:
        shown.append(int(np.asarray(image)[0, 0, 0]))
        return MeanColour().classify(image)

    (judged,) = Judge(watching).judge(made(*range(0, 81), frames=True))
    assert len(shown) == SAMPLED_FRAMES
    assert (shown[0], shown[-1]) == (0, 80), "the first and the last are among them"
    assert (judged.status, judged.reason) == ("flagged", "classifier:medium")
    (short,) = Judge(MeanColour().classify).judge(made(0, 255, frames=True))
    assert short.status == "rejected"
    (one,) = Judge(MeanColour().classify).judge(made(0, frames=True))
    assert one.status == "approved"


def test_what_a_real_pipeline_made_is_judged(
    sdxl: SDXL, wan: WAN, image_request: Callable[..., Any], video_request: Callable[..., Any]
) -> None:
    judge = Judge(MeanColour().classify)
    pictures = sdxl.generate(image_request(num_images=2), Control())
    labels = [MeanColour().classify(image).label for image in pictures.images or []]
    assert [one.reason for one in judge.judge(pictures)] == [f"classifier:{label}" for label in labels]
    video = wan.generate(video_request(), Control())
    assert video.frames is not None
    graves = [MeanColour().classify(Image.fromarray(frame)).decision for frame in video.frames]
    (judged,) = judge.judge(video)
    assert judged.decision in (max(graves), max(graves[0], graves[-1]))


@pytest.mark.parametrize("answer", [None, "approve", Decision.APPROVE, (Decision.APPROVE, "x", 1.0)], ids=str)
def test_an_answer_that_is_no_verdict_approves_nothing(answer: Any) -> None:
    assert Judge(lambda image: answer).judge(made(0, 0)) == [FAILED, FAILED]


def test_a_classifier_that_fails_at_one_picture_approves_none() -> None:
    def failing(image: Image.Image) -> Verdict:
        if np.asarray(image)[0, 0, 0] == 9:
            raise RuntimeError("out of memory")
        return always(image)

    judge = Judge(failing)
    assert judge.judge(made(0, 9)) == [FAILED, FAILED]
    assert FAILED.status == "pending"
    assert judge.judge(made(0))[0].status == "approved", "the next job is judged again"


def test_a_classifier_that_hangs_holds_up_no_later_job_and_approves_nothing() -> None:
    asked, go = threading.Event(), threading.Event()

    def hanging(image: Image.Image) -> Verdict:
        asked.set()
        go.wait()
        return always(image)

    judge = Judge(hanging, seconds=0.05)
    assert judge.judge(made(0)) == [FAILED]
    assert asked.is_set()
    patient = Judge(hanging, seconds=3600)
    patient._overdue = judge._overdue
    assert patient.judge(made(0)) == [FAILED], "it does not wait for one that hangs"
    overdue = judge._overdue
    assert overdue is not None
    go.set()
    overdue.result(30)
    judge._seconds = 30
    assert judge.judge(made(0))[0].status == "approved", "one that comes back is asked again"


@pytest.mark.parametrize(
    "values",
    [
        (Decision.UNJUDGED, "x", 0.5),
        (3, "x", 0.5),
        (Decision.APPROVE, "Two words", 0.5),
        (Decision.APPROVE, "", 0.5),
        (Decision.APPROVE, "x" * 65, 0.5),
        (Decision.APPROVE, "x", 1.5),
        (Decision.APPROVE, "x", float("nan")),
    ],
)
def test_a_verdict_that_says_nothing_clear_is_none(values: Any) -> None:
    with pytest.raises(ValueError, match=r"classifier|label|score"):
        Verdict(*values)


@pytest.mark.parametrize("name", ["MeanColour", "always"])
def test_a_dotted_path_names_a_class_or_a_function(name: str) -> None:
    classify = load_classifier(f"tests.models.test_moderation:{name}")
    assert classify(Image.new("RGB", (4, 4))).decision is Decision.APPROVE
    assert isinstance(MeanColour(), ImageClassifier)


@pytest.mark.parametrize(
    "path",
    [
        "nowhere:Name",
        "models.moderation:Nothing",
        "models.moderation",
        ":x",
        "models.moderation:SAMPLED_FRAMES",
        "tests.models.test_moderation:Broken",
    ],
)
def test_a_path_without_a_classifier_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(ClassifierUnavailable, match=r"package\.module:Name|can't be loaded|no classify"):
        load_classifier(path)


def test_a_picture_that_is_not_rgb_is_shown_as_rgb() -> None:
    seen: list[str] = []

    def looking(image: Image.Image) -> Verdict:
        seen.append(image.mode)
        return always(image)

    generation = replace(made(0), images=[Image.new("RGBA", (4, 4))])
    Judge(looking).judge(generation)
    assert seen == ["RGB"]
