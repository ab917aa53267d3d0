"""The registry of trainings: what an import changes, refuses and leaves, and what the audit finds."""

import hashlib
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from db.pool import as_user
from db.training import MAX_DEPTH, BadRow, EpochResult, Imported, Numbered, RefusedRows, TrainingRun, Trainings

SHA = "ab" * 32
WHOLE: dict[str, Any] = {  # an epoch with which the audit is content
    "run_name": "r",
    "epoch_number": 8,
    "checkpoint_path": "/srv/ink.safetensors",
    "checkpoint_file_size_mb": 228,
    "visual_quality_score": 9,
    "style_match_score": 8,
    "prompt_adherence_score": 8,
    "production_ready": True,
    "quantitative_metrics": {"avg_colors": 216.6},
    "diagnosed_issues": [],
    "lora_name": "ink",
    "sha256": SHA,
}
RUN: dict[str, Any] = {
    "run_name": "r",
    "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
    "model_family": "sdxl",
    "network_dim": 32,
    "is_production": True,
}


def rows(*given: dict[str, Any]) -> list[Numbered]:
    """Rows as of a file with one in each line."""
    kinds = (EpochResult if "epoch_number" in row else TrainingRun for row in given)
    return [Numbered(n, kind.model_validate(row)) for n, (kind, row) in enumerate(zip(kinds, given, strict=True), 1)]


def without(row: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in fields}


@pytest.fixture
def trainings(database: Any) -> Trainings:
    return Trainings(database.pool)


async def count(database: Any) -> tuple[int, int]:
    statement = "SELECT (SELECT count(*) FROM lora.training_runs), (SELECT count(*) FROM lora.epoch_results)"
    return tuple(await database.pool.fetchrow(statement))


# -------------------------------------------------------------------------------------------------------- imports


async def test_an_import_is_idempotent(database: Any, trainings: Trainings) -> None:
    given = rows(WHOLE, RUN)  # a run may come after its epochs
    assert await trainings.put(given) == Imported(added=2, changed=0, unchanged=0)
    assert await trainings.put(given) == Imported(added=0, changed=0, unchanged=2)
    assert await count(database) == (1, 1)


async def test_an_import_changes_what_it_gives_and_keeps_the_rest(database: Any, trainings: Trainings) -> None:
    await trainings.put(rows(RUN, WHOLE))
    change = {"run_name": "r", "epoch_number": 8, "visual_quality_score": "7.25", "notes": None}
    assert await trainings.put(rows(change)) == Imported(added=0, changed=1, unchanged=0)
    row = await database.pool.fetchrow("SELECT * FROM lora.epoch_results")
    assert (row["visual_quality_score"], row["style_match_score"]) == (Decimal("7.25"), 8)
    assert (row["production_ready"], row["lora_name"], row["quantitative_metrics"]) == (
        True,
        "ink",
        {"avg_colors": 216.6},
    )


async def test_a_try_writes_nothing(database: Any, trainings: Trainings) -> None:
    assert await trainings.put(rows(RUN, WHOLE), keep=False) == Imported(added=2, changed=0, unchanged=0)
    assert await count(database) == (0, 0)


async def test_one_bad_row_keeps_all_of_them_out(database: Any, trainings: Trainings) -> None:
    other = WHOLE | {"run_name": "nobody", "lora_name": "oil"}
    with pytest.raises(RefusedRows) as refused:
        await trainings.put(rows(RUN, WHOLE, other, WHOLE | {"epoch_number": 9}))
    assert refused.value.bad == (
        BadRow(3, "run_name", "there is no such run, here or in the registry"),
        BadRow(4, "lora_name", "another epoch has that name"),
    )
    assert await count(database) == (0, 0)


async def test_what_postgres_can_not_store_is_refused_with_its_line(database: Any, trainings: Trainings) -> None:
    with pytest.raises(RefusedRows) as refused:
        await trainings.put(rows(RUN, WHOLE | {"training_loss": "1e200000"}))
    assert [bad.line for bad in refused.value.bad] == [2]
    assert await count(database) == (0, 0)


async def test_a_name_that_is_too_long_for_its_index_is_refused_with_its_line(
    database: Any, trainings: Trainings
) -> None:
    long = "".join(hashlib.sha512(bytes([number])).hexdigest() for number in range(78))  # no run of it repeats
    with pytest.raises(RefusedRows) as refused:
        await trainings.put(rows(RUN, RUN | {"run_name": long}))
    assert [bad.line for bad in refused.value.bad] == [2]
    assert await count(database) == (0, 0)


