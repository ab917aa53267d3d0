import math
import pickle
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.catalog import Family, default_for, resolve
from models.lora.loras import LoraUse
from models.params import (
    MAX_SEED,
    GenerationParams,
    GivenParams,
    InvalidParams,
    Resolved,
    clean_prompt,
    nearest_length,
    resolve_params,
)

IMAGE = {"bucket": "b", "key": "k"}
STYLE = IMAGE | {"kind": "style"}


def resolved(name: str = "sdxl_image_fast", **given: Any) -> Resolved:
    job_type = resolve(name)
    return resolve_params(job_type, GivenParams(**({"prompt": "a cat"} | given)), default_for(job_type.family))


def refusal(name: str = "sdxl_image_fast", **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidParams) as refused:
        resolved(name, **given)
    assert refused.value.code == "invalid_params"
    return {error.field: error.code for error in refused.value.errors}


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [
        ("sdxl_image_fast", 15, 6.0),
        ("sdxl_image_high", 25, 7.5),
        ("video_fast", 25, 6.5),
        ("image7b_high_enhanced", 50, 7.5),
    ],
)
def test_resolve_params_fills_the_quality_preset(name: str, steps: int, guidance: float) -> None:
    params = resolved(name).params
    assert (params.steps, params.guidance_scale, params.num_images, params.seed) == (steps, guidance, 1, None)


def test_resolve_params_fills_video_defaults() -> None:
    params = resolved("wan_video_fast").params
    assert (params.width, params.height, params.frames, params.fps, params.shift) == (480, 832, 81, 16, 5.0)


def test_resolve_params_keeps_everything_given() -> None:
    params = resolved(
        seed=0,
        num_images=6,
        width=832,
        height=1216,
        steps=2,
        guidance_scale=20,
        scheduler="dpm++",
        negative_prompt="  blurry\nrough ",
        references=({"bucket": "workspace-temp", "key": "u/j/1/0.png", "strength": 0.1, "kind": "image"},),
        compel_enabled=True,
        content_mode="nsfw",
    ).params
    assert params.seed == 0
    assert (params.num_images, params.width, params.height, params.steps) == (6, 832, 1216, 2)
    assert (params.guidance_scale, params.scheduler, params.negative_prompt) == (20.0, "dpm++", "blurry rough")
    assert params.reference is not None
    assert (params.reference.strength, params.compel_enabled, params.content_mode) == (0.1, True, "nsfw")
    assert GenerationParams.model_validate_json(params.model_dump_json()) == params


@pytest.mark.parametrize(
    ("frames", "used"), [(83, 81), (64, 65), (81, 81), (17, 17), (121, 121), (16, 17), (82, 81), (84, 85)]
)
def test_resolve_params_takes_the_nearest_length_and_says_so(frames: int, used: int) -> None:
    answer = resolved("video_fast", frames=frames)
    assert answer.params.frames == used
    assert [(a.field, a.given, a.used) for a in answer.adjustments] == (
        [("frames", frames, used)] if used != frames else []
    )


@given(st.integers(min_value=1, max_value=10_000))
def test_nearest_length_is_4n_plus_1_and_no_further_than_2(frames: int) -> None:
    length = nearest_length(frames)
    assert length % 4 == 1
    assert abs(length - frames) <= 2


