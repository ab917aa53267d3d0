-- Outside providers: what they may be given and where their files come from, what was asked of them, and what it cost.

ALTER TABLE api_providers
  ADD COLUMN output_hosts text[] NOT NULL DEFAULT '{}',    -- hosts that outputs are fetched from; *.name: all below a name
  ADD COLUMN nsfw_allowed boolean NOT NULL DEFAULT false;  -- whether nsfw jobs may go there
GRANT SELECT (output_hosts, nsfw_allowed) ON api_providers TO authenticated;
UPDATE api_providers SET output_hosts = '{replicate.delivery,*.replicate.delivery}' WHERE name = 'replicate';

-- What was asked of a provider for a job, written before it is asked: after a crash this row is what the next attempt
-- goes on from. A job may go before its prediction has ended, which then must still be cancelled.
CREATE TABLE ourvidz.provider_predictions (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  job_id uuid REFERENCES jobs ON DELETE SET NULL,
  attempt int NOT NULL,                       -- the one that asked; a later one may go on with it
  provider_id uuid NOT NULL REFERENCES api_providers ON DELETE CASCADE,
  model_id uuid REFERENCES api_models ON DELETE SET NULL,
  version text NOT NULL,
  input_hash text NOT NULL,                   -- SHA-256 of the input without its files, by which a lost one is found again
  prediction_id text,                         -- the provider's; null: asked for, and no answer heard yet
  status text NOT NULL DEFAULT 'asked'
    CHECK (status IN ('asked', 'starting', 'processing', 'succeeded', 'failed', 'canceled', 'refused', 'gone')),
  requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  ended_at timestamptz,                       -- nothing more is expected of it
  UNIQUE (provider_id, prediction_id)
);
CREATE UNIQUE INDEX provider_predictions_open ON ourvidz.provider_predictions (job_id) WHERE ended_at IS NULL;
CREATE INDEX provider_predictions_job ON ourvidz.provider_predictions (job_id);
CREATE INDEX provider_predictions_model ON ourvidz.provider_predictions (model_id);
ALTER TABLE ourvidz.provider_predictions ENABLE ROW LEVEL SECURITY;
GRANT SELECT, INSERT, UPDATE ON ourvidz.provider_predictions TO ourvidz_worker;
CREATE POLICY worker ON ourvidz.provider_predictions TO ourvidz_worker USING (true) WITH CHECK (true);

-- One row for each prediction that has ended or was refused. `request_payload` holds no prompt and no file.
CREATE TABLE api_usage_logs (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  provider_id uuid NOT NULL REFERENCES api_providers ON DELETE CASCADE,
  model_id uuid REFERENCES api_models ON DELETE SET NULL,
  user_id uuid REFERENCES profiles ON DELETE SET NULL,
  request_type text NOT NULL,
  endpoint_path text,
  request_payload jsonb,
  tokens_input int, tokens_output int, tokens_total int, tokens_cached int,
  cost_usd numeric(10, 6),
  cost_credits numeric(10, 6),
  response_status int,
  response_time_ms int NOT NULL CHECK (response_time_ms >= 0),
  response_payload jsonb,
  error_message text,
  provider_metadata jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_usage_logs_provider ON api_usage_logs (provider_id, created_at);
CREATE INDEX api_usage_logs_model ON api_usage_logs (model_id);
CREATE INDEX api_usage_logs_user ON api_usage_logs (user_id, created_at);
ALTER TABLE api_usage_logs ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_or_admin ON api_usage_logs FOR SELECT TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));
GRANT SELECT ON api_usage_logs TO authenticated;
GRANT INSERT ON api_usage_logs TO ourvidz_worker;
CREATE POLICY worker ON api_usage_logs FOR INSERT TO ourvidz_worker WITH CHECK (true);

-- Requests by hour (UTC), from the log itself.
CREATE VIEW api_usage_aggregates WITH (security_invoker = true) AS
SELECT md5(concat_ws(' ', provider_id, model_id, date_bucket, hour_bucket))::uuid AS id, provider_id, model_id, date_bucket,
       hour_bucket, count(*)::int AS request_count,
       count(*) FILTER (WHERE error_message IS NULL)::int AS success_count,
       count(*) FILTER (WHERE error_message IS NOT NULL)::int AS error_count,
       coalesce(sum(tokens_input), 0)::bigint AS tokens_input_total,
       coalesce(sum(tokens_output), 0)::bigint AS tokens_output_total,
       coalesce(sum(tokens_cached), 0)::bigint AS tokens_cached_total,
       sum(cost_usd) AS cost_usd_total, sum(cost_credits) AS cost_credits_total,  -- null: no price was known
       round(avg(response_time_ms), 2) AS avg_response_time_ms,
       round(percentile_cont(0.95) WITHIN GROUP (ORDER BY response_time_ms)::numeric, 2) AS p95_response_time_ms,
       round(percentile_cont(0.99) WITHIN GROUP (ORDER BY response_time_ms)::numeric, 2) AS p99_response_time_ms
FROM (
  SELECT *, (created_at AT TIME ZONE 'UTC')::date AS date_bucket,
         extract(hour FROM created_at AT TIME ZONE 'UTC')::int AS hour_bucket
  FROM api_usage_logs
) logged
WHERE (SELECT ourvidz.administers())
GROUP BY provider_id, model_id, date_bucket, hour_bucket;
GRANT SELECT ON api_usage_aggregates TO authenticated;
