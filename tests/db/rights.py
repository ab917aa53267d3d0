"""What is right: each table that users reach, and what each actor may do with a row of it that alice owns.

Tables of which users only read their own rows, and those that no user reaches, are listed in `test_security`."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

ACTORS = ("owner", "other", "moderator", "admin", "anonymous")


@dataclass(frozen=True)
class Table:
    """A table, one row of it that alice owns, and what each actor may do with that row.

    In `rights` stand the first letters of select, insert, update and delete, by actor in the order of `ACTORS`. `row`
    is what an insert gives, with $alice for the owner and $<table> for the id of that table's row; `change` is the
    column that an update sets to `to`.
    """

    name: str
    rights: tuple[str, str, str, str, str]
    row: Mapping[str, Any]
    change: str
    reads: str = "*"
    key: str = "id"
    to: str = "changed"
    there: Any = None  # the key of a row that migrations made, and that nobody makes a second of


ALL = "siud"
OWNED = (ALL, "", "s", "sud", "")  # read by the staff, written by the owner, kept in order by admins
ADMINS = ("", "", "", ALL, "")
OFFERED = ("s", "s", "s", ALL, "")
DAY, NOON = date(2026, 1, 2), datetime(2026, 1, 2, 12, tzinfo=UTC)
SUMS = ("successful", "failed", "timed", "time_ms", "rated", "rating")
READ_BY_ADMINS = ("", "", "", "s", "")
PROVIDER = (
    "id, name, display_name, base_url, docs_url, auth_scheme, auth_header_name, rate_limits, is_active, output_hosts, "
    "nsfw_allowed"
)

TABLES = (
    Table("projects", OWNED, {"user_id": "$alice", "original_prompt": "a", "media_type": "image"}, "title"),
    Table("user_collections", OWNED, {"user_id": "$alice", "name": "a"}, "description"),
    Table(
        "characters", OWNED, {"user_id": "$alice", "name": "a", "description": "b", "content_rating": "nsfw"}, "mood"
    ),
    Table("scenes", OWNED, {"project_id": "$projects", "scene_number": 2, "description": "a"}, "setting"),
    Table(
        "character_scenes",
        (ALL, "", "s", ALL, ""),
        {"character_id": "$characters", "scene_prompt": "a"},
        "scene_name",
    ),
    Table("api_providers", OFFERED, {"name": "p2", "display_name": "P"}, "display_name", PROVIDER),
    Table(
        "api_models",
        OFFERED,
        {"provider_id": "$api_providers", "model_key": "m2", "display_name": "M", "modality": "image"},
        "display_name",
    ),
    Table(
        "enhancement_presets",
        ADMINS,
        {"preset_name": "two", "enable_qwen": True, "enable_compel": True, "auto_enhancement": True},
        "preset_description",
    ),
    Table("compel_configs", ADMINS, {"config_name": "a", "weights": {"quality": 1.3}}, "config_name"),
    Table(
        "enhanced_model_config",
        ADMINS,
        {"model_type": "SDXL", "config_name": "two", "inference_steps": 25, "guidance_scale": 7.5},
        "resolution",
    ),
    Table(
        "prompt_ab_tests",
        ADMINS,
        {"test_name": "a", "test_series": "b", "baseline_config": {}, "enhanced_config": {}},
        "test_name",
    ),
    Table(
        "model_test_results",
        ADMINS,
        {"model_type": "SDXL", "prompt_text": "a", "test_series": "b", "test_tier": "artistic"},
        "notes",
    ),
    Table(
        "admin_development_progress",
        ADMINS,
        {"feature_name": "a", "feature_category": "b", "status": "blocked", "priority": "P1"},
        "notes",
    ),
    Table(
        "prompt_templates",
        ADMINS,
        {"enhancer_model": "q", "use_case": "u", "template_name": "t2", "system_prompt": "s", "token_limit": 9},
        "comment",
    ),
    Table("negative_prompts", ADMINS, {"name": "two", "negative_prompt": "blur"}, "description"),
    Table(
        "lora.user_roles",
        ("s", "", "", ALL, ""),
        {"user_id": "$spare", "email": "a@example.com", "role": "viewer"},
        "email",
    ),
    Table("lora.app_settings", ("s", "", "", ALL, ""), {"setting_key": "two", "setting_value": "x"}, "setting_value"),
    Table(
        "lora.user_generations", (ALL, "", "", "sud", ""), {"user_id": "$alice", "prompt_used": "a"}, "user_feedback"
    ),
    Table(
        "lora.trait_detection_accuracy",
        (ALL, "", "", ALL, ""),
        {"generation_id": "$lora.user_generations", "trait_type": "hat"},
        "user_corrected_value",
    ),
    # alice is a viewer of the registry, so she reads what hangs on nobody
    Table("lora.training_runs", ("s", "", "", ALL, ""), {"run_name": "two", "base_model": "sdxl"}, "notes"),
    Table(
        "lora.epoch_results",
        ("s", "", "", ALL, ""),
        {"training_run_id": "$lora.training_runs", "epoch_number": 2},
        "notes",
    ),
    Table("lora.caption_versions", ("s", "", "", ALL, ""), {"version_name": "v2"}, "description"),
    Table(
        "lora.caption_versions_detailed",
        ("s", "", "", ALL, ""),
        {"caption_version_id": "$lora.caption_versions", "image_name": "b.png", "new_caption": "b"},
        "change_reason",
    ),
    Table(
        "lora.caption_reviews",
        ("s", "", "", ALL, ""),
        {"caption_version": "v2", "image_name": "a.png", "caption": "a"},
        "notes",
    ),
    Table("lora.test_prompts", ("s", "", "", ALL, ""), {"prompt_text": "two"}, "expected"),
    Table(
        "lora.prompt_test_results",
        ("s", "", "", ALL, ""),
        {"epoch_result_id": "$lora.epoch_results", "test_prompt_id": "$lora.test_prompts"},
        "notes",
    ),
    Table("lora.unmatched_test_outputs", ("s", "", "", ALL, ""), {"output_path": "two.png"}, "reason"),
    Table("conversations", (ALL, "", "", "", ""), {"user_id": "$alice", "title": "a"}, "title"),
    Table(
        "messages",
        ("si", "", "", "", ""),
        {"conversation_id": "$conversations", "sender": "user", "content": "a"},
        "content",
    ),
    Table("system_config", ("", "", "", "su", ""), {"id": 1, "config": {}}, "config", to="{}", there=1),
    # what the views of these names stand before
    Table(
        "ourvidz.enhancement_presets",
        ADMINS,
        {"preset_name": "four", "enable_qwen": True, "enable_compel": True, "auto_enhancement": True},
        "preset_description",
    ),
    Table("ourvidz.compel_configs", ADMINS, {"config_name": "a", "weights": {"quality": 1.4}}, "config_name"),
    Table(
        "ourvidz.prompt_ab_tests",
        ADMINS,
        {"test_name": "a", "test_series": "b", "baseline_config": {}, "enhanced_config": {}},
        "test_name",
    ),
    # histories and logs, which only the machinery writes
    Table("ourvidz.config_changes", READ_BY_ADMINS, {"model_type": "SDXL", "config_name": "a"}, "config_name"),
    Table(
        "ourvidz.past_days",
        READ_BY_ADMINS,
        {"model_type": "sdxl", "date": DAY, "updated_at": NOON, **dict.fromkeys(SUMS, 0)},
        "model_type",
        key="model_type",
    ),
    Table(
        "moderation_reviews",
        ("", "", "s", "s", ""),
        {"asset_id": "$alice", "user_id": "$alice", "was": "pending", "status": "approved"},
        "notes",
    ),
    Table(
        "api_usage_logs",
        ("s", "", "", "s", ""),
        {"provider_id": "$api_providers", "user_id": "$alice", "request_type": "a", "response_time_ms": 1},
        "error_message",
    ),
)

# the second row of a kind is what an insert tries; these differ where a table allows no second one
FIRST = {
    "scenes": {"scene_number": 1},
    "api_providers": {"name": "p1"},
    "api_models": {"model_key": "m1"},
    "enhancement_presets": {"preset_name": "one"},
    "compel_configs": {"weights": {"quality": 1.1}},
    "enhanced_model_config": {"config_name": "one", "is_active": True},
    "prompt_templates": {"template_name": "t1"},
    "negative_prompts": {"name": "one"},
    "ourvidz.enhancement_presets": {"preset_name": "three"},
    "ourvidz.compel_configs": {"weights": {"quality": 1.2}},
    "lora.user_roles": {"user_id": "$alice"},
    "lora.app_settings": {"setting_key": "one"},
    "lora.training_runs": {"run_name": "one"},
    "lora.epoch_results": {"epoch_number": 1},
    "lora.caption_versions": {"version_name": "v1"},
    "lora.caption_versions_detailed": {"image_name": "a.png"},
    "lora.caption_reviews": {"caption_version": "v1"},
    "lora.test_prompts": {"prompt_text": "one"},
    "lora.unmatched_test_outputs": {"output_path": "one.png"},
    "model_test_results": {"original_prompt": "a", "enhanced_prompt": "a b"},
}
