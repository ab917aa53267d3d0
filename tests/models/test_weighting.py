from collections.abc import Callable
from typing import Any

import pytest

from models.engine import GenerationRequest
from models.prompting.weighting import (
    MAX_WINDOWS,
    Weighting,
    WeightingFailed,
    check_parsable,
    plain_text,
)
from models.sdxl import SDXL

Make = Callable[..., GenerationRequest]


@pytest.fixture(scope="module")
def weighting(sdxl: SDXL) -> Weighting:
    return Weighting(sdxl._pipeline)


def pixels(model: SDXL, request: GenerationRequest, control: Any) -> tuple[bytes, dict[str, Any]]:
    made = model.generate(request, control)
    assert made.images is not None
    return made.images[0].tobytes(), made.settings


def equal(left: Any, right: Any) -> bool:
    return bool((left == right).all())


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a cat on a table", "a cat on a table"),
        ("a (cat)1.5 on a mat", "a cat on a mat"),
        ("a cat++ on a table--", "a cat on a table"),
        ('("a cat", "a dog").blend(0.3, 0.7)', "a cat, a dog"),
        ('("a cat", "a dog").and()', "a cat, a dog"),
        ("a cat.swap(dog) here", "a cat here"),
    ],
)
def test_plain_text_has_no_markup(prompt: str, plain: str) -> None:
    assert plain_text(prompt) == plain


def test_prompt_without_weights_is_encoded_as_the_stock_pipeline_does(
    sdxl: SDXL, image_request: Make, recorder: Any
) -> None:
    for negative in ("blurry", ""):
        plain, _ = pixels(sdxl, image_request(negative_prompt=negative), recorder())
        weighted, settings = pixels(sdxl, image_request(negative_prompt=negative, compel_enabled=True), recorder())
        assert weighted == plain
        assert settings["compel_success"] is True
        assert settings["fallback_used"] is False


