-- name: fitting(queue, slots, worker, shapes, most_rows, loras, window, look)
-- Of the first `look` waiting jobs, those that may be taken before their turn because they share the forwards of what
-- runs already: of the highest class, at most `window` seconds of fair share behind the first, of one of the `shapes`
-- with at most as many rows of it as there is memory for (null: any), and with no LoRA but these. Nothing is locked; what is
-- gone at the claim is not taken.
WITH head AS MATERIALIZED (
  SELECT job_id, class, tag, shape, rows, loras, enqueued_at FROM job_queue
  WHERE queue = :queue AND state = 'ready'
    AND (start_deadline IS NULL OR start_deadline > now() OR claimed_at IS NOT NULL) AND (deadline IS NULL OR deadline > now())
    AND (avoid_until IS NULL OR avoid_until <= now() OR avoid_worker <> :worker)
  ORDER BY class DESC, tag, job_id LIMIT :look::int
)
SELECT h.job_id
FROM head h JOIN unnest(:shapes::text[], :most_rows::int[]) AS running (shape, rows) USING (shape),
     (SELECT class, tag, enqueued_at FROM head ORDER BY class DESC, tag, job_id LIMIT 1) first
WHERE h.class = first.class AND h.tag <= first.tag + :window::float8
  -- and by the clock as well: the tags of ever new users do not grow
  AND first.enqueued_at > now() - make_interval(secs => :window::float8)
  AND (h.rows <= running.rows) IS NOT FALSE AND coalesce(h.loras, '{}') <@ :loras::text[]
ORDER BY h.tag, h.job_id LIMIT :slots::int;

-- name: claim(queue, slots, worker, lease_seconds, chosen, least_class)
-- Take up to `slots` waiting jobs of a class or higher: the `chosen` ones, then by highest class, fair share and age. Sets owner, lease and
-- the next attempt, in the queue alone: the job's own row is written when the run is over, and its event is the record
-- until then.
WITH stopped AS MATERIALIZED (
  SELECT FROM queues WHERE name = :queue AND paused
), before AS MATERIALIZED (
  SELECT ctid FROM job_queue
  WHERE job_id = ANY (:chosen::uuid[]) AND queue = :queue AND state = 'ready' AND NOT EXISTS (SELECT FROM stopped)
  FOR UPDATE SKIP LOCKED
), picked AS MATERIALIZED (
  SELECT ctid FROM job_queue
  WHERE queue = :queue AND state = 'ready' AND class >= :least_class AND job_id <> ALL (:chosen::uuid[])
    AND (start_deadline IS NULL OR start_deadline > now() OR claimed_at IS NOT NULL) AND (deadline IS NULL OR deadline > now())
    AND (avoid_until IS NULL OR avoid_until <= now() OR avoid_worker <> :worker)
    AND NOT EXISTS (SELECT FROM stopped)
  ORDER BY class DESC, tag, job_id
  LIMIT :slots::int - (SELECT count(*) FROM before) FOR UPDATE SKIP LOCKED
), claimed AS (
  UPDATE job_queue q
  SET state = 'running', attempt = q.attempt + 1, worker = :worker, phase = 'claimed', step = NULL, steps = NULL,
      preview_step = NULL, preview_steps = NULL, started_at = coalesce(q.started_at, now()),
      claimed_at = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => :lease_seconds::float8)
  -- by where they stand, as they are locked; an array, not a join: a prepared plan does not know the limit, and would
  -- join its guess by reading the whole table
  WHERE q.ctid = ANY (ARRAY(SELECT ctid FROM before UNION ALL SELECT ctid FROM picked))
  RETURNING q.job_id, q.attempt, q.class, q.tag, q.started_at, q.failures, q.batch_size,
            extract(epoch FROM q.deadline - now())::float8 AS deadline_seconds,
            q.avoid_worker IS NOT NULL AS moved_for_memory, extract(epoch FROM now() - q.outage_since)::float8 AS outage_seconds
), clock AS (
  UPDATE queues SET clock = greatest(clock, top.tag), batch_clock = greatest(batch_clock, top.batch_tag)
  FROM (SELECT max(tag) FILTER (WHERE class > 0) AS tag, max(tag) FILTER (WHERE class = 0) AS batch_tag FROM claimed) top
  WHERE name = :queue AND (clock < top.tag OR batch_clock < top.batch_tag)
), started AS (
  SELECT c.*, j.user_id, j.job_type, j.stage, j.content_mode, j.original_prompt, j.enhanced_prompt, j.enhancement, j.params,
         j.max_attempts, j.event_seq, j.callback_url, j.callback_events, j.metadata,
         coalesce(j.queue_wait_ms, ourvidz.waited_ms(j.created_at, c.started_at)) AS queue_wait_ms
  -- in their order before the wide columns come, which a nested loop leaves as it is
  FROM (SELECT * FROM claimed ORDER BY class DESC, tag, job_id) c JOIN jobs j ON j.id = c.job_id
), noted AS (
  -- there are two stages, and one worker: what is told of them is made once
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT job_id, user_id, attempt, 'started',
         CASE stage WHEN 'enhance' THEN (SELECT jsonb_build_object('stage', 'enhance', 'worker', :worker::uuid))
                    ELSE (SELECT jsonb_build_object('stage', 'generate', 'worker', :worker::uuid)) END
  FROM started
), called AS (
  -- told once: at the first start, which is the one whose start time is this transaction's
  INSERT INTO callback_outbox (id, job_id, user_id, endpoint_id, seq, event_type, terminal, url, body)
  SELECT c.* FROM started s CROSS JOIN LATERAL ourvidz.callbacks_of(
    s.job_id, s.user_id, s.event_seq + 1, 'processing', s.attempt, s.job_type, s.callback_url, s.callback_events,
    s.metadata, NULL, NULL, NULL, NULL) c
  WHERE s.started_at = now()
)
SELECT job_id AS id, user_id, job_type, stage, content_mode, original_prompt, enhanced_prompt, enhancement, params,
       attempt AS attempts, queue_wait_ms, failures AS budget_used, max_attempts, batch_size, moved_for_memory,
       outage_seconds, class, deadline_seconds
