"""The modes of queue-job, by hand: which one a body asks for, its wording, and the numbers it gets."""

import pytest

from models.catalog import Family, default_for
from serve_app.api.queue_requests import RATIOS, nearest_size
from serve_app.modes import PRESETS, VIDEO_MODES, Mode, Wish, Wording, changed, nearest_count, nearest_strength, worded

COPY, MODIFY, TEXT = Mode.COPY, Mode.MODIFY, Mode.TEXT


@pytest.mark.parametrize(
    ("wish", "mode"),
    [
        (Wish(), TEXT),
        (Wish(prompt="red"), MODIFY),
        (Wish(described="a mill"), MODIFY),
        (Wish(modify=True), MODIFY),
        (Wish(copy=True), COPY),
        (Wish(copy=True, modify=True), COPY),
        (Wish(copy=True, prompt="red"), MODIFY),
        (Wish(copy=True, described="a mill"), MODIFY),
    ],
)
def test_a_mode_follows_from_what_is_said_of_the_picture(wish: Wish, mode: Mode) -> None:
    assert wish.mode() is mode


def test_the_presets_are_those_of_the_contract() -> None:
    found = {mode: (round(1 - p.strength, 6), p.guidance_scale, p.steps) for mode, p in PRESETS.items()}
    assert found == {COPY: (0.05, 1.0, 15), MODIFY: (0.2, 6.0, 20)}


@pytest.mark.parametrize(
    ("wish", "skip", "wording"),
    [
        (Wish(prompt="a red roof", described="a mill"), False, Wording("a red roof, a mill", "modify_flow")),
        (
            Wish(prompt="a red roof"),
            False,
            Wording("a red roof, same subject, same framing", "manual_compose_fallback"),
        ),
        (Wish(described="a mill"), False, Wording("a mill", "original_from_metadata")),
        (Wish(described="a mill"), True, Wording("a mill", "original_from_metadata")),
        (Wish(prompt="a red roof", described="a mill"), True, Wording(None, "original_prompt")),
        (Wish(modify=True), False, Wording(None, "original_prompt")),
    ],
)
def test_a_change_is_worded_without_a_model(wish: Wish, skip: bool, wording: Wording) -> None:
    assert changed(wish, skip=skip) == wording


@pytest.mark.parametrize(
    ("given", "skip", "wanted", "always", "wording"),
    [
        (None, False, False, False, Wording(None, "original_prompt", None)),
        (None, False, True, False, Wording(None, None, True)),
        (None, True, True, False, Wording(None, "original_prompt", False)),
        (None, False, False, True, Wording(None, None, None)),
        ("better", False, False, False, Wording("better", None, None)),
    ],
)
def test_a_text_is_worded_by_the_language_model_where_it_is_wanted(
    given: str | None, skip: bool, wanted: bool, always: bool, wording: Wording
) -> None:
    assert worded(given, skip=skip, wanted=wanted, always=always) == wording


@pytest.mark.parametrize(
    ("asked", "used"), [(-3, 1), (0, 1), (1, 1), (2, 3), (3, 3), (4, 6), (6, 6), (7, 6), (10**12, 6)]
)
def test_a_number_of_images_becomes_one_that_can_be(asked: int, used: int) -> None:
    assert nearest_count(asked, (1, 3, 6)) == used


@pytest.mark.parametrize(
    ("asked", "starts", "used"),
    [(0.0, True, 0.1), (0.05, False, 0.1), (0.1, True, 0.1), (0.5, True, 0.5), (1.0, True, 0.99), (1.0, False, 1.0)],
)
def test_a_strength_becomes_one_that_can_be(asked: float, starts: bool, used: float) -> None:
    assert nearest_strength(asked, starts=starts)[0] == used


def test_a_video_is_one() -> None:
    assert nearest_count(6, (1,)) == 1


@pytest.mark.parametrize(
    ("family", "ratio", "size"),
    [
        (Family.SDXL, "1:1", (1024, 1024)),
        (Family.SDXL, "16:9", (1024, 576)),
        (Family.SDXL, "9:16", (576, 1024)),
        (Family.SDXL, "2:3", (832, 1216)),
        (Family.SDXL, "3:2", (1216, 832)),
        (Family.WAN, "16:9", (832, 480)),
        (Family.WAN, "9:16", (480, 832)),
    ],
)
def test_an_aspect_ratio_is_a_size_of_the_published_model(family: Family, ratio: str, size: tuple[int, int]) -> None:
    assert nearest_size(default_for(family), RATIOS[ratio]) == size


def test_every_pair_of_pictures_has_a_video_mode() -> None:
    possible = {
        (single, start, end) for single in (0, 1) for start in (0, 1) for end in (0, 1) if not (single and start)
    }
    assert {tuple(map(int, key)) for key in VIDEO_MODES} == possible
    assert set(VIDEO_MODES.values()) == {"none", "single", "start", "end", "both"}
