"""The bodies of `queue-job`, read in either of their dialects: `{job_type, prompt, …}` or `{jobType, metadata}`.

What a body says and can't have is refused, or is noted as an adjustment where older clients send it with every request.
"""

import math
from collections.abc import Mapping
from typing import Any

from db.providers import ApiModel
from models.catalog import FamilyDefaults, Format, JobType, resolve
from models.fields import cleaned, is_too_long
from models.policy import check_signs
from models.profile import ModelSpec
from serve_app.admission import Submission, installed, signs_off_loop
from serve_app.api.fields import Fields, is_number, text
from serve_app.api.problems import Problem
from serve_app.api.queue_references import PictureReading
from serve_app.api.wire import Adjusted
from serve_app.api.wire_enhancement import is_ours, not_installed
from serve_app.api.wire_requests import JobRequest
from serve_app.edge import Edge
from serve_app.modes import COPIED, PRESETS, Mode, Wish, Wording, changed, nearest_count, worded
from serve_app.negatives import Asked, negative_of_job, takes_rows
from serve_app.outside import stand_in, taker
from serve_app.strategies import STRATEGIES

# read alike in both dialects, and like the fields of /v1
PLAIN = (
    "seed",
    "num_images",
    "steps",
    "width",
    "height",
    "frames",
    "fps",
    "scheduler",
    "shift",
    "guidance_scale",
    "guidance_interval",
    "compel_enabled",
    "compel_weights",
    "previews",
    "reproducible",
    "loras",
)
# what is read from the body; anything else is carried in the job's metadata, so that nothing is lost
READ = {
    *PLAIN,
    "job_type",
    "jobType",
    "prompt",
    "original_prompt",
    "originalPrompt",
    "enhanced_prompt",
    "enhancedPrompt",
    "negative_prompt",
    "reference_image_url",
    "reference_strength",
    "denoise_strength",
    "reference_type",
    "start_reference_url",
    "end_reference_url",
    "callback_url",
    "contentType",
    "content_type",
    "content_mode",
    "aspect_ratio",
    "enhancement_strategy",
    "metadata",
}
# fields of /v1 that this function has never had: refused, so that nobody takes them for honoured
ELSEWHERE = JobRequest.model_fields.keys() - READ
NAMES_OF_FORMAT = {Format.IMAGE: ("image", "png"), Format.VIDEO: ("video", "mp4")}
MODEL_TYPES = ("sdxl", "wan", "rv51", "flux", "replicate-sdxl", "replicate-sdxl-i2i")
RATIOS = {"1:1": 1.0, "16:9": 16 / 9, "9:16": 9 / 16, "4:3": 4 / 3, "3:4": 3 / 4, "3:2": 3 / 2, "2:3": 2 / 3}
SAME_SHAPE = 0.15  # of the logarithm of the ratios: shapes that are so near count as the same


async def read_submission(edge: Edge, body: Mapping[str, Any], *, worded: bool = False) -> tuple[JobType, Submission]:
    """What a body asks for, and its job type. `worded` says that its prompt was put together already, so that a change
    is not joined with its description once more. Raises `Problem` or `RequestRefused`."""
    legacy = "jobType" in body
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem(400, "type", "must be an object", field="metadata")
    name = body.get("jobType") if legacy else body.get("job_type")
    if not isinstance(name, str) or not name:
        raise Problem(400, "missing", "is required", field="jobType" if legacy else "job_type")
    job_type = resolve(name)
    spec = await stand_in(edge, job_type) or installed(edge, job_type)
    return job_type, await _Reading(edge, job_type, spec, Fields(body, metadata), worded).submission(legacy)


