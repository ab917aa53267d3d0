"""The negative prompts that the operator's rows and a caller's own words come to, in the room that the model has.

The caller's words come in full; the rows give way to them, those of the lowest priority first.
"""

from dataclasses import dataclass

from db.providers import ApiModel
from deployments.prompting import negatives_of
from deployments.provider.inputs import key_of
from models.catalog import Family, JobType
from models.fields import InvalidParams, cleaned
from models.params import ContentMode
from models.prompting.negatives import GenerationMode, negative_prompt
from models.prompting.prompts import WINDOWS
from models.prompting.weighting import MAX_WINDOWS
from serve_app.api.wire import Adjusted
from serve_app.edge import Edge

UNCOUNTED = "there is no tokenizer to count by now: these words go before the operator's, which may be cut off"
REPLICATE_SDXL = "replicate-sdxl"
READERS: dict[str, Family] = {family.value: family for family in Family} | {REPLICATE_SDXL: Family.SDXL}
"""The model types that rows may be asked for by, and the family of models that reads them."""


@dataclass(frozen=True)
class Asked:
    """What a negative prompt is for. `compel` says that the prompt is read in several windows."""

    prompt: str = ""
    own: str = ""
    content_mode: ContentMode = "sfw"
    generation_mode: GenerationMode = "txt2img"
    compel: bool = False


@dataclass(frozen=True)
class Negative:
    """A negative prompt, and of how many content `tokens` the model reads `limit`. Both are None where no tokenizer
    counts them; then the caller's own words stand before the rows'."""

    text: str
    tokens: int | None = None
    limit: int | None = None

    def notes(self, own: str) -> list[Adjusted]:
        """What the one whose `own` words are in it is to be told of it."""
        given, used, reason = f"{len(own)} characters", f"{len(self.text)} characters", UNCOUNTED
        if not own or self.text == own:
            return []
        if self.tokens is not None and self.limit is not None:
            if self.tokens <= self.limit:
                return []
            given, used, reason = f"{self.tokens} tokens", f"{self.limit} tokens", "the model reads no more of it"
        return [Adjusted(field="negative_prompt", given=given, used=used, reason=reason)]


def takes_rows(guidance: float, model: ApiModel | None) -> bool:
    """Whether a job gets the rows. Not where they would have no effect: without guidance, or at a provider's `model`
    that takes no negative prompt; the caller did not choose them. Nor where the model's own row brings one."""
    if model is None:
        return guidance > 1
    key = key_of(model, "negative_prompt")
    return guidance > 1 and key is not None and key not in model.input_defaults


async def negative_of_job(edge: Edge, job_type: JobType, model: ApiModel | None, asked: Asked) -> Negative:
    """That of a job: `model` is the provider's that makes it, None where it is made here.

    A provider's model has rows of its own, as `replicate-sdxl`; where there are none, it gets those of the family.
    """
    name = job_type.family.value
    if model is not None:
        outside = f"{model.provider.name}-{name}"
        name = outside if any(row.model_type == outside for row in await edge.prompts.negatives()) else name
    return await negative(edge, name, job_type.family, asked)


async def negative(edge: Edge, model_type: str, reader: Family, asked: Asked) -> Negative:
    """That of the rows of a model type, for models of the family `reader`."""
    try:
        own = cleaned("negative_prompt", asked.own)
    except InvalidParams:  # for which the job is refused, with whatever else is wrong with it
        return Negative(asked.own)
    presets = negatives_of(await edge.prompts.negatives())
    window, windows = WINDOWS.get(reader), MAX_WINDOWS if asked.compel else 1
    counter = None if window is None else await edge.counters.of(reader)
    limit = None if window is None else windows * (window - (counter.specials if counter else 0))
    text = negative_prompt(
        model_type,
        asked.prompt,
        own,
        asked.content_mode,
        asked.generation_mode,
        presets,
        counter=counter,
        limit=limit,
    )
    return Negative(text) if counter is None else Negative(text, counter.count(text), limit)
