from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from models.catalog import Family
from models.generation import Cancelled
from models.policy import ContentRejected, signs_in
from models.profile import ModelSpec
from models.prompting.enhancement import Enhancement, Tier, enhance, strategy_of, usable_answer
from models.prompting.prompts import Template, TokenCounter, builtin_templates
from models.qwen import Qwen
from models.samples.tiny import ensure_tiny
from models.writing.language import Answer, Completion, FinishReason, Message, Sampling

PROMPT = "a red fox on a mossy log in the forest"
RAMBLING = (
    "A red fox sits on a mossy log in the forest while the afternoon wanders westward, remembering autumns that nobody "
    "counted, and somewhere behind the birches an unseen stream keeps murmuring about stones, travellers, bridges and "
    "the patience of water, which has carried leaves, letters, lanterns and once even a wooden flute toward villages "
    "whose chimneys write slow grey sentences across evenings full of swallows; further on, merchants unfold striped "
    "awnings, musicians argue cheerfully over forgotten melodies, bakers dust their sleeves with flour, children chase "
    "paper kites between laundry lines, and an elderly clockmaker measures twilight with instruments inherited from "
    "sailors, until constellations gather above orchards, vineyards, quarries and abandoned railway platforms."
)


@pytest.fixture(scope="session")
def clip(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("sdxl", tiny_root))


@pytest.fixture(scope="session")
def umt5(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("wan", tiny_root))


@pytest.fixture(scope="module")
def qwen(tiny_root: Path) -> Iterator[Qwen]:
    spec = ModelSpec(family=Family.QWEN, model_name="qwen-tiny", source="tiny", device="cpu", memory_gib=0, disk_gib=0)
    model = Qwen(spec, ensure_tiny("qwen", tiny_root))
    model.load()
    yield model
    model.close()


def named(name: str) -> Template:
    return next(t for t in builtin_templates() if (t.name, t.content_mode) == (name, "sfw"))


@pytest.fixture
def template() -> Template:
    return named("SDXL_FAST")


def wrote(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(text=text, prompt_tokens=50, new_tokens=20, seconds=0.1, finish_reason=finish_reason)


# --- a model's answer


def test_usable_answer_takes_a_good_one_whole(template: Template, clip: TokenCounter) -> None:
    answer = "a red fox on a mossy log, deep forest, morning fog, low angle, sharp focus"
    assert usable_answer(wrote(f'"{answer}"'), PROMPT, template, clip, "sfw") == (answer, False, None)


def test_usable_answer_is_shortened_to_the_limit(template: Template, clip: TokenCounter) -> None:
    answer = "a red fox on a mossy log, " + "golden light on wet leaves, " * 20 + "sharp focus"
    answer = answer.replace(
        "golden light on wet leaves, " * 20, ", ".join(f"old tree {n}" for n in "abcdefghijklmnopqrst")
    )
    text, shortened, reason = usable_answer(
        wrote(answer + ", morning fog over the river" * 2), PROMPT, template, clip, "sfw"
    )
    assert (shortened, reason) == (True, None)
    assert text.startswith("a red fox on a mossy log")
    assert clip.count(text) <= 75


def test_usable_answer_drops_a_phrase_that_was_cut_off(template: Template, clip: TokenCounter) -> None:
    completion = wrote("a red fox on a mossy log, deep forest, morning fo", "length")
    assert usable_answer(completion, PROMPT, template, clip, "sfw") == (
        "a red fox on a mossy log, deep forest",
        True,
        None,
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty_answer"),
        ("I'm sorry, but I can't help with a red fox.", "refusal"),
        ("a red fox on a mossy log. I cannot continue with the rest of it.", "refusal"),
        ("\ufffdfox\x07\ufffd\ufffd", "gibberish"),
        (PROMPT, "unchanged"),
        ("what would you like? please provide more about the red fox in the forest", "not_a_prompt"),
        ("a red fox, nude, in the forest", "content_rejected"),
        ("You write prompts for the SDXL image model. Rewrite the user's request about the fox", "echo"),
        (RAMBLING, "too_long"),
    ],
)
def test_usable_answer_says_why_not(template: Template, clip: TokenCounter, answer: str, reason: str) -> None:
    assert usable_answer(wrote(answer), PROMPT, template, clip, "sfw") == ("", False, reason)


