-- name: claim_due(limit, lease_seconds, per_host, per_user, window)
-- Lease callbacks that are due to one deliverer, oldest first; an expired lease makes a callback due again.
-- A callback waits while an earlier one of its job to the same receiver is open, but a terminal one for no progress
-- that is not under way: that progress is superseded here. Callbacks under way count against the caps of their host
-- and their user; an endpoint whose last ten tries failed gets one at a time.
WITH sending AS MATERIALIZED (
  SELECT user_id, endpoint_id, lower(substring(url FROM '//([^/?#]*)')) AS host
  FROM callback_outbox WHERE state = 'sending' AND lease_until >= now()
), hosts AS MATERIALIZED (
  SELECT host, count(*) AS held FROM sending GROUP BY host
), users AS MATERIALIZED (
  SELECT user_id, count(*) AS held FROM sending GROUP BY user_id
), tripped AS MATERIALIZED (
  SELECT e.id AS endpoint_id, (SELECT count(*) FROM sending s WHERE s.endpoint_id = e.id) AS held
  FROM callback_endpoints e WHERE e.failures >= 10 AND e.disabled_at IS NULL
), due AS MATERIALIZED (
  (SELECT id, job_id, seq, terminal, user_id, endpoint_id, lower(substring(url FROM '//([^/?#]*)')) AS host, next_at
   FROM callback_outbox o
   WHERE state = 'due' AND next_at <= now()
     AND lower(substring(url FROM '//([^/?#]*)')) <> ALL (ARRAY(SELECT host FROM hosts WHERE held >= :per_host::int))
     AND user_id <> ALL (ARRAY(SELECT user_id FROM users WHERE held >= :per_user::int))
     AND (endpoint_id IS NULL OR endpoint_id <> ALL (ARRAY(SELECT endpoint_id FROM tripped WHERE held > 0)))
     AND NOT EXISTS (SELECT FROM callback_outbox other
       WHERE other.job_id = o.job_id AND other.endpoint_id IS NOT DISTINCT FROM o.endpoint_id AND (
       other.seq < o.seq AND other.state = 'sending' AND (other.lease_until >= now() OR other.terminal OR NOT o.terminal)
       OR other.seq < o.seq AND other.state = 'due' AND (other.terminal OR NOT o.terminal)
       OR other.seq > o.seq AND other.terminal AND NOT o.terminal))
   ORDER BY next_at LIMIT :window::int)
  UNION ALL
  (SELECT id, job_id, seq, terminal, user_id, endpoint_id, lower(substring(url FROM '//([^/?#]*)')), next_at
   FROM callback_outbox o
   WHERE state = 'sending' AND lease_until < now()
     AND NOT EXISTS (SELECT FROM callback_outbox other
       WHERE other.job_id = o.job_id AND other.endpoint_id IS NOT DISTINCT FROM o.endpoint_id
       AND other.seq > o.seq AND other.terminal AND NOT o.terminal)
   ORDER BY lease_until LIMIT :window::int)
), ranked AS (
  SELECT due.id, due.next_at,
         coalesce(hosts.held, 0) + row_number() OVER (PARTITION BY host ORDER BY due.next_at, due.id) AS of_host,
         coalesce(users.held, 0) + row_number() OVER (PARTITION BY user_id ORDER BY due.next_at, due.id) AS of_user,
         tripped.held + row_number() OVER (PARTITION BY endpoint_id ORDER BY due.next_at, due.id) AS of_tripped
  FROM due LEFT JOIN hosts USING (host) LEFT JOIN users USING (user_id) LEFT JOIN tripped USING (endpoint_id)
), chosen AS MATERIALIZED (
  SELECT o.id, o.job_id, o.endpoint_id, o.seq, o.terminal
  FROM ranked JOIN callback_outbox o USING (id)
  WHERE ranked.of_host <= :per_host AND ranked.of_user <= :per_user AND coalesce(ranked.of_tripped, 1) <= 1
    AND (o.state = 'due' AND o.next_at <= now() OR o.state = 'sending' AND o.lease_until < now())
  ORDER BY ranked.next_at, o.id LIMIT :limit::int
  FOR UPDATE OF o SKIP LOCKED
), superseded AS (
  UPDATE callback_outbox o SET state = 'superseded', lease_until = NULL
  FROM chosen
  WHERE o.job_id = chosen.job_id AND o.endpoint_id IS NOT DISTINCT FROM chosen.endpoint_id
    AND o.seq < chosen.seq AND chosen.terminal AND NOT o.terminal
    AND (o.state = 'due' OR o.state = 'sending' AND o.lease_until < now())
)
UPDATE callback_outbox o
SET state = 'sending', lease_until = now() + make_interval(secs => :lease_seconds::float8),
    lease_no = o.lease_no + 1, attempts = o.attempts + 1,
    url = coalesce(e.url, o.url)  -- the endpoint may have moved since
FROM chosen LEFT JOIN callback_endpoints e ON e.id = chosen.endpoint_id, profiles p
WHERE o.id = chosen.id AND p.id = o.user_id
RETURNING o.id, o.job_id, o.user_id, o.url, o.body, o.event_type, o.attempts, o.lease_no,
          CASE WHEN o.endpoint_id IS NULL THEN p.callback_secret_version ELSE coalesce(e.secret_version, 1) END
            AS secret_version,
          extract(epoch FROM now() - CASE WHEN o.endpoint_id IS NULL THEN p.callback_secret_rotated_at
                                          ELSE e.secret_rotated_at END)::float8 AS secret_age_seconds,
          o.endpoint_id, coalesce(e.signature, 'v1') AS signature,
          CASE WHEN o.endpoint_id IS NULL THEN NULL
               WHEN e.id IS NULL THEN 'endpoint_deleted'
               WHEN e.disabled_at IS NOT NULL THEN 'endpoint_disabled' END AS withdrawn;

