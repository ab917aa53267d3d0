-- The job and its queue. `jobs` holds the facts for ever; `job_queue` is narrow and hot, with one row per open job.

CREATE TABLE jobs (
  id uuid PRIMARY KEY,                        -- UUIDv7 made at the edge, so that accepting can be repeated safely
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  job_type text NOT NULL CHECK (job_type IN (
    'sdxl_image_fast', 'sdxl_image_high', 'image_fast', 'image_high', 'video_fast', 'video_high',
    'image7b_fast_enhanced', 'image7b_high_enhanced', 'video7b_fast_enhanced', 'video7b_high_enhanced',
    'wan_video_fast', 'wan_video_high', 'rv51_fast', 'rv51_high')),
  format text NOT NULL CHECK (format IN ('image', 'video')),
  quality text NOT NULL CHECK (quality IN ('fast', 'high')),
  model_type text NOT NULL CHECK (model_type IN ('sdxl', 'wan', 'rv51', 'flux', 'replicate-sdxl', 'replicate-sdxl-i2i')),
  status text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')),
  stage text NOT NULL CHECK (stage IN ('enhance', 'generate')),
  provider text NOT NULL DEFAULT 'local',     -- 'local': our replicas hold it; anything else: an outside provider does
  content_mode text NOT NULL DEFAULT 'sfw' CHECK (content_mode IN ('sfw', 'nsfw')),
  original_prompt text NOT NULL,
  enhanced_prompt text,
  params jsonb NOT NULL,                      -- the canonical parameters, as resolved at acceptance
  metadata jsonb NOT NULL DEFAULT '{}',       -- the caller's own, carried and never read
  generation_settings jsonb,                  -- what was really used
  adjustments jsonb NOT NULL DEFAULT '[]',    -- what acceptance changed (83 frames became 81), for the caller to see

  attempts int NOT NULL DEFAULT 0,            -- claims so far; the last one is the fencing token
  max_attempts int NOT NULL DEFAULT 3 CHECK (max_attempts BETWEEN 1 AND 20),
  class smallint NOT NULL DEFAULT 1,          -- as in job_queue, for when it comes back there by a retry
  failures int NOT NULL DEFAULT 0,
  error_code text,
  error_message text,
  retryable boolean,
  event_seq int NOT NULL DEFAULT 0,           -- grows with every change of status; late news can't move a client back

  callback_url text,
  callback_events text[] NOT NULL DEFAULT '{processing,completed,failed,cancelled}'
    CHECK (callback_events <@ '{processing,completed,failed,cancelled}'::text[]),

  created_at timestamptz NOT NULL DEFAULT now(),
  started_at timestamptz,
  completed_at timestamptz,
  updated_at timestamptz NOT NULL DEFAULT now(),
  queue_wait_ms bigint CHECK (queue_wait_ms >= 0),
  generation_time_ms bigint CHECK (generation_time_ms >= 0),
  worker uuid,                                -- the replica that finished it

  -- enhancement
  enhancement_strategy varchar(50),
  enhancement jsonb,                          -- the whole account: tokens, fallback and its reason, model
  enhancement_time_ms int,
  template_name text,
  qwen_expansion_percentage numeric(9, 2),
  compel_weights jsonb,
  -- columns of the specification that later features fill
  video_id uuid, image_id uuid, project_id uuid, prompt_test_id uuid, workspace_session_id uuid, api_model_id uuid,
  test_metadata jsonb,
  moderation_status text NOT NULL DEFAULT 'pending' CHECK (moderation_status IN ('pending', 'approved', 'rejected', 'flagged')),
  reviewed_at timestamptz, reviewed_by uuid REFERENCES profiles ON DELETE SET NULL, review_notes text,
  quality_rating numeric(4, 2) CHECK (quality_rating BETWEEN 0 AND 10),
  quality_improvement numeric(9, 2),
  destination text NOT NULL DEFAULT 'library' CHECK (destination IN ('library', 'workspace')),
  traceparent text,

  CONSTRAINT terminal_has_finish_time CHECK ((status IN ('completed', 'failed', 'cancelled')) = (completed_at IS NOT NULL)),
  CONSTRAINT failed_has_code CHECK ((status = 'failed') = (error_code IS NOT NULL)),
  CONSTRAINT processing_has_start CHECK (status <> 'processing' OR (started_at IS NOT NULL AND attempts > 0))
);
CREATE TRIGGER jobs_touch BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION ourvidz.touch();
CREATE INDEX jobs_user ON jobs (user_id, id DESC);
CREATE INDEX jobs_created ON jobs (created_at);
-- not `WHERE status = 'completed'`: an index that speaks of the status would forbid heap-only updates at every move
CREATE INDEX jobs_run_times ON jobs (job_type, completed_at DESC) WHERE generation_time_ms IS NOT NULL;

