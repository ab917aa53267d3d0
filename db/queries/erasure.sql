-- name: find_user(user_id, username)$
-- A user by either, or one whose erasure is under way.
SELECT id FROM profiles WHERE id = :user_id::uuid OR username = :username::text
UNION SELECT user_id FROM erasures WHERE user_id = :user_id LIMIT 1;

-- name: holdings(user_id)^
-- What there is of a user.
SELECT (SELECT count(*) FROM jobs WHERE user_id = :user_id) AS jobs,
       (SELECT count(*) FROM job_queue WHERE user_id = :user_id) AS open_jobs,
       (SELECT count(*) FROM workspace_assets WHERE user_id = :user_id) AS assets,
       (SELECT count(*) FROM user_library WHERE user_id = :user_id) AS library,
       (SELECT count(*) FROM callback_endpoints WHERE user_id = :user_id) AS endpoints,
       (SELECT count(*) FROM api_keys WHERE user_id = :user_id) AS keys;

-- name: stop_jobs(user_id)
-- Take all open jobs of a user from their queues and replicas: whoever runs one finds no row to write to.
WITH gone AS (
  DELETE FROM job_queue WHERE user_id = :user_id RETURNING job_id, attempt, started_at
), ended AS (
  UPDATE jobs j
  SET status = 'cancelled', completed_at = now(), updated_at = now(), attempts = g.attempt, event_seq = j.event_seq + 2,
      started_at = coalesce(j.started_at, g.started_at)
  FROM gone g WHERE j.id = g.job_id AND j.completed_at IS NULL
)
SELECT job_id FROM gone;

-- name: end_access(user_id)!
-- Nothing is accepted from a user or sent to one from here on.
WITH unsent AS (
  DELETE FROM callback_outbox WHERE user_id = :user_id AND state IN ('due', 'sending')
), endpoints AS (
  DELETE FROM callback_endpoints WHERE user_id = :user_id
), idempotency AS (
  DELETE FROM idempotency_keys WHERE user_id = :user_id
), roles AS (
  DELETE FROM user_roles WHERE user_id = :user_id
)
DELETE FROM api_keys WHERE user_id = :user_id;

-- name: forget_person(user_id)!
-- What the profile and the log say of a person. The profile itself goes last.
WITH traces AS (
  UPDATE user_activity_log SET ip_address = NULL, user_agent = NULL WHERE user_id = :user_id
)
UPDATE profiles SET username = NULL, birth_date = NULL, age_verified = false, age_verification_date = NULL
WHERE id = :user_id;

-- name: request(user_id, actor, asked_by, open_jobs)!
-- Note that the rest is to be deleted, and who asked for it; once, however often it is asked for.
WITH requested AS (
  INSERT INTO erasures (user_id) VALUES (:user_id) ON CONFLICT DO NOTHING RETURNING user_id
)
INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
SELECT :actor::uuid, 'user.erased', 'user', user_id::text,
       jsonb_build_object('asked_by', :asked_by::text, 'open_jobs', :open_jobs::int)
FROM requested;

-- name: erase_some(user_id, batch)$
SELECT ourvidz.erase_some(:user_id, :batch);

-- name: pending()
-- The users of whom something is left.
SELECT user_id FROM erasures ORDER BY requested_at;

-- name: complete(user_id)!
DELETE FROM erasures WHERE user_id = :user_id AND rows_gone_at IS NOT NULL;
