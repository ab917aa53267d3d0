from dataclasses import replace

import pytest

from models.catalog import Family, Format, Quality
from models.params import ContentMode
from models.prompting.prompts import NoTemplate, builtin_templates
from models.prompting.selection import Wanted, select_template


def wanted(
    family: Family = Family.SDXL,
    format: Format = Format.IMAGE,
    quality: Quality = Quality.FAST,
    enhanced7b: bool = False,
    mode: ContentMode = "sfw",
) -> Wanted:
    return Wanted(target_model=family, job_type=format, quality=quality, enhanced7b=enhanced7b, content_mode=mode)


@pytest.mark.parametrize(
    ("family", "format", "quality", "enhanced7b", "name"),
    [
        (Family.SDXL, Format.IMAGE, Quality.FAST, False, "SDXL_FAST"),
        (Family.SDXL, Format.IMAGE, Quality.HIGH, False, "SDXL_HIGH"),
        (Family.RV51, Format.IMAGE, Quality.HIGH, False, "SDXL_HIGH"),
        (Family.WAN, Format.VIDEO, Quality.FAST, False, "WAN_FAST"),
        (Family.WAN, Format.VIDEO, Quality.HIGH, False, "WAN_FAST"),
        (Family.WAN, Format.VIDEO, Quality.FAST, True, "WAN_FAST"),
        (Family.WAN, Format.VIDEO, Quality.HIGH, True, "WAN_HIGH_7B"),
        (Family.WAN, Format.IMAGE, Quality.HIGH, True, "WAN_IMAGE"),
    ],
)
@pytest.mark.parametrize("mode", ["sfw", "nsfw"])
def test_select_template_finds_the_fitting_one(
    family: Family, format: Format, quality: Quality, enhanced7b: bool, name: str, mode: ContentMode
) -> None:
    chosen = select_template(builtin_templates(), wanted(family, format, quality, enhanced7b, mode))
    assert (chosen.template.name, chosen.template.content_mode, chosen.misfits) == (name, mode, ())


def test_select_template_says_what_does_not_fit() -> None:
    only = [t for t in builtin_templates() if t.name == "SDXL_HIGH" and t.content_mode == "sfw"]
    chosen = select_template(only, wanted(mode="nsfw"))
    assert (chosen.template.name, chosen.misfits) == ("SDXL_HIGH", ("content_mode", "quality"))
    assert chosen.account() == {
        "asked": {
            "target_model": "sdxl",
            "job_type": "image",
            "use_case": "enhancement",
            "content_mode": "nsfw",
            "quality": "fast",
            "enhanced7b": False,
        },
        "taken": {
            "template_name": "SDXL_HIGH",
            "target_model": "sdxl",
            "job_type": "image",
            "use_case": "enhancement",
            "content_mode": "sfw",
            "quality": "high",
            "enhanced7b": None,
        },
        "misfits": ["content_mode", "quality"],
        "reason": "no active template is for content_mode nsfw; no active template is for quality fast",
    }


def test_select_template_says_that_rv51_reads_what_sdxl_reads() -> None:
    chosen = select_template(builtin_templates(), wanted(Family.RV51))
    assert (chosen.misfits, chosen.account()["reason"]) == ((), "rv51 reads the prompts that sdxl reads")
    assert select_template(builtin_templates(), wanted()).account()["reason"] is None


def test_select_template_takes_plain_enhancement_for_another_use_case_and_says_so() -> None:
    scene = [replace(t, use_case="scene_description", name="SCENE") for t in builtin_templates()][:1]
    assert scene[0].name == "SCENE"
    asked = replace(wanted(), use_case="scene_description")
    assert select_template([*builtin_templates(), *scene], asked).template.name == "SCENE"
    chosen = select_template(builtin_templates(), asked)
    assert (chosen.template.name, chosen.misfits) == ("SDXL_FAST", ("use_case",))
    # a template of another use case never stands in for plain enhancement
    with pytest.raises(NoTemplate):
        select_template(scene, wanted())


def test_select_template_never_gives_an_nsfw_template_to_sfw() -> None:
    only = [t for t in builtin_templates() if t.content_mode == "nsfw"]
    with pytest.raises(NoTemplate) as missing:
        select_template(only, wanted())
    assert missing.value.code == "no_template_available"