FROM started;

-- name: renew(job_ids, attempts, phases, steps, totals, preview_steps, preview_totals, worker, lease_seconds)
-- Renew the leases of a replica's jobs with their progress. A job that is missing from the answer was lost.
UPDATE job_queue q
SET lease_until = clock_timestamp() + make_interval(secs => :lease_seconds::float8),
    phase = g.phase, step = g.step, steps = g.total, preview_step = g.preview_step, preview_steps = g.preview_total
FROM unnest(:job_ids::uuid[], :attempts::int[], :phases::text[], :steps::int[], :totals::int[],
            :preview_steps::int[], :preview_totals::int[])
     AS g(job_id, attempt, phase, step, total, preview_step, preview_total)
-- the state as text, or a plan of the time when little ran would walk the index of what runs for each of them
WHERE q.job_id = g.job_id AND q.attempt = g.attempt AND q.state::text = 'running' AND q.worker = :worker
RETURNING q.job_id, q.cancel;

-- name: settle(job_ids, attempts, statuses, times, workers, details)$
-- End jobs. The attempt is the fence: with it, only a running job under that very attempt ends; without it, only one
-- that is not running. `details` are what few have: the error, `counts`, `expired` (only if the lease has run out),
-- settings, assets, callback_assets, facts, compute_seconds (the share of a replica that it had, in the place of the time
-- since its claim). The answer holds the numbers, counted from 1, of those that ended.
WITH given AS MATERIALIZED (
  SELECT * FROM unnest(:job_ids::uuid[], :attempts::int[], :statuses::text[], :times::bigint[], :workers::uuid[],
                       :details::jsonb[])
    WITH ORDINALITY AS g(job_id, attempt, status, generation_time_ms, worker, details, n)
), gone AS (
  DELETE FROM job_queue q USING given g
  WHERE q.job_id = g.job_id
    AND CASE WHEN g.attempt IS NULL THEN q.state <> 'running' ELSE q.state = 'running' AND q.attempt = g.attempt END
    AND (g.details -> 'expired' IS NULL OR q.lease_until < clock_timestamp())
  RETURNING q.job_id, q.user_id, q.queue, q.class, q.cost, q.state, q.claimed_at, q.started_at, q.attempt, q.failures, g.n,
            g.status, g.generation_time_ms, g.worker, g.details
), refunded AS MATERIALIZED (
  -- what was charged for a job that gave nothing, unless its own input was at fault, or its owner stopped it while it ran:
  -- by a deadline too, which is the owner's, and would make everything free that was seen before it.
  -- Before the shares: an acceptance locks a balance, and then a share
  SELECT ourvidz.refund(ids)
  FROM (SELECT array_agg(job_id) AS ids FROM gone
        WHERE (status = 'cancelled' AND state <> 'running')
           OR (status = 'failed' AND details ->> 'error_code' NOT IN ('invalid_input', 'content_rejected')
               AND NOT (state = 'running' AND details ->> 'error_code' = 'deadline_exceeded'))) unearned
  WHERE ids IS NOT NULL
), charged AS (
  -- the user was charged what was predicted; in the order of the key, so that two finishers can't lock each other out
  INSERT INTO fair_shares AS f (queue, user_id, class, last_finish)
  SELECT queue, user_id, class, sum(CASE state WHEN 'running'
    THEN coalesce((details ->> 'compute_seconds')::float8,
                  greatest(0, extract(epoch FROM clock_timestamp() - claimed_at)::float8)) - cost ELSE -cost END)
  FROM gone WHERE state <> 'scheduled' AND (SELECT count(*) FROM refunded) >= 0
  GROUP BY queue, user_id, class ORDER BY queue, user_id, class
  ON CONFLICT (queue, user_id, class) DO UPDATE SET last_finish = f.last_finish + excluded.last_finish / f.weight
), ended AS (
  -- the number of the event grows by two: a claim's callback has the one between, and writes it nowhere
  UPDATE jobs j
  SET status = g.status, completed_at = now(), updated_at = now(), attempts = g.attempt, event_seq = j.event_seq + 2,
      started_at = coalesce(j.started_at, g.started_at),
      queue_wait_ms = coalesce(j.queue_wait_ms, ourvidz.waited_ms(j.created_at, g.started_at)),
      failures = g.failures + (g.details -> 'counts' IS NOT NULL)::int,
      error_code = g.details ->> 'error_code', error_message = g.details ->> 'error_message',
      retryable = (g.details ->> 'retryable')::boolean,
      enhancement_strategy = coalesce(g.details #>> '{settings,enhancement_strategy}', j.enhancement_strategy),
      generation_settings = coalesce(g.details -> 'settings', j.generation_settings), worker = coalesce(g.worker, j.worker),
      generation_time_ms = coalesce(g.generation_time_ms, j.generation_time_ms)
  FROM gone g  -- with what was given, as joining it again would cost the square of a batch
  WHERE j.id = g.job_id
  RETURNING j.id, j.user_id, j.job_type, j.status, j.attempts, j.error_code, j.error_message, j.retryable, j.event_seq,
            j.generation_time_ms + coalesce(j.enhancement_time_ms, 0) AS run_ms, j.original_prompt,
            j.callback_url, j.callback_events, j.metadata, g.n, g.details
), timed AS (
  INSERT INTO run_times AS t (job_type, seconds, runs)
  SELECT job_type, avg(run_ms) / 1000, count(*) FROM ended
  WHERE status = 'completed' AND run_ms IS NOT NULL GROUP BY job_type ORDER BY job_type
  ON CONFLICT (job_type) DO UPDATE SET runs = t.runs + excluded.runs,
    seconds = excluded.seconds + (t.seconds - excluded.seconds) * power(0.95, excluded.runs)
), stored AS (
  INSERT INTO workspace_assets (id, user_id, job_id, asset_index, attempt, asset_type, temp_storage_path, thumbnail_path,
                                mime_type, file_size_bytes, width, height, frames, fps, duration_seconds, generation_seed,
                                original_prompt, model_used, generation_settings, manifest, moderation_status,
                                moderation_reason)
  SELECT a.id, e.user_id, e.id, a.asset_index, e.attempts, a.asset_type, a.key, a.thumbnail_key,
         a.mime_type, a.file_size_bytes, a.width, a.height, a.frames, a.fps, a.duration_seconds, a.seed,
         e.original_prompt, a.model_used, coalesce(a.settings, '{}'), a.manifest, coalesce(a.moderation_status, 'pending'),
         a.moderation_reason
  FROM (SELECT * FROM ended WHERE details -> 'assets' IS NOT NULL) e CROSS JOIN LATERAL jsonb_to_recordset(e.details -> 'assets') AS a(
    id uuid, asset_index int, asset_type text, key text, thumbnail_key text, mime_type text, file_size_bytes bigint,
    width int, height int, frames int, fps numeric, duration_seconds numeric, seed bigint, model_used text, settings jsonb,
    manifest jsonb, moderation_status text, moderation_reason text)
), noted AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT id, user_id, attempts, status,
         CASE WHEN details IS NULL THEN '{"assets": 0}'
              ELSE jsonb_strip_nulls(jsonb_build_object(
                'error_code', error_code, 'error_message', error_message, 'retryable', retryable,
                'assets', coalesce(jsonb_array_length(details -> 'assets'), 0))) END
  FROM ended
), superseded AS (
  -- by the jobs alone: of the index of what is due the whole backlog would be read, were its condition spelled out
  UPDATE callback_outbox SET state = 'superseded'
  WHERE job_id = ANY (ARRAY(SELECT id FROM ended)) AND state || '' = 'due' AND NOT terminal
), called AS (
  INSERT INTO callback_outbox (id, job_id, user_id, endpoint_id, seq, event_type, terminal, url, body)
  SELECT c.* FROM ended e CROSS JOIN LATERAL ourvidz.callbacks_of(
    e.id, e.user_id, e.event_seq, e.status, e.attempts, e.job_type, e.callback_url, e.callback_events, e.metadata,
    e.error_code, e.error_message, e.details -> 'callback_assets', e.details -> 'facts') c
)
SELECT coalesce(array_agg(n), '{}') FROM ended;

