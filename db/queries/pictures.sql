-- name: place(picture_id, user_id)^
-- Where a picture of a user's lies, by its id: an upload, a result in the workspace, or an item of the library.
SELECT 'reference_images' AS bucket, storage_path AS key FROM reference_uploads
WHERE id = :picture_id AND user_id = :user_id
UNION ALL
SELECT 'workspace-temp', temp_storage_path FROM workspace_assets WHERE id = :picture_id AND user_id = :user_id
UNION ALL
SELECT 'user-library', storage_path FROM user_library WHERE id = :picture_id AND user_id = :user_id
LIMIT 1;

-- name: origin(user_id, bucket, key)$
-- The manifest of the result that lies there; null for anything that no model of ours made, and where no row speaks of it.
SELECT manifest FROM workspace_assets
WHERE :bucket::text = 'workspace-temp' AND user_id = :user_id AND temp_storage_path = :key::text
UNION ALL
SELECT generation_metadata -> 'manifest' FROM user_library
WHERE :bucket::text = 'user-library' AND user_id = :user_id AND storage_path = :key::text
LIMIT 1;
