-- Retention: what an archive or an erasure has begun and must end, and the indexes that deleting needs.

-- a deleted job or user looks its rows up in these tables; without an index it reads all of them each time.
-- `callback_outbox` has none by user: its rows go with their jobs, and what is open of it is little
CREATE INDEX idempotency_keys_job ON idempotency_keys (job_id);
CREATE INDEX jobs_reviewed_by ON jobs (reviewed_by) WHERE reviewed_by IS NOT NULL;
CREATE INDEX user_activity_log_user ON user_activity_log (user_id) WHERE user_id IS NOT NULL;

-- Jobs that nothing will move again unless somebody asks: ended, in no queue, with nobody left to call.
CREATE VIEW ourvidz.settled_jobs AS
  SELECT id, user_id, created_at, completed_at, updated_at FROM jobs j
  WHERE completed_at IS NOT NULL
    AND NOT EXISTS (SELECT FROM job_queue q WHERE q.job_id = j.id)
    AND NOT EXISTS (SELECT FROM callback_outbox o WHERE o.job_id = j.id AND o.state IN ('due', 'sending'));

-- One row for each archive in the object store. It comes before the first file, so that a command that died is taken up
-- where it stopped: under the same name, with the same jobs.
CREATE TABLE archives (
  name text PRIMARY KEY,                      -- the folder in bucket archive; follows from the ids of its jobs
  cutoff timestamptz NOT NULL,                -- its jobs ended before
  keeps_files boolean NOT NULL,
  job_ids uuid[],                             -- null once it is finished
  planned_at timestamptz NOT NULL DEFAULT now(),
  verified_at timestamptz,                    -- every file was read back; only from here on is anything deleted
  finished_at timestamptz,
  jobs int,                                   -- how many jobs it holds
  CONSTRAINT open_has_jobs CHECK ((finished_at IS NULL) = (job_ids IS NOT NULL)),
  CONSTRAINT finished_was_verified CHECK (finished_at IS NULL OR verified_at IS NOT NULL AND jobs IS NOT NULL)
);
CREATE UNIQUE INDEX archives_open ON archives ((true)) WHERE finished_at IS NULL;  -- one at a time

-- Users who are being erased: written in the transaction that ends their access, deleted when the last file is gone.
CREATE TABLE erasures (
  user_id uuid PRIMARY KEY,                   -- no foreign key: it outlives the profile
  requested_at timestamptz NOT NULL DEFAULT now(),
  rows_gone_at timestamptz
);

-- Delete up to `most` rows of a user whose erasure was requested, and the profile when nothing else is left. How many
-- were deleted; 0 when it is done. Runs as the owner, because upkeep, which takes up what others left, may not delete
-- jobs; without a row in `erasures`, which it can't write, it deletes nothing.
CREATE FUNCTION ourvidz.erase_some(erased uuid, most int) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
DECLARE gone int;
BEGIN
  PERFORM FROM erasures WHERE user_id = erased AND rows_gone_at IS NULL FOR UPDATE;
  IF NOT FOUND THEN
    RETURN 0;
  END IF;
  DELETE FROM jobs WHERE id = ANY (ARRAY(SELECT id FROM jobs WHERE user_id = erased LIMIT most));
  GET DIAGNOSTICS gone = ROW_COUNT;
  IF gone = 0 THEN
    DELETE FROM usage_logs WHERE id = ANY (ARRAY(SELECT id FROM usage_logs WHERE user_id = erased LIMIT most));
    GET DIAGNOSTICS gone = ROW_COUNT;
  END IF;
  IF gone = 0 THEN
    DELETE FROM user_library WHERE id = ANY (ARRAY(SELECT id FROM user_library WHERE user_id = erased LIMIT most));
    GET DIAGNOSTICS gone = ROW_COUNT;
  END IF;
  IF gone = 0 THEN
    DELETE FROM profiles WHERE id = erased;  -- and whatever came in meanwhile
    UPDATE erasures SET rows_gone_at = now() WHERE user_id = erased;
  END IF;
  RETURN gone;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.erase_some(uuid, int) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.erase_some(uuid, int) TO ourvidz_worker;

ALTER TABLE archives ENABLE ROW LEVEL SECURITY;
ALTER TABLE erasures ENABLE ROW LEVEL SECURITY;
GRANT SELECT, DELETE ON erasures TO ourvidz_worker;
CREATE POLICY worker ON erasures TO ourvidz_worker USING (true) WITH CHECK (true);