-- name: requeue(rows)
-- Put running jobs back: to the next stage's queue, after a failure with its delay, or at once when a replica drains.
-- The fence is the same as in settle; a job that was asked to stop is left for settle to end.
WITH given AS MATERIALIZED (
  SELECT * FROM jsonb_to_recordset(:rows::jsonb) AS g(
    n int, job_id uuid, attempt int, expired boolean, counts boolean, delay_seconds double precision, error_code text,
    error_message text, kind text, queue text, cost real, stage text, enhanced_prompt text, enhancement jsonb,
    enhancement_strategy text, enhancement_time_ms int, template_name text, expansion numeric, batch_size smallint,
    avoid_worker uuid, avoid_seconds double precision, outage boolean)
), held AS MATERIALIZED (
  -- locked first: a renewal at this moment must not have the tag drawn twice
  SELECT g.n, q.job_id, q.user_id, q.queue, q.class, q.cost,
         greatest(0, extract(epoch FROM clock_timestamp() - q.claimed_at)::float8) AS seconds
  FROM given g JOIN job_queue q USING (job_id)
  WHERE q.state = 'running' AND q.attempt = g.attempt AND q.cancel IS NULL
    AND (g.expired IS NOT TRUE OR q.lease_until < clock_timestamp())
  FOR UPDATE OF q
), charged AS MATERIALIZED (
  -- the run that ends is charged as it was; the prediction stays charged only if the job keeps its place. Before the new
  -- tag is drawn: shares are taken in the order of their keys, and the queue of the first stage is the first of them
  SELECT ourvidz.charge(queue, user_id, class, seconds - CASE WHEN stays THEN 0 ELSE cost END)
  FROM (SELECT h.*, g.queue IS NULL AND coalesce(g.delay_seconds, 0) <= 0 AS stays
        FROM held h JOIN given g USING (n) ORDER BY h.queue, h.user_id, h.class) in_order
), moved AS (
  UPDATE job_queue q
  SET state = (CASE WHEN g.delay_seconds > 0 THEN 'scheduled' ELSE 'ready' END)::queue_state,
      run_at = now() + make_interval(secs => coalesce(g.delay_seconds, 0)),
      worker = NULL, lease_until = NULL, phase = NULL, step = NULL, steps = NULL, preview_step = NULL, preview_steps = NULL,
      failures = q.failures + coalesce(g.counts, false)::int, queue = coalesce(g.queue, q.queue),
      tag = CASE WHEN g.delay_seconds > 0 THEN 0 WHEN g.queue IS NULL THEN q.tag
                 ELSE ourvidz.next_tag(g.queue, q.user_id, q.class, coalesce(g.cost, q.cost)) END,
      cost = coalesce(g.cost, q.cost), batch_size = coalesce(g.batch_size, q.batch_size),
      avoid_worker = coalesce(g.avoid_worker, q.avoid_worker),
      avoid_until = coalesce(now() + make_interval(secs => g.avoid_seconds), q.avoid_until),
      outage_since = CASE WHEN g.outage THEN coalesce(q.outage_since, now()) WHEN g.counts THEN NULL ELSE q.outage_since END
  FROM given g
  WHERE q.job_id = g.job_id AND g.n IN (SELECT n FROM held) AND (SELECT count(*) FROM charged) > 0
  RETURNING q.job_id, q.attempt, q.started_at, q.queue, q.failures, g.n
), waiting AS (
  UPDATE jobs j
  SET status = 'queued', updated_at = now(), attempts = m.attempt, event_seq = j.event_seq + 2,
      started_at = coalesce(j.started_at, m.started_at),
      queue_wait_ms = coalesce(j.queue_wait_ms, ourvidz.waited_ms(j.created_at, m.started_at)), failures = m.failures, stage = coalesce(g.stage, j.stage),
      enhanced_prompt = coalesce(g.enhanced_prompt, j.enhanced_prompt), enhancement = coalesce(g.enhancement, j.enhancement),
      enhancement_strategy = coalesce(g.enhancement_strategy, j.enhancement_strategy),
      enhancement_time_ms = coalesce(g.enhancement_time_ms, j.enhancement_time_ms),
      template_name = coalesce(g.template_name, j.template_name),
      qwen_expansion_percentage = coalesce(g.expansion, j.qwen_expansion_percentage)
  FROM moved m JOIN given g USING (n)
  WHERE j.id = m.job_id
  RETURNING j.id, j.user_id, m.attempt, m.queue, g.kind, g.error_code, g.error_message, g.delay_seconds, j.stage,
            g.batch_size, g.avoid_seconds
), noted AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT id, user_id, attempt, kind, jsonb_strip_nulls(jsonb_build_object(
    'queue', queue, 'stage', stage, 'error_code', error_code, 'error_message', error_message, 'delay_seconds', delay_seconds,
    'batch_size', batch_size, 'elsewhere_for_seconds', avoid_seconds))
  FROM waiting
)
SELECT id AS job_id, queue FROM waiting;

