from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.prompting.composition import SAME_SUBJECT, compose_modification, compose_within, modify_strategy
from models.prompting.prompts import TokenCounter
from models.samples.tiny import ensure_tiny


@pytest.fixture(scope="session")
def clip(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("sdxl", tiny_root))


@pytest.mark.parametrize(
    ("base", "change", "text"),
    [
        ("a red fox, forest", "in the snow", "in the snow, a red fox, forest"),
        ("a red fox.", " in the  snow. ", "in the snow, a red fox"),
        ("a red fox", "", "a red fox"),
        ("a red fox", None, "a red fox"),
        ("", "in the snow", f"in the snow, {SAME_SUBJECT}"),
        (None, "in the snow", f"in the snow, {SAME_SUBJECT}"),
        ("A red fox", "a red fox", "A red fox"),
        ("", "", ""),
    ],
)
def test_the_change_goes_before_what_the_reference_shows(base: str | None, change: str | None, text: str) -> None:
    assert compose_modification(base, change) == text


def test_the_strategy_says_what_it_was_made_from() -> None:
    assert modify_strategy("in the snow") == "reference_modify_with_prompt"
    assert modify_strategy(" ") == modify_strategy(None) == "reference_modify_base_only"


def test_the_description_gives_way_to_the_change(clip: TokenCounter) -> None:
    """Ten words and a comma are eleven tokens, so nine of the description's words are left in twenty."""
    composed = compose_within("cat " * 60, "dog " * 10, clip, 20)
    assert composed.text == " ".join(["dog"] * 10) + ", " + " ".join(["cat"] * 9)
    assert (clip.count(composed.text), composed.shortened) == (20, True)


def test_what_fits_is_left_alone(clip: TokenCounter) -> None:
    composed = compose_within("cat", "dog", clip, 75)
    assert (composed.text, composed.shortened, composed.strategy) == (
        "dog, cat",
        False,
        "reference_modify_with_prompt",
    )


@settings(deadline=None)
@given(st.text(alphabet="ab ,.猫", max_size=200), st.text(alphabet="ab ,.猫", max_size=200), st.integers(1, 60))
def test_a_composition_never_exceeds_the_limit(clip: TokenCounter, base: str, change: str, limit: int) -> None:
    assert clip.count(compose_within(base, change, clip, limit).text) <= limit
