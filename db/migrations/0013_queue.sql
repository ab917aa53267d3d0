-- What a move costs. A claim writes the queue's row and none of `jobs`; the end of a run writes the job once, with what
-- the claim has left in the queue.

ALTER TABLE job_queue ADD COLUMN started_at timestamptz;  -- of the first claim; goes to `jobs` when the run is over
UPDATE job_queue q SET started_at = j.started_at FROM jobs j WHERE j.id = q.job_id AND j.started_at IS NOT NULL;

-- A move gives a row of the queue a second entry in the index of its key: with room for it no page is split or searched
-- for what can go. The new index holds those from before as well.
ALTER INDEX job_queue_pkey SET (fillfactor = 45);
REINDEX INDEX job_queue_pkey;
DROP INDEX job_queue_running;
CREATE INDEX job_queue_running ON job_queue (queue) WHERE state = 'running';

-- Our statements say themselves when they change a job; the trigger is for whoever does not.
DROP TRIGGER jobs_touch ON jobs;
CREATE TRIGGER jobs_touch BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.updated_at = OLD.updated_at)
  EXECUTE FUNCTION ourvidz.touch();

-- Events are read by their job and pruned by their time, and the numbers of their own need no index beside these.
ALTER TABLE job_events DROP CONSTRAINT job_events_pkey;
DROP INDEX job_events_job;
ALTER TABLE job_events ADD PRIMARY KEY (job_id, id);
DROP INDEX callback_outbox_created;  -- nothing reads all callbacks by their age

-- Milliseconds from an acceptance to a first claim, which may have begun before the acceptance that it finds.
CREATE FUNCTION ourvidz.waited_ms(created_at timestamptz, started_at timestamptz) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$ SELECT greatest(0, (extract(epoch FROM started_at - created_at) * 1000)::bigint) $$;

-- Jobs as they are at this moment. `jobs` is the record: of an open job it holds what was so at its acceptance or at the
-- end of its last run, while the queue knows whether a replica has it. Row-level security is the caller's on both.
CREATE VIEW current_jobs WITH (security_invoker = true) AS
SELECT j.id, j.user_id, j.job_type, j.format, j.quality, j.model_type,
       CASE WHEN q.state = 'running' THEN 'processing' WHEN q.state IS NOT NULL THEN 'queued' ELSE j.status END AS status,
       j.stage, j.provider, j.content_mode, j.original_prompt, j.enhanced_prompt, j.params, j.metadata,
       j.generation_settings, j.adjustments, coalesce(q.attempt, j.attempts) AS attempts, j.max_attempts, j.class,
       j.failures, j.error_code, j.error_message, j.retryable,
       j.event_seq + coalesce(q.state = 'running', false)::int AS event_seq,
       j.callback_url, j.callback_events, j.created_at, coalesce(j.started_at, q.started_at) AS started_at, j.completed_at,
       greatest(j.updated_at, q.claimed_at) AS updated_at,
       coalesce(j.queue_wait_ms, ourvidz.waited_ms(j.created_at, q.started_at)) AS queue_wait_ms, j.generation_time_ms,
       j.worker, j.enhancement_strategy, j.enhancement, j.enhancement_time_ms, j.template_name,
       j.qwen_expansion_percentage, j.compel_weights, j.video_id, j.image_id, j.project_id, j.prompt_test_id,
       j.workspace_session_id, j.api_model_id, j.test_metadata, j.moderation_status, j.reviewed_at, j.reviewed_by,
       j.review_notes, j.quality_rating, j.quality_improvement, j.destination, j.traceparent, j.start_deadline_seconds,
       j.deadline_seconds
FROM jobs j LEFT JOIN job_queue q ON q.job_id = j.id;
GRANT SELECT ON current_jobs TO authenticated, ourvidz_worker;
GRANT SELECT (started_at, claimed_at) ON job_queue TO authenticated;

-- The outbox rows for a status that a job has reached, one for each receiver that wants it: the job's own URL, and its
-- user's enabled endpoints. `assets` are references with signed URLs, made by the caller, which holds the signing key
-- that the database does not; `facts` are what it tells of the run. The values come one by one, since taking them out of
-- a row costs a walk over its columns each time; the body is put together as text, which is a third of the work of
-- building json; and an id is made of what makes the callback the only one, with the time, so that a database that was
-- restored to an earlier day does not use it again. Random ids would take longer than all the rest.
-- `callback_for` stays for the replicas of the version before, which a rolling update lets end their jobs.
CREATE FUNCTION ourvidz.callbacks_of(
  job uuid, owner uuid, number int, status text, attempt int, job_type text, own_url text, own_events text[],
  client jsonb, error_code text, error_message text, assets jsonb, facts jsonb)
RETURNS TABLE (id text, job_id uuid, user_id uuid, endpoint_id uuid, seq int, event_type text, terminal boolean,
               url text, body bytea)
LANGUAGE sql STABLE AS $$
  SELECT receiver.message_id, $1, $2, receiver.endpoint_id, $3, 'job.' || $4, $4 <> 'processing', receiver.url,
         convert_to(
           '{"id":"' || receiver.message_id || '","type":"job.' || $4 || '","timestamp":"'
           || (SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'))
           || '","job_id":"' || $1 || '","status":"' || $4 || '","assets":' || coalesce($12::text, '[]')
           || ',"error_message":' || coalesce(to_json($11)::text, 'null')
           || ',"error_code":' || coalesce(to_json($10)::text, 'null')
           || ',"metadata":'
           || CASE WHEN $13 IS NULL
                THEN '{"job_type":"' || $6 || '","attempt":' || $5 || ',"client":' || $9 || '}'
                ELSE ($13 || jsonb_build_object('job_type', $6, 'attempt', $5, 'client', $9))::text END
           || '}', 'UTF8')
  FROM (
    SELECT 'msg_' || replace($1::text, '-', '') || '_' || $3
           || (SELECT '_' || to_hex((extract(epoch FROM now()) * 1000000)::bigint))
           || coalesce('_' || replace(wanting.endpoint_id::text, '-', ''), '') AS message_id,
           wanting.endpoint_id, wanting.url
    FROM (
      SELECT NULL::uuid AS endpoint_id, $7 AS url
      WHERE $7 IS NOT NULL AND $4 = ANY ($8)
      UNION ALL
      SELECT e.id, e.url FROM callback_endpoints e
      WHERE e.user_id = $2 AND e.disabled_at IS NULL AND $4 = ANY (e.events)
    ) wanting
  ) receiver
$$;
