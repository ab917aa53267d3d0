-- name: list_assets(user_id, job_id, asset_type, before_at, before_id, page_size)
-- A page of a user's workspace, newest first. What has expired is not shown, whether it is deleted yet or not.
SELECT a.*, j.job_type, j.quality, j.model_type, j.content_mode
FROM workspace_assets a JOIN jobs j ON j.id = a.job_id
WHERE a.user_id = :user_id AND a.expires_at > now()
  AND (:job_id::uuid IS NULL OR a.job_id = :job_id)
  AND (:asset_type::text IS NULL OR a.asset_type = :asset_type)
  AND (:before_at::timestamptz IS NULL OR (a.created_at, a.id) < (:before_at, :before_id::uuid))
ORDER BY a.created_at DESC, a.id DESC LIMIT :page_size::int;

-- name: asset(asset_id)^
SELECT a.*, j.job_type, j.quality, j.model_type, j.content_mode
FROM workspace_assets a JOIN jobs j ON j.id = a.job_id WHERE a.id = :asset_id;

-- name: asset_ids(user_id, job_id)
-- All assets of a user, or those of one job, oldest first.
SELECT id FROM workspace_assets WHERE user_id = :user_id AND (:job_id::uuid IS NULL OR job_id = :job_id)
ORDER BY created_at, asset_index;

-- name: was_cleared(user_id, job_id)$
-- Whether the library has something of this job.
SELECT EXISTS (SELECT FROM user_library WHERE user_id = :user_id AND source_job_id = :job_id::uuid);

-- name: list_items(user_id, asset_type, tag, is_favorite, collection_id, before_at, before_id, page_size)
-- A page of a user's library, newest first.
SELECT l.* FROM user_library l
WHERE l.user_id = :user_id
  AND (:asset_type::text IS NULL OR l.asset_type = :asset_type)
  AND (:tag::text IS NULL OR :tag = ANY (l.tags))
  AND (:is_favorite::boolean IS NULL OR l.is_favorite = :is_favorite)
  AND (:collection_id::uuid IS NULL OR l.collection_id = :collection_id)
  AND (:before_at::timestamptz IS NULL OR (l.created_at, l.id) < (:before_at, :before_id::uuid))
ORDER BY l.created_at DESC, l.id DESC LIMIT :page_size::int;

-- name: item(item_id)^
SELECT * FROM user_library WHERE id = :item_id;

-- name: item_of(user_id, asset_id)^
-- The item that a workspace asset was saved as, or that it is a copy of.
SELECT l.* FROM user_library l WHERE l.user_id = :user_id
  AND (l.source_asset_id = :asset_id::uuid
       OR l.id = (SELECT source_library_id FROM workspace_assets WHERE id = :asset_id::uuid))
ORDER BY l.source_asset_id = :asset_id::uuid DESC NULLS LAST LIMIT 1;

-- name: save(id, storage_path, thumbnail_path, asset)^
-- The row of a copy that lies in the store already. None when the asset was saved meanwhile.
INSERT INTO user_library (id, user_id, source_asset_id, source_job_id, asset_type, storage_path, thumbnail_path,
                          file_size_bytes, mime_type, duration_seconds, width, height, original_prompt, model_used,
                          generation_seed, generation_metadata)
SELECT :id, a.user_id, a.id, a.job_id, a.asset_type, :storage_path, :thumbnail_path, a.file_size_bytes, a.mime_type,
       a.duration_seconds, a.width, a.height, a.original_prompt, a.model_used, a.generation_seed, a.facts
FROM jsonb_to_record(:asset::jsonb) AS a(
  id uuid, user_id uuid, job_id uuid, asset_type text, file_size_bytes bigint, mime_type text, duration_seconds numeric,
  width int, height int, original_prompt text, model_used text, generation_seed bigint, facts jsonb)
ON CONFLICT (source_asset_id) DO NOTHING RETURNING *;

-- name: refile(item_id, was, storage_path, thumbnail_path)^
-- Let an item whose file was lost speak of another copy. None when somebody else did so first.
UPDATE user_library SET storage_path = :storage_path, thumbnail_path = :thumbnail_path, fault = NULL
WHERE id = :item_id AND storage_path = :was RETURNING *;

-- name: update_item(item_id, user_id, changes)^
-- Change what is named, and nothing else.
UPDATE user_library SET
  custom_title = CASE WHEN c ? 'custom_title' THEN c ->> 'custom_title' ELSE custom_title END,
  collection_id = CASE WHEN c ? 'collection_id' THEN (c ->> 'collection_id')::uuid ELSE collection_id END,
  visibility = CASE WHEN c ? 'visibility' THEN c ->> 'visibility' ELSE visibility END,
  is_favorite = CASE WHEN c ? 'is_favorite' THEN (c ->> 'is_favorite')::boolean ELSE is_favorite END,
  tags = CASE WHEN c ? 'tags' THEN ARRAY(SELECT jsonb_array_elements_text(c -> 'tags')) ELSE tags END
FROM (SELECT :changes::jsonb AS c) given
WHERE id = :item_id AND user_id = :user_id RETURNING user_library.*;

-- name: owns_collection(user_id, collection_id)$
SELECT EXISTS (SELECT FROM user_collections WHERE id = :collection_id AND user_id = :user_id);

