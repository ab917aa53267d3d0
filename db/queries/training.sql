-- name: put_run(given)$
-- Add a run, or change what is given of it. True when it is new, false when it changed, null when it was so already.
INSERT INTO lora.training_runs AS t (run_name, caption_version, base_model, model_family, network_dim, network_alpha,
  learning_rate, resolution, total_epochs, training_config, overall_verdict, quality_score, is_production, notes)
SELECT r.run_name, r.caption_version, r.base_model, r.model_family, r.network_dim, r.network_alpha, r.learning_rate,
       r.resolution, r.total_epochs, r.training_config, r.overall_verdict, r.quality_score,
       coalesce(r.is_production, false), r.notes
FROM jsonb_populate_record(
  (SELECT e FROM lora.training_runs e WHERE e.run_name = :given::jsonb ->> 'run_name'), :given::jsonb) r
ON CONFLICT (run_name) DO UPDATE SET
  caption_version = excluded.caption_version, base_model = excluded.base_model, model_family = excluded.model_family,
  network_dim = excluded.network_dim, network_alpha = excluded.network_alpha, learning_rate = excluded.learning_rate,
  resolution = excluded.resolution, total_epochs = excluded.total_epochs, training_config = excluded.training_config,
  overall_verdict = excluded.overall_verdict, quality_score = excluded.quality_score,
  is_production = excluded.is_production, notes = excluded.notes
WHERE (t.caption_version, t.base_model, t.model_family, t.network_dim, t.network_alpha, t.learning_rate, t.resolution,
       t.total_epochs, t.training_config, t.overall_verdict, t.quality_score, t.is_production, t.notes)
  IS DISTINCT FROM
      (excluded.caption_version, excluded.base_model, excluded.model_family, excluded.network_dim,
       excluded.network_alpha, excluded.learning_rate, excluded.resolution, excluded.total_epochs,
       excluded.training_config, excluded.overall_verdict, excluded.quality_score, excluded.is_production, excluded.notes)
RETURNING xmax = 0;

-- name: run_id(run_name)$
SELECT id FROM lora.training_runs WHERE run_name = :run_name;

-- name: put_epoch(run_id, given)$
-- Add an epoch of a run, or change what is given of it. Answers as `put_run` does.
INSERT INTO lora.epoch_results AS t (training_run_id, epoch_number, checkpoint_path, checkpoint_file_size_mb,
  visual_quality_score, style_match_score, prompt_adherence_score, training_loss, verdict, production_ready,
  recommendation, notes, quantitative_metrics, diagnosed_issues, lora_name, repository, revision, sha256, trigger_words)
SELECT :run_id, r.epoch_number, r.checkpoint_path, r.checkpoint_file_size_mb, r.visual_quality_score, r.style_match_score,
       r.prompt_adherence_score, r.training_loss, r.verdict, coalesce(r.production_ready, false), r.recommendation,
       r.notes, r.quantitative_metrics, r.diagnosed_issues, r.lora_name, r.repository, r.revision, r.sha256,
       coalesce(r.trigger_words, '{}')
FROM jsonb_populate_record(
  (SELECT e FROM lora.epoch_results e
   WHERE e.training_run_id = :run_id AND e.epoch_number = (:given::jsonb ->> 'epoch_number')::int), :given::jsonb) r
ON CONFLICT (training_run_id, epoch_number) DO UPDATE SET
  checkpoint_path = excluded.checkpoint_path, checkpoint_file_size_mb = excluded.checkpoint_file_size_mb,
  visual_quality_score = excluded.visual_quality_score, style_match_score = excluded.style_match_score,
  prompt_adherence_score = excluded.prompt_adherence_score, training_loss = excluded.training_loss,
  verdict = excluded.verdict, production_ready = excluded.production_ready, recommendation = excluded.recommendation,
  notes = excluded.notes, quantitative_metrics = excluded.quantitative_metrics,
  diagnosed_issues = excluded.diagnosed_issues, lora_name = excluded.lora_name, repository = excluded.repository,
  revision = excluded.revision, sha256 = excluded.sha256, trigger_words = excluded.trigger_words
WHERE (t.checkpoint_path, t.checkpoint_file_size_mb, t.visual_quality_score, t.style_match_score,
       t.prompt_adherence_score, t.training_loss, t.verdict, t.production_ready, t.recommendation, t.notes,
       t.quantitative_metrics, t.diagnosed_issues, t.lora_name, t.repository, t.revision, t.sha256, t.trigger_words)
  IS DISTINCT FROM
      (excluded.checkpoint_path, excluded.checkpoint_file_size_mb, excluded.visual_quality_score,
       excluded.style_match_score, excluded.prompt_adherence_score, excluded.training_loss, excluded.verdict,
       excluded.production_ready, excluded.recommendation, excluded.notes, excluded.quantitative_metrics,
       excluded.diagnosed_issues, excluded.lora_name, excluded.repository, excluded.revision, excluded.sha256,
       excluded.trigger_words)
RETURNING xmax = 0;

-- name: findings(offered)
-- What the audit's view says, and which LoRAs of the profile the registry has in no production epoch. Errors come first.
SELECT check_code, severity, run_name, epoch_number, lora_name, detail
FROM (
  SELECT check_code, severity, run_name, epoch_number, lora_name, detail FROM lora.audit_findings
  UNION ALL
  SELECT 'production_unlogged', 'error', gap.run_name, gap.epoch_number, name, 'the profile offers it; ' || gap.reason
  FROM unnest(:offered::text[]) AS name CROSS JOIN LATERAL lora.production_gap(name) gap
) found
ORDER BY severity, check_code, run_name NULLS FIRST, epoch_number, lora_name;

-- name: production_loras(family)
-- The LoRAs of a model that jobs may name.
SELECT name, model_family, run_name, epoch_number, checkpoint_path, repository, revision, sha256, trigger_words,
       checkpoint_file_size_mb
FROM lora.production_loras WHERE model_family = :family::text ORDER BY name;
