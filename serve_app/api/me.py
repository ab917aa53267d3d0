"""/v1/me: the caller's own profile, and the age gate."""

from datetime import UTC, date, datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from db.profiles import Profiles
from serve_app.api.auth import EdgeDep, User
from serve_app.api.problems import Problem
from serve_app.edge import Edge

router = APIRouter(prefix="/v1/me", tags=["access"])

OLDEST = date(1900, 1, 1)


class Me(BaseModel):
    """Who you are here. Your birth date is not told again."""

    id: UUID
    username: str | None
    roles: list[str]
    subscription_status: str
    token_balance: int = Field(description="Credits. They are taken only where the operator charges for jobs.")
    age_verified: bool = Field(description="Whether nsfw content is open to you, where the installation makes it.")
    birth_date_set: bool
    created_at: datetime


class ChangeMe(BaseModel):
    """What you may say of yourself."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"birth_date": "1990-05-17"}]})

    birth_date: date = Field(description="Opens nsfw content to adults. It is set once; after that ask the operator.")


@router.get("", operation_id="getMe")
async def get_me(edge: EdgeDep, user: User) -> Me:
    """Your profile."""
    return await _me(edge, user)


@router.patch("", operation_id="changeMe")
async def change_me(body: ChangeMe, edge: EdgeDep, user: User) -> Me:
    """Set your birth date. Whoever is 18 or older is age-verified from then on."""
    if not OLDEST < body.birth_date <= datetime.now(UTC).date():
        raise Problem(422, "range", "must be a day since 1900 that has come", field="birth_date")
    if not await Profiles(edge.pool).set_birth_date(user.user_id, body.birth_date):
        raise Problem(409, "birth_date_set", "your birth date was set before; ask the operator", field="birth_date")
    return await _me(edge, user)


async def _me(edge: Edge, user: User) -> Me:
    profile = await Profiles(edge.pool).read(user.user_id)
    if profile is None:
        raise Problem(404, "user_not_found", "there is no such user")
    return Me(roles=sorted(user.roles), **vars(profile))