-- name: remove_item(item_id, user_id)^
DELETE FROM user_library WHERE id = :item_id AND user_id = :user_id RETURNING *;

-- name: show_instead(user_id, keys, instead)!
-- Let the characters, scenes and conversations that show a file of a user's library which no item speaks of any more show
-- another one, or none. An admin's item may be the picture of anybody's character or scene; conversations are one's own.
WITH gone AS MATERIALIZED (
  SELECT 'user-library/' || g.key AS path FROM unnest(:keys::text[]) AS g(key)
  WHERE NOT EXISTS (SELECT FROM user_library l WHERE l.storage_path = g.key)
    AND NOT EXISTS (SELECT FROM user_library l WHERE l.thumbnail_path = g.key)
), shown AS MATERIALIZED (
  SELECT 'user-library/' || :instead::text AS path
), of_characters AS (
  UPDATE characters SET
    image_url = CASE WHEN image_url IN (SELECT path FROM gone) THEN shown.path ELSE image_url END,
    reference_image_url = CASE WHEN reference_image_url IN (SELECT path FROM gone) THEN shown.path
                               ELSE reference_image_url END,
    preview_image_url = CASE WHEN preview_image_url IN (SELECT path FROM gone) THEN shown.path
                             ELSE preview_image_url END
  FROM shown
  WHERE image_url IN (SELECT path FROM gone) OR reference_image_url IN (SELECT path FROM gone)
     OR preview_image_url IN (SELECT path FROM gone)
), of_scenes AS (
  UPDATE character_scenes SET
    image_url = CASE WHEN image_url IN (SELECT path FROM gone) THEN shown.path ELSE image_url END,
    previous_scene_image_url = CASE WHEN previous_scene_image_url IN (SELECT path FROM gone) THEN shown.path
                                    ELSE previous_scene_image_url END
  FROM shown
  WHERE image_url IN (SELECT path FROM gone) OR previous_scene_image_url IN (SELECT path FROM gone)
)
UPDATE conversations SET last_scene_image = shown.path FROM shown
WHERE user_id = :user_id AND last_scene_image IN (SELECT path FROM gone);

-- name: discard(asset_id, user_id)^
DELETE FROM workspace_assets WHERE id = :asset_id AND user_id = :user_id
RETURNING temp_storage_path, thumbnail_path;

-- name: clear(asset_id, user_id, item_id, storage_path)^
-- Discard what is saved. The lock keeps the item, under the file that was looked at, until the row is gone.
WITH kept AS MATERIALIZED (
  SELECT id FROM user_library WHERE id = :item_id AND user_id = :user_id AND storage_path = :storage_path FOR SHARE
)
DELETE FROM workspace_assets a USING kept WHERE a.id = :asset_id AND a.user_id = :user_id
RETURNING a.temp_storage_path, a.thumbnail_path;

-- name: copy_of(item_id)$
-- The workspace's live copy of an item.
SELECT id FROM workspace_assets WHERE source_library_id = :item_id::uuid;

-- name: copy_back(asset_id, job_id, storage_path, thumbnail_path, facts, item)$
-- A copy in the workspace needs a job to hang on: one that has ended, and that says where it comes from.
WITH i AS MATERIALIZED (
  SELECT * FROM jsonb_to_record(:item::jsonb) AS r(
    id uuid, user_id uuid, asset_type text, mime_type text, file_size_bytes bigint, width int, height int,
    duration_seconds numeric, generation_seed bigint, original_prompt text, model_used text)
), f AS MATERIALIZED (
  SELECT * FROM jsonb_to_record(:facts::jsonb) AS r(
    job_type text, quality text, model_type text, content_mode text, frames int, fps numeric, settings jsonb,
    manifest jsonb, metadata jsonb)
), made AS (
  INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, status, stage, provider, content_mode,
                    original_prompt, params, metadata, generation_settings, destination, attempts, completed_at)
  SELECT :job_id, i.user_id, f.job_type, i.asset_type, f.quality, f.model_type, 'completed', 'generate', 'library',
         f.content_mode, i.original_prompt, '{}', f.metadata, f.settings, 'workspace', 1, now()
  FROM i, f
)
INSERT INTO workspace_assets (id, user_id, job_id, attempt, asset_type, temp_storage_path, thumbnail_path, mime_type,
                              file_size_bytes, width, height, frames, fps, duration_seconds, generation_seed,
                              original_prompt, model_used, generation_settings, manifest, source_library_id)
SELECT :asset_id, i.user_id, :job_id, 1, i.asset_type, :storage_path, :thumbnail_path, i.mime_type, i.file_size_bytes,
       i.width, i.height, f.frames, f.fps, i.duration_seconds, i.generation_seed, i.original_prompt, i.model_used,
       coalesce(f.settings, '{}'), f.manifest, i.id
FROM i, f RETURNING id;

-- name: expire(batch)
-- Delete rows whose time is over, the oldest first. Their files are the caller's to delete, or the sweep's.
DELETE FROM workspace_assets WHERE id = ANY (ARRAY(
  SELECT id FROM workspace_assets WHERE expires_at <= now() ORDER BY expires_at LIMIT :batch::int))
RETURNING temp_storage_path, thumbnail_path;

-- name: kept_files(bucket, keys)
SELECT ourvidz.kept_files(:bucket, :keys::text[]) AS key;
