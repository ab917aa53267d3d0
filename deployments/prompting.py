"""Between the rows that an operator edits and the values that `models.prompting` works with; and what an enhancement is
asked for, and told as."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from db.prompts import NegativeRow, Prompts, TemplateRow
from deployments.settings import Settings
from models.catalog import Family, Format, Quality
from models.policy import NO_SIGNS
from models.profile import resolve_weights
from models.prompting.dialogue import builtin_chat_templates
from models.prompting.enhancement import Enhancement, strategy_of
from models.prompting.negatives import NegativePreset, builtin_negatives
from models.prompting.prompts import NoTemplate, Template, TokenCounter, builtin_templates
from models.prompting.selection import ENHANCEMENT, Selection, Wanted, select_template
from models.prompting.signs import Signs


@dataclass(frozen=True)
class EnhanceRequest:
    """One prompt to enhance at once."""

    prompt: str
    family: str
    format: str
    quality: str
    enhanced7b: bool
    content_mode: str
    seed: int
    use_case: str = ENHANCEMENT
    seconds: float | None = None  # how long the model may take
    windows: int = 1  # of the reader that the prompt may fill
    beside: str = ""  # what will be read together with it, and is judged with it
    signs: Signs = NO_SIGNS  # of its references, which are judged with it too

    @property
    def wanted(self) -> Wanted:
        """What template it asks for."""
        return Wanted(
            target_model=Family(self.family),
            job_type=Format(self.format),
            quality=Quality(self.quality),
            enhanced7b=self.enhanced7b,
            content_mode="nsfw" if self.content_mode == "nsfw" else "sfw",
            use_case=self.use_case,
        )


async def choose_template(prompts: Prompts, wanted: Wanted) -> tuple[Selection | None, bool]:
    """The operator's template for that, None where none fits, and whether the rows were in memory."""
    hits = []
    templates: list[Template] = []
    for use_case in dict.fromkeys((wanted.use_case, ENHANCEMENT)):
        rows, hit = await prompts.look_up(use_case)
        hits.append(hit)
        templates += templates_of(rows)
    try:
        return select_template(templates, wanted), all(hits)
    except NoTemplate:
        return None, all(hits)


def template_rows() -> list[TemplateRow]:
    """The product's templates as rows to seed."""
    return [
        TemplateRow(
            use_case=template.use_case,
            content_mode=template.content_mode,
            template_name=template.name,
            system_prompt=template.system_prompt,
            token_limit=template.token_limit,
            job_type=template.job_type.value,
            target_model=template.target_model.value,
            quality=template.quality.value if template.quality else None,
            metadata={"max_new_tokens": template.max_new_tokens, "enhanced7b": template.enhanced7b},
        )
        for template in builtin_templates()
    ] + [
        TemplateRow(
            use_case=template.use_case,
            content_mode=template.content_mode,
            template_name=template.name,
            system_prompt=template.system_prompt,
            token_limit=template.token_limit,
            job_type="chat",
            target_model=None,
            quality=None,
        )
        for template in builtin_chat_templates()
    ]


def templates_of(rows: Sequence[TemplateRow]) -> list[Template]:
    """Rows as templates. A row without a length of its own may use four new tokens for each token it is allowed."""
    return [
        Template(
            name=row.template_name,
            use_case=row.use_case,
            target_model=Family(row.target_model),
            job_type=Format(row.job_type),
            content_mode="nsfw" if row.content_mode == "nsfw" else "sfw",
            system_prompt=row.system_prompt,
            token_limit=row.token_limit,
            max_new_tokens=_positive(row.metadata.get("max_new_tokens")) or 4 * row.token_limit,
            quality=Quality(row.quality) if row.quality else None,
            enhanced7b=row.metadata.get("enhanced7b"),
        )
        for row in rows
        if row.target_model and row.job_type in ("image", "video")
    ]


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def negative_rows() -> list[NegativeRow]:
    """The product's negative presets as rows to seed."""
    return [
        NegativeRow(
            name=preset.name,
            model_type=preset.family,
            content_mode=preset.content_mode,
            generation_mode=preset.generation_mode,
            negative_prompt=", ".join(preset.terms),
            priority=preset.priority,
            metadata={"triggers": list(preset.triggers), "take": preset.take, "required": preset.required},
            description=preset.description,
        )
        for preset in builtin_negatives()
    ]


def negatives_of(rows: Sequence[NegativeRow]) -> list[NegativePreset]:
    """Rows as presets."""
    return [
        NegativePreset(
            name=row.name,
            terms=tuple(term.strip() for term in row.negative_prompt.split(",") if term.strip()),
            priority=row.priority,
            family=row.model_type,
            content_mode="nsfw" if row.content_mode == "nsfw" else "sfw" if row.content_mode else None,
            generation_mode="i2i" if row.generation_mode == "i2i" else "txt2img" if row.generation_mode else None,
            triggers=tuple(row.metadata.get("triggers") or ()),
            take=_positive(row.metadata.get("take")),
            required=bool(row.metadata.get("required")),
            description=row.description or "",
        )
        for row in rows
    ]


def enhancement_account(result: Enhancement) -> dict[str, Any]:
    """What an enhancement did, without the prompts."""
    account = asdict(result)
    del account["original_prompt"], account["enhanced_prompt"]
    return account


def prompt_account(enhancement: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked about a job's prompt, what was done, and each step that fell back, from the account of its
    enhancement (empty where there was none) and the settings of its run."""
    asked = strategy_of(bool(enhancement), bool(settings.get("compel_enabled")))
    used = strategy_of(enhancement.get("strategy") == "qwen", settings.get("compel_success") is True)
    fallbacks = []
    if enhancement and enhancement.get("strategy") != "qwen":
        reason, instead = enhancement.get("fallback_reason"), enhancement.get("strategy")
        fallbacks.append({"step": "qwen", "reason": reason, "instead": instead})
    if settings.get("compel_enabled") and settings.get("compel_success") is not True:
        fallbacks.append({"step": "compel", "reason": settings.get("fallback_reason"), "instead": "plain_prompt"})
    return {"enhancement_asked": asked, "enhancement_strategy": used, "enhancement_fallbacks": fallbacks}


def load_counter(settings: Settings, family: Family) -> TokenCounter:
    """The tokenizer of the model that will read the prompt. Raises `OSError` where it can't be read."""
    spec = settings.loaded_profile.models[family]
    weights = resolve_weights(spec, settings.state_dir / "weights")
    return TokenCounter.from_pretrained(weights)
