-- name: accept(rows)$
-- Take jobs in: the fact, its place in the queue, its first event and its charge, in one statement. All read what was
-- given, as joining what was made would cost the square of a large batch; the keys are checked when all is there. The jobs
-- of one `submission` come in all or none. The answer maps the submissions that the limits refuse to why; null: none.
WITH asked AS MATERIALIZED (
  SELECT * FROM jsonb_to_recordset(:rows::jsonb) AS g(
    submission int, exempt boolean, id uuid, user_id uuid, job_type text, format text, quality text, model_type text, stage text, content_mode text,
    original_prompt text, enhanced_prompt text, params jsonb, metadata jsonb, adjustments jsonb, max_attempts int,
    callback_url text, callback_events text[], destination text, traceparent text,
    queue text, class smallint, cost real, start_after_seconds double precision, start_deadline_seconds double precision,
    deadline_seconds double precision, credits numeric, batch_size smallint, shape text, rows smallint, loras text[], provider text,
    api_model_id uuid, template_name text, enhancement_strategy text)
), verdict AS MATERIALIZED (
  SELECT admitted.* FROM (
    SELECT array_agg(submission) AS submissions, array_agg(user_id) AS owners, array_agg(jobs::int) AS jobs,
           array_agg(price) AS prices, array_agg(free) AS free
    FROM (SELECT submission, user_id, count(*) AS jobs, sum(ceil(credits)) AS price, bool_and(exempt) AS free
          FROM asked GROUP BY submission, user_id) one) all_of_them,
    ourvidz.admit(submissions, owners, jobs, prices, free, true) AS admitted
), given AS MATERIALIZED (
  SELECT asked.*, charging AND NOT exempt AS charged FROM asked, verdict WHERE NOT refusals ? submission::text
), made AS (
  INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, content_mode, original_prompt,
                    enhanced_prompt, params, metadata, adjustments, max_attempts, callback_url, callback_events,
                    destination, traceparent, class, compel_weights, start_deadline_seconds, deadline_seconds, provider,
                    api_model_id, template_name, enhancement_strategy)
  SELECT id, user_id, job_type, format, quality, model_type, stage, content_mode, original_prompt, enhanced_prompt,
         params, coalesce(metadata, '{}'), coalesce(adjustments, '[]'), max_attempts, callback_url,
         coalesce(callback_events, '{processing,completed,failed,cancelled}'), destination, traceparent,
         class, nullif(params -> 'compel_weights', 'null'), start_deadline_seconds, deadline_seconds,
         coalesce(provider, 'local'), api_model_id, template_name, enhancement_strategy
  FROM given
  RETURNING id
), queued AS (
  INSERT INTO job_queue (job_id, user_id, queue, class, tag, cost, state, run_at, max_attempts, start_deadline, deadline,
                         batch_size, shape, rows, loras)
  SELECT id, user_id, queue, class,
         CASE WHEN start_after_seconds > 0 THEN 0 ELSE ourvidz.next_tag(queue, user_id, class, cost) END, cost,
         (CASE WHEN start_after_seconds > 0 THEN 'scheduled' ELSE 'ready' END)::queue_state,
         now() + make_interval(secs => coalesce(start_after_seconds, 0)),
         max_attempts, now() + make_interval(secs => start_deadline_seconds),
         now() + make_interval(secs => deadline_seconds), batch_size, shape, rows, loras
  FROM (SELECT * FROM given ORDER BY queue, user_id, class, id) in_order
), noted AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT id, user_id, 0, 'queued', jsonb_build_object('queue', queue, 'stage', stage) FROM given
), charged AS (
  INSERT INTO usage_logs (user_id, action, credits_consumed, format, quality, job_id, charged)
  SELECT user_id, job_type, CASE WHEN charged THEN ceil(credits) ELSE credits END, format, quality, id, charged FROM given
)
SELECT nullif(refusals, '{}') FROM verdict;