def test_weights_change_the_picture(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    pictures = {
        pixels(sdxl, image_request(prompt=prompt, compel_enabled=True), recorder())[0]
        for prompt in ("a cat on a table", "a (cat)1.5 on a table", "a (cat)0.5 on a table")
    }
    assert len(pictures) == 3


def test_pooled_embedding_is_that_of_the_plain_text(sdxl: SDXL, weighting: Weighting) -> None:
    import torch

    with torch.no_grad():
        weighted = weighting.encode("a (cat)1.5 on a mat", "blurry++", "cpu").arguments
        _, _, pooled, negative_pooled = sdxl._pipeline.encode_prompt(
            "a cat on a mat", negative_prompt="blurry", device="cpu", do_classifier_free_guidance=True
        )
    assert equal(weighted["pooled_prompt_embeds"], pooled)
    assert equal(weighted["negative_pooled_prompt_embeds"], negative_pooled)


def test_long_prompt_fills_more_windows_and_the_negative_is_as_long(weighting: Weighting) -> None:
    import torch

    with torch.no_grad():
        arguments = weighting.encode("a cat on a table, " * 20, "blurry", "cpu").arguments
    assert arguments["prompt_embeds"].shape[1] == 2 * 77
    assert arguments["negative_prompt_embeds"].shape == arguments["prompt_embeds"].shape


def test_long_prompt_loses_nothing_with_compel(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    long = "a cat on a table, " * 20
    _, plain = pixels(sdxl, image_request(prompt=long), recorder())
    _, weighted = pixels(sdxl, image_request(prompt=long, compel_enabled=True), recorder())
    assert plain["prompt_tokens_cut"] > 0
    assert weighted["prompt_tokens_cut"] == 0


@pytest.mark.parametrize(
    ("prompt", "as_compel_reads_it"),
    [
        ("portrait/(cinematic)1.9", "portrait/ (cinematic)1.9"),
        ("4k—(hdr:1.3)|film", "4k— (hdr)1.3 |film"),
        ("(red (fluffy) cat:1.3)", "(red (fluffy) cat)1.3"),
        ("(portrait - studio light:1.3)", "(portrait -studio light)1.3"),
        ("(portrait - studio light)1.3", "(portrait -studio light)1.3"),
        ("(1=1 cat)1.3", "(1)1.3 = (1 cat)1.3"),
        ("(word:.5) here", "(word)0.5 here"),
        ("(cat)1.5, a mat--", "(cat)1.5, a mat--"),
    ],
)
def test_weights_in_any_place_have_the_embeddings_of_compel(
    sdxl: SDXL, weighting: Weighting, prompt: str, as_compel_reads_it: str
) -> None:
    import torch
    from compel import Compel, CompelForSDXL

    parsed = Compel.parse_prompt_string(as_compel_reads_it).prompts[0].children
    assert not [fragment for fragment in parsed if "(" in fragment.text]
    with torch.no_grad():
        weighted = weighting.encode(prompt, None, "cpu").arguments["prompt_embeds"]
        own = CompelForSDXL(sdxl._pipeline, device="cpu")(as_compel_reads_it).embeds
    assert equal(weighted, own)


@pytest.mark.parametrize(
    "prompt",
    [
        'a/"red cat"1.3',
        "x.cat++",
        "(a (b = c) d)1.3",
        "(cat -)1.2",
        "(word:-1)",
        "(word:1,3)",
        "(cat:1.3)++",
        "[cat:1.3]",
        "<lora:foo:0.8>",
        "cat:1.3, dog",
    ],
)
def test_a_weight_that_stays_text_is_refused(weighting: Weighting, prompt: str) -> None:
    for texts in ((prompt, None), ("kite", prompt)):
        with pytest.raises(WeightingFailed):
            weighting.encode(*texts, "cpu")


@pytest.mark.parametrize(
    "prompt",
    [
        '("a cat", "a dog").and(), a huge red castle',
        '("a cat", "a dog").add() x',
        'x, ("a cat", "a dog").and()',
        '("a", "b").and(), ("c", "d").and()',
        '(x) ("a cat", "a dog").blend(1, 1)',
        "cat.swap(dog)",
        "(a cat.swap(dog, s_start=0.2))1.2",
        "withLora(foo, 0.5)",
        "a cat useLora(foo)",
    ],
)
def test_operators_that_lose_words_or_do_nothing_are_refused(weighting: Weighting, prompt: str) -> None:
    for texts in ((prompt, None), ("kite", prompt)):
        with pytest.raises(WeightingFailed):
            weighting.encode(*texts, "cpu")


@pytest.mark.parametrize(
    "prompt",
    [
        '("a cat", "a dog").and()',
        '("a cat", "a dog").blend(0.3, 0.7)',
        "(cat).attend(1.2) on a mat",
        r"\(cat\)1.3, the trade (fair). and (more)",
        "ratio 16:9, [16:9], at 10:30, lens at: 1.8, C++ code, cat(s), a well-known 3-4",
    ],
)
def test_what_compel_reads_is_not_refused(weighting: Weighting, prompt: str) -> None:
    weighting.encode(prompt, None, "cpu")


@pytest.mark.parametrize(
    "prompt", ["()", '("a cat", "a dog").and(1, 0.5)', "cat " * 75 * (MAX_WINDOWS + 1), "cat.swap(dog)"]
)
def test_failure_of_compel_falls_back_to_the_plain_prompt_and_says_so(
    sdxl: SDXL, image_request: Make, recorder: Any, weighting: Weighting, prompt: str
) -> None:
    with pytest.raises(WeightingFailed):
        weighting.encode(prompt, None, "cpu")
    plain, _ = pixels(sdxl, image_request(prompt=prompt), recorder())
    fallen_back, settings = pixels(sdxl, image_request(prompt=prompt, compel_enabled=True), recorder())
    assert fallen_back == plain
    assert settings["compel_enabled"] is True
    assert settings["compel_success"] is False
    assert settings["fallback_used"] is True
    assert settings["fallback_reason"].startswith("compel_failed")


@pytest.mark.parametrize(
    "prompt",
    [
        "((((red:1.3 kite ))) ::",
        "(" * 7 + "kite",
        "(((kite)))",
        "kite)",
        ")kite(",
        "((kite)) " * 400,
        "()" * 2000,
        '"' + "(cat) " * 650 + '"',
        "(" + "cat " * 900 + ")1.3",
        "kite" + "+" * 500,
        "kite" + "-" * 500,
        "(kite)" + "+" * 7,
    ],
)
def test_hostile_prompts_are_never_parsed(weighting: Weighting, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    parsed: list[str] = []
    monkeypatch.setattr("compel.Compel.parse_prompt_string", parsed.append)
    for texts in ((prompt, None), ("kite", prompt)):
        with pytest.raises(WeightingFailed):
            weighting.encode(*texts, "cpu")
    assert parsed == []


@pytest.mark.parametrize(
    "prompt",
    [
        r"a face \(smiling\), \(\(((tilted)1.2 hat)",
        r"((a \) cat)1.2 on a mat)0.9",
        "((red)1.3 kite)1.1, sky++, cloud------",
        '("a (cat)1.5", "a dog").blend(0.3, 0.7)',
        "a cat [on a mat",
        "cat " * 1000,
        "",
    ],
)
def test_ordinary_weights_are_parsed(prompt: str) -> None:
    check_parsable(prompt)


@pytest.mark.parametrize("prompt", ["kite" + "+" * 500, "(kite)99999999999999999999", "((kite)9)9"])
def test_absurd_weights_fall_back_to_the_plain_prompt(
    sdxl: SDXL, image_request: Make, recorder: Any, prompt: str
) -> None:
    plain, _ = pixels(sdxl, image_request(prompt=prompt), recorder())
    fallen_back, settings = pixels(sdxl, image_request(prompt=prompt, compel_enabled=True), recorder())
    assert fallen_back == plain
    assert (settings["compel_success"], settings["fallback_used"]) == (False, True)


def test_compel_works_without_guidance_and_in_batches(sdxl: SDXL, image_request: Make, recorder: Any) -> None:
    request = image_request(guidance_scale=1.0, negative_prompt="", num_images=3, compel_enabled=True)
    made = sdxl.generate(request, recorder())
    assert made.settings["compel_success"] is True
    assert len(made.images or []) == 3
