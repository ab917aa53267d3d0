"""Which template a prompt is enhanced by: what was asked for, what was taken, and what of it does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from models.catalog import Family, Format, Quality
from models.params import ContentMode
from models.prompting.prompts import NoTemplate, Template

ENHANCEMENT = "enhancement"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a template is asked for. `quality` and `enhanced7b` are matched too, as the WAN templates differ by them."""

    target_model: Family
    job_type: Format
    quality: Quality
    enhanced7b: bool
    content_mode: ContentMode
    use_case: str = ENHANCEMENT


@dataclass(frozen=True)
class Selection:
    """The template that was taken, and the names of what it was asked for and is not."""

    wanted: Wanted
    template: Template
    misfits: tuple[str, ...]

    def account(self) -> dict[str, Any]:
        """What was asked for, what was taken and why, as JSON."""
        asked = {name: _plain(getattr(self.wanted, name)) for name in _FIELDS}
        taken = {name: _plain(getattr(self.template, name)) for name in _FIELDS}
        return {
            "asked": asked,
            "taken": {"template_name": self.template.name} | taken,
            "misfits": list(self.misfits),
            "reason": self._reason(asked),
        }

    def _reason(self, asked: dict[str, Any]) -> str | None:
        if self.misfits:
            return "; ".join(f"no active template is for {name} {asked[name]}" for name in self.misfits)
        if self.template.target_model is not self.wanted.target_model:
            return f"{self.wanted.target_model} reads the prompts that {self.template.target_model} reads"
        return None


_FIELDS = ("target_model", "job_type", "use_case", "content_mode", "quality", "enhanced7b")


def select_template(templates: Iterable[Template], wanted: Wanted) -> Selection:
    """The template that fits best. Raises `NoTemplate`.

    Model and format must fit, but RV51 takes those of SDXL, which reads the same prompts. Of the rest, in this order:
    another use case gives way to plain enhancement, nsfw to sfw (never the other way), then `enhanced7b`, then quality.
    Of those that fit alike, the more special goes before the general.
    """
    readers = (Family.SDXL, Family.RV51) if wanted.target_model is Family.RV51 else (wanted.target_model,)
    ranked: list[tuple[tuple[int, ...], Selection]] = []
    for template in templates:
        unsafe = wanted.content_mode == "sfw" and template.content_mode == "nsfw"
        if template.use_case not in (wanted.use_case, ENHANCEMENT) or unsafe:
            continue
        if template.target_model not in readers or template.job_type is not wanted.job_type:
            continue
        differs = {
            "use_case": template.use_case != wanted.use_case,
            "content_mode": template.content_mode != wanted.content_mode,
            "enhanced7b": template.enhanced7b not in (None, wanted.enhanced7b),
            "quality": template.quality not in (None, wanted.quality),
        }
        general = (
            (template.target_model is not wanted.target_model)
            + (template.quality is None)
            + (template.enhanced7b is None)
        )
        misfits = tuple(name for name, wrong in differs.items() if wrong)
        ranked.append(((*differs.values(), general), Selection(wanted, template, misfits)))
    if not ranked:
        message = f"no {ENHANCEMENT} template for {wanted.target_model} {wanted.job_type} in {wanted.content_mode} mode"
        raise NoTemplate(message)
    return min(ranked, key=lambda entry: entry[0])[1]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Family | Format | Quality) else value