-- name: read(job_id)^
-- One job with its place in the queue, its assets and its callbacks, as far as row-level security lets the caller see.
SELECT to_jsonb(j) AS job,
       (SELECT to_jsonb(q) FROM (
          SELECT queue, class, state, run_at, attempt, failures, cancel, phase, step, steps, preview_step, preview_steps
          FROM job_queue WHERE job_id = j.id) q) AS queue,
       (SELECT to_jsonb(s) FROM ourvidz.standing(j.id) s WHERE j.status = 'queued') AS standing,
       (SELECT coalesce(jsonb_agg(to_jsonb(a) ORDER BY a.asset_index), '[]') FROM (
          -- neither settings nor manifest, which would be most of a page
          SELECT id, asset_index, asset_type, temp_storage_path, thumbnail_path, mime_type, file_size_bytes, width, height,
                 frames, fps, duration_seconds, generation_seed, model_used, expires_at, manifest IS NOT NULL AS has_manifest,
                 moderation_status, moderation_reason
          FROM workspace_assets WHERE job_id = j.id) a) AS assets,
       (SELECT coalesce(jsonb_agg(to_jsonb(o) ORDER BY o.seq), '[]') FROM (
          SELECT id, seq, event_type, state, attempts, last_status, last_error, delivered_at
          FROM callback_outbox WHERE job_id = j.id) o) AS callbacks
FROM current_jobs j WHERE j.id = :job_id;

-- name: list_page(user_id, status, job_type, created_after, before, after, page_size)
-- Jobs, newest first. `before` and `after` are ids; ids are ordered by time.
SELECT to_jsonb(j) AS job,
       (SELECT to_jsonb(q) FROM (
          SELECT queue, class, state, run_at, attempt, failures, cancel, phase, step, steps, preview_step, preview_steps
          FROM job_queue WHERE job_id = j.id) q) AS queue,
       NULL::jsonb AS standing,
       (SELECT coalesce(jsonb_agg(to_jsonb(a) ORDER BY a.asset_index), '[]') FROM (
          -- neither settings nor manifest, which would be most of a page
          SELECT id, asset_index, asset_type, temp_storage_path, thumbnail_path, mime_type, file_size_bytes, width, height,
                 frames, fps, duration_seconds, generation_seed, model_used, expires_at, manifest IS NOT NULL AS has_manifest,
                 moderation_status, moderation_reason
          FROM workspace_assets WHERE job_id = j.id) a) AS assets,
       '[]'::jsonb AS callbacks
FROM current_jobs j
WHERE (:user_id::uuid IS NULL OR j.user_id = :user_id)
  -- as a number it is taken to be every third row; as it stands it would be one in 200, and all of them read and sorted
  AND (:status::text IS NULL OR (j.status = :status)::int > 0)
  AND (:job_type::text IS NULL OR j.job_type = :job_type)
  AND (:created_after::timestamptz IS NULL OR j.created_at > :created_after)
  AND (:before::uuid IS NULL OR j.id < :before)
  AND (:after::uuid IS NULL OR j.id > :after)
ORDER BY CASE WHEN :after::uuid IS NOT NULL AND :before::uuid IS NULL THEN j.id END ASC, j.id DESC
LIMIT :page_size::int;

-- name: manifest(job_id, asset_index)$
-- What a file was made from and by.
SELECT manifest FROM workspace_assets WHERE job_id = :job_id AND asset_index = :asset_index;

-- name: run_seconds(job_type)$
-- Mean seconds of the recent completed runs of a type; null before the first.
SELECT seconds FROM run_times WHERE job_type = :job_type;

-- name: stamps(job_ids)
-- What of these jobs changes with all that is shown of them, as one text; the history changes with it as well.
SELECT j.id, concat_ws(' ', j.event_seq, q.state, q.attempt, q.phase, q.step, q.cancel, q.preview_step,
                       (SELECT string_agg(o.state || o.attempts, ' ' ORDER BY o.seq)
                        FROM callback_outbox o WHERE o.job_id = j.id)) AS stamp
FROM jobs j LEFT JOIN job_queue q ON q.job_id = j.id WHERE j.id = ANY(:job_ids::uuid[]);

-- name: events_after(job_id, after_id, page_size)
-- The events of a job past an id, oldest first.
SELECT id, job_id, attempt, kind, at, data FROM job_events
WHERE job_id = :job_id AND id > :after_id ORDER BY id LIMIT :page_size::int;

