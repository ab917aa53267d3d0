-- name: find_import(job_id)^
-- What an earlier import noted of that job.
SELECT body_hash, taken_at IS NOT NULL AS taken FROM imported_jobs WHERE job_id = :job_id;

-- name: begin_import(job_id, body_hash)$
-- Note that a job is about to be taken in. False when another message has that id.
INSERT INTO imported_jobs AS i (job_id, body_hash) VALUES (:job_id, :body_hash)
ON CONFLICT (job_id) DO UPDATE SET begun_at = i.begun_at
RETURNING i.body_hash = :body_hash;

-- name: end_import(job_id, body_hash)!
-- The job is there. The note may have been dropped by another import of the same message, which was refused.
INSERT INTO imported_jobs AS i (job_id, body_hash, taken_at) VALUES (:job_id, :body_hash, now())
ON CONFLICT (job_id) DO UPDATE SET taken_at = coalesce(i.taken_at, excluded.taken_at);

-- name: drop_import(job_id)!
-- The job was refused after all.
DELETE FROM imported_jobs WHERE job_id = :job_id AND taken_at IS NULL;
