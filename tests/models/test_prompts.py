from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.catalog import Format, Quality
from models.prompting.prompts import (
    Budget,
    TokenCounter,
    add_rule_terms,
    budget,
    builtin_templates,
    fit,
)
from models.samples.tiny import ensure_tiny

LONG = (
    "A red fox on a mossy log, deep in an old forest, its fur wet from the rain, ferns and mushrooms all around, "
    "a narrow stream behind it. The fox looks up. Cinematic lighting, birch trunks fading into fog, sharp focus, "
    "fallen leaves, spider webs with dew, distant mountains, highly detailed texture"
)


@pytest.fixture(scope="session")
def clip(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("sdxl", tiny_root))


@pytest.fixture(scope="session")
def umt5(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("wan", tiny_root))


# --- templates


def test_builtin_templates_have_the_specified_limits_in_both_modes() -> None:
    limits = {(t.name, t.content_mode): t.token_limit for t in builtin_templates()}
    for mode in ("sfw", "nsfw"):
        assert (limits["SDXL_FAST", mode], limits["SDXL_HIGH", mode]) == (75, 75)
        assert (limits["WAN_FAST", mode], limits["WAN_HIGH_7B", mode]) == (175, 250)


def test_builtin_templates_name_their_limit_and_mode() -> None:
    for template in builtin_templates():
        assert f"{template.token_limit} tokens" in template.system_prompt
        assert ("adult" in template.system_prompt) is (template.content_mode == "nsfw")
        assert template.max_new_tokens > template.token_limit


# --- token counts and shortening


def test_token_counter_counts_content_tokens_only(clip: TokenCounter, umt5: TokenCounter) -> None:
    assert (clip.count(""), umt5.count("")) == (0, 0)
    assert clip.count("cat") + clip.count("dog") == clip.count("cat dog") == 2


def test_token_counter_counts_far_past_the_window(clip: TokenCounter) -> None:
    assert clip.count("cat " * 500) == 500


def test_fit_leaves_short_texts_alone(clip: TokenCounter) -> None:
    assert fit("  a cat,  a dog.", clip, 75) == ("  a cat,  a dog.", False)


def test_fit_cuts_at_phrases_and_keeps_subject_and_quality(clip: TokenCounter) -> None:
    limit = clip.count(LONG) // 2
    text, compressed = fit(LONG, clip, limit)
    assert compressed
    assert text.startswith("A red fox on a mossy log")
    assert "sharp focus" in text
    phrases = [phrase.strip() for phrase in text.replace(".", ",").split(",")]
    originals = [phrase.strip() for phrase in LONG.replace(".", ",").split(",")]
    assert [phrase for phrase in originals if phrase in phrases] == phrases
    assert limit * 0.6 < clip.count(text) <= limit


def test_fit_keeps_weighted_phrases_whole(clip: TokenCounter) -> None:
    text, _ = fit("(a cat, a dog:1.2), " + "rain on leaves, " * 40, clip, 40)
    assert text.startswith("(a cat, a dog:1.2)")


def test_fit_cuts_words_when_one_phrase_is_too_long(clip: TokenCounter) -> None:
    text, compressed = fit("cat " * 200, clip, 75)
    assert (text, compressed) == (" ".join(["cat"] * 75), True)


def test_fit_cuts_at_marks_of_scripts_without_spaces(clip: TokenCounter) -> None:
    text, _ = fit("桜の下の猫、柔らかな光、浅い被写界深度、高精細", clip, 40)
    assert text.split("、") == ["桜の下の猫", "柔らかな光", "浅い被写界深度", "高精細"][: len(text.split("、"))]


@settings(deadline=None)
@given(
    st.text(max_size=400) | st.text(alphabet="ab ,.;()\n猫é🎈", max_size=400) | st.just(LONG * 3),
    st.integers(min_value=0, max_value=120),
)
def test_fit_never_exceeds_the_limit(clip: TokenCounter, umt5: TokenCounter, text: str, limit: int) -> None:
    for counter in (clip, umt5):
        shorter, compressed = fit(text, counter, limit)
        assert counter.count(shorter) <= limit
        assert compressed is (counter.count(text) > limit)


# --- budgets


def test_a_budget_is_the_templates_limit_or_the_room_of_the_reader(clip: TokenCounter, umt5: TokenCounter) -> None:
    """CLIP reads 77 tokens of which start and end are two; UMT5 is given 512, of which the end is one."""
    by_name = {(t.name, t.content_mode): t for t in builtin_templates()}
    sdxl, wan = by_name["SDXL_FAST", "sfw"], by_name["WAN_HIGH_7B", "sfw"]
    assert budget(sdxl, clip) == Budget(limit=75, window=77, specials=2, windows=1, clamped=False)
    assert budget(wan, umt5) == Budget(limit=250, window=512, specials=1, windows=1, clamped=False)
    assert budget(replace(sdxl, token_limit=150), clip) == Budget(75, 77, 2, 1, clamped=True)
    assert budget(replace(sdxl, token_limit=150), clip, windows=4) == Budget(150, 77, 2, 4, clamped=False)
    assert budget(replace(wan, token_limit=600), umt5) == Budget(511, 512, 1, 1, clamped=True)


# --- rules


def test_add_rule_terms_puts_the_callers_words_first(clip: TokenCounter) -> None:
    text, compressed = add_rule_terms("a cat on a roof", Format.IMAGE, Quality.HIGH, clip, 75)
    assert text.startswith("a cat on a roof, ")
    assert "light" in text
    assert not compressed


def test_add_rule_terms_adds_motion_to_video_only(umt5: TokenCounter) -> None:
    image, _ = add_rule_terms("a cat on a roof", Format.IMAGE, Quality.FAST, umt5, 175)
    video, _ = add_rule_terms("a cat on a roof", Format.VIDEO, Quality.FAST, umt5, 175)
    assert ("motion" in image, "motion" in video) == (False, True)


def test_add_rule_terms_leaves_out_what_the_prompt_settles(clip: TokenCounter) -> None:
    text, _ = add_rule_terms("a cat at sunset, blurred, symmetrical", Format.IMAGE, Quality.FAST, clip, 75)
    assert "focus" not in text
    assert "natural light" not in text
    assert "composition" not in text


def test_add_rule_terms_high_says_more_than_fast(clip: TokenCounter) -> None:
    fast, _ = add_rule_terms("a cat", Format.IMAGE, Quality.FAST, clip, 75)
    high, _ = add_rule_terms("a cat", Format.IMAGE, Quality.HIGH, clip, 75)
    assert clip.count(high) > clip.count(fast)


@settings(deadline=None)
@given(st.text(max_size=300), st.sampled_from(list(Format)), st.sampled_from(list(Quality)), st.integers(1, 100))
def test_add_rule_terms_never_exceeds_the_limit(
    clip: TokenCounter, prompt: str, format: Format, quality: Quality, limit: int
) -> None:
    text, compressed = add_rule_terms(prompt, format, quality, clip, limit)
    assert clip.count(text) <= limit
    assert compressed or text.startswith(prompt.rstrip(" ,;.、，。；\n"))
