-- Jobs that came from another system's queue under an id of their own. A row is written before its job and marked after
-- it, so that an import that died can be run again; and it outlives the job, so that an erased one does not come back.

CREATE TABLE imported_jobs (
  job_id uuid PRIMARY KEY,                    -- no foreign key: see above
  body_hash bytea NOT NULL CHECK (length(body_hash) = 32),  -- SHA-256 of the message
  begun_at timestamptz NOT NULL DEFAULT now(),
  taken_at timestamptz                        -- null: the job may be there or not
);
ALTER TABLE imported_jobs ENABLE ROW LEVEL SECURITY;  -- the owner's alone