async def test_the_deepest_and_longest_that_a_row_takes_is_stored(database: Any, trainings: Trainings) -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    given = {"a": value, "b": 10**4000}
    await trainings.put(rows(RUN, WHOLE | {"quantitative_metrics": given}))
    assert await database.pool.fetchval("SELECT quantitative_metrics FROM lora.epoch_results") == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantitative_metrics": {"a": "\0"}}, "a: has a character that can't be stored"),
        ({"quantitative_metrics": {"loss": float("nan")}}, "loss: NaN is no number"),
        ({"quantitative_metrics": {"a": {"b": [float("-inf")]}}}, "a: b: 0: -Infinity is no number"),
        ({"visual_quality_score": float("inf")}, "Infinity is no number"),
        ({"checkpoint_path": "/srv/ink.ckpt"}, "ends in .safetensors"),
        ({"checkpoint_path": "ink.safetensors"}, "begins with /"),
        ({"lora_name": "../ink"}, "pattern"),
        ({"visual_quality_score": 11}, "less than or equal to 10"),
        ({"verdict": "superb"}, "Input should be"),
        ({"sha256": "AB" * 32}, "pattern"),
        ({"epoch": 3}, "not permitted"),
    ],
)
def test_an_epoch_that_can_not_be_used_is_no_epoch(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochResult.model_validate(WHOLE | change)


def test_a_name_inside_a_repository_is_a_relative_one() -> None:
    row = EpochResult.model_validate(WHOLE | {"checkpoint_path": "ink.safetensors", "repository": "studio/ink"})
    assert row.checkpoint_path == "ink.safetensors"


# ----------------------------------------------------------------------------------------------------- production


@pytest.mark.parametrize(
    ("run", "epoch", "named"),
    [
        ({}, {}, ["ink"]),
        ({"is_production": False}, {}, []),
        ({"model_family": None}, {}, []),
        ({"model_family": "wan"}, {}, []),
        ({}, {"production_ready": False}, []),
        ({}, {"lora_name": None}, []),
    ],
)
async def test_what_is_in_production_can_be_named(
    database: Any, trainings: Trainings, run: dict[str, Any], epoch: dict[str, Any], named: list[str]
) -> None:
    await trainings.put(rows(RUN | run, WHOLE | epoch))
    assert [lora.name for lora in await trainings.production_loras("sdxl")] == named
    # replicas read the same, and nothing else of the registry
    assert [lora.name for lora in await Trainings(database.worker_pool).production_loras("sdxl")] == named


# ---------------------------------------------------------------------------------------------------------- audit


async def codes(trainings: Trainings, *offered: str) -> set[tuple[str, str]]:
    return {(finding.check_code, finding.severity) for finding in await trainings.findings(offered)}


async def use(database: Any, loras: list[dict[str, Any]] | None) -> None:
    """A job that names these."""
    await database.pool.execute(
        """INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, original_prompt, params)
           VALUES ($1, $2, 'sdxl_image_fast', 'image', 'fast', 'sdxl', 'generate', 'p', $3)""",
        uuid4(),
        await database.user(),
        {"loras": loras},
    )


async def test_the_audit_is_content_with_a_whole_registry(trainings: Trainings) -> None:
    await trainings.put(rows(RUN, WHOLE))
    assert await trainings.findings(["ink"]) == []


@pytest.mark.parametrize(
    ("run", "epoch", "found"),
    [
        ({}, {"quantitative_metrics": None}, ("metrics_missing", "error")),
        ({}, {"quantitative_metrics": {}}, ("metrics_missing", "error")),
        ({}, {"diagnosed_issues": None}, ("issues_missing", "warning")),
        ({}, {"style_match_score": None}, ("scores_missing", "error")),
        ({}, {"lora_name": None, "checkpoint_path": None}, ("checkpoint_missing", "error")),
        ({}, {"sha256": None}, ("not_pinned", "warning")),
        ({"network_dim": 128}, {}, ("size_rank_mismatch", "error")),  # 371 MB at least
        ({}, {"checkpoint_file_size_mb": 36}, ("size_rank_mismatch", "error")),  # 93 MB at least
        ({}, {"checkpoint_file_size_mb": 900}, ("size_rank_mismatch", "error")),  # 506 MB at most
        ({"is_production": False}, {}, ("production_flags_disagree", "warning")),
        ({}, {"production_ready": False}, ("production_unlogged", "error")),
        (
            {"base_model": "runwayml/stable-diffusion-v1-5"},
            {"checkpoint_file_size_mb": 36},
            ("base_model_mismatch", "error"),
        ),
    ],
)
async def test_the_audit_finds_each_fault(
    trainings: Trainings, run: dict[str, Any], epoch: dict[str, Any], found: tuple[str, str]
) -> None:
    await trainings.put(rows(RUN | run, WHOLE | epoch))
    assert await codes(trainings) == {found}


async def test_the_papers_own_file_does_not_fit_its_rank(trainings: Trainings) -> None:
    run = {"run_name": "r", "base_model": "runwayml/stable-diffusion-v1-5", "network_dim": 128, "is_production": True}
    await trainings.put(rows(run, without(WHOLE, "lora_name") | {"checkpoint_file_size_mb": 36}))
    (finding,) = await trainings.findings()
    assert finding.check_code == "size_rank_mismatch"
    assert finding.detail == "36.00 MB do not fit rank 128 of sd15, which takes 49.9 to 601.6 MB"
    await trainings.put(rows({"run_name": "r", "base_model": run["base_model"], "network_dim": 32}))
    assert await trainings.findings() == []


@pytest.mark.parametrize(
    ("run", "epoch", "reason"),
    [
        ({"is_production": False}, {}, "its epoch is ready for production, its run is not in it"),
        ({}, {"production_ready": False}, "its run is in production, its epoch is not ready for it"),
        (
            {"is_production": False},
            {"production_ready": False},
            "its epoch is not ready for production, and its run is not in it",
        ),
        ({}, {"lora_name": "oil"}, "no epoch has that name"),
    ],
)
async def test_a_lora_is_logged_by_an_epoch_in_production_and_by_no_other(
    database: Any, trainings: Trainings, run: dict[str, Any], epoch: dict[str, Any], reason: str
) -> None:
    await trainings.put(rows(RUN | run, WHOLE | epoch))
    await use(database, [{"name": "ink"}])
    where = (None, None) if "lora_name" in epoch else ("r", 8)
    found = [
        one for one in await trainings.findings(["ink"]) if one.lora_name == "ink" and "production_u" in one.check_code
    ]
    assert {(one.severity, one.run_name, one.epoch_number, one.detail) for one in found} == {
        ("error", *where, f"the profile offers it; {reason}"),
        ("error", *where, f"1 jobs of the last 30 days used it; {reason}"),
    }
    await trainings.put(rows(RUN, WHOLE | {"epoch_number": 9, "lora_name": "oak"}, WHOLE))
    assert await trainings.findings(["ink", "oak"]) == []


async def test_the_audit_is_read_by_whom_the_registry_is_open_to(database: Any, trainings: Trainings) -> None:
    await trainings.put(rows(RUN | {"is_production": False}, WHOLE))
    await use(database, [{"name": "ink"}])
    seen = {}
    for role in ("admin", "basic_user"):
        async with as_user(database.pool, await database.user(role, role)) as connection:
            seen[role] = [row["check_code"] for row in await connection.fetch("SELECT * FROM lora.audit_findings")]
    assert sorted(seen["admin"]) == ["production_flags_disagree", "production_unlogged"]
    assert seen["basic_user"] == []


async def test_the_profiles_loras_are_to_be_logged(trainings: Trainings) -> None:
    await trainings.put(rows(RUN, WHOLE))
    (finding,) = await trainings.findings(["ink", "oil"])
    assert (finding.check_code, finding.lora_name) == ("production_unlogged", "oil")


async def test_a_lora_that_jobs_used_is_to_be_logged(database: Any, trainings: Trainings) -> None:
    await trainings.put(rows(RUN, WHOLE))
    for loras in ([{"name": "ink", "weight": 1}], [{"name": "oil"}, {"name": "ink"}], [], None):
        await use(database, loras)
    (finding,) = await trainings.findings()
    assert (finding.check_code, finding.lora_name, finding.severity) == ("production_unlogged", "oil", "error")
    used = await database.pool.fetch("SELECT name, jobs FROM lora.used_loras ORDER BY name")
    assert [tuple(row) for row in used] == [("ink", 2), ("oil", 1)]
