-- name: read()$
-- What was registered, under the names that older clients look for in the configuration.
SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM system_config, jsonb_each(config)
WHERE key IN ('workerUrl', 'worker_url', 'workerRegistrationInfo', 'chatWorkerUrl', 'chatWorkerRegistrationInfo');

-- name: write(entries)$
-- Put entries into the configuration, leaving the others; the time it was done.
UPDATE system_config SET config = config || :entries::jsonb WHERE id = 1 RETURNING updated_at;