-- name: unheard(worker, known)
-- Running jobs that a worker claimed without hearing so, because the connection broke: it knows of `known` alone.
SELECT job_id, attempt FROM job_queue WHERE state = 'running' AND worker = :worker AND NOT job_id = ANY (:known::uuid[]);

-- name: flag_cancel(job_id, reason)^
-- Ask the replica that runs a job to stop it. No row: the job is not running.
WITH flagged AS (
  UPDATE job_queue SET cancel = :reason WHERE job_id = :job_id AND state = 'running' AND cancel IS NULL
  RETURNING job_id, user_id, attempt, queue
), noted AS (
  INSERT INTO job_events (job_id, user_id, attempt, kind, data)
  SELECT job_id, user_id, attempt, 'cancelling', jsonb_build_object('reason', :reason::text) FROM flagged
)
SELECT job_id, queue FROM flagged;

-- name: cancel_reason(job_id, attempt)$
SELECT cancel FROM job_queue WHERE job_id = :job_id AND attempt = :attempt AND state = 'running';

-- name: queue_row(job_id)^
-- The queue row of a job, locked against everyone else until the transaction ends.
SELECT job_id, state, cancel FROM job_queue WHERE job_id = :job_id FOR UPDATE;

-- name: expired(page_size)
-- Running jobs whose lease has run out. Reading does not change them: settle and requeue check again.
SELECT job_id, attempt, failures, max_attempts, cancel, queue, worker FROM job_queue
WHERE state = 'running' AND lease_until < clock_timestamp()
ORDER BY lease_until LIMIT :page_size::int;

