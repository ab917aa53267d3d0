"""/v1/loras: which LoRAs a job may name."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from models.catalog import JOB_TYPES
from serve_app.api.auth import EdgeDep, User

router = APIRouter(prefix="/v1/loras", tags=["jobs"])


class Lora(BaseModel):
    """One LoRA that the operator has registered. Where its file lies is not told."""

    name: str
    model: Literal["sdxl", "wan", "rv51"]
    job_types: list[str] = Field(description="The job types that may use it.")
    trigger_words: list[str] = Field(description="Words it was trained with. Write them into the prompt yourself.")


class LoraList(BaseModel):
    """The registered LoRAs, by model and name."""

    data: list[Lora]


@router.get("", operation_id="listLoras")
async def list_loras(edge: EdgeDep, user: User) -> LoraList:
    """The LoRAs that jobs may name in `loras`: of the profile, and in production in the training registry."""
    found = []
    for family, spec in sorted(edge.settings.loaded_profile.models.items()):
        job_types = sorted(name for name, job_type in JOB_TYPES.items() if job_type.family is family)
        words_of = {name: source.trigger_words for name, source in spec.loras.items()}
        if spec.lora_cache_gib:
            registered = await edge.trainings.production_loras(family.value)
            words_of = {lora.name: lora.trigger_words for lora in registered} | words_of
        for name, trigger_words in sorted(words_of.items()):
            words = list(trigger_words)
            found.append(
                Lora.model_validate(
                    {"name": name, "model": family.value, "job_types": job_types, "trigger_words": words}
                )
            )
    return LoraList(data=found)
