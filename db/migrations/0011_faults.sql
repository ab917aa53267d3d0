-- What a job has to remember from one run to the next when it was the installation that failed it.

ALTER TABLE job_queue
  ADD COLUMN batch_size smallint CHECK (batch_size > 0),  -- images at a time, after a larger batch had no room
  ADD COLUMN avoid_worker uuid,                           -- it had no room for a single one: others first,
  ADD COLUMN avoid_until timestamptz,                     -- and that one again from here on
  ADD COLUMN outage_since timestamptz,                    -- since when the object store has kept it from its end
  ADD CONSTRAINT avoids_for_a_time CHECK ((avoid_worker IS NULL) = (avoid_until IS NULL));

-- what was asked for, in seconds from the acceptance: a retry counts them anew
ALTER TABLE jobs
  ADD COLUMN start_deadline_seconds double precision,
  ADD COLUMN deadline_seconds double precision;
