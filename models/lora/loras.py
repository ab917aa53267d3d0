"""LoRAs by name: how a request asks for them, how a profile registers them, and which request may use which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from models.fields import FieldError

MAX_LORAS = 5
MAX_LORA_WEIGHT = 2.0

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
LoraName = Annotated[str, Field(pattern=_NAME)]


class LoraUse(BaseModel):
    """One LoRA of a request: its name in the registry, and how much of it is added. Never a path or a URL.

    A weight of 1 is as it was trained, a negative one turns it round. Its range is that of -2 to 2, without 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=63, description="A name of `GET /v1/loras`.")
    weight: float = Field(
        default=1.0,
        ge=-MAX_LORA_WEIGHT,
        le=MAX_LORA_WEIGHT,
        allow_inf_nan=False,
        description="-2 to 2, not 0. 1 is as it was trained.",
    )


class LoraSource(BaseModel):
    """Where the operator's profile says a LoRA lies: a file of safetensors, in a repository or on this machine.

    `source` is a Hugging Face repository, a folder or the file itself; `file` its name inside a folder or repository.
    A file whose digest is not `sha256` is refused. `trigger_words` are told to callers, and put into no prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    file: str | None = Field(default=None, pattern=r"\.safetensors$")
    revision: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    trigger_words: tuple[str, ...] = ()


def lora_errors(uses: Sequence[LoraUse], known: Collection[str], job_type: str) -> list[FieldError]:
    """What is wrong with the LoRAs of a request to a model that has those `known`; empty where nothing is."""
    if not uses:
        return []
    if not known:
        return [FieldError("loras", f"this installation has no LoRAs for {job_type}", "unsupported")]
    errors = []
    if len(uses) > MAX_LORAS:
        errors.append(FieldError("loras", f"may be at most {MAX_LORAS}", "length"))
    times = Counter(use.name for use in uses)
    for number, use in enumerate(uses):
        if use.name not in known:
            errors.append(FieldError(f"loras.{number}.name", f"must be one of {', '.join(sorted(known))}", "choice"))
        elif times[use.name] > 1:
            errors.append(FieldError(f"loras.{number}.name", "is there twice; give it one weight", "conflict"))
        if use.weight == 0:
            errors.append(FieldError(f"loras.{number}.weight", "has no effect at 0; leave the LoRA out", "conflict"))
    return errors