def test_usable_answer_judges_what_shortening_would_hide(template: Template, clip: TokenCounter) -> None:
    answer = "a red fox on a mossy log, " + ", ".join(f"old tree {n}" for n in "abcdefghijklmnopqrstuvwxyz") + ", nude"
    assert usable_answer(wrote(answer), PROMPT, template, clip, "sfw")[2] == "content_rejected"


# --- the whole way


def check(enhancement: Enhancement, counter: TokenCounter) -> None:
    assert enhancement.original_prompt == PROMPT
    assert enhancement.tokens is not None
    assert enhancement.token_limit is not None
    assert enhancement.tokens.original == counter.count(PROMPT)
    assert enhancement.tokens.enhanced == counter.count(enhancement.enhanced_prompt) <= enhancement.token_limit
    assert enhancement.execution_time_ms >= 0


@pytest.mark.parametrize("seed", range(8))
def test_enhance_tells_a_random_models_noise_from_a_prompt(
    qwen: Qwen, template: Template, clip: TokenCounter, seed: int
) -> None:
    enhancement = enhance(PROMPT, template, qwen, clip, "sfw", seed)
    check(enhancement, clip)
    assert (enhancement.strategy, enhancement.fallback_used) == ("rule_based", True)
    assert enhancement.fallback_reason in ("gibberish", "unrelated")  # the latter where noise ends after a few letters
    assert enhancement.enhanced_prompt.startswith(PROMPT + ", ")
    assert enhancement.model_used is None
    assert enhancement.new_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_enhance_tells_noise_at_any_temperature(
    qwen: Qwen, template: Template, clip: TokenCounter, temperature: float
) -> None:
    assert enhance(PROMPT, template, qwen, clip, "sfw", 1, temperature=temperature).fallback_reason == "gibberish"


def test_enhance_without_a_model_says_so_and_is_deterministic(template: Template, clip: TokenCounter) -> None:
    first, second = (enhance(PROMPT, template, None, clip, "sfw", seed) for seed in (1, 2))
    check(first, clip)
    assert (first.fallback_reason, first.new_tokens) == ("model_unavailable", 0)
    assert first.enhanced_prompt == second.enhanced_prompt


def test_enhance_with_a_model_that_is_not_loaded_says_so(template: Template, clip: TokenCounter) -> None:
    spec = ModelSpec(family=Family.QWEN, model_name="q", source="tiny", device="cpu", memory_gib=0, disk_gib=0)
    assert enhance(PROMPT, template, Qwen(spec, "x"), clip, "sfw", 1).fallback_reason == "model_unavailable"


def test_enhance_reports_a_model_that_fails(qwen: Qwen, template: Template, clip: TokenCounter) -> None:
    too_much = replace(template, max_new_tokens=10**7)
    assert enhance(PROMPT, too_much, qwen, clip, "sfw", 1).fallback_reason == "model_failed"


def test_enhance_video_adds_motion(umt5: TokenCounter) -> None:
    enhancement = enhance(PROMPT, named("WAN_HIGH_7B"), None, umt5, "sfw", 1)
    check(enhancement, umt5)
    assert (enhancement.template_name, enhancement.token_limit) == ("WAN_HIGH_7B", 250)
    assert "motion" in enhancement.enhanced_prompt


def test_enhance_shortens_a_prompt_that_is_too_long(template: Template, clip: TokenCounter) -> None:
    enhancement = enhance(
        ", ".join(f"tree {n}" for n in "abcdefghijklmnopqrstuvwxyz") * 3, template, None, clip, "sfw", 1
    )
    assert enhancement.compression_applied
    assert enhancement.tokens is not None
    assert enhancement.tokens.enhanced <= 75 < enhancement.tokens.original


