-- name: users()
SELECT id FROM profiles ORDER BY id;

-- name: files_of(user_id)
-- Every file that a row of a user speaks of; `size` in bytes where the row says it.
SELECT 'workspace_assets' AS "table", id, 'workspace-temp' AS bucket, temp_storage_path AS key, file_size_bytes AS size,
       fault, false AS extra
FROM workspace_assets WHERE user_id = :user_id
UNION ALL
SELECT 'workspace_assets', id, 'workspace-temp', thumbnail_path, NULL, NULL, true
FROM workspace_assets WHERE user_id = :user_id AND thumbnail_path IS NOT NULL
UNION ALL
SELECT 'user_library', id, 'user-library', storage_path, file_size_bytes, fault, false
FROM user_library WHERE user_id = :user_id
UNION ALL
SELECT 'user_library', id, 'user-library', thumbnail_path, NULL, NULL, true
FROM user_library WHERE user_id = :user_id AND thumbnail_path IS NOT NULL
UNION ALL
SELECT 'reference_uploads', id, 'reference_images', storage_path, file_size_bytes, fault, false
FROM reference_uploads WHERE user_id = :user_id;

-- name: results_kept(keys, job_ids)
-- Of these files of the workspace, each given with its job, those that a row speaks of.
SELECT g.key FROM unnest(:keys::text[], :job_ids::uuid[]) AS g(key, job_id)
WHERE EXISTS (SELECT FROM workspace_assets a
              WHERE a.job_id = g.job_id AND (a.temp_storage_path = g.key OR a.thumbnail_path = g.key));

-- name: mark_assets(ids, fault)!
UPDATE workspace_assets SET fault = :fault::text WHERE id = ANY (:ids::uuid[]);

-- name: mark_items(ids, fault)!
UPDATE user_library SET fault = :fault::text WHERE id = ANY (:ids::uuid[]);

-- name: mark_uploads(ids, fault)!
UPDATE reference_uploads SET fault = :fault::text WHERE id = ANY (:ids::uuid[]);