CREATE TYPE queue_state AS ENUM (
  'ready',      -- may be claimed
  'scheduled',  -- becomes ready at run_at: a delayed start, or the backoff after a failure
  'blocked',    -- its user is at a cap; becomes ready when one of the user's jobs ends
  'running');   -- held by `worker` until `lease_until`, under `attempt`

CREATE TABLE job_queue (
  job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
  user_id uuid NOT NULL,
  queue text NOT NULL,                        -- the model family that does the next stage
  class smallint NOT NULL DEFAULT 1 CHECK (class IN (0, 1)),  -- 1 interactive, 0 batch; higher first
  tag double precision NOT NULL,              -- start tag of fair queueing; lower first
  cost real NOT NULL CHECK (cost > 0),        -- predicted seconds of this stage
  state queue_state NOT NULL DEFAULT 'ready',
  run_at timestamptz NOT NULL DEFAULT now(),
  claimed_at timestamptz,                     -- of the last claim: what a run has cost counts from here
  attempt int NOT NULL DEFAULT 0,             -- the fencing token: grows at every claim, never shrinks
  failures int NOT NULL DEFAULT 0,            -- failed runs and lost leases, against max_attempts
  max_attempts int NOT NULL DEFAULT 3,
  worker uuid,
  lease_until timestamptz,
  cancel text CHECK (cancel IN ('user', 'deadline')),
  start_deadline timestamptz,
  deadline timestamptz,
  phase text,
  step int,
  steps int,
  enqueued_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT running_has_owner CHECK ((state = 'running') = (worker IS NOT NULL AND lease_until IS NOT NULL)),
  CONSTRAINT running_has_attempt CHECK (state <> 'running' OR attempt > 0)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0);
CREATE INDEX job_queue_ready ON job_queue (queue, class DESC, tag, job_id) WHERE state = 'ready';
CREATE INDEX job_queue_running ON job_queue (queue, user_id) WHERE state = 'running';
CREATE INDEX job_queue_blocked ON job_queue (queue, user_id, class DESC, tag) WHERE state = 'blocked';
CREATE INDEX job_queue_scheduled ON job_queue (run_at) WHERE state = 'scheduled';
CREATE INDEX job_queue_start_deadline ON job_queue (start_deadline) WHERE start_deadline IS NOT NULL;
CREATE INDEX job_queue_deadline ON job_queue (deadline) WHERE deadline IS NOT NULL;
CREATE INDEX job_queue_cancel ON job_queue (job_id) WHERE cancel IS NOT NULL;
-- none on lease_until: renewals stay heap-only updates, and the running set is small

