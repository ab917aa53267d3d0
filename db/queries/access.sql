-- name: find_key(key_hash)^
-- Who holds an API key that is neither revoked nor expired. `stale` says that its last use is worth noting again.
SELECT k.id AS key_id, k.user_id, p.username, p.age_verified,
       coalesce(array_agg(r.role::text) FILTER (WHERE r.role IS NOT NULL), '{}') AS roles,
       k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute' AS stale
FROM api_keys k JOIN profiles p ON p.id = k.user_id LEFT JOIN user_roles r ON r.user_id = k.user_id
WHERE k.key_hash = :key_hash AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
GROUP BY k.id, p.id;

-- name: keys_that_hold(key_ids)
-- Of these keys, those that `find_key` would still find.
SELECT id FROM api_keys
WHERE id = ANY(:key_ids::uuid[]) AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now());

-- name: note_use(key_id)!
UPDATE api_keys SET last_used_at = now() WHERE id = :key_id;

-- name: find_user(user_id)^
SELECT p.username, p.age_verified,
       coalesce((SELECT array_agg(r.role::text) FROM user_roles r WHERE r.user_id = p.id), '{}') AS roles
FROM profiles p WHERE p.id = :user_id;

-- name: adopt_user(user_id)$
INSERT INTO profiles (id) VALUES (:user_id) ON CONFLICT (id) DO NOTHING RETURNING id;

-- name: find_token_holder(user_id)^
-- The user whom a token names, unless the user is being erased.
SELECT p.username, p.age_verified,
       coalesce((SELECT array_agg(r.role::text) FROM user_roles r WHERE r.user_id = p.id), '{}') AS roles
FROM profiles p WHERE p.id = :user_id AND NOT EXISTS (SELECT FROM erasures e WHERE e.user_id = p.id);

-- name: admit_user(user_id, issued_at)!
-- The profile of whom a token names, with the role of everybody, once. Nothing for somebody who was erased after the
-- token was issued, or is being erased. Who was erased before begins without credits: the first ones were given once.
-- That is the word of this system: what users log themselves begins with `client.`.
WITH made AS (
  INSERT INTO profiles (id, token_balance)
  SELECT :user_id::uuid, CASE WHEN EXISTS (SELECT FROM user_activity_log WHERE action = 'user.erased'
                                             AND resource_id = :user_id::uuid::text) THEN 0 ELSE 100 END
  WHERE NOT EXISTS (SELECT FROM erasures WHERE user_id = :user_id)
    AND NOT EXISTS (SELECT FROM user_activity_log
                    WHERE action = 'user.erased' AND resource_id = :user_id::uuid::text AND created_at >= :issued_at)
  ON CONFLICT (id) DO NOTHING RETURNING id
)
INSERT INTO user_roles (user_id, role) SELECT id, 'basic_user' FROM made ON CONFLICT DO NOTHING;

-- name: abandon_user(user_id)!
-- Delete a user who was made for a job that was refused after all, and has nothing.
DELETE FROM profiles p WHERE id = :user_id AND username IS NULL
  AND NOT EXISTS (SELECT FROM jobs WHERE user_id = p.id) AND NOT EXISTS (SELECT FROM api_keys WHERE user_id = p.id);

-- name: ensure_user(username)$
-- The user of that name, made when new.
INSERT INTO profiles (username) VALUES (:username)
ON CONFLICT (username) DO UPDATE SET username = excluded.username RETURNING id;

-- name: ensure_role(user_id, role, actor)!
-- A role of a user, with an audit row when somebody's act gave it.
WITH given AS (
  INSERT INTO user_roles (user_id, role) VALUES (:user_id, :role::app_role) ON CONFLICT DO NOTHING RETURNING user_id, role
)
INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
SELECT :actor::uuid, 'role.granted', 'user', user_id::text, jsonb_build_object('role', role) FROM given
WHERE :actor::uuid IS NOT NULL;

-- name: create_key(user_id, name, prefix, key_hash, expires_at, actor)^
-- A key, with an audit row when somebody's act made it.
WITH made AS (
  INSERT INTO api_keys (user_id, name, prefix, key_hash, expires_at)
  VALUES (:user_id, :name, :prefix, :key_hash, :expires_at)
  RETURNING id, user_id, name, prefix, created_at, last_used_at, expires_at, revoked_at
), noted AS (
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  SELECT :actor::uuid, 'api_key.created', 'api_key', id::text, jsonb_build_object('owner', user_id) FROM made
  WHERE :actor::uuid IS NOT NULL
)
SELECT * FROM made;

-- name: list_keys(user_id)
SELECT k.id, k.user_id, p.username, k.name, k.prefix, k.created_at, k.last_used_at, k.expires_at, k.revoked_at
FROM api_keys k JOIN profiles p ON p.id = k.user_id
WHERE :user_id::uuid IS NULL OR k.user_id = :user_id ORDER BY k.created_at;

-- name: revoke_key(key_id, actor)^
-- End a key, with an audit row when it was somebody's act and the key held until now.
WITH ended AS (
  UPDATE api_keys k SET revoked_at = coalesce(k.revoked_at, now())
  FROM (SELECT id, revoked_at FROM api_keys WHERE id = :key_id FOR UPDATE) was
  WHERE k.id = was.id
  RETURNING k.id, k.user_id, k.name, k.prefix, k.created_at, k.last_used_at, k.expires_at, k.revoked_at,
            was.revoked_at IS NULL AS held
), noted AS (
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  SELECT :actor::uuid, 'api_key.revoked', 'api_key', id::text, jsonb_build_object('owner', user_id) FROM ended
  WHERE :actor::uuid IS NOT NULL AND held
)
SELECT id, user_id, name, prefix, created_at, last_used_at, expires_at, revoked_at FROM ended;

-- name: note_request(user_id, operation, resource_type, resource_id, metadata)!
-- What an admin asks the API to change, before it is done.
INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
VALUES (:user_id, 'request.' || :operation::text, :resource_type, :resource_id, :metadata);

-- name: count_admins()$
SELECT count(*) FROM user_roles WHERE role = 'admin';

-- name: callback_secret(user_id)^
-- The version of a user's callback secret, and whether the one before it still signs beside it.
SELECT callback_secret_version AS version,
       callback_secret_version > 1 AND callback_secret_rotated_at > now() - interval '24 hours' AS rotating
FROM profiles WHERE id = :user_id;

-- name: rotate_callback_secret(user_id)!
UPDATE profiles SET callback_secret_version = callback_secret_version + 1, callback_secret_rotated_at = now()
WHERE id = :user_id;
