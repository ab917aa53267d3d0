-- name: find(user_id, sha256)^
-- The upload of the same bytes.
SELECT * FROM reference_uploads WHERE user_id = :user_id AND sha256 = :sha256;

-- name: read(upload_id)^
SELECT * FROM reference_uploads WHERE id = :upload_id;

-- name: list_all(user_id)
SELECT * FROM reference_uploads WHERE user_id = :user_id ORDER BY created_at DESC, id;

-- name: lock_owner(user_id)!
-- One upload of a user at a time is counted.
SELECT FROM profiles WHERE id = :user_id FOR NO KEY UPDATE;

-- name: add(id, user_id, storage_path, mime_type, file_size_bytes, width, height, sha256, most)^
-- None when the user has the same upload, or `most` others.
INSERT INTO reference_uploads (id, user_id, storage_path, mime_type, file_size_bytes, width, height, sha256)
SELECT :id, :user_id, :storage_path, :mime_type, :file_size_bytes, :width, :height, :sha256
WHERE (SELECT count(*) FROM reference_uploads WHERE user_id = :user_id) < :most::int
ON CONFLICT DO NOTHING RETURNING *;

-- name: remove(upload_id, user_id)^
DELETE FROM reference_uploads WHERE id = :upload_id AND user_id = :user_id RETURNING *;
