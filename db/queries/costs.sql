-- name: publish_costs(queue, model_name, profile)!
-- The profile of a queue's model, in the place of the one before.
INSERT INTO cost_profiles (queue, model_name, profile) VALUES (:queue, :model_name, :profile)
ON CONFLICT (queue) DO UPDATE
SET model_name = excluded.model_name, profile = excluded.profile, measured_at = now();

-- name: read_costs()
-- The profiles of all queues.
SELECT queue, model_name, profile FROM cost_profiles;
