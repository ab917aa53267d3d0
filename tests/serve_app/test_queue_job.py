"""queue-job, field by field: each that the contract names, with the effect that it has on the job's row."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from models.catalog import JOB_TYPES, Family
from serve_app.api.queue_requests import READ
from serve_app.api.wire_requests import JobRequest
from tests.serve_app.queueing import QUEUE, Gallery, gallery, notes

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(
    shared_database: Any, tmp_path_factory: pytest.TempPathFactory, state_dir: Any
) -> AsyncIterator[Gallery]:
    async with gallery(shared_database, tmp_path_factory.mktemp("queue"), state_dir) as opened:
        yield opened


def snake(**changes: Any) -> dict[str, Any]:
    return {"job_type": "sdxl_image_fast", "prompt": "a lighthouse"} | changes


def old(top: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    return {"jobType": "sdxl_image_fast", "metadata": {"prompt": "a lighthouse"} | metadata} | (top or {})


def inside(**metadata: Any) -> dict[str, Any]:
    return snake(metadata=metadata)


async def of(site: Gallery, body: dict[str, Any], name: str) -> Any:
    """A fact of the job that a body makes: a column of its row, or a parameter."""
    row = await site.row(await site.queue(**body))
    return row["params"][name] if name in row["params"] else row[name]


@pytest.mark.parametrize("name", [name for name, one in JOB_TYPES.items() if one.family is not Family.RV51])
async def test_every_job_type_makes_its_row(site: Gallery, name: str) -> None:
    known = JOB_TYPES[name]
    for body in (snake(job_type=name), old({"jobType": name})):
        row = await site.row(await site.queue(**body))
        assert (row["job_type"], row["format"], row["quality"], row["model_type"], row["status"]) == (
            name,
            known.format.value,
            known.quality.value,
            known.family.value,
            "queued",
        )


OF_VIDEO = (
    "nudity, sexual content, low quality, blurry, jpeg artifacts, flicker, jittery motion, frozen frame, warped body,"
    " extra limbs, extra fingers, overexposed, washed out colors, subtitles, watermark, logo, text, fog"
)

FIELDS: list[tuple[str, dict[str, Any], str, Any]] = [
    ("prompt", snake(prompt="a mill"), "original_prompt", "a mill"),
    ("original_prompt", {"job_type": "sdxl_image_fast", "original_prompt": "a mill"}, "original_prompt", "a mill"),
    ("original_prompt first", snake(original_prompt="a mill"), "original_prompt", "a mill"),
    ("old prompt", old(prompt="a mill"), "original_prompt", "a mill"),
    ("old originalPrompt", {"jobType": "sdxl_image_fast", "originalPrompt": "a mill"}, "original_prompt", "a mill"),
    ("enhanced_prompt", snake(enhanced_prompt="a tall mill"), "enhanced_prompt", "a tall mill"),
    ("old enhancedPrompt", old({"enhancedPrompt": "a tall mill"}), "enhanced_prompt", "a tall mill"),
    ("quality", snake(quality="fast"), "quality", "fast"),
    ("quality of the type", snake(job_type="sdxl_image_high"), "quality", "high"),
    ("format", snake(format="png"), "format", "image"),
    ("model_type", snake(model_type="SDXL"), "model_type", "sdxl"),
    ("seed", snake(seed=7), "seed", 7),
    ("seed of 0", snake(seed=0), "seed", 0),
    ("old seed of 0", old(seed=0), "seed", 0),
    ("top seed first", snake(seed=0, metadata={"seed": 9}), "seed", 0),
    ("num_images", snake(num_images=3), "num_images", 3),
    ("num_images of 2", snake(num_images=2), "num_images", 3),
    ("num_images of 4", inside(num_images=4), "num_images", 6),
    ("num_images of 9", old(num_images=9), "num_images", 6),
    ("num_images of 0", snake(num_images=0), "num_images", 1),
    ("num_images of a video", snake(job_type="video_fast", num_images=3), "num_images", 1),
    ("steps", snake(steps=11), "steps", 11),
    ("inner steps", inside(steps=12), "steps", 12),
    ("steps of fast", snake(), "steps", 15),
    ("steps of high", snake(job_type="sdxl_image_high"), "steps", 25),
    ("guidance_scale", snake(guidance_scale=4), "guidance_scale", 4.0),
    ("inner guidance_scale", inside(guidance_scale=4.5), "guidance_scale", 4.5),
    ("guidance of fast", snake(), "guidance_scale", 6.0),
    ("scheduler", snake(scheduler="heun"), "scheduler", "heun"),
    ("guidance_interval", snake(guidance_interval=[0, 0.5]), "guidance_interval", [0.0, 0.5]),
    ("inner guidance_interval", inside(guidance_interval=[0.2, 0.5]), "guidance_interval", [0.2, 0.5]),
    ("reproducible", snake(reproducible=True), "reproducible", True),
    ("old reproducible", old(reproducible=True), "reproducible", True),
    ("no LoRAs", snake(loras=[]), "loras", []),
    ("content_mode", snake(content_mode="sfw"), "content_mode", "sfw"),
    ("compel_enabled", snake(compel_enabled=True), "compel_enabled", True),
    ("inner compel_enabled", inside(compel_enabled=True), "compel_enabled", True),
    ("contentType", inside(contentType="sfw"), "content_mode", "sfw"),
    ("aspect ratio 1:1", inside(aspect_ratio="1:1"), "width", 128),
    ("aspect ratio 16:9", inside(aspect_ratio="16:9"), "width", 224),
    ("aspect ratio 2:3", inside(aspect_ratio="2:3"), "height", 192),
    ("aspect ratio 9:16", inside(aspect_ratio="9:16"), "height", 224),
    ("negative of a video", snake(job_type="video_fast", negative_prompt="fog"), "negative_prompt", OF_VIDEO),
    ("template of a prompt as it is", snake(), "template_name", "original_prompt"),
    ("template of the caller's", snake(enhanced_prompt="a tall mill"), "template_name", None),
    ("wanted enhancement", inside(user_requested_enhancement=True), "stage", "enhance"),
    ("skipped", inside(user_requested_enhancement=True, skip_enhancement=True), "stage", "generate"),
    ("model none", inside(user_requested_enhancement=True, enhancement_model="none"), "stage", "generate"),
    ("no wish", snake(), "stage", "generate"),
    ("enhanced type", snake(job_type="video7b_fast_enhanced"), "stage", "enhance"),
    ("frames", snake(job_type="video_fast", frames=19), "frames", 17),
    ("callback_url", snake(callback_url="https://8.8.8.8/hook"), "callback_url", "https://8.8.8.8/hook"),
]


@pytest.mark.parametrize(("body", "name", "value"), [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS])
async def test_a_field_has_its_effect(site: Gallery, body: dict[str, Any], name: str, value: Any) -> None:
    assert await of(site, body, name) == value


CARRIED = {
    "model_key": "x",
    "model_id": "y",
    "seed_locked": True,
    "bypass_enhancement": True,
    "hard_override": True,
    "projectId": "p",
    "videoId": "v",
    "imageId": "i",
}
CARRIED_INSIDE = {
    "lock_hair": True,
    "clothing_edit_mode": False,
    "original_clothing_color": "red",
    "seed_locked": True,
    "duration": 5,
    "motion_intensity": 0.4,
    "shot_type": "wide",
    "camera_angle": "low",
    "style": "noir",
    "scene_id": "s",
    "conversation_id": "c",
    "credits": 3,
    "bucket": "sdxl_image_fast",
}


async def test_what_has_no_effect_is_carried(site: Gallery) -> None:
    row = await site.row(await site.queue(**snake(**CARRIED, metadata=CARRIED_INSIDE)))
    assert row["metadata"] == CARRIED | CARRIED_INSIDE


NOTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nothing", snake(), {}),
    ("a number of images", snake(num_images=2), {"num_images": (2, 3)}),
    ("one video", snake(job_type="video_fast", num_images=6), {"num_images": (6, 1)}),
    ("another model", snake(model_type="flux"), {"model_type": ("flux", "sdxl")}),
    ("a second prompt", snake(original_prompt="a mill"), {"prompt": ("12 characters", "none")}),
    ("a length", snake(job_type="video_fast", frames=19), {"frames": (19, 17)}),
    (
        "a shape that there is not",
        snake(job_type="video_fast", metadata={"aspect_ratio": "1:1"}),
        {"aspect_ratio": ("1:1", "96x160")},
    ),
    (
        "another language model where none is asked",
        inside(enhancement_model="mythomax"),
        {"metadata.enhancement_model": ("mythomax", "none")},
    ),
    (
        "another language model beside an enhanced prompt",
        snake(enhanced_prompt="a tall mill", enhancement_model="mythomax"),
        {"enhancement_model": ("mythomax", "none")},
    ),
    ("our language model", inside(enhancement_model="qwen_instruct"), {}),
    ("no name of a language model", inside(enhancement_model="", user_requested_enhancement=True), {}),
    (
        "strengths without a picture",
        snake(reference_strength=0.8, denoise_strength=0.2),
        {"reference_strength": (0.8, "none"), "denoise_strength": (0.2, "none")},
    ),
    (
        "a mode without a picture",
        inside(exact_copy_mode=True, reference_mode="modify", originalEnhancedPrompt="a mill", reference_type="style"),
        {
            "metadata.exact_copy_mode": ("true", "none"),
            "metadata.reference_mode": ("modify", "none"),
            "metadata.originalEnhancedPrompt": ("6 characters", "none"),
            "reference_type": ("style", "none"),
        },
    ),
]


@pytest.mark.parametrize(("body", "noted"), [row[1:] for row in NOTED], ids=[row[0] for row in NOTED])
async def test_what_can_not_be_used_as_given_is_told(
    site: Gallery, body: dict[str, Any], noted: dict[str, Any]
) -> None:
    said = await site.queue(**body)
    assert notes(said) == noted
    assert len(said["fixes_applied"]) == len(noted)


OTHER_MODEL = {"enhancement_model": "mythomax"}
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    (
        "another language model that would enhance",
        inside(user_requested_enhancement=True, **OTHER_MODEL),
        503,
        "metadata.enhancement_model",
    ),
    (
        "another language model by the strategy",
        snake(enhancement_strategy="qwen", metadata=OTHER_MODEL),
        503,
        "metadata.enhancement_model",
    ),
    (
        "another language model by the type",
        old({"jobType": "image7b_fast_enhanced"}, **OTHER_MODEL),
        503,
        "metadata.enhancement_model",
    ),
    ("a language model that is a list", inside(enhancement_model=["x"]), 400, "enhancement_model"),
    ("a language model of no character", inside(enhancement_model="a\0"), 400, "metadata.enhancement_model"),
    ("no type", {"prompt": "x"}, 400, "job_type"),
    ("a type that is none", snake(job_type="best"), 400, "job_type"),
    ("a model that is not there, before other faults", snake(job_type="rv51_fast", seed="x"), 503, "job_type"),
    ("another quality", snake(quality="high"), 400, "quality"),
    ("another format", snake(format="mp4"), 400, "format"),
    ("no type in the old dialect", {"jobType": "", "metadata": {"prompt": "x"}}, 400, "jobType"),
    ("no prompt", snake(prompt=None), 400, "prompt"),
    ("a prompt that is a number", snake(prompt=5), 400, "prompt"),
    ("an enhanced prompt that is a number", snake(enhanced_prompt=5), 400, "enhanced_prompt"),
    ("an enhanced prompt of 100 kB", snake(enhanced_prompt="a" * 100_000), 400, "enhanced_prompt"),
    ("an enhanced prompt with NUL", snake(enhanced_prompt="a\0"), 400, "enhanced_prompt"),
    ("a negative prompt that is a list", snake(negative_prompt=["x"]), 400, "negative_prompt"),
    ("metadata that is text", snake(metadata="x"), 400, "metadata"),
    ("metadata that is a list", snake(metadata=[1]), 400, "metadata"),
    ("0 steps", snake(steps=0), 400, "steps"),
    ("a seed of 2^70", inside(seed=2**70), 400, "seed"),
    ("a seed as text", snake(seed="7"), 400, "seed"),
    ("a guidance that is true", snake(guidance_scale=True), 400, "guidance_scale"),
    ("an unknown ratio", inside(aspect_ratio="7:5"), 400, "metadata.aspect_ratio"),
    ("a ratio that is a list", inside(aspect_ratio=[1]), 400, "aspect_ratio"),
    ("noise above 1", snake(reference_image_url="https://8.8.8.8/", denoise_strength=2), 400, "denoise_strength"),
    (
        "noise that is true",
        snake(reference_image_url="https://8.8.8.8/", denoise_strength=True),
        400,
        "denoise_strength",
    ),
    ("weights that are a list", snake(compel_enabled=True, compel_weights=[1]), 400, "compel_weights"),
    (
        "no enhancement of an enhanced type",
        snake(job_type="image7b_fast_enhanced", metadata={"skip_enhancement": True}),
        400,
        "enhance",
    ),
    ("an unused description of what is never made", inside(originalEnhancedPrompt="a nude child"), 400, "prompt"),
    ("an unused prompt for what is never made", snake(original_prompt="a", prompt="a nude child"), 400, "prompt"),
    ("a LoRA that is not here", snake(loras=[{"name": "ink"}]), 400, "loras"),
    ("a LoRA without a name", inside(loras=[{"weight": 1}]), 400, "loras.0.name"),
    ("LoRAs that are text", snake(loras="ink"), 400, "loras"),
    ("an interval of one number", snake(guidance_interval=[0.5]), 400, "guidance_interval.1"),
    ("an interval that ends before it starts", snake(guidance_interval=[0.5, 0.2]), 400, "guidance_interval"),
    ("a reproducible that is text", snake(reproducible="yes"), 400, "reproducible"),
    ("a mode that contradicts", snake(content_mode="sfw", contentType="nsfw"), 400, "contentType"),
    ("a content mode that is none", snake(content_mode="image"), 400, "content_mode"),
    ("a model that is none", snake(model_type="dall-e"), 400, "model_type"),
    ("a model that is a list", snake(model_type=["sdxl"]), 400, "model_type"),
    ("a count in a string", snake(num_images="3"), 400, "num_images"),
    ("a count that is true", snake(num_images=True), 400, "num_images"),
    ("a count that is no whole number", snake(num_images=1.5), 400, "num_images"),
    ("a mode that is none", inside(reference_mode="mix"), 400, "metadata.reference_mode"),
    ("a mode that is a list", inside(reference_mode=["modify"]), 400, "metadata.reference_mode"),
    ("a kind that is none", inside(reference_type="mood"), 400, "reference_type"),
    ("a copy that is text", inside(exact_copy_mode="yes"), 400, "metadata.exact_copy_mode"),
    ("a description that is a number", inside(originalEnhancedPrompt=5), 400, "metadata.originalEnhancedPrompt"),
    ("frames of an image", inside(start_reference_url="x"), 400, "metadata.start_reference_url"),
    ("an end of an image", inside(end_reference_url="x"), 400, "metadata.end_reference_url"),
    ("a start that is a list", snake(job_type="video_fast", start_reference_url=[1]), 400, "start_reference_url"),
]


@pytest.mark.parametrize(("body", "status", "field"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
async def test_what_can_not_be_is_refused_by_field(
    site: Gallery, body: dict[str, Any], status: int, field: str
) -> None:
    before = await site.server.stored()
    answer = await site.alice.post(QUEUE, json=body)
    said = answer.json()
    assert (answer.status_code, [error["field"] for error in said["errors"]]) == (status, [field]), answer.text
    assert (said["success"], answer.headers["content-type"]) == (False, "application/json")
    assert said["error"] == said["details"] != ""
    assert await site.server.stored() == before


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "9" * 400])
@pytest.mark.parametrize(
    "name", ["guidance_scale", "denoise_strength", "reference_strength", "seed", "steps", "num_images"]
)
async def test_a_number_that_is_none_is_refused(site: Gallery, name: str, number: str) -> None:
    before = await site.server.stored()
    body = snake(reference_image_url=site.path, prompt="", metadata={"exact_copy_mode": True}) | {name: "@"}
    raw = json.dumps(body).replace('"@"', number)
    answer = await site.alice.post(QUEUE, content=raw, headers={"Content-Type": "application/json"})
    if (name, number) == ("num_images", "9" * 400):  # a whole number, of which a job makes the most that it can
        assert notes(answer.json())["num_images"] == (int(number), 6)
        assert (await site.alice.get(f"/v1/jobs/{answer.json()['jobId']}")).status_code == 200
        return
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, name), answer.text
    assert await site.server.stored() == before


OF_V1_ALONE: dict[str, Any] = {
    "callback_events": ["completed"],
    "deadline_seconds": 5,
    "enhance": False,
    "mask_image_url": "https://8.8.8.8/",
    "priority": "batch",
    "references": [{"image": "https://8.8.8.8/"}],
    "start_after_seconds": 5,
    "start_deadline_seconds": 5,
}


@pytest.mark.parametrize("name", sorted(JobRequest.model_fields.keys() - READ))
async def test_what_only_v1_reads_is_refused_by_name(site: Gallery, name: str) -> None:
    for body, field in ((snake(), name), (old({}), name), (old(**{name: OF_V1_ALONE[name]}), f"metadata.{name}")):
        given = body if field != name else body | {name: OF_V1_ALONE[name]}
        answer = await site.alice.post(QUEUE, json=given)
        assert (answer.status_code, [e["field"] for e in answer.json()["errors"]]) == (400, [field]), answer.text
    carried = await site.row(await site.queue(**inside(**{name: OF_V1_ALONE[name]})))
    assert carried["metadata"] == {name: OF_V1_ALONE[name]}


async def test_a_repeat_with_a_key_makes_one_job(site: Gallery) -> None:
    headers = {"Idempotency-Key": "once"}
    ids = [(await site.alice.post(QUEUE, json=snake(), headers=headers)).json()["jobId"] for _ in range(2)]
    assert ids[0] == ids[1]


async def test_the_checks_come_in_their_order(site: Gallery) -> None:
    stranger, json_type = await site.server.client(), {"Content-Type": "application/json"}
    assert (await stranger.get(QUEUE)).status_code == 405  # before anybody asks who it is
    assert (await stranger.post(QUEUE, content=b"{", headers=json_type)).status_code == 401
    assert (await site.alice.post(QUEUE, content=b"{", headers=json_type)).json()["code"] == "invalid_json"
    assert (await site.alice.post(QUEUE, json=[])).status_code == 400
    assert (await site.alice.post(QUEUE, json={"seed": "x"})).json()["errors"][0]["field"] == "job_type"


@pytest.mark.parametrize("body", [snake(), old()])
async def test_one_answer_has_what_both_dialects_read(site: Gallery, body: dict[str, Any]) -> None:
    said = await site.queue(**body)
    assert said["jobId"] == said["job_id"] == said["job"]["id"]
    assert (said["success"], said["status"], said["message"]) == (True, "queued", "Job queued successfully")
    assert said["queueName"] == said["queue"] == "sdxl_queue"
    assert (said["jobType"], said["modelVariant"], said["isSDXL"]) == ("sdxl_image_fast", "lustify_sdxl", True)
    assert said["negativePromptSupported"]
    waiting = await site.server.pool.fetchval("SELECT count(*) FROM job_queue WHERE queue = 'sdxl'")
    assert said["queueLength"] == waiting > 0
    assert {"id", "user_id", "job_type", "format", "quality", "model_type", "status", "metadata"} <= said["job"].keys()
    negative = said["job"]["params"]["negative_prompt"]
    assert said["debug"] == {
        "userId": site.alice_id,
        "hasPrompt": True,
        "promptLength": 12,
        "promptWordCount": 2,
        "hasNegativePrompt": True,
        "negativePromptLength": len(negative),
        "negativePromptWordCount": len(negative.split()),
        "negativePromptError": None,
        "redisConfigured": False,
        "metadataFields": len(body.get("metadata", {})),
        "timestamp": said["job"]["created_at"],
    }
