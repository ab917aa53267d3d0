-- What is used or offered as production is to be logged as production: by an epoch that is ready, in a run that is in it.
-- An epoch that is there and not in production explains no LoRA that users get, so it does not content the audit.

-- Why a LoRA is not in production: one row, with the epoch of that name where there is one; none if it is in production.
CREATE FUNCTION lora.production_gap(asked text) RETURNS TABLE (run_name text, epoch_number int, reason text)
LANGUAGE sql STABLE AS $$
  SELECT named.run_name, named.epoch_number,
         CASE WHEN named.run_name IS NULL THEN 'no epoch has that name'
              WHEN named.production_ready THEN 'its epoch is ready for production, its run is not in it'
              WHEN named.is_production THEN 'its run is in production, its epoch is not ready for it'
              ELSE 'its epoch is not ready for production, and its run is not in it' END
  FROM (VALUES (1)) AS always (there)
  LEFT JOIN (SELECT r.run_name, e.epoch_number, e.production_ready, r.is_production
             FROM lora.epoch_results e JOIN lora.training_runs r ON r.id = e.training_run_id
             WHERE e.lora_name = asked) named ON true
  WHERE NOT coalesce(named.production_ready AND named.is_production, false)
$$;
REVOKE EXECUTE ON FUNCTION lora.production_gap(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lora.production_gap(text) TO authenticated;

-- What the registry says that can't be so, or leaves out. An error keeps a LoRA from being used or traced.
CREATE OR REPLACE VIEW lora.audit_findings WITH (security_invoker = true) AS
WITH epochs AS (
  SELECT e.*, r.run_name, r.base_model, r.model_family, r.network_dim, r.is_production, size.architecture,
         size.least_mb * r.network_dim AS least_mb, size.most_mb * r.network_dim AS most_mb
  FROM lora.epoch_results e
  JOIN lora.training_runs r ON r.id = e.training_run_id
  LEFT JOIN lora.rank_sizes size ON r.base_model ~* size.base_model_pattern
)
SELECT 'production_unlogged' AS check_code, 'error' AS severity, gap.run_name, gap.epoch_number, u.name AS lora_name,
       format('%s jobs of the last 30 days used it; %s', u.jobs, gap.reason) AS detail
FROM lora.used_loras u CROSS JOIN LATERAL lora.production_gap(u.name) gap
UNION ALL
SELECT 'production_unlogged', 'error', r.run_name, NULL, NULL, 'the run is in production and none of its epochs is logged as ready'
FROM lora.training_runs r
WHERE r.is_production
  AND NOT EXISTS (SELECT FROM lora.epoch_results e WHERE e.training_run_id = r.id AND e.production_ready)
UNION ALL
SELECT 'production_flags_disagree', 'warning', run_name, epoch_number, lora_name, 'the epoch is ready for production, its run is not in it'
FROM epochs WHERE production_ready AND NOT is_production
UNION ALL
SELECT 'checkpoint_missing', 'error', run_name, epoch_number, lora_name, 'the epoch is ready for production and has no checkpoint_path'
FROM epochs WHERE production_ready AND checkpoint_path IS NULL
UNION ALL
SELECT 'metrics_missing', CASE WHEN production_ready THEN 'error' ELSE 'warning' END, run_name, epoch_number, lora_name,
       'quantitative_metrics is empty'
FROM epochs WHERE quantitative_metrics IS NULL OR quantitative_metrics = '{}'
UNION ALL
SELECT 'issues_missing', 'warning', run_name, epoch_number, lora_name, 'diagnosed_issues is null; [] says that there are none'
FROM epochs WHERE diagnosed_issues IS NULL
UNION ALL
SELECT 'scores_missing', CASE WHEN production_ready THEN 'error' ELSE 'warning' END, run_name, epoch_number, lora_name,
       'a score of visual quality, style match or prompt adherence is missing'
FROM epochs WHERE visual_quality_score IS NULL OR style_match_score IS NULL OR prompt_adherence_score IS NULL
UNION ALL
SELECT 'size_rank_mismatch', 'error', run_name, epoch_number, lora_name,
       format('%s MB do not fit rank %s of %s, which takes %s to %s MB', checkpoint_file_size_mb, network_dim, architecture,
              round(least_mb, 1), round(most_mb, 1))
FROM epochs WHERE checkpoint_file_size_mb NOT BETWEEN least_mb AND most_mb
UNION ALL
SELECT 'base_model_mismatch', 'error', run_name, epoch_number, lora_name,
       format('trained on %s, registered for %s', base_model, model_family)
FROM epochs WHERE model_family IN ('sdxl', 'wan') AND architecture <> model_family
UNION ALL
SELECT 'not_pinned', 'warning', run_name, epoch_number, lora_name, 'without sha256 another file can take its place unnoticed'
FROM epochs WHERE lora_name IS NOT NULL AND production_ready AND sha256 IS NULL;
