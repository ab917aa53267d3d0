-- The specification's analytics tables, by their names and columns. They are functions of jobs, tests and the changes
-- of configurations, so they are views: no counter that somebody must keep, and none that can be wrong. Each shows its
-- rows to admins only, on top of what row-level security shows of the tables below it. Days and hours are those of UTC.
-- What can't be divided is null; a strategy that is not told is 'none'.

-- Days are looked for by ranges, and rows lie in the order of their acceptance: a few pages of index for millions of
-- jobs. It speaks of no column that a move changes.
CREATE INDEX jobs_day ON jobs USING brin (((created_at AT TIME ZONE 'UTC')::date));

-- What is left of a day's jobs that were archived or erased: sums, so that history stays when rows go.
CREATE TABLE ourvidz.past_days (
  model_type text NOT NULL,
  date date NOT NULL,
  successful bigint NOT NULL,
  failed bigint NOT NULL,
  timed bigint NOT NULL,                      -- jobs with a time, and their sum
  time_ms numeric NOT NULL,
  rated bigint NOT NULL,                      -- jobs with a rating, and their sum
  rating numeric NOT NULL,
  updated_at timestamptz NOT NULL,
  PRIMARY KEY (model_type, date)
);
ALTER TABLE ourvidz.past_days ENABLE ROW LEVEL SECURITY;
CREATE POLICY admins ON ourvidz.past_days FOR SELECT TO authenticated USING ((SELECT has_role(ourvidz.uid(), 'admin')));
GRANT SELECT ON ourvidz.past_days TO authenticated;

-- Whoever deletes several days' jobs takes their rows in one order, or risks a deadlock.
CREATE FUNCTION ourvidz.remember_days() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO ourvidz.past_days AS p
    (model_type, date, successful, failed, timed, time_ms, rated, rating, updated_at)
  SELECT upper(model_type), (created_at AT TIME ZONE 'UTC')::date, count(*) FILTER (WHERE status = 'completed'),
         count(*) FILTER (WHERE status = 'failed'), count(generation_time_ms), coalesce(sum(generation_time_ms), 0),
         count(quality_rating), coalesce(sum(quality_rating), 0), max(updated_at)
  FROM gone WHERE status IN ('completed', 'failed')
  GROUP BY 1, 2 ORDER BY 1, 2
  ON CONFLICT (model_type, date) DO UPDATE
  SET successful = p.successful + excluded.successful, failed = p.failed + excluded.failed,
      timed = p.timed + excluded.timed, time_ms = p.time_ms + excluded.time_ms,
      rated = p.rated + excluded.rated, rating = p.rating + excluded.rating,
      updated_at = greatest(p.updated_at, excluded.updated_at);
  RETURN NULL;
END $$;
CREATE TRIGGER jobs_remember_days AFTER DELETE ON jobs REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.remember_days();

-- A day counts what was accepted on it and has ended since, by itself: cancelled jobs were not attempted to the end.
CREATE VIEW model_performance_logs WITH (security_invoker = true) AS
SELECT md5(model_type || date)::uuid AS id, model_type::varchar(20) AS model_type, date,
       (sum(successful) + sum(failed))::int AS total_generations,
       sum(successful)::int AS successful_generations,
       sum(failed)::int AS failed_generations,
       round(sum(time_ms) / nullif(sum(timed), 0))::int AS avg_generation_time_ms,
       round(sum(rating) / nullif(sum(rated), 0), 2)::numeric(4, 2) AS avg_quality_rating,
       sum(time_ms)::bigint AS total_processing_time_ms,
       date::timestamp AT TIME ZONE 'UTC' AS created_at,
       max(updated_at) AS updated_at
FROM (
  SELECT upper(model_type) AS model_type, (created_at AT TIME ZONE 'UTC')::date AS date,
         count(*) FILTER (WHERE status = 'completed') AS successful, count(*) FILTER (WHERE status = 'failed') AS failed,
         count(generation_time_ms) AS timed, coalesce(sum(generation_time_ms), 0) AS time_ms,
         count(quality_rating) AS rated, coalesce(sum(quality_rating), 0) AS rating, max(updated_at) AS updated_at
  FROM jobs WHERE status IN ('completed', 'failed')
  GROUP BY 1, 2
  UNION ALL
  SELECT model_type, date, successful, failed, timed, time_ms, rated, rating, updated_at FROM ourvidz.past_days
) days
WHERE (SELECT ourvidz.administers())
GROUP BY model_type, date;

