-- name: place(picture_id, user_id)^
-- Where a picture of a user's lies, by its id: an upload, a result in the workspace, or an item of the library.
SELECT 'reference_images' AS bucket, storage_path AS key FROM reference_uploads
WHERE id = :picture_id AND user_id = :user_id
UNION ALL
SELECT 'workspace-temp', temp_storage_path FROM workspace_assets WHERE id = :picture_id AND user_id = :user_id
UNION ALL
SELECT 'user-library', storage_path FROM user_library WHERE id = :picture_id AND user_id = :user_id
LIMIT 1;

-- name: origin(user_id, bucket, key)^
-- What the rows say of a file of a user's. The manifest of the result that lies there; null for anything that no model of
-- ours made, and where no row speaks of it. And whether it is nsfw, as it can be without a manifest: by the job that its
-- key or its row names, or by its item. Thumbnails, previews and the references of jobs count with what they belong to.
SELECT (
  SELECT manifest FROM workspace_assets
  WHERE :bucket::text = 'workspace-temp' AND user_id = :user_id AND temp_storage_path = :key::text
  UNION ALL
  SELECT generation_metadata -> 'manifest' FROM user_library
  WHERE :bucket::text = 'user-library' AND user_id = :user_id AND storage_path = :key::text
  LIMIT 1
) AS manifest, EXISTS (
  SELECT FROM jobs WHERE user_id = :user_id AND content_mode = 'nsfw' AND :bucket::text <> 'user-library'
    AND id = ourvidz.id_of(left(split_part(:key::text, '/', 2), 36))
) OR EXISTS (
  SELECT FROM workspace_assets a JOIN jobs j ON j.id = a.job_id
  WHERE a.user_id = :user_id AND j.content_mode = 'nsfw' AND :bucket::text = 'workspace-temp'
    AND :key::text IN (a.temp_storage_path, a.thumbnail_path)
) OR EXISTS (
  SELECT FROM user_library l LEFT JOIN jobs j ON j.id = l.source_job_id
  WHERE l.user_id = :user_id AND :bucket::text = 'user-library' AND :key::text IN (l.storage_path, l.thumbnail_path)
    AND 'nsfw' IN (l.content_category, l.generation_metadata ->> 'content_mode', j.content_mode)
) AS nsfw;

-- name: accounts(user_id, bucket, key)
-- What the file was made from, by every row that speaks of it or of the picture that it is the thumbnail of, and by the job
-- that its key names. Where the job is gone, the signs that are kept with the file tell what the words of the row do not.
WITH told AS (
  SELECT job_id, original_prompt, generation_settings -> 'content_signs' AS signs, moderation_status
  FROM workspace_assets
  WHERE :bucket::text = 'workspace-temp' AND user_id = :user_id AND :key::text IN (temp_storage_path, thumbnail_path)
  UNION ALL
  SELECT source_job_id, original_prompt, generation_metadata #> '{settings,content_signs}', moderation_status
  FROM user_library
  WHERE :bucket::text = 'user-library' AND user_id = :user_id AND :key::text IN (storage_path, thumbnail_path)
  UNION ALL
  SELECT id, original_prompt, NULL, 'pending' FROM jobs
  WHERE :bucket::text <> 'user-library' AND user_id = :user_id
    AND id = ourvidz.id_of(left(split_part(:key::text, '/', 2), 36))
)
SELECT t.original_prompt, j.enhanced_prompt, j.params, t.signs, t.moderation_status
FROM told t LEFT JOIN jobs j ON j.id = t.job_id AND j.user_id = :user_id;
