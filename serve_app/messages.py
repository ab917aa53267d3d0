"""The messages of the older system's queues, read as bodies of `queue-job`.

A message is what the function `queue-job` pushed to `sdxl_queue` or `wan_queue`: `{id, type, prompt, user_id, config,
metadata, …}`, bare, as JSON text in JSON, wrapped in a list of one, or as `{"queue": …, "payload": …}`. A body of
`queue-job` with an id and a user beside it is read as well, in both dialects.

What the function wrote into every message alike (its constants) says nothing and is left out, so that the job gets the
defaults of this installation. What it took from its caller is honoured or refused, like in any request. The rest is
carried in the job's metadata.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid5

from db.idempotency import canonical_body
from models.catalog import Format, JobType, resolve
from serve_app.api.bodies import object_of
from serve_app.api.problems import Problem

QUEUES = ("sdxl_queue", "wan_queue")
WRAPPINGS = 4  # a list around text around an envelope, and one to spare
JOB_TYPES, IDS, USERS = ("type", "job_type", "jobType"), ("id", "job_id", "jobId"), ("user_id", "userId")
# ids that are no UUIDs become some, always the same ones
FOREIGN_IDS = UUID("6f2d1c0e-7b0a-5d3e-9a55-0c7f3f6b2a41")

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_SIZE = re.compile(r"(\d{1,5})[x*](\d{1,5})")
# what the function made of the job type, in every message
DERIVED = {"pipeline", "expected_time", "content_type", "file_extension", "enhance_prompt"}
# one name here for each of theirs; older ones last
RENAMED = {
    "num_inference_steps": "steps",
    "sample_steps": "steps",
    "guidance_scale": "guidance_scale",
    "sample_guide_scale": "guidance_scale",
    "denoise_strength": "denoise_strength",
    "num_images": "num_images",
    "seed": "seed",
    "sample_shift": "shift",
    "sample_solver": "scheduler",
    "frame_num": "frames",
}
# the sizes that the function found for an aspect ratio; the first one also for those it did not know
RATIO_OF_SIZE = {(1024, 1024): None, (1024, 576): "16:9", (576, 1024): "9:16"}


@dataclass(frozen=True)
class Message:
    """One waiting job. `text` is the same for the same message, however it was wrapped.

    `enhanced` says that the function had dealt with the prompt's enhancement before it pushed the message.
    """

    job_id: UUID
    user_id: UUID
    body: Mapping[str, Any]
    text: bytes
    enhanced: bool


def read_message(line: bytes) -> Message:
    """The message of a line. Raises `Problem` or `RequestRefused`, which name a field and repeat nothing of it."""
    payload = _unwrap(_json(line))
    given_id, given_user = _one(payload, IDS), _one(payload, USERS)
    if not _UUID.fullmatch(given_user):
        raise Problem(422, "type", "must be a UUID", field="user_id")
    foreign = not _UUID.fullmatch(given_id)
    name = payload.get("type") or payload.get("job_type") or payload.get("jobType")
    if not isinstance(name, str):
        raise Problem(422, "missing", "is required", field="job_type")
    metadata, config = _object(payload, "metadata"), _object(payload, "config")
    body = {key: value for key, value in payload.items() if key not in (*JOB_TYPES, *IDS, *USERS, "config")}
    body |= {"job_type": name, "metadata": metadata | ({"imported_id": given_id} if foreign else {})}
    body |= _settings(resolve(name), config, body, metadata)
    return Message(
        job_id=uuid5(FOREIGN_IDS, given_id) if foreign else UUID(given_id),
        user_id=UUID(given_user),
        body=body,
        text=canonical_body(payload),
        enhanced="type" in payload,
    )


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Problem(400, "invalid_json", "is not JSON", field="line") from None


def _refuse_constant(_: str) -> None:
    raise ValueError("NaN and infinity are no JSON")


def _unwrap(value: Any) -> dict[str, Any]:
    for _ in range(WRAPPINGS):
        if isinstance(value, str):
            value = _json(value)
        elif isinstance(value, list) and len(value) == 1:
            value = value[0]
        elif isinstance(value, dict) and "payload" in value and not value.keys() & set(JOB_TYPES):
            unread = value.keys() - {"queue", "payload"}
            if unread:
                raise Problem(422, "unknown", "an envelope has queue and payload and nothing else", field="line")
            if value.get("queue", QUEUES[0]) not in QUEUES:
                raise Problem(422, "choice", f"must be {' or '.join(QUEUES)}", field="queue")
            value = value["payload"]
    return object_of(value)


def _one(payload: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What stands under any of these names, which may not contradict one another."""
    said = {name: payload[name] for name in names if payload.get(name) not in (None, "")}
    for name, value in said.items():
        if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
            raise Problem(422, "type", "must be a short string", field=name)
    if not said:
        raise Problem(422, "missing", "is required", field=names[0])
    if len(set(said.values())) > 1:
        raise Problem(422, "conflict", f"contradicts {next(iter(said))}", field=list(said)[-1])
    return str(next(iter(said.values())))


def _object(payload: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = payload.get(name)
    if value is None or isinstance(value, dict):
        return dict(value or {})
    raise Problem(422, "type", "must be an object", field=name)


def _settings(
    job_type: JobType, config: Mapping[str, Any], body: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters that `config` gives, under the names of a request."""
    found: dict[str, Any] = {}
    rest = {}
    for name, value in config.items():
        if value is None or name in DERIVED or _is_constant(job_type, name, value):
            continue
        if name in RENAMED:
            found.setdefault(RENAMED[name], value)
        elif name in ("size", "resolution"):
            found |= _size(name, value, bool(body.get("aspect_ratio") or metadata.get("aspect_ratio")))
        elif name == "image":
            found |= {} if metadata.get("reference_image_url") else {"reference_image_url": value}
        elif name in ("first_frame", "last_frame"):
            url = "start_reference_url" if name == "first_frame" else "end_reference_url"
            found["metadata"] = {**found.get("metadata", body["metadata"]), url: value}
        else:
            rest[name] = value
    return found | ({"config": rest} if rest else {})


def _is_constant(job_type: JobType, name: str, value: Any) -> bool:
    """Whether the function wrote this into every message of the kind: the settings of its video model, for years into
    those of its image model as well."""
    high, video = job_type.quality.value == "high", job_type.format is Format.VIDEO
    constants: dict[str, tuple[Any, ...]] = {
        "size": ("480*832",),
        "sample_steps": (50 if high else 25,),
        "sample_guide_scale": (7.5 if high else 6.5,),
        "sample_solver": ("euler", "unipc", "dpm++"),
        "sample_shift": (5.0,),
        "frame_num": (83 if video else 1,),
    }
    return not isinstance(value, bool | list | dict) and value in constants.get(name, ())


def _size(name: str, value: Any, has_ratio: bool) -> dict[str, Any]:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise Problem(422, "type", "must be like 1024x1024", field=f"config.{name}")
    size = int(match[1]), int(match[2])
    if name == "resolution" and size in RATIO_OF_SIZE:
        ratio = RATIO_OF_SIZE[size]
        return {} if has_ratio or ratio is None else {"aspect_ratio": ratio}
    return {"width": size[0], "height": size[1]}