CREATE VIEW job_enhancement_analysis WITH (security_invoker = true) AS
SELECT j.id, j.user_id, j.job_type, j.model_type, j.status, coalesce(j.enhancement_strategy, 'none') AS enhancement_strategy,
       j.original_prompt, j.enhanced_prompt, j.enhancement_time_ms, j.quality_rating, j.quality_improvement,
       j.created_at, j.completed_at,
       extract(epoch FROM j.completed_at - j.created_at) AS generation_time_seconds,
       CASE j.enhancement_strategy WHEN 'qwen' THEN 'Qwen Only' WHEN 'compel' THEN 'Compel Only'
                                   WHEN 'hybrid' THEN 'Hybrid (Both)' ELSE 'No Enhancement' END AS enhancement_display_name
FROM current_jobs j
WHERE j.created_at >= now() - interval '30 days' AND (SELECT ourvidz.administers());

-- Rates are of the jobs that ended by themselves, or were rated: an open job is no failure. A high rating is four stars
-- of five, which is 8 of the 10 that ratings have here.
CREATE VIEW enhancement_effectiveness WITH (security_invoker = true) AS
SELECT coalesce(enhancement_strategy, 'none') AS enhancement_strategy,
       count(*) AS total_jobs,
       avg(quality_rating) AS avg_quality,
       avg(quality_improvement) AS avg_improvement,
       avg(enhancement_time_ms) AS avg_enhancement_time,
       count(*) FILTER (WHERE status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE status IN ('completed', 'failed')), 0) AS success_rate,
       count(*) FILTER (WHERE quality_rating >= 8) * 100.0 / nullif(count(quality_rating), 0) AS high_quality_rate
FROM jobs
WHERE created_at >= now() - interval '7 days' AND (SELECT ourvidz.administers())
GROUP BY 1;

-- The hours of the last day, and the days of the last thirty.
CREATE VIEW live_prompt_metrics WITH (security_invoker = true) AS
SELECT md5(period_type || period)::uuid AS id, period AT TIME ZONE 'UTC' AS "timestamp",
       count(*)::int AS total_jobs,
       count(*) FILTER (WHERE strategy = 'qwen')::int AS qwen_enhanced_jobs,
       count(*) FILTER (WHERE strategy = 'compel')::int AS compel_enhanced_jobs,
       count(*) FILTER (WHERE strategy = 'hybrid')::int AS hybrid_enhanced_jobs,
       count(*) FILTER (WHERE strategy = 'none')::int AS no_enhancement_jobs,
       round(avg(enhancement_time_ms) FILTER (WHERE strategy <> 'none'))::int AS avg_enhancement_time_ms,
       round(avg(quality_rating) FILTER (WHERE strategy <> 'none'), 2) AS avg_quality_with_enhancement,
       round(avg(quality_rating) FILTER (WHERE strategy = 'none'), 2) AS avg_quality_without_enhancement,
       round(avg(quality_rating) FILTER (WHERE strategy <> 'none') - avg(quality_rating) FILTER (WHERE strategy = 'none'), 2)
         AS avg_quality_gain,
       round(count(*) FILTER (WHERE strategy = 'qwen' AND status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE strategy = 'qwen' AND ended), 0), 2) AS qwen_success_rate,
       round(count(*) FILTER (WHERE strategy = 'compel' AND status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE strategy = 'compel' AND ended), 0), 2) AS compel_success_rate,
       round(count(*) FILTER (WHERE strategy = 'hybrid' AND status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE strategy = 'hybrid' AND ended), 0), 2) AS hybrid_success_rate,
       round(count(*) FILTER (WHERE strategy = 'none' AND status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE strategy = 'none' AND ended), 0), 2) AS no_enhancement_success_rate,
       round(count(*) FILTER (WHERE model_type = 'sdxl' AND strategy <> 'none') * 100.0
         / nullif(count(*) FILTER (WHERE model_type = 'sdxl'), 0), 2) AS sdxl_enhancement_usage,
       round(count(*) FILTER (WHERE model_type = 'wan' AND strategy <> 'none') * 100.0
         / nullif(count(*) FILTER (WHERE model_type = 'wan'), 0), 2) AS wan_enhancement_usage,
       period_type::varchar(20) AS period_type
