-- name: claim_due(limit, lease_seconds, per_host, per_user, window)
-- Lease callbacks that are due to one deliverer, oldest first; an expired lease makes a callback due again.
-- A callback waits while an earlier one of its job is open, but a terminal one for no progress that is not under way:
-- that progress is superseded here. Callbacks under way count against the caps of their receiver and their user.
WITH sending AS MATERIALIZED (
  SELECT user_id, lower(substring(url FROM '//([^/?#]*)')) AS host
  FROM callback_outbox WHERE state = 'sending' AND lease_until >= now()
), hosts AS MATERIALIZED (
  SELECT host, count(*) AS held FROM sending GROUP BY host
), users AS MATERIALIZED (
  SELECT user_id, count(*) AS held FROM sending GROUP BY user_id
), due AS MATERIALIZED (
  (SELECT id, job_id, seq, terminal, user_id, lower(substring(url FROM '//([^/?#]*)')) AS host, next_at
   FROM callback_outbox o
   WHERE state = 'due' AND next_at <= now()
     AND lower(substring(url FROM '//([^/?#]*)')) <> ALL (ARRAY(SELECT host FROM hosts WHERE held >= :per_host::int))
     AND user_id <> ALL (ARRAY(SELECT user_id FROM users WHERE held >= :per_user::int))
     AND NOT EXISTS (SELECT FROM callback_outbox other WHERE other.job_id = o.job_id AND (
       other.seq < o.seq AND other.state = 'sending' AND (other.lease_until >= now() OR other.terminal OR NOT o.terminal)
       OR other.seq < o.seq AND other.state = 'due' AND (other.terminal OR NOT o.terminal)
       OR other.seq > o.seq AND other.terminal AND NOT o.terminal))
   ORDER BY next_at LIMIT :window::int)
  UNION ALL
  (SELECT id, job_id, seq, terminal, user_id, lower(substring(url FROM '//([^/?#]*)')), next_at
   FROM callback_outbox o
   WHERE state = 'sending' AND lease_until < now()
     AND NOT EXISTS (SELECT FROM callback_outbox other WHERE other.job_id = o.job_id
       AND other.seq > o.seq AND other.terminal AND NOT o.terminal)
   ORDER BY lease_until LIMIT :window::int)
), ranked AS (
  SELECT due.id, due.next_at,
         coalesce(hosts.held, 0) + row_number() OVER (PARTITION BY host ORDER BY due.next_at, due.id) AS of_host,
         coalesce(users.held, 0) + row_number() OVER (PARTITION BY user_id ORDER BY due.next_at, due.id) AS of_user
  FROM due LEFT JOIN hosts USING (host) LEFT JOIN users USING (user_id)
), chosen AS MATERIALIZED (
  SELECT o.id, o.job_id, o.seq, o.terminal
  FROM ranked JOIN callback_outbox o USING (id)
  WHERE ranked.of_host <= :per_host AND ranked.of_user <= :per_user
    AND (o.state = 'due' AND o.next_at <= now() OR o.state = 'sending' AND o.lease_until < now())
  ORDER BY ranked.next_at, o.id LIMIT :limit::int
  FOR UPDATE OF o SKIP LOCKED
), superseded AS (
  UPDATE callback_outbox o SET state = 'superseded', lease_until = NULL
  FROM chosen
  WHERE o.job_id = chosen.job_id AND o.seq < chosen.seq AND chosen.terminal AND NOT o.terminal
    AND (o.state = 'due' OR o.state = 'sending' AND o.lease_until < now())
)
UPDATE callback_outbox o
SET state = 'sending', lease_until = now() + make_interval(secs => :lease_seconds::float8),
    lease_no = o.lease_no + 1, attempts = o.attempts + 1
FROM chosen, profiles p
WHERE o.id = chosen.id AND p.id = o.user_id
RETURNING o.id, o.job_id, o.user_id, o.url, o.body, o.event_type, o.attempts, o.lease_no,
          p.callback_secret_version AS secret_version,
          extract(epoch FROM now() - p.callback_secret_rotated_at)::float8 AS secret_age_seconds;

-- name: delivered(id, lease_no, status, error, elapsed_ms, excerpt)$
-- The receiver took it. True unless the lease was lost.
WITH ended AS (
  UPDATE callback_outbox
  SET state = 'delivered', delivered_at = now(), lease_until = NULL, last_status = :status::int, last_error = :error
  WHERE id = :id AND lease_no = :lease_no AND state = 'sending'
  RETURNING id, attempts
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
)
SELECT EXISTS (SELECT FROM ended);

-- name: failed(id, lease_no, retry_in_seconds, status, error, elapsed_ms, excerpt)$
-- Not taken; due again after a while, unless the job has ended meanwhile. True unless the lease was lost.
WITH ended AS (
  UPDATE callback_outbox o
  SET state = CASE WHEN o.terminal OR NOT EXISTS (
        SELECT FROM callback_outbox later WHERE later.job_id = o.job_id AND later.seq > o.seq AND later.terminal)
      THEN 'due' ELSE 'superseded' END,
      next_at = now() + make_interval(secs => :retry_in_seconds::float8), lease_until = NULL,
      last_status = :status::int, last_error = :error
  WHERE o.id = :id AND o.lease_no = :lease_no AND o.state = 'sending'
  RETURNING o.id, o.attempts
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
)
SELECT EXISTS (SELECT FROM ended);

-- name: dead(id, lease_no, status, error, elapsed_ms, excerpt)$
-- Given up. True unless the lease was lost.
WITH ended AS (
  UPDATE callback_outbox
  SET state = 'dead', lease_until = NULL, last_status = :status::int, last_error = :error
  WHERE id = :id AND lease_no = :lease_no AND state = 'sending'
  RETURNING id, attempts
), logged AS (
  INSERT INTO callback_attempts (callback_id, attempt, status, error, elapsed_ms, response_excerpt)
  SELECT id, attempts, :status, :error::text, :elapsed_ms::int, :excerpt::text FROM ended
)
SELECT EXISTS (SELECT FROM ended);

-- name: replay(id)$
-- Send an ended callback once more, with a fresh budget, unless the job's end made it pointless.
WITH again AS (
  UPDATE callback_outbox o SET state = 'due', attempts = 0, next_at = now(), delivered_at = NULL
  WHERE o.id = :id AND o.state IN ('dead', 'delivered') AND (o.terminal OR NOT EXISTS (
    SELECT FROM callback_outbox later WHERE later.job_id = o.job_id AND later.seq > o.seq AND later.terminal))
  RETURNING o.id
)
SELECT EXISTS (SELECT FROM again);

-- name: due_count()$
-- How many should be under way by now; those that wait for an earlier one of their job count too.
SELECT (SELECT count(*) FROM callback_outbox WHERE state = 'due' AND next_at <= now())
     + (SELECT count(*) FROM callback_outbox WHERE state = 'sending' AND lease_until < now());

-- name: for_job(job_id)
-- A job's callbacks in their order.
SELECT id, job_id, seq, event_type, terminal, url, state, attempts, next_at, last_status, last_error, created_at,
       delivered_at
FROM callback_outbox WHERE job_id = :job_id ORDER BY seq;

-- name: attempts_of(id)
-- What happened at each try of a callback, oldest first.
SELECT attempt, at, status, error, elapsed_ms, response_excerpt FROM callback_attempts
WHERE callback_id = :id ORDER BY callback_attempts.id;