class _Reading:
    """One body on its way to a submission, and the notes that are made of it."""

    def __init__(self, edge: Edge, job_type: JobType, spec: ModelSpec, fields: Fields, is_worded: bool) -> None:
        self._edge, self._job_type, self._fields = edge, job_type, fields
        self._spec, self._is_worded = spec, is_worded
        self._notes: list[Adjusted] = []

    @property
    def _defaults(self) -> FamilyDefaults:
        assert self._spec.defaults is not None  # every media family has them
        return self._spec.defaults

    async def submission(self, legacy: bool) -> Submission:
        """What is asked for."""
        fields = self._fields
        self._check_names(legacy)
        self._check_type()
        prompt = self._prompt(legacy)
        given: dict[str, Any] = {name: fields.either(name) for name in PLAIN}
        given |= {"prompt": prompt, "content_mode": self._content_mode(), "num_images": self._num_images()}
        given["compel_weights"] = given["compel_weights"] or None
        if isinstance(given["guidance_interval"], list):
            given["guidance_interval"] = tuple(given["guidance_interval"])  # which JSON has not
        wish = self._wish(prompt or "")
        await self._check_words(given["content_mode"])
        picture = PictureReading(fields, self._job_type, self._spec, wish)
        references, mode = picture.read(PRESETS[Mode.COPY].strength, PRESETS[Mode.MODIFY].strength)
        self._notes += picture.notes
        own = self._preset(mode, given, fields.text("negative_prompt"))
        given |= self._size(given)
        outside = await taker(self._edge, self._job_type, has_reference=bool(references))
        given["negative_prompt"] = await self._negative(given, own, mode, outside)
        wording = self._wording(mode, wish, prompt)
        self._check_writer(wording)
        return Submission(
            job_type=self._job_type.name,
            given=given,
            enhance=wording.enhance,
            strategy=fields.text("enhancement_strategy"),
            enhanced_prompt=wording.enhanced if wording.enhanced != prompt else None,
            template_name=wording.template,
            references=references,
            callback_url=fields.text("callback_url"),
            metadata={name: value for name, value in fields.body.items() if name not in READ} | dict(fields.metadata),
            adjustments=self._notes,
        )

    def _note(self, field: str, given: float | int | str, used: float | int | str, reason: str) -> None:
        self._notes.append(Adjusted(field=field, given=given, used=used, reason=reason))

    def _check_names(self, legacy: bool) -> None:
        """Refuse what /v1 would honour and nothing here does. In the older dialect the metadata has the parameters."""
        for place, prefix in ((self._fields.body, ""), (self._fields.metadata if legacy else {}, "metadata.")):
            for name in sorted(ELSEWHERE & place.keys()):
                if place[name] is not None:
                    raise Problem(400, "unsupported", "is a field of /v1/jobs alone", field=f"{prefix}{name}")

    def _check_type(self) -> None:
        job_type, fields = self._job_type, self._fields
        _agree("quality", fields.either("quality"), (job_type.quality.value,), job_type)
        _agree("format", fields.either("format"), NAMES_OF_FORMAT[job_type.format], job_type)
        said = fields.either("model_type")
        if said is None:
            return
        if not isinstance(said, str) or said.lower() not in MODEL_TYPES:
            raise Problem(400, "choice", f"must be one of {', '.join(MODEL_TYPES)}", field="model_type")
        if said.lower() != job_type.family.value:
            self._note("model_type", said, job_type.family.value, f"{job_type.name} names the model")

    def _prompt(self, legacy: bool) -> str | None:
        if legacy:
            return self._fields.text("prompt", "original_prompt", "originalPrompt")
        plain, original = self._fields.text("prompt"), text("prompt", self._fields.either("original_prompt"))
        if plain and original and plain != original:
            self._note("prompt", _length(plain), "none", "original_prompt goes first")
        return original or plain or text("prompt", self._fields.either("originalPrompt"))

    def _content_mode(self) -> str | None:
        modes = set()
        for place in (self._fields.body, self._fields.metadata):
            for name in ("contentType", "content_type", "content_mode"):
                value = place.get(name)
                if value in ("sfw", "nsfw"):
                    modes.add(value)
                elif name == "content_type" and value in ("image", "video"):
                    # in the older dialect it is the format of the output
                    _agree(name, value, (self._job_type.format.value,), self._job_type)
                elif value is not None:
                    raise Problem(400, "choice", "must be sfw or nsfw", field=name)
        if len(modes) > 1:
            raise Problem(400, "conflict", "is given as both sfw and nsfw", field="contentType")
        return next(iter(modes), None)

    def _num_images(self) -> Any:
        asked = self._fields.either("num_images")
        if not isinstance(asked, int) or isinstance(asked, bool):
            return asked
        used = nearest_count(asked, self._defaults.image_counts)
        if used != asked:
            counts = ", ".join(map(str, self._defaults.image_counts))
            self._note("num_images", asked, used, f"a job makes {counts}")
        return used

    async def _check_words(self, mode: str | None) -> None:
        """Refuse what is never made in any text, whether the mode uses it or not. Raises `ContentRejected`."""
        fields = self._fields
        texts = (
            *(fields.body.get(name) for name in ("prompt", "original_prompt", "enhanced_prompt", "enhancedPrompt")),
            fields.metadata.get("originalEnhancedPrompt"),
        )
        for words in texts:
            if isinstance(words, str) and not is_too_long(words):  # longer ones are refused for that
                check_signs(await signs_off_loop(words), "nsfw" if mode == "nsfw" else "sfw")

    def _wish(self, prompt: str) -> Wish:
        fields = self._fields
        mode = fields.choice("reference_mode", ("modify", "copy"), "metadata.reference_mode")
        described = (
            text("metadata.originalEnhancedPrompt", fields.metadata.get("originalEnhancedPrompt")) or ""
        ).strip()
        copy = fields.flag("exact_copy_mode") or mode == "copy"
        return Wish(prompt.strip(), described, copy, mode == "modify")

    def _preset(self, mode: Mode, given: dict[str, Any], own: str | None) -> str | None:
        """Set what the mode sets; the caller's own negative prompt as far as it is used."""
        preset = PRESETS.get(mode)
        if preset is None:
            return own
        guidance = given["guidance_scale"]
        if mode is Mode.COPY:
            reason = "an exact copy is made without guidance"
            if is_number(guidance) and guidance != preset.guidance_scale:
                self._note("guidance_scale", guidance, preset.guidance_scale, reason)
            if own:
                self._note("negative_prompt", _length(own), "none", reason)
            own = None
        if guidance is None or (mode is Mode.COPY and is_number(guidance)):
            given["guidance_scale"] = preset.guidance_scale
        given["steps"] = preset.steps if given["steps"] is None else given["steps"]
        return own

    def _size(self, given: Mapping[str, Any]) -> dict[str, int]:
        ratio = self._fields.text("aspect_ratio")
        if ratio is None:
            return {}
        if ratio not in RATIOS:
            raise Problem(400, "choice", f"must be one of {', '.join(RATIOS)}", field="metadata.aspect_ratio")
        if given["width"] is not None or given["height"] is not None:
            raise Problem(400, "conflict", "is given beside a width and height", field="aspect_ratio")
        width, height = nearest_size(self._defaults, RATIOS[ratio])
        if _misfit((width, height), RATIOS[ratio]) > SAME_SHAPE:
            self._note("aspect_ratio", ratio, f"{width}x{height}", "the model has no size that is nearer")
        return {"width": width, "height": height}

    async def _negative(
        self, given: Mapping[str, Any], own: str | None, mode: Mode, outside: ApiModel | None
    ) -> str | None:
        """The operator's presets for whoever makes it, and the caller's own words."""
        guidance = given["guidance_scale"]
        if guidance is None:
            guidance = self._defaults.guidance.of(self._job_type.quality)
        if is_number(guidance) and not takes_rows(guidance, outside):
            return own
        asked = Asked(
            prompt=given["prompt"] or "",
            own=own or "",
            content_mode="nsfw" if given["content_mode"] == "nsfw" else "sfw",
            generation_mode="txt2img" if mode is Mode.TEXT else "i2i",
            compel=self._uses_compel(given),
        )
        negative = await negative_of_job(self._edge, self._job_type, outside, asked)
        self._notes += negative.notes(own or "")
        return negative.text

    def _uses_compel(self, given: Mapping[str, Any]) -> bool:
        strategy = self._fields.text("enhancement_strategy")
        by_strategy = STRATEGIES.get(strategy or "")
        return by_strategy[1] if by_strategy else given["compel_enabled"] is True

    def _wording(self, mode: Mode, wish: Wish, prompt: str | None) -> Wording:
        fields = self._fields
        given = text("enhanced_prompt", fields.body.get("enhanced_prompt") or fields.body.get("enhancedPrompt"))
        skip = fields.flag("skip_enhancement") or fields.either("enhancement_model") == "none"
        wanted = fields.flag("user_requested_enhancement")
        if mode is Mode.TEXT:
            given = given if given != prompt else None
            # nothing is said of it where nothing was: the enhanced types enhance then
            return worded(given, skip=skip, wanted=wanted and bool(wish.prompt), always=self._job_type.enhanced)
        if given and given != prompt:
            self._note("enhanced_prompt", _length(given), "none", "a picture that is changed has a prompt put together")
        if mode is Mode.MODIFY:
            return changed(wish, skip=skip or self._is_worded)
        if wanted:
            self._note("metadata.user_requested_enhancement", "true", "false", "an exact copy has no prompt")
        return Wording(template=COPIED)

    def _check_writer(self, wording: Wording) -> None:
        """Refuse a language model that is not here where a prompt is enhanced; where none is, tell that it is not used.
        A prompt that was put together already is another system's work."""
        name, given = "enhancement_model", self._fields.text("enhancement_model")
        if self._is_worded or not given or given == "none" or is_ours(self._edge, given):
            return
        field = f"metadata.{name}" if self._fields.body.get(name) is None else name
        by_strategy, _ = STRATEGIES.get(self._fields.text("enhancement_strategy") or "", (False, False))
        always = self._job_type.enhanced and wording.enhance is None
        if not wording.enhanced and (wording.enhance or by_strategy or always):
            raise not_installed(field)
        self._note(field, cleaned(field, given)[:100], "none", "no prompt is enhanced")


def nearest_size(defaults: FamilyDefaults, ratio: float) -> tuple[int, int]:
    """The size whose shape is nearest to a ratio of width to height, and of those alike the one nearest to the usual
    area."""
    usual = defaults.width * defaults.height

    def badness(size: tuple[int, int]) -> tuple[int, float]:
        return int(_misfit(size, ratio) / SAME_SHAPE), abs(math.log(size[0] * size[1] / usual))

    return min(defaults.sizes, key=badness)


def _misfit(size: tuple[int, int], ratio: float) -> float:
    return abs(math.log(size[0] / size[1] / ratio))


def _length(words: str) -> str:
    """Of a text only how long it is: adjustments are shown where prompts are not."""
    return f"{len(words)} characters"


def _agree(name: str, value: Any, accepted: tuple[str, ...], job_type: JobType) -> None:
    """Refuse what contradicts the job type."""
    if value is not None and value not in accepted:
        message = f"must be {' or '.join(accepted)}, as {job_type.name} is"
        raise Problem(400, "conflict", message, field=name)
