"""Shapes of moderation, and of what is published."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

ModerationStatus = Literal["pending", "approved", "rejected", "flagged"]
Reason = Annotated[
    str,
    Field(
        max_length=100,
        pattern=r"^[a-z0-9][a-z0-9_.:-]{0,99}$",
        description="A code that the owner sees too, such as `likeness`. One of the classifier begins with "
        "`classifier:`; `classifier_failed` says that it could not judge.",
    ),
]
# line breaks and tabs are wanted here, other control characters are not
Notes = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")]


class Decided(BaseModel):
    """One decision about a result. `notes` are for moderators."""

    reviewer: UUID | None
    was: ModerationStatus
    status: ModerationStatus
    reason: str | None
    notes: str | None
    created_at: datetime


class ModeratedResult(BaseModel):
    """A result as moderators see it. Its URLs work for five minutes."""

    id: UUID
    kind: Literal["workspace", "library"]
    user_id: UUID
    job_id: UUID | None
    type: Literal["image", "video"]
    url: str
    thumbnail_url: str | None
    mime_type: str
    width: int | None
    height: int | None
    duration_seconds: float | None
    prompt: str
    model: str
    visibility: Literal["private", "unlisted", "public"]
    moderation_status: ModerationStatus
    moderation_reason: str | None
    created_at: datetime


class ModeratedResultFull(ModeratedResult):
    """The same with what was decided about it, the latest first."""

    reviews: list[Decided]


class ModerationPage(BaseModel):
    """Results, the oldest first. The next page is the one with `cursor` set to `next`; null: there is none."""

    data: list[ModeratedResult]
    next: str | None


class Decide(BaseModel):
    """A decision. It holds for every copy of the result, in the workspace and in the library."""

    model_config = ConfigDict(extra="forbid", strict=True)

    status: ModerationStatus
    reason: Reason | None = None
    notes: Notes | None = Field(None, description="For moderators; kept with the job and with the decision.")
    expected: ModerationStatus | None = Field(
        None, description="The status that you saw: 409 when somebody has decided otherwise since."
    )


class Published(BaseModel):
    """An item that somebody has published. Its URLs work for five minutes."""

    id: UUID
    type: Literal["image", "video"]
    url: str
    thumbnail_url: str | None
    mime_type: str
    file_size_bytes: int
    width: int | None
    height: int | None
    duration_seconds: float | None
    title: str | None
    tags: list[str]
    model: str
    content_mode: Literal["sfw", "nsfw"]
    created_at: datetime


class PublishedPage(BaseModel):
    """Published items, newest first. The next page is the one with `before` set to `next`; null: there is none."""

    data: list[Published]
    next: str | None
