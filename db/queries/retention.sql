-- name: prune_events(days, jobs)$
-- Delete the events of jobs that ended long ago, those first that were accepted first. How many of their
-- beginnings were found.
WITH old AS MATERIALIZED (
  SELECT e.job_id FROM job_events e
  WHERE e.kind IN ('queued', 'retried') AND e.at < now() - make_interval(days => :days::int)
    AND EXISTS (SELECT FROM jobs j WHERE j.id = e.job_id AND j.completed_at < now() - make_interval(days => :days::int))
  ORDER BY e.at LIMIT :jobs::int
), gone AS (
  DELETE FROM job_events WHERE job_id = ANY (ARRAY(SELECT job_id FROM old))
)
SELECT count(*) FROM old;

-- name: prune_deliveries(days, batch)$
-- Delete the log of old tries to deliver callbacks, oldest first. How many.
WITH gone AS (
  DELETE FROM callback_attempts WHERE id = ANY (ARRAY(
    SELECT id FROM callback_attempts WHERE at < now() - make_interval(days => :days::int)
    ORDER BY at LIMIT :batch::int))
  RETURNING 1
)
SELECT count(*) FROM gone;

-- name: prune_idempotency_keys(batch)$
-- Delete keys that have expired. How many.
WITH old AS MATERIALIZED (
  SELECT user_id, key FROM idempotency_keys WHERE expires_at < now() ORDER BY expires_at LIMIT :batch::int
), gone AS (
  DELETE FROM idempotency_keys k USING old WHERE k.user_id = old.user_id AND k.key = old.key AND k.expires_at < now()
  RETURNING 1
)
SELECT count(*) FROM gone;

-- name: prune_workers(batch)$
-- Delete replicas that were not seen for a day. How many.
WITH gone AS (
  DELETE FROM workers WHERE id = ANY (ARRAY(
    SELECT id FROM workers WHERE seen_at < now() - interval '1 day' LIMIT :batch::int))
  RETURNING 1
)
SELECT count(*) FROM gone;
