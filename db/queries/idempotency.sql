-- name: lock(user_id, key)$
-- True when nobody else is accepting with this key right now.
SELECT pg_try_advisory_xact_lock(hashtextextended(:user_id::uuid::text || :key::text, 0));

-- name: find(user_id, keys)
-- What an earlier acceptance with these keys stored.
SELECT key, body_hash, job_id FROM idempotency_keys
WHERE user_id = :user_id AND key = ANY (:keys::text[]) AND expires_at > now();

-- name: store(user_id, keys, job_ids, body_hash, hours)!
-- Remember keys; an expired one of the same name is overwritten.
INSERT INTO idempotency_keys (user_id, key, body_hash, job_id, expires_at)
SELECT :user_id, g.key, :body_hash, g.job_id, now() + make_interval(hours => :hours::int)
FROM unnest(:keys::text[], :job_ids::uuid[]) AS g(key, job_id)
ON CONFLICT (user_id, key) DO UPDATE
  SET body_hash = excluded.body_hash, job_id = excluded.job_id, expires_at = excluded.expires_at;