@pytest.mark.parametrize(
    ("name", "given", "errors"),
    [
        ("sdxl_image_fast", {"num_images": 4}, {"num_images": "choice"}),
        ("sdxl_image_fast", {"num_images": 0}, {"num_images": "choice"}),
        ("video_fast", {"num_images": 3}, {"num_images": "choice"}),
        ("sdxl_image_fast", {"seed": 2**70}, {"seed": "range"}),
        ("sdxl_image_fast", {"seed": -1}, {"seed": "range"}),
        ("sdxl_image_fast", {"seed": True}, {"seed": "type"}),
        ("sdxl_image_fast", {"seed": "7"}, {"seed": "type"}),
        ("sdxl_image_fast", {"seed": 1.5}, {"seed": "type"}),
        ("sdxl_image_fast", {"guidance_scale": math.nan}, {"guidance_scale": "range"}),
        ("sdxl_image_fast", {"guidance_scale": math.inf}, {"guidance_scale": "range"}),
        ("sdxl_image_fast", {"guidance_scale": 20.01}, {"guidance_scale": "range"}),
        ("sdxl_image_fast", {"guidance_scale": False}, {"guidance_scale": "type"}),
        ("sdxl_image_fast", {"steps": 0}, {"steps": "range"}),
        ("sdxl_image_fast", {"steps": 101}, {"steps": "range"}),
        ("sdxl_image_fast", {"width": 480, "height": 832}, {"width": "choice"}),
        ("sdxl_image_fast", {"width": 1024}, {"height": "missing"}),
        ("sdxl_image_fast", {"frames": 81}, {"frames": "unsupported"}),
        ("sdxl_image_fast", {"fps": 16}, {"fps": "unsupported"}),
        ("image_fast", {"frames": 5}, {"frames": "unsupported"}),
        ("sdxl_image_fast", {"shift": 5.0}, {"shift": "unsupported"}),
        ("sdxl_image_fast", {"scheduler": "magic"}, {"scheduler": "choice"}),
        ("video_fast", {"frames": 3}, {"frames": "range"}),
        ("video_fast", {"frames": 200}, {"frames": "range"}),
        ("video_fast", {"frames": -2}, {"frames": "range"}),
        ("video_fast", {"fps": 0}, {"fps": "range"}),
        ("video_fast", {"shift": math.nan}, {"shift": "range"}),
        ("video_fast", {"compel_enabled": True}, {"compel_enabled": "unsupported"}),
        ("video_fast", {"references": [{"bucket": "b", "key": "k"}]}, {"references.0": "unsupported"}),
        ("sdxl_image_fast", {"references": [STYLE]}, {"references.0": "unsupported"}),
        ("sdxl_image_fast", {"references": [IMAGE, IMAGE]}, {"references.1.kind": "conflict"}),
        (
            "sdxl_image_fast",
            {"references": [IMAGE, IMAGE | {"kind": "composition"}]},
            {"references.1.kind": "conflict"},
        ),
        (
            "sdxl_image_fast",
            {"references": [{"bucket": "b", "key": "k", "strength": 0.05}]},
            {"references.0.strength": "range"},
        ),
        (
            "sdxl_image_fast",
            {"references": [{"bucket": "b", "key": "k", "strength": 1.0}]},
            {"references.0.strength": "range"},
        ),
        ("sdxl_image_fast", {"references": [{"bucket": "b"}]}, {"references.0.key": "missing"}),
        ("sdxl_image_fast", {"references": [IMAGE | {"kind": "face"}]}, {"references.0.kind": "choice"}),
        ("sdxl_image_fast", {"prompt": "  \n "}, {"prompt": "missing"}),
        ("sdxl_image_fast", {"prompt": "\u200b"}, {"prompt": "missing"}),
        ("sdxl_image_fast", {"prompt": " \u200b\u2060 \u0301\ufe0f"}, {"prompt": "missing"}),
        ("sdxl_image_fast", {"prompt": "x" * 4001}, {"prompt": "length"}),
        ("sdxl_image_fast", {"prompt": "a\x00b"}, {"prompt": "characters"}),
        ("sdxl_image_fast", {"prompt": "a\ud800b"}, {"prompt": "characters"}),
        ("sdxl_image_fast", {"prompt": 7}, {"prompt": "type"}),
        ("sdxl_image_fast", {"negative_prompt": "blurry", "guidance_scale": 1}, {"negative_prompt": "conflict"}),
        ("sdxl_image_fast", {"content_mode": "wild"}, {"content_mode": "choice"}),
        ("sdxl_image_fast", {"motion_bucket": 127}, {"motion_bucket": "unknown"}),
        (
            "sdxl_image_fast",
            {"steps": 0, "seed": -1, "num_images": 2},
            {"steps": "range", "seed": "range", "num_images": "choice"},
        ),
    ],
)
def test_resolve_params_refuses_and_names_the_field(name: str, given: dict[str, Any], errors: dict[str, str]) -> None:
    assert refusal(name, **given) == errors


def test_resolve_params_takes_the_largest_seed_and_prompt() -> None:
    params = resolved(seed=MAX_SEED, prompt=" " + "x" * 4000).params
    assert (params.seed, len(params.prompt)) == (2**63 - 1, 4000)


def test_resolve_params_lets_a_reference_go_without_words() -> None:
    assert resolved(prompt="", references=[IMAGE]).params.prompt == ""


def test_resolve_params_leaves_a_step_to_run_beside_a_strong_reference() -> None:
    answer = resolved(references=[IMAGE | {"strength": 0.95}])
    assert (answer.params.steps, answer.adjustments[0].given) == (20, 15)
    assert resolved(references=[IMAGE | {"strength": 0.9}]).adjustments == ()


