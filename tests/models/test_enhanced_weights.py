from collections.abc import Sequence
from pathlib import Path

import pytest

from models.prompting.enhancement import Tier, enhance, usable_answer
from models.prompting.notation import lost_weights
from models.prompting.prompts import Template, TokenCounter, builtin_templates
from models.samples.tiny import ensure_tiny
from models.writing.language import Answer, Completion, Message, Priority, Sampling

WEIGHTED = "a woman in a (red scarf)1.4 before a brick wall--"


@pytest.fixture(scope="session")
def clip(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("sdxl", tiny_root))


@pytest.fixture
def template() -> Template:
    return next(t for t in builtin_templates() if (t.name, t.content_mode) == ("SDXL_FAST", "sfw"))


def wrote(text: str) -> Completion:
    return Completion(text=text, prompt_tokens=50, new_tokens=20, seconds=0.1, finish_reason="stop")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (
            "a woman before a brick wall, wearing a red scarf, soft light",
            ("a woman before a brick (wall)--, wearing a (red scarf)1.4, soft light", False, None),
        ),
        (
            "a woman before a brick wall--, wearing a (red scarf:1.4), soft light",
            ("a woman before a brick wall--, wearing a (red scarf:1.4), soft light", False, None),
        ),
        ("a woman before a red wall, wearing a scarf", ("", False, "weights_lost")),
        ("a woman before a wall, wearing a (red scarf)1.2", ("", False, "weights_lost")),
        ("a woman in a red scarf before a brick wall", ("", False, "unchanged")),
    ],
)
def test_usable_answer_keeps_the_weights_of_the_prompt_or_says_that_they_are_lost(
    template: Template, clip: TokenCounter, answer: str, outcome: tuple[str, bool, str | None]
) -> None:
    assert usable_answer(wrote(answer), WEIGHTED, template, clip, "sfw") == outcome


def test_usable_answer_that_was_shortened_by_a_weight_is_not_used(template: Template, clip: TokenCounter) -> None:
    trees = ", ".join(f"old tree {n}" for n in "abcdefghijklmnopqrstuvwxyz")
    answer = f"a woman before a brick wall, {trees}, red scarf"
    assert usable_answer(wrote(answer), WEIGHTED, template, clip, "sfw")[2] == "weights_lost"


def test_usable_answer_may_lose_weights_that_nobody_reads(template: Template, clip: TokenCounter) -> None:
    answer = "a woman before a red wall, wearing a scarf"
    assert usable_answer(wrote(answer), WEIGHTED, template, clip, "sfw", weighed=False) == (answer, False, None)


class Says:
    """A language backend with one answer for everybody."""

    model_name = "says"
    revision = None
    device = "cpu"
    loaded = True
    broken = None

    def __init__(self, text: str) -> None:
        self._text = text

    def load(self) -> None: ...

    def warm_up(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, messages: Sequence[Message], sampling: Sampling, priority: Priority = "chat") -> Answer:
        answer = Answer(priority, lambda answer: None)
        answer.advance(self._text, 20)
        answer.end(wrote(self._text))
        return answer


@pytest.mark.parametrize(
    ("answer", "windows", "told"),
    [
        ("a woman before a brick wall--, in a red scarf, fog", 4, ("qwen", None, 1, 0)),
        ("a woman before a red wall, wearing a scarf", 4, ("rule_based", "weights_lost", 0, 0)),
        ("a woman before a red wall, wearing a scarf", 1, ("qwen", None, 0, 2)),
    ],
)
def test_enhance_tells_what_became_of_weights(
    template: Template, clip: TokenCounter, answer: str, windows: int, told: tuple[str, str | None, int, int]
) -> None:
    """Several windows are for Compel, which reads weights; without it they are text."""
    made = enhance(WEIGHTED, template, Says(answer), clip, "sfw", 1, windows=windows)
    assert (made.strategy, made.fallback_reason, made.weights_restored, made.weights_lost) == told
    if windows > 1:
        assert lost_weights(WEIGHTED, made.enhanced_prompt) == []


def test_enhance_adds_nothing_beside_a_blend(template: Template, clip: TokenCounter) -> None:
    blend = '("a red fox", "a grey wolf").blend(0.5, 0.5)'
    made = enhance(blend, template, Says("a red fox beside a grey wolf, fog"), clip, "sfw", 1, windows=4)
    assert (made.enhanced_prompt, made.strategy, made.fallback_reason) == (blend, "original", "weights_lost")
    assert made.tiers[1] == Tier("rule_based", "failed", "nothing_to_add")