FROM (
  SELECT kind.period_type, date_trunc(kind.unit, j.created_at AT TIME ZONE 'UTC') AS period,
         coalesce(j.enhancement_strategy, 'none') AS strategy, j.status IN ('completed', 'failed') AS ended,
         j.status, j.model_type, j.enhancement_time_ms, j.quality_rating
  FROM jobs j
  CROSS JOIN (VALUES ('hourly', 'hour', interval '1 day'), ('daily', 'day', interval '30 days'))
    AS kind (period_type, unit, reach)
  WHERE j.created_at >= now() - interval '30 days' AND j.created_at >= now() - kind.reach
) counted
WHERE (SELECT ourvidz.administers())
GROUP BY period_type, period;

-- Jobs of the last day, and older ones that are open.
CREATE VIEW live_job_tracking WITH (security_invoker = true) AS
SELECT j.id, j.id AS job_id, j.user_id, j.job_type::varchar(50) AS job_type, j.model_type::varchar(20) AS model_type,
       coalesce(j.enhancement_strategy, 'none') AS enhancement_strategy, j.original_prompt, j.enhanced_prompt,
       j.enhancement_time_ms, j.quality_rating - j.quality_improvement AS baseline_quality,
       j.quality_rating AS final_quality, j.quality_improvement, j.status::varchar(20) AS status, j.created_at, j.updated_at
FROM (
  SELECT * FROM current_jobs WHERE created_at >= now() - interval '1 day'
  UNION ALL
  SELECT c.* FROM job_queue q JOIN current_jobs c ON c.id = q.job_id WHERE c.created_at < now() - interval '1 day'
) j
WHERE (SELECT ourvidz.administers());

-- `enhancement_learning_rate` is by how much the rate of adoption moved since the user's day before, in points.
CREATE VIEW user_enhancement_adoption WITH (security_invoker = true) AS
SELECT md5(user_id::text || date)::uuid AS id, user_id, date, total_jobs, jobs_with_enhancement,
       enhancement_adoption_rate, qwen_usage_count, compel_usage_count, hybrid_usage_count, no_enhancement_count,
       round(quality_with, 2) AS avg_quality_with_enhancement, round(quality_without, 2) AS avg_quality_without_enhancement,
       round(quality_with - quality_without, 2) AS avg_quality_improvement,
       min(first_enhanced) OVER (PARTITION BY user_id) AS first_enhancement_date,
       enhancement_adoption_rate - lag(enhancement_adoption_rate) OVER (PARTITION BY user_id ORDER BY date)
         AS enhancement_learning_rate
FROM (
  SELECT user_id, (created_at AT TIME ZONE 'UTC')::date AS date, count(*)::int AS total_jobs,
         count(*) FILTER (WHERE strategy <> 'none')::int AS jobs_with_enhancement,
         round(count(*) FILTER (WHERE strategy <> 'none') * 100.0 / count(*), 2) AS enhancement_adoption_rate,
         count(*) FILTER (WHERE strategy = 'qwen')::int AS qwen_usage_count,
         count(*) FILTER (WHERE strategy = 'compel')::int AS compel_usage_count,
         count(*) FILTER (WHERE strategy = 'hybrid')::int AS hybrid_usage_count,
         count(*) FILTER (WHERE strategy = 'none')::int AS no_enhancement_count,
         avg(quality_rating) FILTER (WHERE strategy <> 'none') AS quality_with,
         avg(quality_rating) FILTER (WHERE strategy = 'none') AS quality_without,
         min(created_at) FILTER (WHERE strategy <> 'none') AS first_enhanced
  FROM (SELECT user_id, created_at, quality_rating, coalesce(enhancement_strategy, 'none') AS strategy FROM jobs) j
  GROUP BY 1, 2
) days
WHERE (SELECT ourvidz.administers());

-- ------------------------------------------------------------------------------------ tables with computed columns
-- The columns that are written go to the table below; those that are functions of jobs and tests can't be written.

-- A job used a preset when its `test_metadata` names it under `preset`.
CREATE VIEW enhancement_presets WITH (security_invoker = true) AS
SELECT p.id, p.preset_name, p.preset_description, p.enable_qwen, p.enable_compel, p.auto_enhancement, p.compel_weights,
       p.qwen_settings,
       (SELECT count(*)::int FROM jobs j WHERE j.test_metadata ->> 'preset' = p.preset_name) AS usage_count,
       (SELECT round(avg(j.quality_rating), 2) FROM jobs j WHERE j.test_metadata ->> 'preset' = p.preset_name)
         AS avg_quality_with_preset,
       p.is_recommended, p.created_at, p.created_by
