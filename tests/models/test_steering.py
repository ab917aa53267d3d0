from typing import Any

import pytest

from models.catalog import default_for, resolve
from models.guiding.reference import Reference
from models.lora.loras import LoraUse
from models.params import GenerationParams, GivenParams, InvalidParams, Methods, Resolved, resolve_params

IMAGE = {"bucket": "b", "key": "k"}
SDXL: Methods = {"image": "image_to_image", "composition": "controlnet", "style": "ip_adapter"}
WAN: Methods = {"start_frame": "image_to_video", "end_frame": "image_to_video"}
BOTH: Methods = {"start_frame": "first_and_last_frame", "end_frame": "first_and_last_frame"}


def of(kind: str, **changes: Any) -> dict[str, Any]:
    return IMAGE | {"kind": kind} | changes


def resolved(name: str, methods: Methods | None, *references: dict[str, Any]) -> Resolved:
    job_type = resolve(name)
    given = GivenParams(prompt="a cat", references=references)
    return resolve_params(job_type, given, default_for(job_type.family), methods=methods)


def refusal(name: str, methods: Methods | None, *references: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidParams) as refused:
        resolved(name, methods, *references)
    return {error.field: error.code for error in refused.value.errors}


def test_several_kinds_keep_their_order_and_strength() -> None:
    given = (of("style", strength=0.7), of("image", strength=0.2), of("composition"))
    params = resolved("sdxl_image_fast", SDXL, *given).params
    assert [(one.kind, one.strength) for one in params.references] == [
        ("style", 0.7),
        ("image", 0.2),
        ("composition", 0.5),
    ]
    assert params.reference == params.references[1]
    assert params.of_kind("composition") == params.references[2]
    assert params.of_kind("character") is None


def test_composition_is_an_image_to_start_from_where_there_is_no_controlnet() -> None:
    mask = {"bucket": "b", "key": "m"}
    params = resolved("sdxl_image_fast", None, of("composition", mask=mask)).params
    assert params.reference == Reference(**IMAGE, mask=mask, asked_as="composition")  # type: ignore[arg-type]


def test_composition_with_a_controlnet_changes_no_steps() -> None:
    answer = resolved("sdxl_image_fast", SDXL, of("composition", strength=1.0))
    assert (answer.params.steps, answer.adjustments) == (15, ())


def test_video_takes_its_frames_whole() -> None:
    params = resolved("video_fast", WAN, of("start_frame"), of("end_frame", strength=1.0)).params
    assert [one.strength for one in params.references] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "methods", "references", "errors"),
    [
        ("sdxl_image_fast", SDXL, [of("character")], {"references.0": "unsupported"}),
        ("sdxl_image_fast", SDXL, [of("start_frame")], {"references.0": "unsupported"}),
        ("sdxl_image_fast", SDXL, [of("style"), of("style")], {"references.1.kind": "conflict"}),
        ("sdxl_image_fast", SDXL, [of("style", mask=IMAGE)], {"references.0.mask": "unsupported"}),
        ("sdxl_image_fast", SDXL, [of("composition", mask=IMAGE)], {"references.0.mask": "unsupported"}),
        ("video_fast", WAN, [of("image")], {"references.0": "unsupported"}),
        ("video_fast", WAN, [of("end_frame")], {"references": "missing"}),
        ("video_fast", WAN, [of("start_frame", strength=0.5)], {"references.0.strength": "unsupported"}),
        ("video_fast", WAN, [of("start_frame", mask=IMAGE)], {"references.0.mask": "unsupported"}),
        ("video_fast", BOTH, [of("start_frame")], {"references": "missing"}),
        ("video_fast", {}, [of("start_frame")], {"references.0": "unsupported"}),
        ("image_fast", WAN, [of("start_frame")], {"references.0": "unsupported"}),
    ],
)
def test_reference_that_the_model_can_not_honour_is_refused(
    name: str, methods: Methods, references: list[dict[str, Any]], errors: dict[str, str]
) -> None:
    assert refusal(name, methods, *references) == errors


def test_loras_beside_frames_are_refused_by_name() -> None:
    job_type = resolve("video_fast")
    given = GivenParams(prompt="a cat", references=[of("start_frame")], loras=(LoraUse(name="ink"),))
    with pytest.raises(InvalidParams) as refused:
        resolve_params(job_type, given, default_for(job_type.family), ["ink"], WAN)
    assert {error.field: error.code for error in refused.value.errors} == {"loras": "conflict"}


@pytest.mark.parametrize("kind", [None, "style", "character", "composition"])
def test_row_of_an_earlier_version_starts_from_its_one_reference(kind: str | None) -> None:
    now = resolved("sdxl_image_fast", None).params.model_dump(mode="json")
    del now["references"]
    before = now | {"reference": IMAGE | {"strength": 0.3, "kind": kind, "mask": None}}
    assert GenerationParams.model_validate(before).references == (Reference(bucket="b", key="k", strength=0.3),)
    assert GenerationParams.model_validate(now | {"reference": None}).references == ()


def test_neither_of_a_single_reference_and_a_list_is_lost() -> None:
    both = GivenParams.model_validate({"prompt": "p", "reference": IMAGE, "references": [IMAGE | {"kind": "style"}]})
    assert [one.kind for one in both.references] == ["image", "style"]


def test_row_with_two_references_of_a_kind_is_refused() -> None:
    row = resolved("sdxl_image_fast", None).params.model_dump(mode="json")
    with pytest.raises(ValueError, match="one reference of each kind"):
        GenerationParams.model_validate(row | {"references": [IMAGE, IMAGE]})


def test_params_come_back_from_json_as_they_were() -> None:
    params = resolved("sdxl_image_fast", SDXL, of("style"), of("image", mask=IMAGE)).params
    assert GenerationParams.model_validate_json(params.model_dump_json()) == params