-- name: retry(job_id, cost, queue, shape, rows, loras, exempt)^
-- A new budget for a job that failed or was cancelled. The attempt goes on counting, so that a late replica stays out;
-- its deadlines are counted anew, as a retry is a new run. It is charged where its charge was given back; no row comes back
-- where it is in no such state, and a `refusal` where the limits refuse it.
WITH ended AS MATERIALIZED (
  SELECT id, user_id, job_type, format, quality, paid.price FROM jobs, LATERAL (
    SELECT CASE WHEN coalesce(sum(credits_consumed) FILTER (WHERE charged), 0) > 0 THEN 0
                ELSE ceil(coalesce(max(credits_consumed), 0)) END AS price
    FROM usage_logs WHERE job_id = jobs.id) paid
  WHERE id = :job_id AND status IN ('failed', 'cancelled')
  FOR UPDATE OF jobs
), verdict AS MATERIALIZED (
  SELECT ended.*, admitted.*
  FROM ended CROSS JOIN LATERAL ourvidz.admit('{0}', ARRAY[user_id], '{1}', ARRAY[price], ARRAY[:exempt::boolean], false)
    AS admitted
), again AS (
  UPDATE jobs SET status = 'queued', completed_at = NULL, error_code = NULL, error_message = NULL, retryable = NULL,
                  failures = 0, event_seq = event_seq + 1, updated_at = now()
  WHERE id = (SELECT id FROM verdict WHERE refusals = '{}') AND status IN ('failed', 'cancelled')
  RETURNING *
), charged AS (
  INSERT INTO usage_logs (user_id, action, credits_consumed, format, quality, job_id, charged, metadata)
  SELECT user_id, job_type, price, format, quality, id, true, '{"retry": true}'
  FROM verdict WHERE refusals = '{}' AND charging AND NOT :exempt::boolean AND price > 0
), queued AS (
  INSERT INTO job_queue (job_id, user_id, queue, class, tag, cost, attempt, max_attempts, started_at, start_deadline,
                         deadline, shape, rows, loras)
  SELECT id, user_id, :queue, class, ourvidz.next_tag(:queue, user_id, class, :cost), :cost, attempts, max_attempts,
         started_at, now() + make_interval(secs => start_deadline_seconds), now() + make_interval(secs => deadline_seconds),
         :shape, :rows, :loras
  FROM again
), noted AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT id, user_id, attempts, 'retried', jsonb_strip_nulls(jsonb_build_object(
    'start_deadline_seconds', start_deadline_seconds, 'deadline_seconds', deadline_seconds))
  FROM again
)
SELECT refusals -> '0' AS refusal FROM verdict;

-- name: read_bare(job_id)^
-- Where a job stands, without what hangs on it.
SELECT status, attempts, worker, stage FROM current_jobs WHERE id = :job_id;

-- name: erase(job_id, actor)^
-- Delete an ended job with all that hangs on it (assets, events, callbacks, keys), leaving one audit row. The keys of
-- its files come back, for the caller to delete.
WITH doomed AS MATERIALIZED (
  SELECT j.id, j.user_id, j.job_type,
         ARRAY(
           SELECT file.key
           FROM jsonb_array_elements(coalesce(j.params -> 'references', '[]') || jsonb_build_array(j.params -> 'reference'))
             AS reference(image)
           CROSS JOIN LATERAL unnest(ARRAY[image ->> 'key', image #>> '{mask,key}']) AS file(key)
           WHERE file.key IS NOT NULL
         ) AS reference_keys
  FROM jobs j
  WHERE j.id = :job_id AND j.status IN ('completed', 'failed', 'cancelled')
    AND NOT EXISTS (SELECT FROM job_queue q WHERE q.job_id = j.id)
  FOR UPDATE
), files AS MATERIALIZED (
  SELECT coalesce(array_agg(f.key) FILTER (WHERE f.key IS NOT NULL), '{}') AS keys
  FROM workspace_assets a CROSS JOIN LATERAL unnest(ARRAY[a.temp_storage_path, a.thumbnail_path]) AS f(key)
  WHERE a.job_id IN (SELECT id FROM doomed)
), gone AS (
  DELETE FROM jobs USING doomed WHERE jobs.id = doomed.id RETURNING jobs.id
), audited AS (
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  SELECT :actor, 'job.erased', 'job', d.id::text, jsonb_build_object('owner', d.user_id, 'job_type', d.job_type) FROM doomed d
)
SELECT d.id, d.user_id, files.keys, d.reference_keys FROM doomed d, files WHERE EXISTS (SELECT FROM gone);