FROM ourvidz.enhancement_presets p;

CREATE VIEW compel_configs WITH (security_invoker = true) AS
SELECT c.id, c.config_name, c.weights, c.config_hash,
       (SELECT count(*)::int FROM model_test_results t
        WHERE t.compel_weights IS NOT NULL AND ourvidz.weights_hash(t.compel_weights) = c.config_hash) AS total_tests,
       (SELECT round(avg(t.overall_quality), 2) FROM model_test_results t
        WHERE t.compel_weights IS NOT NULL AND ourvidz.weights_hash(t.compel_weights) = c.config_hash) AS avg_quality,
       (SELECT round(avg(t.consistency), 2) FROM model_test_results t
        WHERE t.compel_weights IS NOT NULL AND ourvidz.weights_hash(t.compel_weights) = c.config_hash) AS avg_consistency,
       c.is_active, c.created_at, c.created_by
FROM ourvidz.compel_configs c;

-- A job is of a test when `prompt_test_id` names it; `test_metadata` says under `arm` which side it is on.
CREATE VIEW prompt_ab_tests WITH (security_invoker = true) AS
SELECT t.id, t.test_name, t.test_series, t.baseline_config, t.enhanced_config,
       (SELECT count(DISTINCT j.user_id)::int FROM jobs j WHERE j.prompt_test_id = t.id) AS total_participants,
       (SELECT round(avg(j.quality_rating), 2) FROM jobs j
        WHERE j.prompt_test_id = t.id AND j.test_metadata ->> 'arm' = 'baseline') AS baseline_avg_quality,
       (SELECT round(avg(j.quality_rating), 2) FROM jobs j
        WHERE j.prompt_test_id = t.id AND j.test_metadata ->> 'arm' = 'enhanced') AS enhanced_avg_quality,
       (SELECT round(avg(j.quality_rating) FILTER (WHERE j.test_metadata ->> 'arm' = 'enhanced')
                     - avg(j.quality_rating) FILTER (WHERE j.test_metadata ->> 'arm' = 'baseline'), 2)
        FROM jobs j WHERE j.prompt_test_id = t.id) AS quality_improvement,
       t.confidence_level, t.is_complete, t.created_at, t.completed_at
FROM ourvidz.prompt_ab_tests t;

-- Tests of models with an enhanced prompt, under the names that the portal's paper gives their columns.
CREATE VIEW enhanced_prompt_tests WITH (security_invoker = true) AS
SELECT t.id, t.original_prompt, t.enhanced_prompt, coalesce(t.enhancement_strategy, 'none') AS enhancement_strategy,
       t.model_type, j.job_type::varchar(50) AS job_type,
       length(t.original_prompt) AS original_length, length(t.enhanced_prompt) AS enhanced_length,
       round((length(t.enhanced_prompt) - length(t.original_prompt)) * 100.0 / nullif(length(t.original_prompt), 0), 2)
         AS expansion_percentage,
       t.enhancement_time_ms, t.compel_weights,
       ourvidz.weights_hash(t.compel_weights)::varchar(64) AS weight_config_hash,
       t.baseline_quality, t.overall_quality::numeric(4, 2) AS enhanced_quality,
       coalesce(t.quality_improvement, t.overall_quality - t.baseline_quality) AS quality_improvement,
       t.consistency::numeric(4, 2) AS consistency_score, t.generation_time_ms, t.file_size_bytes, t.success,
       j.error_message, t.test_series, t.test_tier, t.notes, t.created_at, t.user_id AS tested_by
FROM model_test_results t LEFT JOIN jobs j ON j.id = t.job_id
WHERE t.original_prompt IS NOT NULL AND t.enhanced_prompt IS NOT NULL;

-- All tests of models, in the older form of the same paper: stars of five, which are half of the rating.
CREATE VIEW prompt_test_results WITH (security_invoker = true) AS
SELECT t.id, t.prompt_text, t.model_type, t.test_category AS prompt_category,
       greatest(1, round(t.overall_quality / 2.0))::int AS quality_rating, t.generation_time_ms, t.success,
       j.error_message, t.notes, t.user_id AS tested_by, t.created_at
FROM model_test_results t LEFT JOIN jobs j ON j.id = t.job_id;

