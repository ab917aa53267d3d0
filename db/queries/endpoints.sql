-- name: lock_owner(user_id)$
-- Make the other statements that count this user's endpoints wait for the end of this transaction.
SELECT id FROM profiles WHERE id = :user_id FOR NO KEY UPDATE;

-- name: create(user_id, url, description, events, signature, most)^
-- Register an endpoint, unless its user has `most` of them already.
INSERT INTO callback_endpoints (user_id, url, description, events, signature)
SELECT :user_id, :url, :description, :events::text[], :signature
WHERE (SELECT count(*) FROM callback_endpoints WHERE user_id = :user_id) < :most::int
RETURNING *, NULL::float8 AS secret_age_seconds;

-- name: of_user(user_id)
-- A user's endpoints, oldest first, as far as row-level security lets the caller see.
SELECT *, extract(epoch FROM now() - secret_rotated_at)::float8 AS secret_age_seconds
FROM callback_endpoints WHERE user_id = :user_id ORDER BY created_at, id;

-- name: read(endpoint_id)^
-- One endpoint, as far as row-level security lets the caller see.
SELECT *, extract(epoch FROM now() - secret_rotated_at)::float8 AS secret_age_seconds
FROM callback_endpoints WHERE id = :endpoint_id;

-- name: change(endpoint_id, url, description, events)!
-- Change what is not null. What another address did says nothing about the new one.
UPDATE callback_endpoints SET
  url = coalesce(:url::text, url), description = coalesce(:description::text, description),
  events = coalesce(:events::text[], events),
  failures = CASE WHEN :url <> url THEN 0 ELSE failures END,
  failing_since = CASE WHEN :url <> url THEN NULL ELSE failing_since END
WHERE id = :endpoint_id;

-- name: enable(endpoint_id)!
-- Send to a disabled endpoint again. What it did before is forgiven.
UPDATE callback_endpoints SET disabled_at = NULL, disabled_reason = NULL, failures = 0, failing_since = NULL
WHERE id = :endpoint_id AND disabled_at IS NOT NULL;

-- name: disable(endpoint_id, actor)$
-- Send nothing more to an endpoint; what waits for it is dead. False when it is disabled already.
SELECT ourvidz.disable_endpoint(:endpoint_id, 'manual', :actor);

-- name: rotate(endpoint_id)!
-- Move on to the next secret.
UPDATE callback_endpoints SET secret_version = secret_version + 1, secret_rotated_at = now() WHERE id = :endpoint_id;

-- name: note_test(endpoint_id, pause_seconds)$
-- Note that a test is sent now. Nothing comes back when the last one was sent less than `pause_seconds` ago.
UPDATE callback_endpoints SET tested_at = now()
WHERE id = :endpoint_id AND (tested_at IS NULL OR tested_at <= now() - make_interval(secs => :pause_seconds::float8))
RETURNING id;

-- name: remove(endpoint_id, actor)$
-- Delete an endpoint, leaving an audit row. What waits for it is dead; what was sent stays with its jobs.
WITH gone AS (
  DELETE FROM callback_endpoints WHERE id = :endpoint_id RETURNING id, user_id
), unsent AS (
  UPDATE callback_outbox SET state = 'dead', last_error = 'endpoint_deleted'
  WHERE id IN (SELECT id FROM callback_outbox WHERE endpoint_id = :endpoint_id AND state = 'due' FOR UPDATE SKIP LOCKED)
), noted AS (
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  SELECT :actor, 'callback_endpoint.deleted', 'callback_endpoint', id::text, jsonb_build_object('owner', user_id) FROM gone
)
SELECT EXISTS (SELECT FROM gone);
