"""Between the rows that an operator edits and the values that `models.prompts` works with."""

from collections.abc import Sequence

from db.prompts import NegativeRow, TemplateRow
from models.catalog import Family, Format, Quality
from models.dialogue import builtin_chat_templates
from models.negatives import NegativePreset, builtin_negatives
from models.prompts import Template, builtin_templates


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
            max_new_tokens=row.metadata.get("max_new_tokens") or 4 * row.token_limit,
            quality=Quality(row.quality) if row.quality else None,
            enhanced7b=row.metadata.get("enhanced7b"),
        )
        for row in rows
        if row.target_model and row.job_type in ("image", "video")
    ]


def negative_rows() -> list[NegativeRow]:
    """The product's negative presets as rows to seed."""
    return [
        NegativeRow(
            name=preset.name,
            model_type=preset.family.value if preset.family else None,
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
            family=Family(row.model_type) if row.model_type else None,
            content_mode="nsfw" if row.content_mode == "nsfw" else "sfw" if row.content_mode else None,
            generation_mode="i2i" if row.generation_mode == "i2i" else "txt2img" if row.generation_mode else None,
            triggers=tuple(row.metadata.get("triggers") or ()),
            take=row.metadata.get("take"),
            required=bool(row.metadata.get("required")),
            description=row.description or "",
        )
        for row in rows
    ]