-- name: promote(page_size)
-- Delayed jobs whose time has come. They get their place now: one from when they came would be before everybody's.
WITH due AS MATERIALIZED (
  SELECT job_id, queue, user_id, class, cost FROM job_queue WHERE state = 'scheduled' AND run_at <= now()
  ORDER BY run_at LIMIT :page_size::int FOR UPDATE SKIP LOCKED
), tagged AS MATERIALIZED (
  SELECT job_id, ourvidz.next_tag(queue, user_id, class, cost) AS tag
  FROM (SELECT * FROM due ORDER BY queue, user_id, class, job_id) in_order
)
UPDATE job_queue q SET state = 'ready', tag = tagged.tag FROM tagged WHERE q.job_id = tagged.job_id
RETURNING q.job_id, q.queue;

-- name: overdue(page_size)
-- Open jobs past a deadline: the start deadline while they wait for their first claim, the total one always.
SELECT job_id, state, attempt,
       CASE WHEN deadline <= now() THEN 'deadline_exceeded' ELSE 'start_deadline_exceeded' END AS error_code
FROM job_queue
WHERE (deadline <= now() AND cancel IS NULL) OR (start_deadline <= now() AND claimed_at IS NULL)
LIMIT :page_size::int;

-- name: stopped_waiting(page_size)
-- Jobs asked to stop while they ran, which came back to the queue before they could.
SELECT job_id, cancel FROM job_queue WHERE cancel IS NOT NULL AND state <> 'running' LIMIT :page_size::int;

