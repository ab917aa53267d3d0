-- name: reported(job_id)^
-- A job as a report of an outside provider finds it, and where that provider's files may come from.
SELECT j.user_id, j.provider, j.format, j.model_type, j.original_prompt, j.enhanced_prompt, j.params, j.completed_at IS NOT NULL AS ended, p.id AS provider_id,
       coalesce(p.output_hosts, '{}') AS output_hosts
FROM jobs j LEFT JOIN api_providers p ON p.name = j.provider WHERE j.id = :job_id;

-- name: hold(job_id)^
-- The queue row of an open job, locked against every other end until the transaction does.
SELECT state::text, attempt FROM job_queue WHERE job_id = :job_id FOR UPDATE;

-- name: begin(job_id)!
-- Note when work began; only the first report of it counts.
UPDATE jobs SET started_at = now(), updated_at = now()
WHERE id = :job_id AND started_at IS NULL AND completed_at IS NULL;
