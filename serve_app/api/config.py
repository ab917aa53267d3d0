"""/v1/config: the operator's limits and switches, in force for the next request.

The names are those of the specification. What it names beside these is no matter of this row here, and refused rather
than kept without effect: a job's time-out is its own deadline, the size of a file and the models are settings.
"""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from db.limits import SystemConfig
from serve_app.api.auth import Admin, EdgeDep
from serve_app.api.problems import Problem

router = APIRouter(prefix="/v1/config", tags=["operations"])

Count = Annotated[int | None, Field(ge=1, le=1_000_000)]


class Config(BaseModel):
    """What is set. null is off; in a change, what is left out stays as it is."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"maxJobsPerHour": 20, "maintenanceMode": False}]}
    )

    maxConcurrentJobs: Count = Field(None, description="Jobs that wait or run here, of all users together.")
    maxJobsPerUser: Count = Field(None, description="Jobs of a user that wait or run.")
    maxJobsPerHour: Count = Field(None, description="Jobs that a user may submit in any 60 minutes.")
    rateLimitRequestsPerMinute: Count = Field(None, description="Submissions of a user a minute; a batch is one.")
    burst: Count = Field(None, description="Submissions that may come at once; 10 if only a rate is set.")
    maxStoragePerUserGB: float | None = Field(
        None, gt=0, le=1_000_000, description="Gigabytes (1e9 bytes) of a user's files, uploads included."
    )
    maintenanceMode: bool | None = Field(None, description="Refuse new work, but for admins.")
    chargeCredits: bool | None = Field(None, description="Take what a job costs from its user's balance.")
    moderation: Literal["off", "publish", "all"] | None = Field(
        None, description="Which results must be reviewed before others see them."
    )


@router.get("", operation_id="getConfig")
async def get_config(edge: EdgeDep, admin: Admin) -> Config:
    """The limits and switches that are set."""
    return _view(await SystemConfig(edge.pool).read())


@router.patch("", operation_id="changeConfig")
async def change_config(body: Config, edge: EdgeDep, admin: Admin) -> Config:
    """Set some of them; null takes one away. It is written to the audit log, with what was before."""
    config, given = SystemConfig(edge.pool), body.model_dump(exclude_unset=True)
    after = await config.read() | given
    if after.get("burst") is not None and after.get("rateLimitRequestsPerMinute") is None:
        raise Problem(422, "conflict", "has no effect without rateLimitRequestsPerMinute", field="burst")
    return _view(await config.change(given, admin.user_id))


def _view(values: dict[str, object]) -> Config:
    # what a client of the database wrote there itself is shown as far as it is understood
    return Config.model_construct(None, **{name: values.get(name) for name in Config.model_fields})