-- name: depth()
-- What is open, per queue and state: how many, since when, how many predicted seconds.
SELECT queue, state::text, count(*) AS jobs, min(enqueued_at) AS oldest, sum(cost)::float8 AS cost_seconds
FROM job_queue GROUP BY queue, state;

-- name: work(queue)^
-- The load that autoscaling looks at.
SELECT count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE state = 'running') AS running,
       count(DISTINCT worker) FILTER (WHERE state = 'running') AS busy,
       coalesce(sum(cost) FILTER (WHERE state = 'ready'), 0)::float8 AS ready_seconds
FROM job_queue WHERE queue = :queue;

-- name: pause(queue, paused)!
-- Stop or resume the claims of a queue; running jobs go on.
INSERT INTO queues (name, paused) VALUES (:queue, :paused)
ON CONFLICT (name) DO UPDATE SET paused = excluded.paused, updated_at = now();

-- name: enter_worker(id, queue, model_name, device, node, pid, state, slots, load_ms, error)!
-- A replica says what it is and how it is.
INSERT INTO workers (id, queue, model_name, device, node, pid, state, slots, load_ms, error)
VALUES (:id, :queue, :model_name, :device, :node, :pid, :state, :slots, :load_ms, :error)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, model_name = coalesce(excluded.model_name, workers.model_name),
  device = coalesce(excluded.device, workers.device), slots = excluded.slots,
  load_ms = coalesce(excluded.load_ms, workers.load_ms), error = excluded.error, seen_at = now();

-- name: see_worker(id, running)!
UPDATE workers SET seen_at = now(), running = :running WHERE id = :id;

-- name: list_workers(within_seconds)
SELECT id, queue, model_name, device, node, pid, state, slots, running, load_ms, error, started_at, seen_at FROM workers
WHERE seen_at > now() - make_interval(secs => :within_seconds::float8) ORDER BY queue, started_at;

-- name: paused()
-- The queues that nothing is claimed from.
SELECT name FROM queues WHERE paused;

-- name: live_attempts(job_ids, attempts)
-- Of these attempts, those whose files somebody may still speak of: the winning one, and one that runs now.
SELECT g.job_id, g.attempt FROM unnest(:job_ids::uuid[], :attempts::int[]) AS g(job_id, attempt)
WHERE EXISTS (SELECT FROM workspace_assets a WHERE a.job_id = g.job_id AND a.attempt = g.attempt)
   OR EXISTS (SELECT FROM job_queue q WHERE q.job_id = g.job_id AND q.attempt = g.attempt AND q.state = 'running');

-- name: running_attempts(job_ids, attempts)
-- Of these attempts, those that run now: their previews are shown.
SELECT g.job_id, g.attempt FROM unnest(:job_ids::uuid[], :attempts::int[]) AS g(job_id, attempt)
WHERE EXISTS (SELECT FROM job_queue q WHERE q.job_id = g.job_id AND q.attempt = g.attempt AND q.state = 'running');

-- name: open_jobs(job_ids)
-- Of these jobs, those that have not ended: their states are kept.
SELECT job_id FROM job_queue WHERE job_id = ANY(:job_ids::uuid[]);

-- name: known_jobs(job_ids)
-- Of these jobs, those that exist.
SELECT id FROM jobs WHERE id = ANY(:job_ids::uuid[]);
