-- The rows of one step of a job, as of its acceptance: a replica takes jobs that share the forwards of what it runs before
-- their turn only if its free memory holds them. Null, as of what waits already: nothing speaks against it.
ALTER TABLE job_queue ADD COLUMN rows smallint;
