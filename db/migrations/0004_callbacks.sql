-- The outbox: a callback is a row written in the transaction that changed the job, so that neither can be without the other.

CREATE TABLE callback_outbox (
  id text PRIMARY KEY,                        -- webhook-id: the same in every attempt, the receiver's key against repeats
  job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  seq int NOT NULL,                           -- order within the job
  event_type text NOT NULL CHECK (event_type IN ('job.processing', 'job.completed', 'job.failed', 'job.cancelled')),
  terminal boolean NOT NULL,
  url text NOT NULL,
  body bytea NOT NULL,                        -- frozen: every attempt sends these bytes
  state text NOT NULL DEFAULT 'due' CHECK (state IN (
    'due',          -- waits for next_at
    'sending',      -- held by a deliverer until lease_until, under lease_no
    'delivered',
    'dead',         -- given up, by rule; can be replayed
    'superseded')), -- a terminal event made an undelivered progress event pointless
  attempts int NOT NULL DEFAULT 0,
  next_at timestamptz NOT NULL DEFAULT now(),
  lease_until timestamptz,
  lease_no int NOT NULL DEFAULT 0,            -- fencing token of the delivery
  last_status int,
  last_error text,
  created_at timestamptz NOT NULL DEFAULT now(),
  delivered_at timestamptz,
  UNIQUE (job_id, seq),
  CONSTRAINT sending_has_lease CHECK ((state = 'sending') = (lease_until IS NOT NULL)),
  CONSTRAINT delivered_has_time CHECK ((state = 'delivered') = (delivered_at IS NOT NULL))
) WITH (fillfactor = 80);
CREATE INDEX callback_outbox_due ON callback_outbox (next_at) WHERE state = 'due';
CREATE INDEX callback_outbox_sending ON callback_outbox (lease_until) WHERE state = 'sending';
CREATE INDEX callback_outbox_created ON callback_outbox (created_at);

CREATE TABLE callback_attempts (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  callback_id text NOT NULL REFERENCES callback_outbox ON DELETE CASCADE,
  attempt int NOT NULL,
  at timestamptz NOT NULL DEFAULT now(),
  status int,
  error text,
  elapsed_ms int,
  response_excerpt text
);
CREATE INDEX callback_attempts_callback ON callback_attempts (callback_id, id);
CREATE INDEX callback_attempts_at ON callback_attempts (at);

-- The outbox row for the status that a job has just reached; no row when nobody asked for it. `assets` are
-- references with signed URLs, made by the caller, which holds the signing key that the database does not.
CREATE FUNCTION ourvidz.callback_for(job jobs, assets jsonb, facts jsonb)
RETURNS TABLE (id text, job_id uuid, user_id uuid, seq int, event_type text, terminal boolean, url text, body bytea)
LANGUAGE sql STABLE AS $$
  SELECT event.id, job.id, job.user_id, job.event_seq, 'job.' || job.status,
         job.status IN ('completed', 'failed', 'cancelled'), job.callback_url,
         convert_to(jsonb_build_object(
           'id', event.id,
           'type', 'job.' || job.status,
           'timestamp', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
           'job_id', job.id,
           'status', job.status,
           'assets', coalesce(assets, '[]'::jsonb),
           'error_message', job.error_message,
           'error_code', job.error_code,
           'metadata', coalesce(facts, '{}'::jsonb) || jsonb_build_object(
             'job_type', job.job_type, 'attempt', job.attempts, 'client', job.metadata)
         )::text, 'UTF8')
  FROM (SELECT 'msg_' || replace(gen_random_uuid()::text, '-', '') AS id) event
  WHERE job.callback_url IS NOT NULL AND job.status = ANY (job.callback_events)
$$;
