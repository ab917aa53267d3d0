-- name: read_config()$
SELECT config FROM system_config;

-- name: in_maintenance()$
-- `ourvidz.admit` asks the same for jobs, in the statement that accepts them.
SELECT config -> 'maintenanceMode' = 'true' FROM system_config;

-- name: admit_request(user_id)^
-- Why a request that makes no job may not be done now; no row where it may, which counts it. In one rate with the jobs:
-- `ourvidz.admit` reads and writes the same time.
WITH limits AS MATERIALIZED (
  SELECT coalesce((config ->> 'maintenanceMode')::boolean, false) AS maintained, (config ->> 'rateLimitRequestsPerMinute')::int AS rate,
         60.0 / (config ->> 'rateLimitRequestsPerMinute')::int AS gap, coalesce((config ->> 'burst')::int, 10) AS burst
  FROM system_config
), taken AS (
  INSERT INTO ourvidz.user_quotas AS q (user_id, rate_at)
  SELECT :user_id, clock_timestamp() + make_interval(secs => gap) FROM limits WHERE rate IS NOT NULL AND NOT maintained
  ON CONFLICT (user_id) DO UPDATE
    SET rate_at = greatest(q.rate_at, clock_timestamp()) + (SELECT make_interval(secs => gap) FROM limits)
    WHERE q.rate_at IS NULL OR q.rate_at <= clock_timestamp() + (SELECT make_interval(secs => (burst - 1) * gap) FROM limits)
  RETURNING user_id
)
SELECT 'maintenance' AS code, 'maintenanceMode' AS setting, NULL::int AS allowed, NULL::float8 AS retry_after
FROM limits WHERE maintained
UNION ALL
-- also where the user's row is too new to be seen here: it was there to be refused by
SELECT 'rate_limited', 'rateLimitRequestsPerMinute', rate,
       coalesce(extract(epoch FROM q.rate_at - clock_timestamp()) - (burst - 1) * gap, gap)::float8
FROM limits LEFT JOIN ourvidz.user_quotas q ON q.user_id = :user_id
WHERE rate IS NOT NULL AND NOT maintained AND NOT EXISTS (SELECT FROM taken);

-- name: change_config(given, actor)!
-- Set values, or with null take them away; what others keep in the row is left alone. With one audit row, unless nothing
-- changes.
WITH before AS MATERIALIZED (
  SELECT config FROM system_config FOR UPDATE
), changed AS (
  UPDATE system_config s SET config = (before.config || jsonb_strip_nulls(:given::jsonb))
    - ARRAY(SELECT key FROM jsonb_each(:given::jsonb) WHERE value = 'null')
  FROM before
  RETURNING s.config
)
INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
SELECT :actor, 'config.changed', 'system_config', '1', jsonb_build_object('changed', differences.told)
FROM before, changed, LATERAL (
  SELECT jsonb_object_agg(key, jsonb_build_object('before', before.config -> key, 'after', changed.config -> key)) AS told
  FROM jsonb_object_keys(:given::jsonb) AS key
  WHERE before.config -> key IS DISTINCT FROM changed.config -> key
) differences
WHERE differences.told IS NOT NULL;

-- name: storage_room(user_id, size)^
-- No row where a file of that size may come in; else the limit, and the seconds until the user's next asset expires.
SELECT l.gigabytes, (SELECT extract(epoch FROM min(a.expires_at) - now())::float8 FROM workspace_assets a
                     WHERE a.user_id = :user_id AND a.expires_at > now()) AS retry_after
FROM (SELECT (config ->> 'maxStoragePerUserGB')::numeric AS gigabytes FROM system_config) l
WHERE ourvidz.stored_bytes(:user_id) + :size::bigint > l.gigabytes * 1e9 AND NOT has_role(:user_id, 'admin');
