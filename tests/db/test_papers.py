"""Every statement of the specification's papers on the schema of ours, with numbers that were worked out by hand.

The statements stand in `papers/`, each with what was wrong in it. Names and columns of the papers' tables are compared
with ours by making them in a schema of their own.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAPERS = Path(__file__).parent / "papers"
TODAY = datetime.now(UTC).date()
D2, D3, D10 = (TODAY - timedelta(days=days) for days in (2, 3, 10))


def statements(name: str) -> dict[str, str]:
    """The statements of a file by their names."""
    parts = re.split(r"^-- name: (\w+)\n", (PAPERS / f"{name}.sql").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


PERFORMANCE, CHANGES, VIEWS, TRAINING = (statements(n) for n in ("performance", "schema_changes", "views", "training"))
PORTAL_TABLES, TRAINING_TABLES = statements("portal_tables"), statements("training_tables")

# letter: family, day, status, time in ms, rating, strategy, improvement, time of the enhancement in ms, user
JOBS: dict[str, tuple[Any, ...]] = {
    "A": ("sdxl", D2, "completed", 4000, 8, "qwen", "1.5", 1000, "alice"),
    "B": ("sdxl", D2, "completed", 6000, 9, "hybrid", "2.5", 2000, "alice"),
    "C": ("sdxl", D2, "failed", None, None, None, None, None, "alice"),
    "D": ("sdxl", D2, "completed", 8000, None, "compel", None, None, "bob"),
    "E": ("wan", D2, "completed", 100_000, 6, "none", None, None, "bob"),
    "F": ("wan", D2, "failed", None, None, "qwen", None, 3000, "bob"),
    "G": ("sdxl", D3, "completed", 2000, 4, None, None, None, "alice"),
    "H": ("sdxl", D3, "cancelled", None, None, None, None, None, "alice"),
    "I": ("sdxl", D3, "queued", None, None, None, None, None, "alice"),
    "J": ("wan", D10, "completed", 50_000, 10, "qwen", None, None, "alice"),
}
INSERT = """
    INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, status, stage, original_prompt, params,
                      created_at, completed_at, error_code, generation_time_ms, quality_rating, enhancement_strategy,
                      quality_improvement, enhancement_time_ms)
    VALUES ($1, $2, CASE $3::text WHEN 'sdxl' THEN 'sdxl_image_fast' ELSE 'video_fast' END,
            CASE $3 WHEN 'sdxl' THEN 'image' ELSE 'video' END, 'fast', $3, $4, 'generate', 'p', '{}', $5::timestamptz,
            CASE WHEN $4::text <> 'queued' THEN $5::timestamptz + interval '10 seconds' END,
            CASE WHEN $4 = 'failed' THEN 'oom' END, $6, $7, $8, $9, $10)"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ids(shared_database: Any) -> dict[str, UUID]:
    """The jobs above, by letter; and the users, by name."""
    pool = shared_database.pool
    made = {name: await shared_database.user(name) for name in ("alice", "bob")}
    for letter, (family, day, status, ms, rating, strategy, gain, enhancing, user) in JOBS.items():
        made[letter] = uuid4()
        at = datetime.combine(day, time(12), UTC)
        gained = None if gain is None else Decimal(gain)
        values = (made[letter], made[user], family, status, at, ms, rating, strategy, gained, enhancing)
        await pool.execute(INSERT, *values)
    queued = "INSERT INTO job_queue (job_id, user_id, queue, tag, cost) VALUES ($1, $2, 'sdxl', 0, 1)"
    await pool.execute(queued, made["I"], made["alice"])
    return made


@pytest.fixture
def pool(shared_database: Any, ids: dict[str, UUID]) -> asyncpg.Pool:
    return shared_database.pool