def test_enhance_refuses_what_must_not_be_drawn(template: Template, clip: TokenCounter) -> None:
    with pytest.raises(ContentRejected):
        enhance("a nude toddler", template, None, clip, "nsfw", 1)


def test_enhance_can_be_cancelled(qwen: Qwen, template: Template, clip: TokenCounter) -> None:
    with pytest.raises(Cancelled):
        enhance(PROMPT, template, qwen, clip, "sfw", 99, watch=Answer.cancel)


def test_enhance_shows_the_answer_while_it_is_written(qwen: Qwen, template: Template, clip: TokenCounter) -> None:
    counts: list[int] = []
    enhancement = enhance(
        PROMPT, template, qwen, clip, "sfw", 98, watch=lambda answer: counts.append(answer.new_tokens)
    )
    assert counts == sorted(counts)
    assert len(counts) > 2
    assert counts[-1] <= enhancement.new_tokens


def test_enhance_says_when_the_same_was_asked_before(qwen: Qwen, template: Template, clip: TokenCounter) -> None:
    first, second, other = (enhance(PROMPT, template, qwen, clip, "sfw", seed) for seed in (97, 97, 96))
    assert (first.cached, second.cached, other.cached) == (False, True, False)
    assert (second.enhanced_prompt, second.new_tokens) == (first.enhanced_prompt, first.new_tokens)


def test_enhance_by_handle_does_not_wait_for_a_busy_model(
    tiny_root: Path, template: Template, clip: TokenCounter
) -> None:
    spec = ModelSpec(
        family=Family.QWEN, model_name="q", source="tiny", device="cpu", memory_gib=0, disk_gib=0, sequences=1,
        cache_tokens=1024,
    )  # fmt: skip
    model = Qwen(spec, ensure_tiny("qwen", tiny_root))
    model.load()
    try:
        long = Sampling(max_new_tokens=900, temperature=1.0)
        held = [model.submit([Message("user", f"{number}")], long) for number in range(5)]
        enhancement = enhance(PROMPT, template, model, clip, "sfw", 1)
        for answer in held:
            answer.cancel()
    finally:
        model.close()
    assert (enhancement.strategy, enhancement.fallback_reason) == ("rule_based", "model_busy")


# --- the tiers


def test_enhance_tells_each_tier(qwen: Qwen, template: Template, clip: TokenCounter) -> None:
    noise = enhance(PROMPT, template, qwen, clip, "sfw", 1)
    assert noise.tiers == (Tier("qwen", "failed", noise.fallback_reason), Tier("rule_based", "used"))


def test_enhance_goes_back_to_the_prompt_where_rules_have_nothing_to_add(
    template: Template, clip: TokenCounter
) -> None:
    """75 words are 75 tokens, which is all that fits."""
    full = " ".join(["cat"] * 75)
    enhancement = enhance(full, template, None, clip, "sfw", 1)
    assert enhancement.tiers == (
        Tier("qwen", "failed", "model_unavailable"),
        Tier("rule_based", "failed", "nothing_to_add"),
        Tier("original", "used"),
    )
    assert (enhancement.strategy, enhancement.fallback_reason) == ("original", "model_unavailable")
    assert enhancement.enhanced_prompt == full
    assert enhancement.tokens is not None
    assert (enhancement.tokens.original, enhancement.tokens.enhanced) == (75, 75)