def test_resolve_params_keeps_prompts_out_of_messages() -> None:
    with pytest.raises(InvalidParams) as refused:
        resolved(prompt="zanzibar" * 1000, negative_prompt="zanzibar\x00")
    assert "zanzibar" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "type"),
        (5, "type"),
        (["a cat"], "type"),
        ("", "missing"),
        (" \u200b\u2060 ", "missing"),
        ("a\x00b", "characters"),
        ("a\ud800b", "characters"),
        ("a" * 4001, "length"),
        ("\ufdfa" * 250, "length"),  # of 18 letters each
    ],
)
def test_clean_prompt_refuses(text: object, code: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        clean_prompt("original_prompt", text)
    assert [(error.field, error.code) for error in refused.value.errors] == [("original_prompt", code)]


@pytest.mark.parametrize(
    ("text", "cleaned"), [(" a \n cat ", "a cat"), ("e\u0301te\u0301", "e\u0301te\u0301"), ("❤\ufe0f", "❤\ufe0f")]
)
def test_clean_prompt_keeps_what_can_be_seen(text: str, cleaned: str) -> None:
    assert clean_prompt("prompt", text) == cleaned


def test_refusals_survive_pickling() -> None:
    with pytest.raises(InvalidParams) as refused:
        resolved(steps=0, seed=-1)
    copy = pickle.loads(pickle.dumps(refused.value))  # noqa: S301 - our own bytes
    assert (type(copy), copy.code, str(copy)) == (InvalidParams, "invalid_params", str(refused.value))
    assert copy.errors == refused.value.errors


def test_resolve_params_refuses_video_where_the_model_makes_none() -> None:
    with pytest.raises(InvalidParams) as refused:
        resolve_params(resolve("video_fast"), GivenParams(prompt="a cat"), default_for(Family.SDXL))
    assert refused.value.errors[0].field == "frames"


@given(
    st.sampled_from(["sdxl_image_fast", "video_high", "image_fast", "rv51_high"]),
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": st.text(max_size=50),
            "negative_prompt": st.text(max_size=50),
            "seed": st.integers() | st.booleans(),
            "num_images": st.integers(-1, 7),
            "width": st.sampled_from([480, 832, 1024, 7]),
            "height": st.sampled_from([480, 832, 1216, 1024]),
            "frames": st.integers(-5, 200),
            "fps": st.integers(-1, 90),
            "steps": st.integers(-1, 120),
            "guidance_scale": st.floats(),
            "shift": st.floats(),
            "compel_enabled": st.booleans(),
        },
    ),
)
def test_resolve_params_gives_valid_params_or_refuses(name: str, given: dict[str, Any]) -> None:
    job_type = resolve(name)
    defaults = default_for(job_type.family)
    try:
        params = resolve_params(job_type, GivenParams(**given), defaults).params
    except InvalidParams:
        return
    assert (params.width, params.height) in defaults.sizes
    assert params.num_images in (1, *defaults.image_counts)
    assert params.frames == 1 or params.frames % 4 == 1
    for field, value in given.items():
        if field not in ("prompt", "negative_prompt", "frames"):
            assert getattr(params, field) == value


# --- LoRAs ------------------------------------------------------------------------------------------------


def loras_refused(loras: object, known: Collection[str] = ("ink", "oil")) -> dict[str, str]:
    job_type = resolve("sdxl_image_fast")
    with pytest.raises(InvalidParams) as refused:
        resolve_params(job_type, GivenParams(prompt="a cat", loras=loras), default_for(job_type.family), known)
    return {error.field: error.code for error in refused.value.errors}


def test_loras_are_kept_in_their_order() -> None:
    job_type = resolve("sdxl_image_fast")
    given = GivenParams.model_validate({"prompt": "a cat", "loras": [{"name": "oil"}, {"name": "ink", "weight": -2}]})
    params = resolve_params(job_type, given, default_for(job_type.family), ["ink", "oil"]).params
    assert params.loras == (LoraUse(name="oil", weight=1.0), LoraUse(name="ink", weight=-2.0))
    assert GenerationParams.model_validate(params.model_dump(mode="json")) == params


def test_no_loras_are_no_loras() -> None:
    assert resolved().params.loras == ()
    assert resolved(loras=[]).params.loras == ()


def test_rows_from_before_there_were_loras_are_read() -> None:
    row = resolved().params.model_dump(mode="json")
    del row["loras"]
    assert GenerationParams.model_validate(row).loras == ()


@pytest.mark.parametrize(
    ("loras", "errors"),
    [
        ([{"name": "ink"}, {"name": "nobody"}], {"loras.1.name": "choice"}),
        ([{"name": "/etc/passwd"}], {"loras.0.name": "choice"}),
        ([{"name": "ink"}, {"name": "ink", "weight": 0.5}], {"loras.0.name": "conflict", "loras.1.name": "conflict"}),
        ([{"name": "ink", "weight": 0}], {"loras.0.weight": "conflict"}),
        ([{"name": "ink", "weight": 2.01}], {"loras.0.weight": "range"}),
        ([{"name": "ink", "weight": float("nan")}], {"loras.0.weight": "range"}),
        ([{"name": "ink", "weight": "1"}], {"loras.0.weight": "type"}),
        ([{"name": "ink", "scale": 1}], {"loras.0.scale": "unknown"}),
        ([{"weight": 1}], {"loras.0.name": "missing"}),
        ("ink", {"loras": "type"}),
    ],
    ids=str,
)
def test_loras_that_can_not_be_used_are_named(loras: object, errors: dict[str, str]) -> None:
    assert loras_refused(loras) == errors


def test_an_unknown_lora_is_told_the_known_ones() -> None:
    job_type = resolve("sdxl_image_fast")
    given = GivenParams.model_validate({"prompt": "a cat", "loras": [{"name": "x"}]})
    with pytest.raises(InvalidParams, match=r"loras\.0\.name: must be one of ink, oil"):
        resolve_params(job_type, given, default_for(job_type.family), ["oil", "ink"])


def test_more_than_five_loras_are_refused() -> None:
    names = [f"lora{number}" for number in range(6)]
    assert loras_refused([{"name": name} for name in names], names) == {"loras": "length"}


def test_a_model_without_loras_takes_none() -> None:
    assert loras_refused([{"name": "ink"}], ()) == {"loras": "unsupported"}
