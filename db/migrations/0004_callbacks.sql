-- The outbox: a callback is a row written in the transaction that changed the job, so that neither can be without the
-- other; and the endpoints that users registered to hear of all their jobs, beside the URL that a job may have.

CREATE TABLE callback_endpoints (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  url text NOT NULL,
  description text NOT NULL DEFAULT '',
  events text[] NOT NULL
    CHECK (cardinality(events) > 0 AND events <@ '{processing,completed,failed,cancelled}'::text[]),
  signature text NOT NULL DEFAULT 'v1' CHECK (signature IN (
    'v1',    -- HMAC-SHA256, with a secret that the owner has too
    'v1a')), -- ed25519: the owner has the public key only
  secret_version int NOT NULL DEFAULT 1 CHECK (secret_version > 0),
  secret_rotated_at timestamptz,
  failures int NOT NULL DEFAULT 0,            -- tries that failed since the last one that did not
  failing_since timestamptz,                  -- the first of them
  tested_at timestamptz,
  disabled_at timestamptz,
  disabled_reason text CHECK (disabled_reason IN (
    'manual',    -- somebody asked for it
    'gone',      -- it answered 410
    'failing')), -- nothing but failures for five days
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT disabled_has_reason CHECK ((disabled_at IS NULL) = (disabled_reason IS NULL)),
  CONSTRAINT failures_have_begun CHECK ((failures = 0) = (failing_since IS NULL))
) WITH (fillfactor = 70);
CREATE INDEX callback_endpoints_user ON callback_endpoints (user_id);
CREATE INDEX callback_endpoints_tripped ON callback_endpoints (id) WHERE failures >= 10;

CREATE TABLE callback_outbox (
  id text PRIMARY KEY,                        -- webhook-id: the same in every attempt, the receiver's key against repeats
  job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  -- null: the URL that the job itself has. No foreign key, because its check would fail the end of a job whose owner
  -- deletes the endpoint at that moment; the deliverer finds out that the endpoint is not there any more
  endpoint_id uuid,
  seq int NOT NULL,                           -- order within the job, for each receiver
  event_type text NOT NULL CHECK (event_type IN ('job.processing', 'job.completed', 'job.failed', 'job.cancelled')),
  terminal boolean NOT NULL,
  url text NOT NULL,                          -- an endpoint's may change until the callback is claimed
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
  UNIQUE NULLS NOT DISTINCT (job_id, seq, endpoint_id),
  CONSTRAINT sending_has_lease CHECK ((state = 'sending') = (lease_until IS NOT NULL)),
  CONSTRAINT delivered_has_time CHECK ((state = 'delivered') = (delivered_at IS NOT NULL))
) WITH (fillfactor = 80);
CREATE INDEX callback_outbox_due ON callback_outbox (next_at) WHERE state = 'due';
CREATE INDEX callback_outbox_sending ON callback_outbox (lease_until) WHERE state = 'sending';
CREATE INDEX callback_outbox_created ON callback_outbox (created_at);
CREATE INDEX callback_outbox_endpoint ON callback_outbox (endpoint_id, created_at) WHERE endpoint_id IS NOT NULL;
CREATE INDEX callback_outbox_endpoint_due ON callback_outbox (endpoint_id) WHERE endpoint_id IS NOT NULL AND state = 'due';

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

-- The outbox rows for the status that a job has just reached, one for each receiver that wants it: the job's own URL,
-- and its user's enabled endpoints. `assets` are references with signed URLs, made by the caller, which holds the
-- signing key that the database does not.
CREATE FUNCTION ourvidz.callback_for(job jobs, assets jsonb, facts jsonb)
RETURNS TABLE (id text, job_id uuid, user_id uuid, endpoint_id uuid, seq int, event_type text, terminal boolean,
               url text, body bytea)
LANGUAGE sql STABLE AS $$
  SELECT receiver.message_id, job.id, job.user_id, receiver.endpoint_id, job.event_seq, 'job.' || job.status,
         job.status IN ('completed', 'failed', 'cancelled'), receiver.url,
         convert_to(jsonb_build_object(
           'id', receiver.message_id,
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
  FROM (
    SELECT 'msg_' || replace(gen_random_uuid()::text, '-', '') AS message_id, wanting.endpoint_id, wanting.url
    FROM (
      SELECT NULL::uuid AS endpoint_id, job.callback_url AS url
      WHERE job.callback_url IS NOT NULL AND job.status = ANY (job.callback_events)
      UNION ALL
      SELECT e.id, e.url FROM callback_endpoints e
      WHERE e.user_id = job.user_id AND e.disabled_at IS NULL AND job.status = ANY (e.events)
    ) wanting
  ) receiver
$$;

-- Stop sending to an endpoint, with an audit row of whoever did it (the owner when nobody did). False when it is
-- disabled already. Rows that somebody else is changing are passed over, so that nobody waits for anybody here; a
-- deliverer that claims one of them finds out.
CREATE FUNCTION ourvidz.disable_endpoint(unwanted uuid, reason text, actor uuid DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE owner uuid;
BEGIN
  UPDATE callback_endpoints SET disabled_at = now(), disabled_reason = reason
  WHERE id = unwanted AND disabled_at IS NULL RETURNING user_id INTO owner;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  UPDATE callback_outbox SET state = 'dead', last_error = 'endpoint_disabled'
  WHERE id IN (SELECT id FROM callback_outbox WHERE endpoint_id = unwanted AND state = 'due' FOR UPDATE SKIP LOCKED);
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  VALUES (coalesce(actor, owner), 'callback_endpoint.disabled', 'callback_endpoint', unwanted::text,
          jsonb_build_object('reason', reason));
  RETURN true;
END $$;

-- Count a failed try against its endpoint, and disable that one when it says that it is gone, or when nothing has
-- succeeded since a failure of five days ago.
CREATE FUNCTION ourvidz.endpoint_failed(failed uuid, gone boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE since timestamptz;
BEGIN
  UPDATE callback_endpoints SET failures = failures + 1, failing_since = coalesce(failing_since, now())
  WHERE id = failed AND disabled_at IS NULL RETURNING failing_since INTO since;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  IF gone THEN
    PERFORM ourvidz.disable_endpoint(failed, 'gone');
  ELSIF since <= now() - interval '5 days' THEN
    PERFORM ourvidz.disable_endpoint(failed, 'failing');
  END IF;
END $$;
