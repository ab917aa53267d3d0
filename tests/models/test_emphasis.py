from collections.abc import Callable
from typing import Any

import pytest

from models.engine import GenerationRequest
from models.params import GivenParams, InvalidParams
from models.prompting.emphasis import CompelWeights, emphasise, word_groups
from models.prompting.weighting import Weighting, check_parsable, plain_text
from models.sdxl import SDXL

Make = Callable[..., GenerationRequest]


def given(weights: Any) -> CompelWeights:
    made = GivenParams(prompt="a", compel_weights=weights).compel_weights
    assert made is not None
    return made


# --- what may be given


@pytest.mark.parametrize(
    ("weights", "field", "code"),
    [
        ({"quality": 0.4}, "compel_weights.quality", "range"),
        ({"quality": 2.1}, "compel_weights.quality", "range"),
        ({"detail": 0.49}, "compel_weights.detail", "range"),
        ({"style": 2.01}, "compel_weights.style", "range"),
        ({"nsfw": -0.1}, "compel_weights.nsfw", "range"),
        ({"nsfw": 2.1}, "compel_weights.nsfw", "range"),
        ({"quality": float("nan")}, "compel_weights.quality", "range"),
        ({"quality": "1.2"}, "compel_weights.quality", "type"),
        ({"quality": True}, "compel_weights.quality", "type"),
        ({"beauty": 1.2}, "compel_weights.beauty", "unknown"),
        ({"terms": [{"term": "fog", "weight": 3.0}]}, "compel_weights.terms.0.weight", "range"),
        ({"terms": [{"term": "(fog", "weight": 1.0}]}, "compel_weights", "type"),
        ("fog", "compel_weights", "type"),
        ("(fog:1.2) and more", "compel_weights", "type"),
        ("(fog:2.5)", "compel_weights", "range"),
        ("(fog:1.2), (fog:1.3)", "compel_weights", "conflict"),
        (", ".join(f"(w{n}:1.1)" for n in range(7)), "compel_weights", "range"),
        ([1], "compel_weights", "type"),
    ],
)
def test_weights_out_of_range_are_refused_by_name(weights: Any, field: str, code: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        given(weights)
    assert [(error.field, error.code) for error in refused.value.errors] == [(field, code)]


@pytest.mark.parametrize(
    "weights", [{"quality": 0.5, "detail": 2.0, "style": 0.5, "nsfw": 0.0}, {"nsfw": 2}, "(fog:0), (rain:2)"]
)
def test_the_ends_of_the_ranges_are_allowed(weights: Any) -> None:
    assert not given(weights).empty


def test_a_list_of_weighted_terms_is_an_object_with_terms_each_once() -> None:
    weights = given("(sharp focus:1.2), (fog:0.8) (fog:0.8)")
    assert weights.model_dump(mode="json") == {
        "terms": [{"term": "sharp focus", "weight": 1.2}, {"term": "fog", "weight": 0.8}]
    }
    assert CompelWeights.model_validate(weights.model_dump(mode="json")) == weights
    assert weights.wording == "sharp focus, fog"


def test_only_what_was_given_is_kept() -> None:
    assert given({"quality": 1.2, "style": None}).model_dump(mode="json") == {"quality": 1.2}
    assert given({}).empty
    assert given("").empty


# --- what becomes of them


@pytest.mark.parametrize(
    ("prompt", "weights", "text"),
    [
        ("a cat, highly detailed", {"detail": 1.3}, "a cat, (highly detailed)1.3"),
        ("a cat", {"quality": 1.2}, "a cat, (high quality)1.2"),
        ("a cat", {"quality": 0.8}, "a cat"),
        ("a cat, high quality", {"quality": 0.8}, "a cat, (high quality)0.8"),
        ("a cat, high quality", {"quality": 1.0}, "a cat, high quality"),
        ("a cat", {"style": 1.5, "nsfw": 2.0}, "a cat"),
        ("a cinematic cat", {"style": 1.5}, "a (cinematic)1.5 cat"),
        ("a statue, nude", {"nsfw": 0.0}, "a statue, (nude)0"),
        ("a cat, Detailed. A dog", {"detail": 1.2}, "a cat, (Detailed)1.2 . A dog"),
        ("a fine-detailed cat", {"detail": 1.2}, "a fine-detailed cat, (fine detail)1.2"),
        ("a (detailed)1.1 cat", {"detail": 1.4}, "a (detailed)1.1 cat, (fine detail)1.4"),
        ("a detailed++ cat", {"detail": 1.4}, "a detailed++ cat, (fine detail)1.4"),
        ('"a detailed" cat', {"detail": 0.7}, '"a detailed" cat'),
        ("a cat in fog", "(fog:1.2), (rain:0.9)", "a cat in (fog)1.2, (rain)0.9"),
        ("a cat, sharp focus", "(focus:1.2)", "a cat, sharp (focus)1.2"),
        ("", "(fog:1.2)", "(fog)1.2"),
        ("portrait/cinematic", {"style": 1.9}, "portrait/ (cinematic)1.9"),
        ("4k/8k/hdr", {"quality": 1.2}, "(4k)1.2 / (8k)1.2 / (hdr)1.2"),
        ("[masterpiece]", {"quality": 1.2}, "[ (masterpiece)1.2 ]"),
        ("a+cinematic", {"style": 1.9}, "a+cinematic"),
        ("(dog)1.2 1", "(1:1.1)", "(dog)1.2 (1)1.1"),
        ("dog - cat", "(dog - cat:0.5)", "(dog -cat)0.5"),
    ],
)
def test_weights_are_put_on_the_words_of_their_group(prompt: str, weights: Any, text: str) -> None:
    written = emphasise(prompt, given(weights)).text
    assert written == text
    check_parsable(written)


@pytest.mark.parametrize("mark", [*"/;—.:#|[{'&*~!?=", "\u00a0", "，", " - "])
def test_each_weight_that_is_told_is_one_that_compel_reads(mark: str) -> None:
    from compel import Compel

    emphasised = emphasise(f"portrait{mark}cinematic{mark}noir{mark}film", given({"style": 1.9}))
    fragments = Compel.parse_prompt_string(emphasised.text).prompts[0].children
    assert [fragment.text for fragment in fragments if fragment.weight == 1.9] == ["cinematic", "noir"]
    assert emphasised.applied == {"style": {"places": 2, "added": 0, "weight": 1.9}}


def test_a_callers_own_term_goes_before_a_group() -> None:
    weights = CompelWeights.model_validate({"detail": 1.1, "terms": [{"term": "Detailed", "weight": 1.5}]})
    assert emphasise("a detailed cat, intricate", weights).text == "a (detailed)1.5 cat, (intricate)1.1"


def test_what_was_applied_is_told_in_numbers() -> None:
    weights = given({"quality": 1.2, "detail": 1.1, "style": 1.3, "nsfw": 0.5})
    assert emphasise("a detailed, intricate cat", weights).applied == {
        "quality": {"weight": 1.2, "places": 0, "added": 1},
        "detail": {"weight": 1.1, "places": 2, "added": 0},
        "style": {"weight": 1.3, "places": 0, "added": 0},
        "nsfw": {"weight": 0.5, "places": 0, "added": 0},
    }


def test_a_blend_is_left_alone_and_the_reason_told() -> None:
    blend = '("a detailed cat", "a dog").blend(0.5, 0.5)'
    emphasised = emphasise(blend, given({"detail": 1.4}))
    assert (emphasised.text, emphasised.applied) == (blend, {})
    assert emphasised.reason


def test_nothing_is_added_for_adults_or_for_style() -> None:
    assert word_groups()["nsfw"].add is None
    assert word_groups()["style"].add is None


@pytest.mark.parametrize(
    "prompt", ["a cat, masterpiece, highly detailed texture, cinematic.", "nude statue, oil painting"]
)
def test_what_is_written_reads_back_as_the_prompt(prompt: str) -> None:
    weights = given({"quality": 1.3, "detail": 1.2, "style": 1.1, "nsfw": 0.8})
    words = plain_text(emphasise(prompt, weights).text).replace(" ", "").replace(",", "")
    assert words.startswith(prompt.replace(" ", "").replace(",", "").rstrip("."))


# --- in the model


def run(model: SDXL, request: GenerationRequest, control: Any) -> tuple[bytes, dict[str, Any]]:
    made = model.generate(request, control)
    assert made.images is not None
    return made.images[0].tobytes(), made.settings


def test_named_weights_give_the_picture_of_the_written_weights(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    named = image_request(prompt="a detailed cat", compel_enabled=True, compel_weights=given({"detail": 1.4}))
    written = image_request(prompt="a (detailed)1.4 cat", compel_enabled=True)
    unweighted = image_request(prompt="a detailed cat", compel_enabled=True)
    (a, settings), (b, _), (c, _) = (run(sdxl, asked, recorder()) for asked in (named, written, unweighted))
    assert a == b != c
    assert settings["compel_weights_applied"] == {"detail": {"weight": 1.4, "places": 1, "added": 0}}
    assert (settings["compel_success"], settings["fallback_used"]) == (True, False)


def test_weights_that_a_blend_leaves_no_place_for_are_told(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    blend = '("a detailed cat", "a dog").blend(0.5, 0.5)'
    request = image_request(prompt=blend, compel_enabled=True, compel_weights=given({"detail": 1.4}))
    _, settings = run(sdxl, request, recorder())
    assert (settings["compel_success"], settings["fallback_used"]) == (True, True)
    assert settings["fallback_reason"].startswith("compel_weights")


def test_a_long_prompt_is_encoded_window_by_window(sdxl: SDXL) -> None:
    """Chunked by hand: 100 words are a window of 75 and one of 25, each between its own marks, padded to 77."""
    import torch

    pipeline = sdxl._pipeline
    with torch.no_grad():
        weighted = Weighting(pipeline).encode("cat " * 100, "fog", "cpu").arguments
        parts = []
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            ids = tokenizer("cat " * 100, add_special_tokens=False, truncation=False, verbose=False).input_ids
            assert len(ids) == 100
            windows = []
            for window in (ids[:75], ids[75:]):
                row = [tokenizer.bos_token_id, *window, tokenizer.eos_token_id]
                row += [tokenizer.pad_token_id] * (77 - len(row))
                windows.append(encoder(torch.tensor([row]), output_hidden_states=True).hidden_states[-2])
            parts.append(torch.cat(windows, dim=1))
        by_hand = torch.cat(parts, dim=-1)
    assert weighted["prompt_embeds"].shape == by_hand.shape == (1, 154, by_hand.shape[-1])
    torch.testing.assert_close(weighted["prompt_embeds"], by_hand)


@pytest.mark.parametrize("prompt", ["\u0130stanbul at night", "\u0131stanbul at night"], ids=["dotted", "dotless"])
def test_a_letter_that_only_the_pattern_takes_for_an_i_is_left_alone(prompt: str) -> None:
    weights = CompelWeights.model_validate({"terms": [{"term": "istanbul", "weight": 1.3}]})
    assert emphasise(prompt, weights).text == f"{prompt}, (istanbul)1.3"
