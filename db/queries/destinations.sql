-- name: due(page_size)
-- Completed jobs whose picture is to be placed, oldest first. `target` is null where there is nothing that the job's user
-- may change; the file's columns are null where the asset is gone.
SELECT d.job_id, d.kind, j.user_id, j.metadata ->> 'character_id' AS character_id, j.metadata ->> 'avatar' AS avatar,
       ourvidz.destination_target(j.user_id, j.metadata) AS target,
       a.temp_storage_path AS key, a.thumbnail_path AS thumbnail_key, a.asset_type, a.file_size_bytes
FROM job_destinations d JOIN jobs j ON j.id = d.job_id
LEFT JOIN LATERAL (SELECT * FROM workspace_assets w WHERE w.job_id = d.job_id ORDER BY w.asset_index LIMIT 1) a ON true
WHERE d.state = 'due' ORDER BY d.created_at LIMIT :page_size::int;

-- name: place(job_id, key, thumbnail_key)$
SELECT ourvidz.place_result(:job_id, :key, :thumbnail_key);

-- name: refuse(job_id, reason)!
UPDATE job_destinations SET state = 'refused', reason = :reason, settled_at = now() WHERE job_id = :job_id AND state = 'due';

-- name: target(user_id, metadata)$
-- The scene or character that this metadata names, if this user may change it.
SELECT ourvidz.destination_target(:user_id, :metadata::jsonb);

-- name: characters_to_draw(names, most)
-- The installation's own characters and the given ones, by name: those of these names, or those that have no picture.
SELECT id, name, description, appearance_tags, base_prompt, image_url FROM characters
WHERE CASE WHEN :names::text[] IS NULL THEN user_id IS NULL AND image_url IS NULL ELSE name = ANY (:names) END
ORDER BY name, created_at LIMIT :most::int;

-- name: avatars_taken(keys)
-- Of these paths, those that a character has, with that character.
SELECT image_url AS path, id FROM characters WHERE image_url = ANY (:keys::text[]);
