-- name: hold_migrations(lock)!
-- Let no migration begin while this session lives; waits for one that runs.
SELECT pg_advisory_lock_shared(:lock::bigint);

-- name: export_snapshot()$
-- A name under which other sessions see what this transaction sees, while it is open.
SELECT pg_export_snapshot();

-- name: applied_migrations()
SELECT number, name, checksum FROM schema_migrations ORDER BY number;

-- name: files()
-- Every file that a row speaks of. `size` is in bytes where the row says it. A file may come more than once.
SELECT 'workspace-temp' AS bucket, temp_storage_path AS key, file_size_bytes AS size FROM workspace_assets
UNION ALL
SELECT 'workspace-temp', thumbnail_path, NULL FROM workspace_assets WHERE thumbnail_path IS NOT NULL
UNION ALL
SELECT 'user-library', storage_path, file_size_bytes FROM user_library
UNION ALL
SELECT 'user-library', thumbnail_path, NULL FROM user_library WHERE thumbnail_path IS NOT NULL
UNION ALL
SELECT file.image ->> 'bucket', file.image ->> 'key', NULL
FROM jobs
CROSS JOIN LATERAL jsonb_array_elements(
  coalesce(params -> 'references', '[]') || jsonb_build_array(params -> 'reference')) AS reference(image)
CROSS JOIN LATERAL unnest(ARRAY[reference.image, reference.image -> 'mask']) AS file(image)
WHERE file.image ->> 'key' IS NOT NULL;

-- name: has_uploads()$
-- A database of an older version has none.
SELECT to_regclass('public.reference_uploads') IS NOT NULL;

-- name: uploads()
-- The files of uploads, as `files` tells the others.
SELECT 'reference_images' AS bucket, storage_path AS key, file_size_bytes AS size FROM reference_uploads;

-- name: has_avatars()$
SELECT to_regclass('public.job_destinations') IS NOT NULL;

-- name: avatars()
-- The pictures of characters that are no item of anybody's library.
SELECT 'avatars' AS bucket, substr(image_url, 9) AS key, NULL AS size FROM characters WHERE image_url LIKE 'avatars/%';

-- name: has_archives()$
-- A database of an older version, which is backed up before it is migrated, has none.
SELECT to_regclass('public.archives') IS NOT NULL;

-- name: verified_archives()
-- The archives whose files are all written; an archive that is not so far writes its files anew.
SELECT name FROM archives WHERE verified_at IS NOT NULL;

-- name: counts()
-- The rows that a person would ask for after a restore.
SELECT 'profiles' AS name, count(*) AS rows FROM profiles
UNION ALL SELECT 'api_keys', count(*) FROM api_keys
UNION ALL SELECT 'jobs', count(*) FROM jobs
UNION ALL SELECT 'job_queue', count(*) FROM job_queue
UNION ALL SELECT 'workspace_assets', count(*) FROM workspace_assets
UNION ALL SELECT 'user_library', count(*) FROM user_library
UNION ALL SELECT 'callback_outbox', count(*) FROM callback_outbox;

-- name: relations()$
-- How many tables, views and sequences there are, apart from the server's own.
SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
  AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\_%';

-- name: create_roles()!
-- As the first migration makes them: they belong to the server, and a dump speaks of them without holding them.
DO $$
DECLARE wanted text;
BEGIN
  FOREACH wanted IN ARRAY ARRAY['anon', 'authenticated', 'service_role', 'ourvidz_worker'] LOOP
    BEGIN
      IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
        EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', wanted);
      END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
      NULL;
    END;
  END LOOP;
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    EXECUTE format('GRANT anon, authenticated, service_role, ourvidz_worker TO %I', current_user);
  END IF;
END $$;

-- name: analyze()!
-- A restored table has no statistics until somebody asks for them.
ANALYZE;
