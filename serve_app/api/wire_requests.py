"""What goes over the wire under /v1: the bodies of requests."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from models.guiding.reference import ReferenceKind
from models.lora.loras import LoraUse

PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
CallbackEvent = Literal["processing", "completed", "failed", "cancelled"]
KINDS = len(get_args(ReferenceKind))
Picture = Annotated[str, Field(max_length=2048, json_schema_extra={"format": "uri-reference"})]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)]


class ReferenceRequest(BaseModel):
    """A picture that steers the job, each in a way of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: ReferenceKind = Field("image", description="What it is for; an `image` is what the job starts from.")
    image: Picture = Field(description="A URL, or a path or an id of a picture of yours here.")
    strength: float | None = Field(None, description="0.1 to 1.0: how much of it stays. Frames have none.")
    mask: Picture | None = Field(None, description="A mask, for an `image` only.")


class JobRequest(BaseModel):
    """A job to make. What is left out gets the default of the job type; what is given is honoured or refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "job_type": "sdxl_image_high",
                    "prompt": "a lighthouse in a storm, oil painting",
                    "num_images": 3,
                    "enhance": True,
                    "seed": 42,
                    "callback_url": "https://example.com/hooks/ourvidz",
                }
            ]
        },
    )

    job_type: str = Field(description="One of the catalog's job types.")
    prompt: str | None = None
    negative_prompt: str | None = None
    enhance: bool | None = Field(
        None, description="Let Qwen rewrite the prompt first. The `…_enhanced` types always do."
    )
    seed: int | None = Field(None, description="0 to 2^63-1; drawn when left out. Image i of several has seed + i.")
    num_images: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = Field(None, description="Length of a video; rounded to 4n+1, and the answer says so.")
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = Field(None, description="Guide in this part of the steps.")
    scheduler: str | None = None
    shift: float | None = None
    compel_enabled: bool | None = None
    compel_weights: dict[str, Any] | str | None = Field(
        None,
        description="quality, detail and style from 0.5 to 2, nsfw from 0 to 2, up to 6 `terms`; or a list "
        "`(term:1.2), (term:0.8)`. Needs compel_enabled.",
    )
    enhancement_strategy: Literal["none", "qwen", "compel", "hybrid"] | None = Field(
        None, description="`enhance` and `compel_enabled` in one word."
    )
    content_mode: Literal["sfw", "nsfw"] | None = None
    previews: bool | None = Field(None, description="Show small pictures of the job while it is denoised.")
    reproducible: bool | None = Field(None, description="Share no forward with other jobs: nothing moves its pixels.")
    loras: list[LoraUse] | None = Field(None, description="At most 5 LoRAs that the operator has registered, weighted.")
    reference_image_url: Picture | None = Field(
        None, description="A single reference: a URL, or a path or an id of a picture of yours here."
    )
    reference_strength: float | None = Field(None, description="0.1 to 1.0: how much of the reference stays.")
    reference_type: ReferenceKind | None = Field(
        None, description="What it is for; an `image` to start from, if left out."
    )
    mask_image_url: Picture | None = Field(
        None, description="A mask for the reference image, of its proportions: what is white is made anew (SDXL)."
    )
    references: list[ReferenceRequest] | None = Field(
        None, min_length=1, max_length=KINDS, description="Several references, one of each type at most."
    )
    callback_url: str | None = Field(None, max_length=2048)
    callback_events: list[CallbackEvent] | None = Field(None, min_length=1)
    priority: Literal["interactive", "batch"] = "interactive"
    start_after_seconds: Seconds | None = Field(None, description="Do not start before.")
    start_deadline_seconds: Seconds | None = Field(None, description="Fail if not started by then.")
    deadline_seconds: Seconds | None = Field(None, description="Fail if not finished by then.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Yours: carried, given back, never read.")


class JobBatch(BaseModel):
    """Jobs to accept together. The body as a whole keeps to the limit of every request."""

    model_config = ConfigDict(extra="forbid")

    jobs: list[JobRequest] = Field(min_length=1, max_length=100)


class CreateKey(BaseModel):
    """A new API key for a user, who is made when new."""

    model_config = ConfigDict(extra="forbid", strict=True)

    username: str = Field(min_length=1, max_length=100, pattern=PRINTABLE)
    name: str = Field("default", min_length=1, max_length=100, pattern=PRINTABLE)
    role: Literal["admin", "moderator", "premium_user", "basic_user", "guest"] = "basic_user"
    expires_in_days: int | None = Field(None, ge=1, le=3650)