CREATE TABLE queues (
  name text PRIMARY KEY,
  paused boolean NOT NULL DEFAULT false,
  -- virtual time of each class: the highest start tag that was claimed. One for both would let the class that goes
  -- first carry the clock past the tags of the other, whose newcomers would then stand behind the whole backlog
  clock double precision NOT NULL DEFAULT 0,
  batch_clock double precision NOT NULL DEFAULT 0,
  updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE TABLE fair_shares (
  queue text NOT NULL REFERENCES queues ON DELETE CASCADE,
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  class smallint NOT NULL,
  weight real NOT NULL DEFAULT 1 CHECK (weight > 0),
  last_finish double precision NOT NULL DEFAULT 0,
  PRIMARY KEY (queue, user_id, class)
) WITH (fillfactor = 50);

-- Start-time fair queueing (Goyal, Vin, Cheng 1996): a job starts at max(clock, the user's last finish) and moves
-- that finish on by cost / weight. A job is charged so while it is ready or runs; one that waits for its time is not,
-- and gets its tag when the time has come. Creates the queue and the share when they are new.
-- Whoever takes several tags in one transaction takes them ordered by queue, user and class, or risks a deadlock.
CREATE FUNCTION ourvidz.next_tag(queue_name text, owner uuid, job_class smallint, predicted_cost real)
RETURNS double precision
LANGUAGE plpgsql AS $$
DECLARE
  now_v double precision;
  start_tag double precision;
BEGIN
  SELECT CASE job_class WHEN 0 THEN batch_clock ELSE clock END INTO now_v FROM queues WHERE name = queue_name;
  IF NOT FOUND THEN
    INSERT INTO queues (name) VALUES (queue_name) ON CONFLICT DO NOTHING;
    now_v := 0;
  END IF;
  INSERT INTO fair_shares AS f (queue, user_id, class, last_finish)
  VALUES (queue_name, owner, job_class, now_v + predicted_cost)
  ON CONFLICT (queue, user_id, class)
    DO UPDATE SET last_finish = greatest(f.last_finish, now_v) + predicted_cost / f.weight
  RETURNING last_finish - predicted_cost / weight INTO start_tag;
  RETURN start_tag;
END $$;

-- Correct what a user was charged: by what a run really took, or back by what will not run.
CREATE FUNCTION ourvidz.charge(queue_name text, owner uuid, job_class smallint, seconds double precision) RETURNS void
LANGUAGE sql AS $$
  UPDATE fair_shares SET last_finish = last_finish + seconds / weight
  WHERE queue = queue_name AND user_id = owner AND class = job_class
$$;

CREATE TABLE idempotency_keys (
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  key text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
  body_hash bytea NOT NULL,
  job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
  expires_at timestamptz NOT NULL,
  PRIMARY KEY (user_id, key)
);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

CREATE TABLE job_events (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
  user_id uuid NOT NULL,
  attempt int NOT NULL,
  kind text NOT NULL CHECK (kind IN ('queued', 'started', 'enhanced', 'requeued', 'cancelling',
                                     'completed', 'failed', 'cancelled', 'retried')),
  at timestamptz NOT NULL DEFAULT now(),
  data jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX job_events_job ON job_events (job_id, id);
CREATE INDEX job_events_at ON job_events (at);

CREATE TABLE usage_logs (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id uuid NOT NULL REFERENCES profiles ON DELETE CASCADE,
  action text NOT NULL,
  credits_consumed numeric(10, 2) NOT NULL DEFAULT 1.0,
  metadata jsonb NOT NULL DEFAULT '{}',
  format text,
  quality text,
  job_id uuid REFERENCES jobs ON DELETE SET NULL,
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX usage_logs_user ON usage_logs (user_id, created_at DESC);
CREATE INDEX usage_logs_job ON usage_logs (job_id);

CREATE TABLE workers (
  id uuid PRIMARY KEY,
  queue text NOT NULL,
  model_name text,
  device text,
  node text NOT NULL,
  pid int NOT NULL,
  state text NOT NULL CHECK (state IN ('loading', 'ready', 'draining', 'stopped', 'failed')),
  slots int NOT NULL DEFAULT 1 CHECK (slots > 0),
  running int NOT NULL DEFAULT 0 CHECK (running >= 0),
  load_ms bigint,
  error text,
  started_at timestamptz NOT NULL DEFAULT now(),
  seen_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX workers_queue ON workers (queue, seen_at);