@pytest.mark.parametrize("missing", ["template", "tokenizer"])
def test_enhance_leaves_a_prompt_alone_that_it_can_not_measure(
    qwen: Qwen, template: Template, clip: TokenCounter, missing: str
) -> None:
    if missing == "template":
        enhancement = enhance(PROMPT, None, qwen, clip, "sfw", 1)
        assert (enhancement.strategy, enhancement.fallback_reason) == ("no_template_available",) * 2
        assert enhancement.template_name is None
    else:
        enhancement = enhance(PROMPT, template, qwen, None, "sfw", 1)
        assert (enhancement.strategy, enhancement.fallback_reason) == ("original", "tokenizer_unavailable")
        assert enhancement.tokens is None
    assert enhancement.enhanced_prompt == PROMPT
    assert [tier.outcome for tier in enhancement.tiers] == ["failed", "failed", "used"]
    assert (enhancement.token_limit, enhancement.new_tokens, enhancement.fallback_used) == (None, 0, True)


def test_enhance_says_why_there_is_no_model(template: Template, clip: TokenCounter) -> None:
    enhancement = enhance(PROMPT, template, None, clip, "sfw", 1, absent="replica_unavailable")
    assert enhancement.fallback_reason == "replica_unavailable"


def test_enhance_gives_the_model_no_more_than_its_time(tiny_root: Path, template: Template, clip: TokenCounter) -> None:
    """The only place is taken, so the answer can't begin before its time is over."""
    spec = ModelSpec(
        family=Family.QWEN, model_name="q", source="tiny", device="cpu", memory_gib=0, disk_gib=0, sequences=1,
        cache_tokens=4096,
    )  # fmt: skip
    model = Qwen(spec, ensure_tiny("qwen", tiny_root))
    model.load()
    try:
        model._model.generation_config.eos_token_id = -1
        held = model.submit([Message("user", "x")], Sampling(max_new_tokens=3500, temperature=1.0))
        enhancement = enhance(PROMPT, template, model, clip, "sfw", 1, seconds=0.01)
        held.cancel()
    finally:
        model.close()
    assert (enhancement.strategy, enhancement.fallback_reason) == ("rule_based", "timed_out")


def test_enhance_of_several_windows_keeps_more(template: Template, clip: TokenCounter) -> None:
    long = " ".join(["cat"] * 100)
    wide = replace(template, token_limit=300)
    one, four = (enhance(long, wide, None, clip, "sfw", 1, windows=windows) for windows in (1, 4))
    assert (one.token_limit, four.token_limit) == (75, 300)
    assert (one.compression_applied, four.compression_applied) == (True, False)
    assert one.budget is not None
    assert one.budget.clamped


def test_enhance_judges_what_will_be_read_beside_the_prompt(template: Template, clip: TokenCounter) -> None:
    with pytest.raises(ContentRejected) as refused:
        enhance("a portrait of a toddler", template, None, clip, "sfw", 1, beside="nude")
    assert refused.value.code == "content_minors"
    assert enhance("a portrait of a toddler", template, None, clip, "sfw", 1).strategy == "rule_based"


def test_usable_answer_is_judged_with_what_stands_beside_it(template: Template, clip: TokenCounter) -> None:
    answer = "a red fox and a toddler on a mossy log, forest"
    assert usable_answer(wrote(answer), PROMPT, template, clip, "sfw") == (answer, False, None)
    beside = usable_answer(wrote(answer), PROMPT, template, clip, "sfw", beside="nude")
    assert beside == ("", False, "content_rejected")


def test_enhance_judges_prompt_and_answer_with_the_signs_of_the_references(
    template: Template, clip: TokenCounter
) -> None:
    child = signs_in("a ten year old child")
    with pytest.raises(ContentRejected) as refused:
        enhance("in lingerie, seductive", template, None, clip, "sfw", 1, signs=child)
    assert refused.value.code == "content_minors"
    answer = "a red fox in lingerie on a mossy log, forest"
    assert usable_answer(wrote(answer), PROMPT, template, clip, "sfw") == (answer, False, None)
    assert usable_answer(wrote(answer), PROMPT, template, clip, "sfw", signs=child) == ("", False, "content_rejected")


def test_strategy_is_what_was_done_by_model_and_by_compel() -> None:
    assert [strategy_of(model, compel) for model in (False, True) for compel in (False, True)] == [
        "none",
        "compel",
        "qwen",
        "hybrid",
    ]
