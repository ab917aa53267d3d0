-- A copy from the library to the workspace is a job on paper only: nothing was made, and no figure counts it.

CREATE OR REPLACE VIEW model_performance_logs WITH (security_invoker = true) AS
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
  FROM jobs WHERE status IN ('completed', 'failed') AND provider IS DISTINCT FROM 'library'
  GROUP BY 1, 2
  UNION ALL
  SELECT model_type, date, successful, failed, timed, time_ms, rated, rating, updated_at FROM ourvidz.past_days
) days
WHERE (SELECT ourvidz.administers())
GROUP BY model_type, date;

CREATE OR REPLACE VIEW job_enhancement_analysis WITH (security_invoker = true) AS
SELECT j.id, j.user_id, j.job_type, j.model_type, j.status, coalesce(j.enhancement_strategy, 'none') AS enhancement_strategy,
       j.original_prompt, j.enhanced_prompt, j.enhancement_time_ms, j.quality_rating, j.quality_improvement,
       j.created_at, j.completed_at,
       extract(epoch FROM j.completed_at - j.created_at) AS generation_time_seconds,
       CASE j.enhancement_strategy WHEN 'qwen' THEN 'Qwen Only' WHEN 'compel' THEN 'Compel Only'
                                   WHEN 'hybrid' THEN 'Hybrid (Both)' ELSE 'No Enhancement' END AS enhancement_display_name
FROM current_jobs j
WHERE j.provider IS DISTINCT FROM 'library' AND j.created_at >= now() - interval '30 days' AND (SELECT ourvidz.administers());

CREATE OR REPLACE VIEW enhancement_effectiveness WITH (security_invoker = true) AS
SELECT coalesce(enhancement_strategy, 'none') AS enhancement_strategy,
       count(*) AS total_jobs,
       avg(quality_rating) AS avg_quality,
       avg(quality_improvement) AS avg_improvement,
       avg(enhancement_time_ms) AS avg_enhancement_time,
       count(*) FILTER (WHERE status = 'completed') * 100.0
         / nullif(count(*) FILTER (WHERE status IN ('completed', 'failed')), 0) AS success_rate,
       count(*) FILTER (WHERE quality_rating >= 8) * 100.0 / nullif(count(quality_rating), 0) AS high_quality_rate
FROM jobs
WHERE provider IS DISTINCT FROM 'library' AND created_at >= now() - interval '7 days' AND (SELECT ourvidz.administers())
GROUP BY 1;

CREATE OR REPLACE VIEW live_prompt_metrics WITH (security_invoker = true) AS
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
  WHERE j.provider IS DISTINCT FROM 'library' AND j.created_at >= now() - interval '30 days' AND j.created_at >= now() - kind.reach
) counted
WHERE (SELECT ourvidz.administers())
GROUP BY period_type, period;

CREATE OR REPLACE VIEW user_enhancement_adoption WITH (security_invoker = true) AS
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
  FROM (SELECT user_id, created_at, quality_rating, coalesce(enhancement_strategy, 'none') AS strategy FROM jobs
        WHERE provider IS DISTINCT FROM 'library') j
  GROUP BY 1, 2
) days
WHERE (SELECT ourvidz.administers());

CREATE OR REPLACE VIEW live_job_tracking WITH (security_invoker = true) AS
SELECT j.id, j.id AS job_id, j.user_id, j.job_type::varchar(50) AS job_type, j.model_type::varchar(20) AS model_type,
       coalesce(j.enhancement_strategy, 'none') AS enhancement_strategy, j.original_prompt, j.enhanced_prompt,
       j.enhancement_time_ms, j.quality_rating - j.quality_improvement AS baseline_quality,
       j.quality_rating AS final_quality, j.quality_improvement, j.status::varchar(20) AS status, j.created_at, j.updated_at
FROM (
  SELECT * FROM current_jobs WHERE created_at >= now() - interval '1 day'
  UNION ALL
  SELECT c.* FROM job_queue q JOIN current_jobs c ON c.id = q.job_id WHERE c.created_at < now() - interval '1 day'
) j
WHERE j.provider IS DISTINCT FROM 'library' AND (SELECT ourvidz.administers());

CREATE OR REPLACE VIEW config_change_history WITH (security_invoker = true) AS
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
  WHERE j.provider IS DISTINCT FROM 'library' AND (c.new_values ->> 'is_active')::boolean AND j.model_type = lower(c.model_type)
    AND j.created_at >= c.changed_at AND (c.until IS NULL OR j.created_at < c.until)) after
CROSS JOIN LATERAL (
  SELECT avg(quality_rating) AS rating, avg(generation_time_ms) AS time_ms FROM jobs j
  WHERE j.provider IS DISTINCT FROM 'library' AND j.model_type = lower(c.model_type)
    AND j.created_at >= c.changed_at - interval '7 days' AND j.created_at < c.changed_at) before
WHERE (SELECT ourvidz.administers());

CREATE OR REPLACE FUNCTION ourvidz.remember_days() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO ourvidz.past_days AS p
    (model_type, date, successful, failed, timed, time_ms, rated, rating, updated_at)
  SELECT upper(model_type), (created_at AT TIME ZONE 'UTC')::date, count(*) FILTER (WHERE status = 'completed'),
         count(*) FILTER (WHERE status = 'failed'), count(generation_time_ms), coalesce(sum(generation_time_ms), 0),
         count(quality_rating), coalesce(sum(quality_rating), 0), max(updated_at)
  FROM gone WHERE status IN ('completed', 'failed') AND provider IS DISTINCT FROM 'library'
  GROUP BY 1, 2 ORDER BY 1, 2
  ON CONFLICT (model_type, date) DO UPDATE
  SET successful = p.successful + excluded.successful, failed = p.failed + excluded.failed,
      timed = p.timed + excluded.timed, time_ms = p.time_ms + excluded.time_ms,
      rated = p.rated + excluded.rated, rating = p.rating + excluded.rating,
      updated_at = greatest(p.updated_at, excluded.updated_at);
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION get_system_stats(p_days int DEFAULT 30) RETURNS json
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
    FROM public.jobs WHERE provider IS DISTINCT FROM 'library' AND created_at >= now() - make_interval(days => p_days));
END $$;