-- name: delivered(id, lease_no, status, error, elapsed_ms, excerpt)$
-- The receiver took it. True unless the lease was lost.
WITH ended AS (
  UPDATE callback_outbox
  SET state = 'delivered', delivered_at = now(), lease_until = NULL, last_status = :status::int, last_error = :error
  WHERE id = :id AND lease_no = :lease_no AND state = 'sending'
  RETURNING id, attempts, endpoint_id
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
), recovered AS (
  UPDATE callback_endpoints e SET failures = 0, failing_since = NULL FROM ended
  WHERE e.id = ended.endpoint_id AND e.failures > 0
)
SELECT EXISTS (SELECT FROM ended);

-- name: failed(id, lease_no, retry_in_seconds, status, error, elapsed_ms, excerpt)$
-- Not taken; due again after a while, unless the job has ended meanwhile. Counts against an endpoint. Nothing comes
-- back when the lease was lost.
WITH ended AS (
  UPDATE callback_outbox o
  SET state = CASE WHEN o.terminal OR NOT EXISTS (
        SELECT FROM callback_outbox later WHERE later.job_id = o.job_id AND later.seq > o.seq AND later.terminal
          AND later.endpoint_id IS NOT DISTINCT FROM o.endpoint_id)
      THEN 'due' ELSE 'superseded' END,
      next_at = now() + make_interval(secs => :retry_in_seconds::float8), lease_until = NULL,
      last_status = :status::int, last_error = :error
  WHERE o.id = :id AND o.lease_no = :lease_no AND o.state = 'sending'
  RETURNING o.id, o.attempts, o.endpoint_id
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
)
SELECT true, CASE WHEN endpoint_id IS NOT NULL THEN ourvidz.endpoint_failed(endpoint_id, false) END FROM ended;

-- name: dead(id, lease_no, status, error, elapsed_ms, excerpt)$
-- Given up. Counts against an endpoint if it was really tried, and disables it if it said that it is gone. Nothing
-- comes back when the lease was lost.
WITH ended AS (
  UPDATE callback_outbox
  SET state = 'dead', lease_until = NULL, last_status = :status::int, last_error = :error
  WHERE id = :id AND lease_no = :lease_no AND state = 'sending'
  RETURNING id, attempts, endpoint_id
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
)
SELECT true, CASE WHEN endpoint_id IS NOT NULL AND :elapsed_ms::int IS NOT NULL
             THEN ourvidz.endpoint_failed(endpoint_id, coalesce(:status = 410, false)) END FROM ended;

-- name: replay(id)$
-- Send an ended callback once more, with a fresh budget, unless the job's end made it pointless or its endpoint is not
-- enabled.
WITH again AS (
  UPDATE callback_outbox o SET state = 'due', attempts = 0, next_at = now(), delivered_at = NULL
  WHERE o.id = :id AND o.state IN ('dead', 'delivered')
    AND (o.terminal OR NOT EXISTS (
      SELECT FROM callback_outbox later WHERE later.job_id = o.job_id AND later.seq > o.seq AND later.terminal
        AND later.endpoint_id IS NOT DISTINCT FROM o.endpoint_id))
    AND (o.endpoint_id IS NULL OR EXISTS (
      SELECT FROM callback_endpoints e WHERE e.id = o.endpoint_id AND e.disabled_at IS NULL))
  RETURNING o.id
)
SELECT EXISTS (SELECT FROM again);

-- name: replay_range(endpoint_id, since, until, states)$
-- The same for all of an enabled endpoint's callbacks that came to be from `since` on and before `until`. How many.
WITH again AS (
  UPDATE callback_outbox o SET state = 'due', attempts = 0, next_at = now(), delivered_at = NULL
  WHERE o.endpoint_id = :endpoint_id AND o.created_at >= :since AND o.created_at < :until
    AND o.state IN ('dead', 'delivered') AND o.state = ANY (:states::text[])
    AND (o.terminal OR NOT EXISTS (
      SELECT FROM callback_outbox later WHERE later.job_id = o.job_id AND later.seq > o.seq AND later.terminal
        AND later.endpoint_id = o.endpoint_id))
    AND EXISTS (SELECT FROM callback_endpoints e WHERE e.id = :endpoint_id AND e.disabled_at IS NULL)
  RETURNING o.id
)
SELECT count(*) FROM again;

-- name: due_count()$
-- How many should be under way by now; those that wait for an earlier one of their job count too.
SELECT (SELECT count(*) FROM callback_outbox WHERE state = 'due' AND next_at <= now())
     + (SELECT count(*) FROM callback_outbox WHERE state = 'sending' AND lease_until < now());

-- name: for_job(job_id)
-- A job's callbacks in their order.
SELECT id, job_id, endpoint_id, seq, event_type, terminal, url, state, attempts, next_at, last_status, last_error,
       created_at, delivered_at
FROM callback_outbox WHERE job_id = :job_id ORDER BY seq, endpoint_id NULLS FIRST;

-- name: for_endpoint(endpoint_id, state, limit)
-- An endpoint's callbacks, newest first.
SELECT id, job_id, endpoint_id, seq, event_type, terminal, url, state, attempts, next_at, last_status, last_error,
       created_at, delivered_at
FROM callback_outbox WHERE endpoint_id = :endpoint_id AND (:state::text IS NULL OR state = :state)
ORDER BY created_at DESC, seq DESC LIMIT :limit::int;

-- name: attempts_of(ids)
-- What happened at each try of some callbacks, oldest first.
SELECT callback_id, attempt, at, status, error, elapsed_ms, response_excerpt FROM callback_attempts
WHERE callback_id = ANY (:ids::text[]) ORDER BY id;
