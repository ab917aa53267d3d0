-- The latest preview of a running job: which step it shows, and of how many. Its file lies under the attempt, and its
-- size follows from the job's, so the step is all that its name takes. Written with the renewal of the lease.
ALTER TABLE job_queue ADD COLUMN preview_step int, ADD COLUMN preview_steps int,
  ADD CONSTRAINT preview_is_whole CHECK ((preview_step IS NULL) = (preview_steps IS NULL)),
  ADD CONSTRAINT preview_is_of_a_run CHECK (preview_step IS NULL OR state = 'running');
GRANT SELECT (preview_step, preview_steps) ON job_queue TO authenticated;
