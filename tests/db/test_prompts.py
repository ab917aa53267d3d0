"""Seeded rows that an operator may edit, and that come back as what the product works with."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from db.prompts import NegativeRow, Prompts, TemplateRow
from deployments.prompting import negative_rows, negatives_of, template_rows, templates_of
from models.prompting.negatives import builtin_negatives
from models.prompting.prompts import builtin_templates


@pytest.fixture
async def prompts(database: Any) -> Prompts:
    seeded = Prompts(database.pool)
    await seeded.seed(template_rows(), negative_rows())
    return seeded


def by_name(values: Any) -> list[Any]:
    return sorted(values, key=lambda value: (value.name, value.content_mode or "", str(value)))


async def test_templates_come_back_as_the_product_made_them(prompts: Prompts) -> None:
    assert by_name(templates_of(await prompts.templates())) == by_name(
        template for template in builtin_templates() if template.use_case == "enhancement"
    )


async def test_negatives_come_back_as_the_product_made_them(prompts: Prompts) -> None:
    assert by_name(negatives_of(await prompts.negatives())) == by_name(builtin_negatives())


async def test_negatives_come_by_priority(prompts: Prompts) -> None:
    priorities = [row.priority for row in await prompts.negatives()]
    assert priorities == sorted(priorities, reverse=True)


async def test_seeding_again_adds_nothing(prompts: Prompts, database: Any) -> None:
    count = "SELECT (SELECT count(*) FROM prompt_templates), (SELECT count(*) FROM negative_prompts)"
    before = await database.pool.fetchrow(count)
    await asyncio.gather(*(prompts.seed(template_rows(), negative_rows()) for _ in range(3)))
    assert await database.pool.fetchrow(count) == before


async def test_seeding_keeps_what_an_operator_changed(prompts: Prompts, database: Any) -> None:
    await database.pool.execute("UPDATE prompt_templates SET system_prompt = 'mine' WHERE template_name = 'SDXL_FAST'")
    await database.pool.execute("UPDATE negative_prompts SET negative_prompt = 'mine'")
    await prompts.seed(template_rows(), negative_rows())
    edited = [row for row in await prompts.templates() if row.template_name == "SDXL_FAST"]
    assert {row.system_prompt for row in edited} == {"mine"}
    assert {row.negative_prompt for row in await prompts.negatives()} == {"mine"}


async def test_seeding_adds_what_is_missing(prompts: Prompts, database: Any) -> None:
    await database.pool.execute("DELETE FROM prompt_templates WHERE template_name = 'SDXL_FAST'")
    assert not [row for row in await prompts.templates() if row.template_name == "SDXL_FAST"]
    await prompts.seed(template_rows(), negative_rows())
    assert [row for row in await prompts.templates() if row.template_name == "SDXL_FAST"]


async def test_rows_that_are_not_active_are_not_used(prompts: Prompts, database: Any) -> None:
    await database.pool.execute("UPDATE prompt_templates SET is_active = template_name = 'WAN_FAST'")
    await database.pool.execute("UPDATE negative_prompts SET is_active = false")
    assert {row.template_name for row in await prompts.templates()} == {"WAN_FAST"}
    assert await prompts.negatives() == []


async def test_templates_are_of_one_use_case(prompts: Prompts) -> None:
    chat = TemplateRow(
        use_case="chat",
        content_mode="sfw",
        template_name="CHAT",
        system_prompt="Answer.",
        token_limit=100,
        job_type="chat",
        target_model=None,
        quality=None,
    )
    await prompts.seed([chat], [])
    assert await prompts.templates("chat") == [chat]
    assert "CHAT" not in {row.template_name for row in await prompts.templates()}
    assert templates_of([chat]) == []


async def test_a_negative_that_fits_everything_is_seeded_once(prompts: Prompts) -> None:
    row = NegativeRow(
        name="house",
        model_type=None,
        content_mode=None,
        generation_mode=None,
        negative_prompt="fog, rain",
        priority=99,
    )
    for _ in range(2):
        await prompts.seed([], [row])
    (seeded,) = [kept for kept in await prompts.negatives() if kept.name == "house"]
    assert seeded == row
    (preset,) = negatives_of([seeded])
    assert (preset.terms, preset.family, preset.content_mode, preset.generation_mode) == (
        ("fog", "rain"),
        None,
        None,
        None,
    )


async def test_a_failed_seed_leaves_nothing(database: Any) -> None:
    bad = replace(template_rows()[0], token_limit=-1)
    with pytest.raises(Exception, match="token_limit"):
        await Prompts(database.pool).seed([*template_rows(), replace(bad, template_name="BAD")], [])
    assert await database.pool.fetchval("SELECT count(*) FROM prompt_templates") == 0


async def test_replicas_read_them(prompts: Prompts, database: Any) -> None:
    assert await Prompts(database.worker_pool).templates()
    assert await Prompts(database.worker_pool).negatives()
