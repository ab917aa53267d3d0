import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.catalog import FAMILIES, JOB_TYPES, Family, Format, Quality, UnknownJobType, default_for, resolve

NAMES = [
    "sdxl_image_fast",
    "sdxl_image_high",
    "image_fast",
    "image_high",
    "video_fast",
    "video_high",
    "image7b_fast_enhanced",
    "image7b_high_enhanced",
    "video7b_fast_enhanced",
    "video7b_high_enhanced",
    "wan_video_fast",
    "wan_video_high",
    "rv51_fast",
    "rv51_high",
]


def test_catalog_has_the_specified_job_types() -> None:
    assert sorted(JOB_TYPES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_resolve_reads_quality_and_format_from_the_name(name: str) -> None:
    job_type = resolve(name)
    assert job_type.name == name
    assert job_type.quality is (Quality.HIGH if "high" in name else Quality.FAST)
    assert job_type.format is (Format.VIDEO if "video" in name else Format.IMAGE)
    assert job_type.enhanced is ("7b" in name)
    assert job_type.family.value == name.split("_")[0] if name[:4] in ("sdxl", "rv51") else Family.WAN


def test_resolve_alias_keeps_its_name_and_behaves_as_the_other() -> None:
    alias, original = resolve("wan_video_high"), resolve("video_high")
    assert (alias.name, alias.behaves_as) == ("wan_video_high", "video_high")
    assert (alias.credits, alias.initial_seconds) == (original.credits, original.initial_seconds) == (5, 180)


@pytest.mark.parametrize("name", ["", "SDXL_IMAGE_FAST", "sdxl", "video_medium", "sdxl_image_fast "])
def test_resolve_refuses_unknown_names(name: str) -> None:
    with pytest.raises(UnknownJobType) as refused:
        resolve(name)
    assert refused.value.code == "unknown_job_type"
    assert "sdxl_image_fast" in refused.value.message


def test_catalog_credits_per_format() -> None:
    credits = {name: JOB_TYPES[name].credits for name in NAMES}
    assert [credits[name] for name in NAMES] == [1, 2, 1, 2, 3, 5, 2, 3, 4, 6, 3, 5, 1, 2]


def test_default_for_sdxl_is_the_specification() -> None:
    defaults = default_for(Family.SDXL)
    assert defaults.size == (1024, 1024)
    assert set(defaults.sizes) == {(1024, 1024), (832, 1216), (1216, 832), (1024, 576), (576, 1024)}
    assert (defaults.steps.of(Quality.FAST), defaults.guidance.of(Quality.FAST)) == (15, 6.0)
    assert (defaults.steps.of(Quality.HIGH), defaults.guidance.of(Quality.HIGH)) == (25, 7.5)
    assert defaults.image_counts == (1, 3, 6)
    assert not defaults.makes_video


def test_default_for_wan_is_the_specification() -> None:
    defaults = default_for(Family.WAN)
    assert defaults.size == (480, 832)
    assert (defaults.frames, defaults.frames_min, defaults.frames_max, defaults.fps) == (81, 17, 121, 16)
    assert (defaults.steps.fast, defaults.guidance.fast, defaults.steps.high, defaults.guidance.high) == (
        25,
        6.5,
        50,
        7.5,
    )
    assert defaults.shift == 5.0
    assert not FAMILIES[Family.WAN].takes_reference


def test_with_overrides_changes_what_it_names() -> None:
    tiny = default_for(Family.SDXL).with_overrides(
        {"sizes": [[64, 64], [96, 64]], "width": 64, "height": 64, "steps": {"fast": 2}}
    )
    assert (tiny.size, tiny.steps.fast, tiny.steps.high) == ((64, 64), 2, 25)
    assert default_for(Family.SDXL).steps.fast == 15


@pytest.mark.parametrize(
    "overrides",
    [
        {"sizes": [[64, 64]]},
        {"scheduler": "magic"},
        {"frames": 80},
        {"frames_min": 101},
        {"fps": None},
        {"steps": {"fast": 0}},
        {"guidance": {"fast": float("nan")}},
        {"colour": "red"},
        {"sizes": [[100, 101]], "width": 100, "height": 101},
    ],
)
def test_with_overrides_refuses_what_does_not_hang_together(overrides: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        default_for(Family.WAN).with_overrides(overrides)


def test_importing_the_text_modules_loads_no_heavy_library() -> None:
    program = (
        "import sys; import models.catalog, models.params, models.policy, models.qwen, models.prompting.prompts,"
        " models.prompting.answers, models.prompting.enhancement;"
        " print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
