-- name: lock()$
-- True when no other archive command is at work; holds until the unlock, or the connection's end.
SELECT pg_try_advisory_lock(x'6F757276697A6172'::bigint);

-- name: unlock()$
-- Let another archive command begin.
SELECT pg_advisory_unlock(x'6F757276697A6172'::bigint);

-- name: cutoff(seconds)$
SELECT now() - make_interval(secs => :seconds::float8);

-- name: survey(cutoff)^
-- What an archive of the jobs that ended before would hold, and the bytes of their files.
SELECT count(*) AS jobs, min(s.created_at) AS first_created_at, max(s.created_at) AS last_created_at,
       coalesce(sum(a.assets), 0)::bigint AS assets, coalesce(sum(a.bytes), 0)::bigint AS asset_bytes
FROM ourvidz.settled_jobs s
CROSS JOIN LATERAL (SELECT count(*) AS assets, sum(file_size_bytes) AS bytes FROM workspace_assets WHERE job_id = s.id) a
WHERE s.created_at < :cutoff AND s.completed_at < :cutoff;

-- name: unfinished()^
-- The archive that was begun and not ended.
SELECT name, cutoff, keeps_files, job_ids, verified_at IS NOT NULL AS verified FROM archives WHERE finished_at IS NULL;

-- name: archivable(cutoff, batch)
-- The oldest jobs that may go into an archive.
SELECT id, created_at FROM ourvidz.settled_jobs
WHERE created_at < :cutoff AND completed_at < :cutoff ORDER BY created_at, id LIMIT :batch::int;

-- name: plan(name, cutoff, keeps_files, job_ids)!
-- Begin an archive. One of that name was of the same jobs, none of which can have been deleted.
INSERT INTO archives (name, cutoff, keeps_files, job_ids) VALUES (:name, :cutoff, :keeps_files, :job_ids::uuid[])
ON CONFLICT (name) DO UPDATE SET cutoff = excluded.cutoff, keeps_files = excluded.keeps_files,
  job_ids = excluded.job_ids, planned_at = now(), verified_at = NULL, finished_at = NULL, jobs = NULL;

-- name: abandon(name)!
DELETE FROM archives WHERE name = :name AND verified_at IS NULL;

-- name: verified(name, jobs)!
UPDATE archives SET verified_at = coalesce(verified_at, now()), jobs = :jobs::int WHERE name = :name;

-- name: finish(name)!
UPDATE archives SET finished_at = now(), job_ids = NULL WHERE name = :name;

-- name: begin_snapshot()^
-- Fix how values are written, whatever the server's defaults are. The first statement: it takes the snapshot.
SELECT now() AS taken_at, (SELECT max(number) FROM schema_migrations) AS schema_version,
       set_config('datestyle', 'ISO, YMD', true), set_config('intervalstyle', 'iso_8601', true),
       set_config('bytea_output', 'hex', true), set_config('extra_float_digits', '1', true);

-- name: still_archivable(job_ids, cutoff)
SELECT s.id FROM unnest(:job_ids::uuid[]) AS planned(id) JOIN ourvidz.settled_jobs s USING (id)
WHERE s.completed_at < :cutoff;

-- name: copy_jobs(job_ids)
SELECT j.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN jobs j USING (id) ORDER BY j.id;

-- name: copy_events(job_ids)
SELECT e.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN job_events e ON e.job_id = chosen.id ORDER BY e.job_id, e.id;

-- name: copy_assets(job_ids)
SELECT a.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN workspace_assets a ON a.job_id = chosen.id
ORDER BY a.job_id, a.asset_index;

-- name: copy_callbacks(job_ids)
SELECT o.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN callback_outbox o ON o.job_id = chosen.id
ORDER BY o.job_id, o.seq, o.id;

-- name: copy_deliveries(job_ids)
SELECT o.job_id, t.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN callback_outbox o ON o.job_id = chosen.id
JOIN callback_attempts t ON t.callback_id = o.id ORDER BY o.job_id, t.id;

-- name: copy_usage(job_ids)
SELECT u.* FROM unnest(:job_ids::uuid[]) AS chosen(id) JOIN usage_logs u ON u.job_id = chosen.id ORDER BY u.job_id, u.id;

-- name: lock_callbacks(job_ids)
-- Nobody may replay them until the end of this transaction.
SELECT id FROM callback_outbox WHERE job_id = ANY (:job_ids::uuid[]) ORDER BY id FOR UPDATE;

-- name: delete_archived(job_ids, stamps, taken_at)
-- Delete jobs with all that hangs on them, but those that changed since they were written.
DELETE FROM jobs j USING unnest(:job_ids::uuid[], :stamps::timestamptz[]) AS archived(id, updated_at)
WHERE j.id = archived.id AND j.updated_at = archived.updated_at
  AND EXISTS (SELECT FROM ourvidz.settled_jobs s WHERE s.id = j.id)
  AND NOT EXISTS (SELECT FROM callback_outbox o JOIN callback_attempts t ON t.callback_id = o.id
                  WHERE o.job_id = j.id AND t.at >= :taken_at)
RETURNING j.id;

-- name: existing(job_ids)
SELECT id FROM jobs WHERE id = ANY (:job_ids::uuid[]);
