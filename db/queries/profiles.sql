-- name: read_profile(user_id)^
SELECT id, username, subscription_status, token_balance, age_verified, birth_date IS NOT NULL AS birth_date_set, created_at
FROM profiles WHERE id = :user_id;

-- name: set_birth_date(user_id, birth_date)$
-- Once; a trigger decides the age gate by it. The log says that it was set, and not to what.
WITH told AS (
  UPDATE profiles SET birth_date = :birth_date::date WHERE id = :user_id AND birth_date IS NULL RETURNING id, age_verified
), noted AS (
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  SELECT id, 'profile.birth_date_set', 'profile', id::text, jsonb_build_object('age_verified', age_verified) FROM told
)
SELECT id FROM told;
