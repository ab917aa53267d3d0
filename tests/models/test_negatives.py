from pathlib import Path

import pytest

from models.catalog import Family
from models.params import MAX_PROMPT_CHARACTERS
from models.prompting.negatives import NegativePreset, builtin_negatives, negative_prompt
from models.prompting.prompts import TokenCounter
from models.samples.tiny import ensure_tiny


@pytest.fixture(scope="session")
def clip(tiny_root: Path) -> TokenCounter:
    return TokenCounter.from_pretrained(ensure_tiny("sdxl", tiny_root))


def test_negative_prompt_joins_presets_by_priority_and_appends_the_callers_own() -> None:
    text = negative_prompt(Family.SDXL, "a cat", "snow, Watermark", "sfw", "txt2img", builtin_negatives())
    terms = text.split(", ")
    assert terms.index("nudity") < terms.index("bad anatomy") < terms.index("deformed hands") < terms.index("anime")
    assert terms[-2:] == ["snow", "Watermark"]
    assert "watermark" not in terms
    assert "title" not in terms


def test_negative_prompt_of_nsfw_excludes_minors_whatever_the_prompt_says() -> None:
    text = negative_prompt(Family.SDXL, "a minor chord", "", "nsfw", "txt2img", builtin_negatives())
    assert text.startswith("child, minor, ")


def test_negative_prompt_of_i2i_has_three_quality_terms() -> None:
    text = negative_prompt(Family.SDXL, "a cat", "", "sfw", "i2i", builtin_negatives())
    assert text == "nudity, sexual content, worst quality, low quality, watermark"


def test_negative_prompt_leaves_out_what_the_prompt_asks_for() -> None:
    text = negative_prompt(Family.SDXL, "an anime cat, 3d", "", "sfw", "txt2img", builtin_negatives())
    assert "anime" not in text.split(", ")
    assert "cartoon" in text.split(", ")


def test_negative_prompt_gives_sdxl_presets_to_sdxl_only() -> None:
    text = negative_prompt(Family.WAN, "a cat", "", "sfw", "txt2img", builtin_negatives())
    assert "flicker" in text
    assert "bad anatomy" not in text


def test_negative_prompt_applies_triggered_presets_on_their_words() -> None:
    preset = NegativePreset("crowd", ("empty street", "fog", "rain"), 1, triggers=("crowd",), take=2)
    assert negative_prompt(Family.SDXL, "a crowd", "", "sfw", "txt2img", [preset]) == "empty street, fog"
    assert negative_prompt(Family.SDXL, "crowded", "", "sfw", "txt2img", [preset]) == ""


def test_negative_prompt_drops_low_priorities_to_fit_and_keeps_the_callers_own(clip: TokenCounter) -> None:
    own = "snow, " * 20
    text = negative_prompt(Family.SDXL, "a cat", own, "nsfw", "txt2img", builtin_negatives(), counter=clip, limit=75)
    assert clip.count(text) <= 75
    assert text.startswith("child, minor, bad anatomy")
    assert text.count("snow") == 20
    assert "anime" not in text


def test_negative_prompt_that_nobody_can_count_has_the_callers_own_before_what_may_be_cut_off() -> None:
    text = negative_prompt(Family.SDXL, "a cat", "snow", "sfw", "txt2img", builtin_negatives(), limit=75)
    assert text.startswith("nudity, sexual content, snow, bad anatomy, ")
    assert "anime" in text


def test_negative_prompt_is_not_made_too_long_by_presets(clip: TokenCounter) -> None:
    own = "snow " * 794
    for counter in (None, clip):
        presets = builtin_negatives()
        text = negative_prompt(Family.SDXL, "a cat", own, "sfw", "txt2img", presets, counter=counter, limit=75)
        assert text == f"nudity, sexual content, {own.strip()}"
    free = negative_prompt(Family.SDXL, "a cat", own, "sfw", "txt2img", builtin_negatives())
    assert len(free) <= MAX_PROMPT_CHARACTERS


def test_builtin_negatives_ship_the_nsfw_presets_empty() -> None:
    named = {preset.name: preset.terms for preset in builtin_negatives() if preset.name.startswith("nsfw_")}
    assert named.pop("nsfw_safety") == ("child", "minor")
    assert named == {"nsfw_people_mixed": (), "nsfw_people_count": (), "nsfw_position": (), "nsfw_anatomy": ()}


def test_builtin_negatives_of_image_to_image_have_exactly_three_terms_in_each_model_and_mode() -> None:
    presets = [preset for preset in builtin_negatives() if preset.generation_mode == "i2i"]
    assert {preset.family for preset in presets} == {"sdxl", "rv51", "replicate-sdxl"}
    assert {len(preset.terms) for preset in presets} == {3}
    for family in ("sdxl", "rv51", "replicate-sdxl"):
        for mode in ("sfw", "nsfw"):
            text = negative_prompt(family, "a cat", "", mode, "i2i", presets)  # type: ignore[arg-type]
            assert text == "worst quality, low quality, watermark"


def test_negative_prompt_of_i2i_keeps_to_three_terms_whatever_an_operator_adds() -> None:
    mine = NegativePreset("mine", ("fog", "rain"), 95, generation_mode="i2i")
    text = negative_prompt(Family.SDXL, "a cat", "snow", "sfw", "i2i", [*builtin_negatives(), mine])
    assert text == "nudity, sexual content, fog, rain, worst quality, snow"


def test_negative_prompt_of_a_portrait_takes_its_preset() -> None:
    text = negative_prompt(Family.SDXL, "a portrait of a cat", "", "sfw", "txt2img", builtin_negatives())
    assert text.endswith("crossed eyes, asymmetric eyes, cropped face")
    assert "crossed eyes" not in negative_prompt(Family.SDXL, "a cat", "", "sfw", "txt2img", builtin_negatives())


def test_negative_prompt_gives_another_providers_presets_to_its_model_only() -> None:
    only = [preset for preset in builtin_negatives() if preset.family == "replicate-sdxl"]
    assert negative_prompt(Family.SDXL, "a cat", "", "sfw", "txt2img", only) == ""
    assert 7 <= len(negative_prompt("replicate-sdxl", "a cat", "", "sfw", "txt2img", only).split(", ")) <= 12
