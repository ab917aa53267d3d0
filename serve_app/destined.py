"""Where a job's metadata says that its picture is to be shown, checked before the job is accepted."""

from collections.abc import Mapping
from typing import Any

from db.access import Principal
from db.destinations import KINDS, Destinations
from deployments.placing import AVATAR_KEY
from models.catalog import Format, JobType
from serve_app.api.problems import Problem
from serve_app.edge import Edge


async def check_destination(edge: Edge, user: Principal, job_type: JobType, metadata: Mapping[str, Any]) -> None:
    """Raise `Problem` for a destination that nothing could be placed at; other words there are only carried."""
    kind = metadata.get("destination")
    if kind not in KINDS:
        return
    if job_type.format is not Format.IMAGE:
        message = f"a {kind} is a picture, which {job_type.name} does not make"
        raise Problem(422, "unsupported", message, field="metadata.destination")
    if kind == "character_avatar" and not _is_avatar(metadata.get("avatar")):
        raise Problem(422, "choice", "must be characters/<name>.png", field="metadata.avatar")
    if await Destinations(edge.pool).target(user.user_id, metadata) is None:
        message = f"there is no {'scene' if kind == 'roleplay_scene' else 'character'} that you may change"
        raise Problem(404, "destination_not_found", message, field="metadata.destination")


def _is_avatar(name: Any) -> bool:
    return isinstance(name, str) and AVATAR_KEY.fullmatch(name) is not None
