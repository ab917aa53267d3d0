-- name: offered(provider, family, modality, task)^
-- The model that a provider offers for a task, when both are turned on: the default of the task first, then by priority.
SELECT to_jsonb(m) AS model, to_jsonb(p) AS provider
FROM api_models m JOIN api_providers p ON p.id = m.provider_id
WHERE p.name = :provider AND p.is_active AND m.is_active AND m.modality = :modality AND m.model_family = :family
  AND m.version ~ '^[0-9a-f]{32,64}$'
  AND :task = ANY (m.tasks)
ORDER BY :task = ANY (m.default_for_tasks) DESC, m.is_default DESC, m.priority DESC, m.model_key LIMIT 1;

-- name: model(model_id)^
-- A model with its provider, turned on or not.
SELECT to_jsonb(m) AS model, to_jsonb(p) AS provider
FROM api_models m JOIN api_providers p ON p.id = m.provider_id WHERE m.id = :model_id;

-- name: model_of(job_id)^
-- The model that a job was accepted for.
SELECT to_jsonb(m) AS model, to_jsonb(p) AS provider
FROM jobs j JOIN api_models m ON m.id = j.api_model_id JOIN api_providers p ON p.id = m.provider_id WHERE j.id = :job_id;

-- name: open_prediction(job_id)^
-- What was asked for a job and has not ended.
SELECT id, job_id, attempt, provider_id, model_id, version, input_hash, prediction_id, status, requested_at
FROM ourvidz.provider_predictions WHERE job_id = :job_id AND ended_at IS NULL;

-- name: ask(job_id, attempt, worker, provider_id, model_id, version, input_hash)^
-- Say what is about to be asked. The fence is the claim's: no row where the job is somebody else's by now.
INSERT INTO ourvidz.provider_predictions (job_id, attempt, provider_id, model_id, version, input_hash)
SELECT q.job_id, q.attempt, :provider_id, :model_id, :version, :input_hash FROM job_queue q
WHERE q.job_id = :job_id AND q.attempt = :attempt AND q.worker = :worker AND q.state = 'running'
RETURNING id, job_id, attempt, provider_id, model_id, version, input_hash, prediction_id, status, requested_at;

-- name: name_prediction(id, prediction_id, status)$
-- The provider's name for what was asked. The first name stands, and is the answer; none where another row has it.
UPDATE ourvidz.provider_predictions p SET prediction_id = coalesce(p.prediction_id, :prediction_id),
  status = CASE WHEN p.prediction_id IS NULL THEN :status ELSE p.status END
WHERE p.id = :id AND NOT EXISTS (
  SELECT FROM ourvidz.provider_predictions o
  WHERE o.provider_id = p.provider_id AND o.prediction_id = :prediction_id AND o.id <> p.id)
RETURNING p.prediction_id;

-- name: note_status(id, status)!
UPDATE ourvidz.provider_predictions SET status = :status WHERE id = :id AND ended_at IS NULL AND status <> :status;

-- name: end_prediction(id, status, request_payload, response_status, response_time_ms, cost_usd, error_message, provider_metadata)^
-- Nothing more is expected of it; told in the log of usage, once.
WITH ended AS (
  UPDATE ourvidz.provider_predictions SET status = :status, ended_at = clock_timestamp()
  WHERE id = :id AND ended_at IS NULL RETURNING *
), logged AS (
  INSERT INTO api_usage_logs (provider_id, model_id, user_id, request_type, endpoint_path, request_payload, cost_usd,
                              response_status, response_time_ms, error_message, provider_metadata)
  SELECT e.provider_id, e.model_id, j.user_id, 'prediction', '/predictions', :request_payload::jsonb, :cost_usd::numeric,
         :response_status::int,
         coalesce(:response_time_ms::int, greatest(0, extract(epoch FROM e.ended_at - e.requested_at) * 1000)::int),
         :error_message, :provider_metadata::jsonb || jsonb_strip_nulls(jsonb_build_object(
           'prediction_id', e.prediction_id, 'status', e.status, 'job_id', e.job_id, 'attempt', e.attempt))
  FROM ended e LEFT JOIN jobs j ON j.id = e.job_id
)
SELECT id FROM ended;

-- name: names_known(provider_id, prediction_ids)
-- Of these names, those that a row has already.
SELECT prediction_id FROM ourvidz.provider_predictions
WHERE provider_id = :provider_id AND prediction_id = ANY (:prediction_ids::text[]);

-- name: strays(page_size)
-- What was asked and has not ended although its job has, or is no more: to be cancelled.
SELECT p.id, p.job_id, p.attempt, p.provider_id, p.model_id, p.version, p.input_hash, p.prediction_id, p.status,
       p.requested_at, to_jsonb(v) AS provider
FROM ourvidz.provider_predictions p JOIN api_providers v ON v.id = p.provider_id
WHERE p.ended_at IS NULL AND NOT EXISTS (SELECT FROM job_queue q WHERE q.job_id = p.job_id)
ORDER BY p.requested_at LIMIT :page_size::int;

-- name: job_of(provider, prediction_id)$
-- The job that a prediction is made for.
SELECT p.job_id FROM ourvidz.provider_predictions p JOIN api_providers v ON v.id = p.provider_id
WHERE v.name = :provider AND p.prediction_id = :prediction_id;

-- name: latest_prediction(job_id)$
-- The provider's name for what was last asked for a job.
SELECT prediction_id FROM ourvidz.provider_predictions
WHERE job_id = :job_id AND prediction_id IS NOT NULL ORDER BY requested_at DESC LIMIT 1;