@asynccontextmanager
async def undone(pool: asyncpg.Pool) -> AsyncIterator[Any]:
    """A transaction of the owner that is taken back."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield connection
        finally:
            await transaction.rollback()


async def rows(pool: Any, sql: str, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns) if columns else tuple(row) for row in await pool.fetch(sql)]


def exact(*values: str) -> tuple[Decimal, ...]:
    return tuple(Decimal(value) for value in values)


# ------------------------------------------------------------------------------------------ names and columns


@pytest.mark.parametrize("table", [*PORTAL_TABLES, *(f"lora.{name}" for name in TRAINING_TABLES)])
async def test_every_table_of_the_papers_is_there_with_its_columns(pool: asyncpg.Pool, table: str) -> None:
    schema, _, name = table.rpartition(".")
    given = (TRAINING_TABLES if schema else PORTAL_TABLES)[name]
    needed = {"config_change_history": "enhanced_model_config", "trait_detection_accuracy": "user_generations"}
    async with undone(pool) as connection:
        await connection.execute("CREATE SCHEMA paper; SET LOCAL search_path = paper, public")
        if name in needed:
            await connection.execute((TRAINING_TABLES | PORTAL_TABLES)[needed[name]])
        await connection.execute(given)
        columns = "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped"
        asked = {row["attname"] for row in await connection.fetch(columns, f"paper.{name}")}
        ours = {row["attname"] for row in await connection.fetch(columns, f"{schema or 'public'}.{name}")}
    assert asked
    assert asked - ours == set()


@pytest.mark.parametrize("change", CHANGES)
async def test_every_change_of_the_schema_runs(pool: asyncpg.Pool, change: str) -> None:
    async with undone(pool) as connection:
        await connection.execute(CHANGES[change])


@pytest.mark.parametrize("table", PORTAL_TABLES)
async def test_a_rating_of_ten_and_an_expansion_past_a_thousand_percent_fit(pool: asyncpg.Pool, table: str) -> None:
    columns = """SELECT column_name, numeric_precision - numeric_scale AS digits FROM information_schema.columns
                 WHERE table_schema = 'public' AND table_name = $1 AND data_type = 'numeric'
                   AND numeric_precision IS NOT NULL AND column_name ~ '(quality|rating|expansion)'
                   AND column_name !~ 'weight'"""
    for row in await pool.fetch(columns, table):
        assert row["digits"] >= (4 if "expansion" in row["column_name"] else 2)


# ------------------------------------------------------------------------------------------- model performance


async def test_performance_of_a_model_type(pool: asyncpg.Pool) -> None:
    found = await rows(
        pool, PERFORMANCE["by_model_type"], "date", "total_generations", "successful_generations", "failed_generations",
        "avg_generation_time_ms", "avg_quality_rating", "total_processing_time_ms",
    )  # fmt: skip
    assert found == [
        (D2, 4, 3, 1, 6000, Decimal("8.50"), 18_000),  # 4, 6 and 8 s; ratings of 8 and 9
        (D3, 1, 1, 0, 2000, Decimal("4.00"), 2000),  # neither the cancelled nor the open one
    ]


async def test_success_rates_by_model(pool: asyncpg.Pool) -> None:
    assert await rows(pool, PERFORMANCE["success_rates"]) == [
        ("SDXL", 5, 4, 1, *exact("80.00", "6.25")),
        ("WAN", 3, 2, 1, *exact("66.67", "8")),
    ]


async def test_performance_trends(pool: asyncpg.Pool) -> None:
    assert await rows(pool, PERFORMANCE["trends"]) == [
        (D2, "SDXL", 4, 3, 6000, Decimal("8.50")),
        (D2, "WAN", 2, 1, 100_000, Decimal("6.00")),
        (D3, "SDXL", 1, 1, 2000, Decimal("4.00")),
        (D10, "WAN", 1, 1, 50_000, Decimal("10.00")),
    ]


async def test_models_compared(pool: asyncpg.Pool) -> None:
    assert await rows(pool, PERFORMANCE["comparison"]) == [
        ("SDXL", *exact("4000", "6.25"), 87.5),
        ("WAN", *exact("100000", "6"), 50.0),
    ]


async def test_days_with_many_failures(pool: asyncpg.Pool) -> None:
    assert await rows(pool, PERFORMANCE["anomalies"]) == [
        (D2, "WAN", 2, 1, Decimal("50.00")),
        (D2, "SDXL", 4, 1, Decimal("25.00")),
    ]


async def test_quality_by_week(pool: asyncpg.Pool) -> None:
    def monday(day: date) -> date:
        return day - timedelta(days=day.weekday())

    days = [("SDXL", D2, "8.5"), ("SDXL", D3, "4"), ("WAN", D2, "6"), ("WAN", D10, "10")]
    wanted = set()
    by = sorted(days, key=lambda day: (day[0], monday(day[1])))
    for (model, week), group in groupby(by, key=lambda day: (day[0], monday(day[1]))):
        ratings = [Decimal(day[2]) for day in group]
        wanted.add((week, model, sum(ratings) / len(ratings), len(ratings)))
    found = await rows(pool, PERFORMANCE["quality_trends"])
    assert {(week.date(), model, mean, count) for week, model, mean, count in found} == wanted
    assert found == sorted(found, key=lambda row: (row[0], row[2]), reverse=True)


async def test_processing_times(pool: asyncpg.Pool) -> None:
    found = await rows(pool, PERFORMANCE["processing_times"])
    assert [row[:4] for row in found] == [("SDXL", 4000, 2000, 6000), ("WAN", 75_000, 50_000, 100_000)]
    # of two values a and b: |a - b| / sqrt(2)
    assert [round(float(row[4]), 3) for row in found] == [2828.427, 35_355.339]


async def test_daily_summary(pool: asyncpg.Pool) -> None:
    assert await rows(pool, PERFORMANCE["daily_summary"]) == [
        (D2, 2, 6, 4, Decimal("7.25")),
        (D3, 1, 1, 1, Decimal("4")),
    ]


async def test_history_stays_when_its_jobs_go(pool: asyncpg.Pool) -> None:
    asked = "SELECT * FROM model_performance_logs ORDER BY model_type, date"
    async with undone(pool) as connection:
        before = await connection.fetch(asked)
        await connection.execute("DELETE FROM jobs WHERE quality_rating = 8")  # a part of a day
        assert await connection.fetch(asked) == before
        await connection.execute("DELETE FROM jobs")
        assert await connection.fetchval("SELECT count(*) FROM jobs") == 0
        assert await connection.fetch(asked) == before


# ------------------------------------------------------------------------------------------------- enhancement


async def test_effectiveness_of_strategies(pool: asyncpg.Pool) -> None:
    wanted = {
        "qwen": (2, *exact("8", "1.5", "2000", "50", "100")),  # A well, F failed
        "hybrid": (1, *exact("9", "2.5", "2000", "100", "100")),
        "compel": (1, None, None, None, Decimal(100), None),  # D was not rated
        # C failed, E and G were made, H and I did not end by themselves; none rated 8 or more
        "none": (5, Decimal(5), None, None, Decimal("66.67"), Decimal(0)),
    }
    for asked in ("SELECT * FROM enhancement_effectiveness", VIEWS["enhancement_effectiveness"]):
        found = {row[0]: row[1:] for row in await rows(pool, asked)}
        rounded = {k: (v[0], *(None if n is None else round(n, 2) for n in v[1:])) for k, v in found.items()}
        assert rounded == wanted


async def test_analysis_of_jobs(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    ours = await pool.fetch("SELECT * FROM job_enhancement_analysis ORDER BY id")
    papers = sorted(await pool.fetch(VIEWS["job_enhancement_analysis"]), key=lambda row: row["id"])
    assert len(ours) == len(JOBS)
    for one, other in zip(ours, papers, strict=True):
        assert {**one, "enhancement_strategy": None} == {**other, "enhancement_strategy": None}
    by_id = {row["id"]: row for row in ours}
    shown = [by_id[ids[letter]]["enhancement_display_name"] for letter in "ABDEG"]
    assert shown == ["Qwen Only", "Hybrid (Both)", "Compel Only", "No Enhancement", "No Enhancement"]
    assert by_id[ids["A"]]["generation_time_seconds"] == 10
    assert by_id[ids["I"]]["generation_time_seconds"] is None
    assert by_id[ids["G"]]["enhancement_strategy"] == "none"


async def test_metrics_of_a_day(pool: asyncpg.Pool) -> None:
    row = await pool.fetchrow(
        "SELECT * FROM live_prompt_metrics WHERE period_type = 'daily' AND timestamp = $1",
        datetime.combine(D2, time(), UTC),
    )
    assert {name: value for name, value in row.items() if name not in ("id", "timestamp")} == {
        "total_jobs": 6, "qwen_enhanced_jobs": 2, "compel_enhanced_jobs": 1, "hybrid_enhanced_jobs": 1,
        "no_enhancement_jobs": 2, "avg_enhancement_time_ms": 2000, "avg_quality_with_enhancement": Decimal("8.50"),
        "avg_quality_without_enhancement": Decimal("6.00"), "avg_quality_gain": Decimal("2.50"),
        "qwen_success_rate": Decimal("50.00"), "compel_success_rate": Decimal("100.00"),
        "hybrid_success_rate": Decimal("100.00"), "no_enhancement_success_rate": Decimal("50.00"),
        "sdxl_enhancement_usage": Decimal("75.00"), "wan_enhancement_usage": Decimal("50.00"), "period_type": "daily",
    }  # fmt: skip


async def test_metrics_of_an_hour(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    hourly = "SELECT * FROM live_prompt_metrics WHERE period_type = 'hourly'"
    async with undone(pool) as connection:
        assert await connection.fetch(hourly) == []
        now = await connection.fetchval("SELECT now()")
        values = (uuid4(), ids["alice"], "sdxl", "queued", now, None, None, "qwen", None, None)
        await connection.execute(INSERT, *values)
        (row,) = await connection.fetch(hourly)
        assert (row["timestamp"], row["total_jobs"]) == (now.replace(minute=0, second=0, microsecond=0), 1)
        assert row["qwen_success_rate"] is None  # nothing has ended


COUNTED = (
    "model_performance_logs", "job_enhancement_analysis", "live_prompt_metrics", "live_job_tracking",
    "user_enhancement_adoption",
)  # fmt: skip


async def counted(connection: asyncpg.Connection) -> dict[str, Any]:
    """What the views say that count jobs one by one or by the day."""
    shown = {view: await connection.fetch(f"SELECT * FROM {view} ORDER BY id") for view in COUNTED}  # noqa: S608
    strategies = "SELECT * FROM enhancement_effectiveness ORDER BY enhancement_strategy"
    stats = json.loads(await connection.fetchval("SELECT get_system_stats()::text"))
    return shown | {"strategies": await connection.fetch(strategies), "jobs": stats["total_jobs"]}


async def test_a_copy_out_of_the_library_counts_nowhere(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    async with undone(pool) as connection:
        before, made = await counted(connection), uuid4()
        now = await connection.fetchval("SELECT clock_timestamp()")
        await connection.execute(INSERT, made, ids["alice"], "sdxl", "completed", now, None, None, None, None, None)
        assert all(value != before[name] for name, value in (await counted(connection)).items())
        await connection.execute("UPDATE jobs SET provider = 'library' WHERE id = $1", made)
        assert await counted(connection) == before
        await connection.execute("DELETE FROM jobs WHERE id = $1", made)
        assert await counted(connection) == before  # nor is it remembered


async def test_open_jobs_are_tracked(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    asked = "SELECT job_id, status, enhancement_strategy FROM live_job_tracking"
    assert await rows(pool, asked) == [(ids["I"], "queued", "none")]
    async with undone(pool) as connection:
        await connection.execute(
            "UPDATE job_queue SET state = 'running', attempt = 1, worker = $1, lease_until = now()", uuid4()
        )
        assert await rows(connection, asked) == [(ids["I"], "processing", "none")]


async def test_adoption_by_users(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    first = datetime.combine(D10, time(12), UTC)
    found = await rows(
        pool, "SELECT * FROM user_enhancement_adoption ORDER BY user_id = $1, date".replace("$1", f"'{ids['bob']}'")
    )
    assert [row[1:] for row in found] == [
        (ids["alice"], D10, 1, 1, Decimal("100.00"), 1, 0, 0, 0, Decimal("10.00"), None, None, first, None),
        (ids["alice"], D3, 3, 0, Decimal("0.00"), 0, 0, 0, 3, None, Decimal("4.00"), None, first, Decimal("-100.00")),
        (ids["alice"], D2, 3, 2, Decimal("66.67"), 1, 0, 1, 1, Decimal("8.50"), None, None, first, Decimal("66.67")),
        (ids["bob"], D2, 3, 2, Decimal("66.67"), 1, 1, 0, 1, None, Decimal("6.00"), None,
         datetime.combine(D2, time(12), UTC), None),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- computed columns


async def test_tests_of_weights_are_counted_whatever_the_order_of_their_names(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        weights = {"quality": 1.2, "detail": 1.0}
        await connection.execute("INSERT INTO compel_configs (config_name, weights) VALUES ('a', $1)", weights)
        for quality, consistency in ((8, 7), (6, 9)):
            await connection.execute(
                """INSERT INTO model_test_results (model_type, prompt_text, test_series, test_tier, overall_quality,
                                                   consistency, compel_weights)
                   VALUES ('SDXL', 'p', 's', 'artistic', $1, $2, '{"detail": 1.0, "quality": 1.2}')""",
                quality,
                consistency,
            )
        (row,) = await connection.fetch("SELECT * FROM compel_configs")
    assert (row["total_tests"], row["avg_quality"], row["avg_consistency"]) == (2, *exact("7.00", "8.00"))
    assert re.fullmatch("[0-9a-f]{64}", row["config_hash"])


async def test_tests_of_prompts_in_both_forms(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        await connection.execute(
            """INSERT INTO model_test_results (model_type, prompt_text, test_series, test_tier, overall_quality,
                 baseline_quality, original_prompt, enhanced_prompt, enhancement_strategy)
               VALUES ('SDXL', 'p', 's', 'artistic', 8, 6.5, 'a cat', $1, 'qwen')""",
            "x" * 175,
        )
        enhanced = await connection.fetchrow("SELECT * FROM enhanced_prompt_tests")
        plain = await connection.fetchrow("SELECT * FROM prompt_test_results")
    assert (enhanced["original_length"], enhanced["enhanced_length"]) == (5, 175)
    assert (enhanced["expansion_percentage"], enhanced["quality_improvement"]) == exact("3400.00", "1.5")
    assert plain["quality_rating"] == 4


async def test_use_of_a_preset(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    async with undone(pool) as connection:
        await connection.execute(
            """INSERT INTO enhancement_presets (preset_name, enable_qwen, enable_compel, auto_enhancement)
               VALUES ('Speed Focus', false, true, true), ('Disabled', false, false, false)"""
        )
        use = 'UPDATE jobs SET test_metadata = \'{"preset": "Speed Focus"}\' WHERE id = ANY ($1)'
        await connection.execute(use, [ids["A"], ids["E"], ids["C"]])
        asked = "SELECT preset_name, usage_count, avg_quality_with_preset FROM enhancement_presets ORDER BY 2"
        assert await rows(connection, asked) == [("Disabled", 0, None), ("Speed Focus", 3, Decimal("7.00"))]
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute("UPDATE enhancement_presets SET usage_count = 9")


async def test_arms_of_a_test(pool: asyncpg.Pool, ids: dict[str, UUID]) -> None:
    async with undone(pool) as connection:
        test = await connection.fetchval(
            """INSERT INTO prompt_ab_tests (test_name, test_series, baseline_config, enhanced_config)
               VALUES ('couples', 's', '{}', '{}') RETURNING id"""
        )
        for letter, arm in (("A", "baseline"), ("B", "enhanced"), ("E", "enhanced")):
            change = "UPDATE jobs SET prompt_test_id = $1, test_metadata = $2 WHERE id = $3"
            await connection.execute(change, test, {"arm": arm}, ids[letter])
        row = await connection.fetchrow("SELECT * FROM prompt_ab_tests")
    assert row["total_participants"] == 2  # alice on both sides, bob on one
    assert (row["baseline_avg_quality"], row["enhanced_avg_quality"]) == exact("8.00", "7.50")
    assert row["quality_improvement"] == Decimal("-0.50")


async def test_what_a_change_of_a_configuration_did(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        await connection.execute(
            """INSERT INTO enhanced_model_config (model_type, config_name, inference_steps, guidance_scale, is_active)
               VALUES ('SDXL', 'daily', 20, 7.5, true)"""
        )
        await connection.execute("UPDATE enhanced_model_config SET inference_steps = 25")
        await connection.execute("UPDATE enhanced_model_config SET inference_steps = 25")  # changes nothing
        for summary, day in ("created", D10), ("changed", D2):
            is_first = "IS NULL" if summary == "created" else "IS NOT NULL"
            move = f"UPDATE ourvidz.config_changes SET changed_at = $1 WHERE old_values {is_first}"  # noqa: S608
            await connection.execute(move, datetime.combine(day, time(), UTC))
        asked = """SELECT change_summary, jobs_affected, quality_impact, performance_impact
                   FROM config_change_history ORDER BY changed_at"""
        assert await rows(connection, asked) == [
            ("created", 3, None, None),  # G, H and I; none in the week before
            # A to D: 8.5 against 4, and 6 s against 2
            ("inference_steps: 20 -> 25", 4, *exact("4.50", "200.00")),
        ]
        history = "SELECT config_data ->> 'inference_steps', is_active FROM model_config_history ORDER BY created_at"
        assert await rows(connection, history) == [("20", False), ("25", True)]


# ------------------------------------------------------------------------------------------------- the registry


async def test_the_audits_own_statements(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        for statement in TRAINING.values():
            await connection.execute(statement)
        compared = await connection.fetchrow("SELECT * FROM lora.training_comparison")
        assert (compared["epochs_logged"], compared["production_ready_epochs"], compared["best_epoch"]) == (1, 1, 8)
        assert compared["avg_epoch_score"] == Decimal("8.33")  # of 9, 8 and 8
        assert await rows(
            connection, "SELECT caption_version, avg_run_quality FROM lora.caption_version_effectiveness"
        ) == [("caption_fix_v1", Decimal("8.50"))]
        ready = await connection.fetchrow("SELECT * FROM lora.production_ready_epochs")
        assert ready["quantitative_metrics"]["avg_colors"] == 216.6
        correlated = await connection.fetchrow("SELECT * FROM lora.v_parameter_correlation_data")
        assert correlated["alpha_per_dim"] == 1
        best = await connection.fetchrow("SELECT place, run_name FROM lora.best_training_runs")
        assert tuple(best) == (1, "CAPTION_FIX_Epoch8_Production")
        summary = await connection.fetchrow("SELECT * FROM lora.training_summary")
        assert (summary["production_runs"], summary["epochs_without_metrics"], summary["epochs_without_issues"]) == (
            1,
            0,
            1,
        )
        assert await connection.fetchval("SELECT role FROM lora.user_roles") == "admin"


async def test_progress_of_epochs(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        run = await connection.fetchval(TRAINING["run"])
        for epoch, scores in ((1, (6, 6, 6)), (2, (8, None, 7)), (3, (None, None, None))):
            await connection.execute(
                """INSERT INTO lora.epoch_results (training_run_id, epoch_number, visual_quality_score,
                     style_match_score, prompt_adherence_score) VALUES ($1, $2, $3, $4, $5)""",
                run, epoch, *scores,
            )  # fmt: skip
        asked = "SELECT epoch_number, mean_score, change_since_last FROM lora.v_epoch_metrics_progression ORDER BY 1"
        assert await rows(connection, asked) == [(1, Decimal(6), None), (2, *exact("7.5", "1.5")), (3, None, None)]


async def test_progress_of_reviews(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        await connection.execute(
            """INSERT INTO lora.caption_reviews (caption_version, image_name, caption, status, reviewed_at)
               VALUES ('v1', 'a', 'c', 'approved', now()), ('v1', 'b', 'c', 'corrected', now()),
                      ('v1', 'c', 'c', 'pending', NULL)"""
        )
        (row,) = await rows(connection, "SELECT * FROM lora.review_progress")
    assert row == ("v1", 3, 2, 1, 1, 0, Decimal("66.67"))


async def test_use_of_traits(pool: asyncpg.Pool) -> None:
    async with undone(pool) as connection:
        await connection.execute(
            """INSERT INTO lora.user_generations (alacarte_traits_selected, user_rating)
               VALUES ('{eyes:glasses,hat}', 5), ('{eyes:glasses}', 2), ('{eyes:glasses}', NULL), (NULL, 1)"""
        )
        asked = """SELECT trait_id, trait_category, times_selected, times_rated_positive, times_rated_negative,
                          avg_user_rating FROM lora.alacarte_trait_usage ORDER BY 1"""
        assert await rows(connection, asked) == [
            ("eyes:glasses", "eyes", 3, 1, 1, Decimal("3.50")),
            ("hat", None, 1, 1, 0, Decimal("5.00")),
        ]
