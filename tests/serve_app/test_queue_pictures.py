"""queue-job with pictures: the three modes and their numbers by hand, and the frames of videos."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from db.blobs import BlobNotFound
from serve_app.api.queue_requests import read_submission
from tests.serve_app.queueing import PLAIN, QUEUE, STEERED, Gallery, gallery, notes, png, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

PICTURE = "@"  # stands for the path of alice's upload


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(
    shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Any
) -> AsyncIterator[Gallery]:
    """A profile that takes images to start from, and no other references."""
    folder = tmp_path_factory.mktemp("pictures")
    profile = folder / "plain.yaml"
    profile.write_text(PLAIN)
    async with gallery(shared_database, folder, state_dir, profile=str(profile)) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def steered(
    site: Gallery, shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Any
) -> AsyncIterator[Gallery]:
    """The same over a profile that takes every kind of reference."""
    folder = tmp_path_factory.mktemp("steered")
    profile = folder / "steered.yaml"
    profile.write_text(STEERED)
    async with gallery(shared_database, folder, state_dir, profile=str(profile)) as opened:
        yield opened


def image(prompt: str = "", top: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    body = {"job_type": "sdxl_image_fast", "prompt": prompt, "reference_image_url": PICTURE, "metadata": metadata}
    return body | (top or {})


def video(**metadata: Any) -> dict[str, Any]:
    return {"job_type": "video_fast", "prompt": "a mill turns", "metadata": metadata}


def filled(value: Any, picture: str) -> Any:
    """A body with a picture where the sign for it stands."""
    if isinstance(value, dict):
        return {name: filled(inner, picture) for name, inner in value.items()}
    return picture if value == PICTURE else value


# strength, guidance, steps, enhanced prompt, template
Numbers = tuple[float, float, int, str | None, str | None]
MODES: list[tuple[str, dict[str, Any], Numbers]] = [
    # 0.05 of 15 steps is none: 20 are the fewest of which one is left
    ("copy", image(exact_copy_mode=True), (0.95, 1.0, 20, None, "exact_copy_skip_enhance")),
    ("copy by its mode", image(reference_mode="copy"), (0.95, 1.0, 20, None, "exact_copy_skip_enhance")),
    (
        "copy with noise",
        image(top={"denoise_strength": 0.3}, exact_copy_mode=True),
        (0.7, 1.0, 15, None, "exact_copy_skip_enhance"),
    ),
    (
        "copy with steps",
        image(top={"steps": 40}, exact_copy_mode=True),
        (0.95, 1.0, 40, None, "exact_copy_skip_enhance"),
    ),
    (
        "copy with guidance",
        image(top={"guidance_scale": 9}, exact_copy_mode=True),
        (0.95, 1.0, 20, None, "exact_copy_skip_enhance"),
    ),
    (
        "copy of what is described is a change",
        image(exact_copy_mode=True, originalEnhancedPrompt="a mill"),
        (0.8, 6.0, 20, "a mill", "original_from_metadata"),
    ),
    (
        "copy with a prompt is a change",
        image("red", exact_copy_mode=True),
        (0.8, 6.0, 20, "red, same subject, same framing", "manual_compose_fallback"),
    ),
    (
        "change by its prompt",
        image("red"),
        (0.8, 6.0, 20, "red, same subject, same framing", "manual_compose_fallback"),
    ),
    (
        "change of what is described",
        image("red", originalEnhancedPrompt="a mill by a river", reference_mode="modify"),
        (0.8, 6.0, 20, "red, a mill by a river", "modify_flow"),
    ),
    ("change without words", image(reference_mode="modify"), (0.8, 6.0, 20, None, "original_prompt")),
    ("change, skipped", image("red", skip_enhancement=True), (0.8, 6.0, 20, None, "original_prompt")),
    ("change, no model", image("red", enhancement_model="none"), (0.8, 6.0, 20, None, "original_prompt")),
    (
        "change with all given",
        image("red", {"denoise_strength": 0.45, "guidance_scale": 8, "steps": 31}, skip_enhancement=True),
        (0.55, 8.0, 31, None, "original_prompt"),
    ),
    (
        "change by its strength",
        image("red", {"reference_strength": 0.6}, skip_enhancement=True),
        (0.6, 6.0, 20, None, "original_prompt"),
    ),
    ("text", image(), (0.5, 6.0, 15, None, "original_prompt")),
    (
        "composition without ControlNet",
        image("red", skip_enhancement=True, reference_type="composition"),
        (0.8, 6.0, 20, None, "original_prompt"),
    ),
]


@pytest.mark.parametrize(("body", "numbers"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
async def test_a_mode_has_the_numbers_of_the_contract(site: Gallery, body: dict[str, Any], numbers: Numbers) -> None:
    row = await site.row(await site.queue(**filled(body, site.path)))
    params = row["params"]
    (reference,) = params["references"]
    found = (reference["strength"], params["guidance_scale"], params["steps"])
    assert (*found, row["enhanced_prompt"], row["template_name"]) == numbers
    assert (reference["kind"], row["stage"], row["original_prompt"]) == ("image", "generate", body["prompt"])
    assert await site.bytes_of(reference) == await site.server.blobs.get(*site.path.split("/", 1))


async def test_a_change_that_was_worded_before_is_not_worded_again(site: Gallery) -> None:
    body = filled(image("red, a mill", originalEnhancedPrompt="a mill"), site.path)
    _, asked = await read_submission(site.server.edge, body, worded=True)
    assert (asked.enhanced_prompt, asked.template_name) == (None, "original_prompt")


async def test_the_old_dialect_has_the_same_modes(site: Gallery) -> None:
    metadata = {"exact_copy_mode": True, "reference_image_url": site.path}
    row = await site.row(await site.queue(jobType="sdxl_image_fast", metadata=metadata))
    assert (row["template_name"], row["params"]["references"][0]["strength"]) == ("exact_copy_skip_enhance", 0.95)


async def test_the_picture_of_the_metadata_goes_first(site: Gallery) -> None:
    body = filled(image("red", {"reference_image_url": "https://127.0.0.1/x"}, reference_image_url=PICTURE), site.path)
    await site.queue(**body)


async def test_the_negatives_are_those_of_the_mode(site: Gallery) -> None:
    async def negative(body: dict[str, Any]) -> list[str]:
        said = await site.queue(**filled(body | {"negative_prompt": "fog"}, site.path))
        return [term.strip() for term in said["job"]["params"]["negative_prompt"].split(",") if term.strip()]

    plain = await negative({"job_type": "sdxl_image_fast", "prompt": "red"})
    assert {"bad anatomy", "deformed hands", "fog"} <= set(plain)
    assert await negative(image("red")) == [
        "nudity",
        "sexual content",
        "worst quality",
        "low quality",
        "watermark",
        "fog",
    ]
    assert await negative(image(exact_copy_mode=True)) == []


NOTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "a copy's own",
        image(top={"guidance_scale": 7, "negative_prompt": "fog", "steps": 20}, exact_copy_mode=True),
        {"guidance_scale": (7, 1.0), "negative_prompt": ("3 characters", "none")},
    ),
    (
        "a copy's kind",
        image(top={"steps": 20}, exact_copy_mode=True, reference_type="character"),
        {"reference_type": ("character", "image")},
    ),
    (
        "a copy's enhancement",
        image(top={"steps": 20, "enhanced_prompt": "a mill"}, exact_copy_mode=True, user_requested_enhancement=True),
        {
            "enhanced_prompt": ("6 characters", "none"),
            "metadata.user_requested_enhancement": ("true", "false"),
        },
    ),
    ("a copy with a prompt", image("red", exact_copy_mode=True), {"metadata.exact_copy_mode": ("true", "modify")}),
    (
        "a change's kind",
        image("red", reference_mode="modify", reference_type="style"),
        {"reference_type": ("style", "image")},
    ),
    (
        "a change's other prompt",
        image("red", {"enhanced_prompt": "a mill"}),
        {"enhanced_prompt": ("6 characters", "none")},
    ),
    (
        "two strengths that differ",
        image("red", {"reference_strength": 0.5, "denoise_strength": 0.1}),
        {"reference_strength": (0.5, 0.9)},
    ),
    ("two that agree", image("red", {"reference_strength": 0.85, "denoise_strength": 0.15}), {}),
    ("too much noise", image("red", {"denoise_strength": 0.95}), {"denoise_strength": (0.95, 0.9)}),
    ("all noise", image("red", {"denoise_strength": 1}), {"denoise_strength": (1, 0.9)}),
    ("too little strength", image("red", {"reference_strength": 0.05}), {"reference_strength": (0.05, 0.1)}),
    (
        "too little, said in both ways",
        image("red", {"reference_strength": 0, "denoise_strength": 1}),
        {"denoise_strength": (1, 0.9), "reference_strength": (0, 0.1)},
    ),
    # 0.01 of 20 steps is none: 100 are the fewest of which one is left
    ("no noise", image("red", {"denoise_strength": 0}), {"denoise_strength": (0, 0.01), "steps": (20, 100)}),
    ("all strength", image("red", {"reference_strength": 1}), {"reference_strength": (1, 0.99), "steps": (20, 100)}),
    (
        "a copy with all strength",
        image(top={"reference_strength": 1, "denoise_strength": 0}, exact_copy_mode=True),
        {"denoise_strength": (0, 0.01), "reference_strength": (1, 0.99), "steps": (15, 100)},
    ),
]


@pytest.mark.parametrize(("body", "noted"), [row[1:] for row in NOTED], ids=[row[0] for row in NOTED])
async def test_what_a_mode_does_not_use_is_told(site: Gallery, body: dict[str, Any], noted: dict[str, Any]) -> None:
    assert notes(await site.queue(**filled(body, site.path))) == noted


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("less than nothing", image("red", {"denoise_strength": -0.1}), 400, "denoise_strength"),
    ("more than all", image("red", {"reference_strength": 1.1}), 400, "reference_strength"),
    ("a style", image("red", reference_type="style"), 503, "reference_type"),
    ("a character", image("red", reference_type="character"), 503, "reference_type"),
    ("a start", video(start_reference_url=PICTURE), 503, "metadata.start_reference_url"),
    ("an end", video(end_reference_url=PICTURE), 503, "metadata.end_reference_url"),
    ("a single frame", video(reference_image_url=PICTURE), 503, "reference_image_url"),
    ("a picture for WAN", image("red", {"job_type": "image_fast"}), 400, "reference_image_url"),
    ("two starts", video(reference_image_url=PICTURE, start_reference_url="x"), 400, "reference_image_url"),
    ("a mode of others", video(video_reference_mode="both"), 400, "metadata.video_reference_mode"),
    ("a mode that is none", video(video_reference_mode="middle"), 400, "video_reference_mode"),
    ("a change that is never made", image("a nude child"), 400, "prompt"),
    ("a description of what is never made", image("red", originalEnhancedPrompt="a nude child"), 400, "prompt"),
]


@pytest.mark.parametrize(("body", "status", "field"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
async def test_what_a_picture_can_not_be_is_refused_and_nothing_kept(
    site: Gallery, body: dict[str, Any], status: int, field: str
) -> None:
    before = await site.server.stored()
    answer = await site.alice.post(QUEUE, json=filled(body, site.path))
    said = answer.json()
    assert (answer.status_code, [error["field"] for error in said["errors"]]) == (status, [field]), answer.text
    assert (said["code"] == "reference_type_unavailable") is (status == 503)
    assert await site.server.stored() == before


FRAMES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("none", video(), []),
    ("single", video(reference_image_url=PICTURE, video_reference_mode="single"), ["start_frame"]),
    ("start", video(start_reference_url=PICTURE, video_reference_mode="start"), ["start_frame"]),
    ("the same twice", video(start_reference_url=PICTURE, reference_image_url=PICTURE), ["start_frame"]),
    (
        "both",
        video(start_reference_url=PICTURE, end_reference_url=PICTURE, video_reference_mode="both"),
        ["start_frame", "end_frame"],
    ),
    (
        "single and end",
        video(reference_image_url=PICTURE, end_reference_url=PICTURE, video_reference_mode="both"),
        ["start_frame", "end_frame"],
    ),
]


@pytest.mark.parametrize(("body", "kinds"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
async def test_a_video_has_frames_and_no_mode_of_images(
    steered: Gallery, body: dict[str, Any], kinds: list[str]
) -> None:
    row = await steered.row(await steered.queue(**filled(body, steered.path)))
    params = row["params"]
    assert [(one["kind"], one["strength"]) for one in params["references"]] == [(kind, 1.0) for kind in kinds]
    assert len({one["key"] for one in params["references"]}) == len(kinds)
    # the original made a change of every video with a picture: noise 0.20, guidance 6.0, 20 steps
    assert (params["guidance_scale"], params["steps"], row["enhanced_prompt"]) == (6.5, 25, None)


async def test_an_end_needs_a_start(steered: Gallery) -> None:
    answer = await steered.alice.post(QUEUE, json=filled(video(end_reference_url=PICTURE), steered.path))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, "metadata.end_reference_url")


async def test_strengths_of_a_frame_are_told_to_have_no_effect(steered: Gallery) -> None:
    body = video(reference_image_url=PICTURE, exact_copy_mode=True, reference_type="style")
    said = await steered.queue(**filled(body, steered.path), reference_strength=0.9, denoise_strength=0.1)
    assert notes(said) == {
        "metadata.exact_copy_mode": ("true", "none"),
        "reference_type": ("style", "start_frame"),
        "reference_strength": (0.9, "none"),
        "denoise_strength": (0.1, "none"),
    }


@pytest.mark.parametrize("kind", ["style", "character", "composition"])
async def test_a_picture_that_only_steers_changes_no_other_number(steered: Gallery, kind: str) -> None:
    body = filled(image("red", {"reference_strength": 0.7}, reference_type=kind), steered.path)
    row = await steered.row(await steered.queue(**body))
    params = row["params"]
    assert [(one["kind"], one["strength"]) for one in params["references"]] == [(kind, 0.7)]
    assert (params["guidance_scale"], params["steps"], row["enhanced_prompt"]) == (6.0, 15, None)
    assert "bad anatomy" in params["negative_prompt"]


@pytest.mark.parametrize(("asked", "used", "noted"), [(1, 1.0, {}), (0, 0.1, {"reference_strength": (0, 0.1)})])
async def test_a_style_may_have_all_its_strength(
    steered: Gallery, asked: float, used: float, noted: dict[str, Any]
) -> None:
    body = filled(image("red", {"reference_strength": asked}, reference_type="style"), steered.path)
    said = await steered.queue(**body)
    assert (said["job"]["params"]["references"][0]["strength"], notes(said)) == (used, noted)


async def test_several_references_have_strengths_of_their_own(steered: Gallery) -> None:
    asked = [
        {"image": steered.path, "strength": 0.8},
        {"type": "style", "image": steered.upload_id, "strength": 0.3},
        {"type": "composition", "image": steered.kept},
    ]
    answer = await steered.alice.post(
        "/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "a mill", "references": asked}
    )
    assert answer.status_code == 202, answer.text
    job = answer.json()
    kept = job["params"]["references"]
    assert [(one["kind"], one["strength"]) for one in kept] == [("image", 0.8), ("style", 0.3), ("composition", 0.5)]
    stem = f"{steered.alice_id}/{job['id']}"
    assert [one["key"] for one in kept] == [f"{stem}.png", f"{stem}.ref1.png", f"{stem}.ref2.png"]
    assert await steered.bytes_of(kept[2]) == png("navy")
    assert await steered.bytes_of(kept[0]) == await steered.bytes_of(kept[1]) != png("navy")


async def test_erasing_a_job_erases_all_its_references(steered: Gallery) -> None:
    mask = (await send(steered.alice, png("white")))["id"]
    asked = [{"image": steered.path, "mask": mask}, {"type": "style", "image": steered.upload_id}]
    body = {"job_type": "sdxl_image_fast", "prompt": "a mill", "references": asked}
    job = (await steered.alice.post("/v1/jobs", json=body)).json()
    image, style = job["params"]["references"]
    assert [len(await steered.bytes_of(one)) > 0 for one in (image, image["mask"], style)] == [True] * 3
    await steered.alice.post(job["urls"]["cancel"])
    assert (await steered.alice.delete(job["urls"]["self"])).status_code == 204
    for one in (image, image["mask"], style):
        with pytest.raises(BlobNotFound):
            await steered.bytes_of(one)


LISTED: list[tuple[str, dict[str, Any], int, str]] = [
    ("beside a single one", {"references": [{"image": PICTURE}], "reference_image_url": "x"}, 422, "references"),
    ("beside a strength", {"references": [{"image": PICTURE}], "reference_strength": 0.5}, 422, "references"),
    ("none", {"references": []}, 422, "references"),
    ("without a picture", {"references": [{"type": "style"}]}, 422, "references.0.image"),
    ("of no kind", {"references": [{"image": PICTURE, "type": "mood"}]}, 422, "references.0.type"),
    ("with another field", {"references": [{"image": PICTURE, "weight": 1}]}, 422, "references.0.weight"),
    (
        "not installed",
        {"references": [{"image": PICTURE}, {"image": PICTURE, "type": "style"}]},
        503,
        "references.1.type",
    ),
    ("two of a kind", {"references": [{"image": PICTURE}, {"image": PICTURE}]}, 422, "references.1.type"),
    ("too strong", {"references": [{"image": PICTURE, "strength": 1.2}]}, 422, "references.0.strength"),
    ("frames of an image", {"references": [{"image": PICTURE, "type": "start_frame"}]}, 422, "references.0.image"),
    ("not there", {"references": [{"image": "00000000-0000-0000-0000-000000000000"}]}, 422, "references.0.image"),
    ("inside", {"references": [{"image": "https://127.0.0.1/x"}]}, 422, "references.0.image"),
]


@pytest.mark.parametrize(("changes", "status", "field"), [r[1:] for r in LISTED], ids=[r[0] for r in LISTED])
async def test_a_list_of_references_is_refused_by_its_field(
    site: Gallery, changes: dict[str, Any], status: int, field: str
) -> None:
    changes = changes | {"references": [filled(one, site.path) for one in changes["references"]]}
    before = await site.server.stored()
    answer = await site.alice.post("/v1/jobs", json={"job_type": "sdxl_image_fast", "prompt": "a mill"} | changes)
    assert (answer.status_code, [error["field"] for error in answer.json()["errors"]]) == (status, [field]), answer.text
    assert await site.server.stored() == before
