"""Shapes of the workspace, the library and uploads."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from serve_app.api.wire_moderation import ModerationStatus

PRINTABLE = r"^[^\x00-\x1f\x7f]*$"

Title = Annotated[str, Field(max_length=200, pattern=PRINTABLE)]
Tag = Annotated[str, Field(min_length=1, max_length=100, pattern=PRINTABLE)]
Tags = Annotated[list[Tag], Field(max_length=50)]
Visibility = Literal["private", "unlisted", "public"]
Fault = Literal["missing", "size"]


class _Result(BaseModel):
    """A result with its file. URLs expire; read it again for new ones."""

    id: UUID
    type: Literal["image", "video"]
    url: str | None = Field(description="Null where the file is known to be gone.")
    thumbnail_url: str | None
    bucket: str
    key: str
    thumbnail_key: str | None
    mime_type: str
    file_size_bytes: int
    width: int | None
    height: int | None
    duration_seconds: float | None
    seed: int | None
    model: str
    prompt: str
    created_at: datetime
    fault: Fault | None = Field(
        description="What the reconciler found wrong with the file; null where nothing is known."
    )
    moderation_status: ModerationStatus = Field(description="What is not approved is seen by you and the moderators.")
    moderation_reason: str | None = Field(description="Why, as a code; null where nobody has judged it.")


class WorkspaceAsset(_Result):
    """A file of a job in your workspace, until `expires_at`."""

    job_id: UUID
    index: int
    frames: int | None
    fps: float | None
    expires_at: datetime
    library_id: UUID | None = Field(description="The library's item that it is a copy of.")


class LibraryItem(_Result):
    """A file that you keep, until you remove it."""

    asset_id: UUID | None = Field(description="The workspace's asset that it was saved from, there or not.")
    job_id: UUID | None
    title: str | None
    tags: list[str]
    is_favorite: bool
    collection_id: UUID | None
    visibility: Visibility
    updated_at: datetime


class WorkspacePage(BaseModel):
    """Assets, newest first. The next page is the one with `before` set to `next`; null: there is none."""

    data: list[WorkspaceAsset]
    next: str | None


class LibraryPage(BaseModel):
    """Items, newest first. The next page is the one with `before` set to `next`; null: there is none."""

    data: list[LibraryItem]
    next: str | None


class SaveAsset(BaseModel):
    """How an asset is kept. What is left out stays as it is where the asset was saved before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Title | None = None
    tags: Tags | None = None
    collection_id: Annotated[UUID, Field(strict=False)] | None = None


class ChangeItem(BaseModel):
    """What to change of an item; what is left out stays. Null takes a title or a collection away."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Title | None = None
    tags: Tags = []
    is_favorite: bool = False
    collection_id: Annotated[UUID, Field(strict=False)] | None = None
    visibility: Visibility = Field(
        "private", description="Who else sees it once moderation lets it through: nobody, whoever knows its id, or all."
    )


class SignedUrl(BaseModel):
    """A URL that gives the file to whoever holds it, until `expires_at`."""

    url: str
    expires_at: datetime


class Upload(BaseModel):
    """A picture to be used as a reference. What is stored are its pixels, upright, and no metadata."""

    id: UUID
    bucket: str
    key: str
    storage_path: str = Field(description="`bucket/key`, as a job names it for a reference.")
    url: str | None
    mime_type: str
    file_size_bytes: int
    width: int
    height: int
    fault: Fault | None
    created_at: datetime


class UploadList(BaseModel):
    """Uploads, newest first."""

    data: list[Upload]


class WorkspaceAnswer(BaseModel):
    """What workspace-actions answers: which of the fields depends on the action."""

    success: Literal[True] = True
    message: str
    libraryAssetId: UUID | None = None  # the names of the function's clients
    workspaceAssetId: UUID | None = None
    assetsProcessed: int | None = None
    newSaves: int | None = None
    errors: list[dict[str, Any]] | None = None


class ItemDeleted(BaseModel):
    """What delete-workspace-item answers."""

    success: Literal[True] = True
    deleted_item_id: UUID
    timestamp: datetime
