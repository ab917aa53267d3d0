"""Seed rows: there once, complete, and an operator's edit stays."""

from typing import Any

from db.offers import Offers
from models.catalog import JOB_TYPES
from serve_app.seeds import offered


async def test_seeding_twice_adds_nothing_and_keeps_edits(database: Any) -> None:
    pool, offers = database.pool, Offers(database.pool)
    await offers.seed(offered())
    await pool.execute("UPDATE enhancement_presets SET preset_description = 'mine' WHERE preset_name = 'Disabled'")
    await pool.execute("UPDATE api_providers SET is_active = true WHERE name = 'replicate'")
    await offers.seed(offered())
    presets = await pool.fetch("SELECT preset_name, preset_description FROM enhancement_presets")
    assert {row["preset_name"] for row in presets} == {"Quality Focus", "Speed Focus", "Maximum Quality", "Disabled"}
    assert {row["preset_description"] for row in presets if row["preset_name"] == "Disabled"} == {"mine"}
    providers = await pool.fetch("SELECT name, is_active FROM api_providers ORDER BY name")
    assert [tuple(row) for row in providers] == [("local", True), ("replicate", True)]


async def test_what_presets_enable_is_as_the_portal_shows_it(database: Any) -> None:
    await Offers(database.pool).seed(offered())
    rows = await database.pool.fetch(
        "SELECT preset_name, enable_qwen, enable_compel, auto_enhancement FROM enhancement_presets"
    )
    assert {row[0]: tuple(row)[1:] for row in rows} == {
        "Quality Focus": (True, True, True),
        "Speed Focus": (False, True, True),
        "Maximum Quality": (True, True, False),
        "Disabled": (False, False, False),
    }


async def test_models_of_this_installation_are_families_of_the_catalog(database: Any) -> None:
    await Offers(database.pool).seed(offered())
    rows = await database.pool.fetch("SELECT model_family, modality FROM api_models")
    kinds = {(kind.family.value, kind.format.value) for kind in JOB_TYPES.values()} | {("qwen", "chat")}
    assert {tuple(row) for row in rows} <= kinds
    assert {row["model_family"] for row in rows} == {"sdxl", "wan", "qwen"}