-- What a change of a configuration did: the jobs accepted under it, until the next change of the same model, against
-- those of the seven days before. Impacts are differences of the means, of the rating in points, of the time in percent.
CREATE VIEW config_change_history WITH (security_invoker = true) AS
SELECT c.id, c.config_id, c.model_type, c.config_name, c.old_values, c.new_values,
       CASE WHEN c.old_values IS NULL THEN 'created' WHEN c.new_values IS NULL THEN 'deleted' ELSE
         (SELECT string_agg(n.key || ': ' || coalesce(c.old_values ->> n.key, 'null') || ' -> '
                            || coalesce(n.value #>> '{}', 'null'), '; ' ORDER BY n.key)
          FROM jsonb_each(c.new_values) n WHERE c.old_values -> n.key IS DISTINCT FROM n.value)
       END AS change_summary,
       after.jobs::int AS jobs_affected,
       round(after.rating - before.rating, 2) AS quality_impact,
       round((after.time_ms - before.time_ms) * 100 / nullif(before.time_ms, 0), 2) AS performance_impact,
       c.changed_by, c.changed_at
FROM (SELECT *, lead(changed_at) OVER (PARTITION BY model_type ORDER BY changed_at, id) AS until
      FROM ourvidz.config_changes) c
CROSS JOIN LATERAL (
  SELECT count(*) AS jobs, avg(quality_rating) AS rating, avg(generation_time_ms) AS time_ms FROM jobs j
  WHERE (c.new_values ->> 'is_active')::boolean AND j.model_type = lower(c.model_type)
    AND j.created_at >= c.changed_at AND (c.until IS NULL OR j.created_at < c.until)) after
CROSS JOIN LATERAL (
  SELECT avg(quality_rating) AS rating, avg(generation_time_ms) AS time_ms FROM jobs j
  WHERE j.model_type = lower(c.model_type)
    AND j.created_at >= c.changed_at - interval '7 days' AND j.created_at < c.changed_at) before
WHERE (SELECT ourvidz.administers());

-- Every configuration as it once was, and which one is active.
CREATE VIEW model_config_history WITH (security_invoker = true) AS
SELECT c.id, c.model_type, c.config_name, c.new_values AS config_data,
       c.is_newest AS is_active,
       c.changed_by AS created_by, c.changed_at AS created_at,
       CASE WHEN c.old_values IS NULL THEN 'created' ELSE 'changed' END AS notes
FROM (SELECT *, (new_values ->> 'is_active')::boolean
                AND row_number() OVER (PARTITION BY config_id ORDER BY changed_at DESC, id DESC) = 1 AS is_newest
      FROM ourvidz.config_changes) c
WHERE c.new_values IS NOT NULL AND (SELECT ourvidz.administers());

GRANT SELECT ON model_performance_logs, job_enhancement_analysis, enhancement_effectiveness, live_prompt_metrics,
  live_job_tracking, user_enhancement_adoption, enhanced_prompt_tests, prompt_test_results, config_change_history,
  model_config_history TO authenticated;
GRANT SELECT, INSERT, UPDATE, DELETE ON enhancement_presets, compel_configs, prompt_ab_tests TO authenticated;

-- What the last days were like, in one object. For admins.
CREATE FUNCTION get_system_stats(p_days int DEFAULT 30) RETURNS json
LANGUAGE plpgsql STABLE AS $$
BEGIN
  IF NOT ourvidz.administers() THEN
    RAISE insufficient_privilege USING MESSAGE = 'for admins';
  END IF;
  RETURN (
    SELECT json_build_object(
      'days', p_days,
      'total_jobs', count(*),
      'completed_jobs', count(*) FILTER (WHERE status = 'completed'),
      'failed_jobs', count(*) FILTER (WHERE status = 'failed'),
      'cancelled_jobs', count(*) FILTER (WHERE status = 'cancelled'),
      'open_jobs', count(*) FILTER (WHERE completed_at IS NULL),
      'active_users', count(DISTINCT user_id),
      'total_users', (SELECT count(*) FROM public.profiles),
      'workspace_assets', (SELECT count(*) FROM public.workspace_assets),
      'library_assets', (SELECT count(*) FROM public.user_library),
      'avg_generation_time_ms', round(avg(generation_time_ms)))
    FROM public.jobs WHERE created_at >= now() - make_interval(days => p_days));
END $$;
