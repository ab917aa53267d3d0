-- What the forwards of a queue's model cost, as its newest replica has measured them: whoever predicts a job's time reads
-- it here, also while no replica runs.
CREATE TABLE cost_profiles (
  queue text PRIMARY KEY,
  model_name text NOT NULL,
  profile jsonb NOT NULL,
  measured_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE cost_profiles ENABLE ROW LEVEL SECURITY;
GRANT SELECT, INSERT, UPDATE ON cost_profiles TO ourvidz_worker;
CREATE POLICY worker ON cost_profiles TO ourvidz_worker USING (true) WITH CHECK (true);

-- What a replica looks at when it takes jobs that share the forwards of those it runs: the sizes ("1024x1024x1"), and the
-- LoRAs by name. Null where the stage has none.
ALTER TABLE job_queue ADD COLUMN shape text, ADD COLUMN loras text[];
