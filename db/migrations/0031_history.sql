-- A job's history goes as a whole, some time after its end. So only the events that begin one are looked for by their
-- time; those of a claim and of an end, which are written at the highest rates, go into one index less.
DROP INDEX job_events_at;
CREATE INDEX job_events_begun ON job_events (at) WHERE kind IN ('queued', 'retried');
-- Histories whose beginning was deleted before, when each event went by its own age, get one again, to be found by. The
-- number before the first that is left is free: numbers are told apart within a job.
INSERT INTO job_events (id, job_id, user_id, attempt, kind, at)
OVERRIDING SYSTEM VALUE
SELECT min(e.id) - 1, e.job_id, e.user_id, 0, 'queued', j.created_at
FROM job_events e JOIN jobs j ON j.id = e.job_id
GROUP BY e.job_id, e.user_id, j.created_at
HAVING NOT bool_or(e.kind IN ('queued', 'retried'));

-- A job's place in the queue goes with it by the same trigger as its history, for the same reason: the rows are written by
-- the statements that have just written their job. The key was checked at every acceptance.
ALTER TABLE job_queue DROP CONSTRAINT job_queue_job_id_fkey;
CREATE OR REPLACE FUNCTION ourvidz.forget_history() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM job_queue q USING gone WHERE q.job_id = gone.id;
  DELETE FROM job_events e USING gone WHERE e.job_id = gone.id;
  DELETE FROM callback_outbox o USING gone WHERE o.job_id = gone.id;
  UPDATE usage_logs u SET job_id = NULL FROM gone WHERE u.job_id = gone.id;  -- what was charged stays charged
  RETURN NULL;
END $$;
CREATE FUNCTION ourvidz.empty_queue() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM job_queue;
  RETURN NULL;
END $$;
CREATE TRIGGER jobs_emptied AFTER TRUNCATE ON jobs FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.empty_queue();
